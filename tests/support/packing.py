"""Packed folders, written and compared with the plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bitatlas.export.packed import Applied, apply_plan
from bitatlas.export.trial import load_packed
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import Bank
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS
from bitatlas.records.sizes import size_of

MIXED = ("int2_g32", "int3_g64", "int4_g32_sym", "int8_g128", "int3_g32", "int4_g128", "int2_g64_sym")


LOGITS = 1e-4  # the most that float32 logits may differ; the same codes and the same arithmetic give 0


QUIET = Reporter(quiet=True)


def make_plan(
    model: Path,
    formats: Sequence[str] = MIXED,
    quantizer: str = "rtn",
    codes: str = "",
    skip: int = -1,
    experts: Sequence[str] | None = (),
    outer: bool = False,
) -> Plan:
    """Formats in turn, module by module; module number `skip` stays as it is. experts: formats of their own, None: they stay as they are."""
    checkpoint = open_checkpoint(str(model), None, False)
    checkpoint = checkpoint.planning(checkpoint.outer if outer else ())
    modules = {
        m.name: (experts or formats)[k % len(experts or formats)] if m.expert is not None else formats[k % len(formats)]
        for k, m in enumerate(checkpoint.modules)
        if k != skip and (m.expert is None or experts is not None)
    }
    table = {name: FORMATS[name] for name in dict.fromkeys(modules.values())}
    info = PlanModel(checkpoint.info.name, None, checkpoint.info.weights_sha256)
    size = size_of(checkpoint.modules, modules, checkpoint.info)
    return Plan(info, table, quantizer, modules, Budget("code_bits", 3.0), size, PlanDamage(None, None), codes=codes)


def applied(model: Path, plan: Plan, place: Path, shard_bytes: int = 10**9) -> Applied:
    place.mkdir(exist_ok=True)
    (place / "plan.json").write_text(to_json(plan), encoding="utf-8")
    return apply_plan(str(model), place / "plan.json", place / "packed", QUIET, shard_bytes)


@torch.no_grad()
def largest_difference(model: Path, plan: Plan, folder: Path, rows: torch.Tensor | None = None) -> float:
    """Of the float32 logits: the loaded checkpoint against the reference model with our reconstruction swapped in.

    Loaded by transformers, or by `load_packed` where the folder says so; experts that transformers unpacked in float16 are ours in float16, too.
    """
    checkpoint = open_checkpoint(str(model), None, False)
    ours = checkpoint.load_model()
    ids = torch.randint(checkpoint.vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    bank = Bank(ours, list(plan.modules), plan.quantizer, plan.formats, rows=rows)
    weights = dict(bank.weights(plan.modules))
    if '"format": "bitatlas.load_packed"' in (folder / "config.json").read_text(encoding="utf-8"):
        theirs = load_packed(folder)
    else:
        theirs, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values()), report
        for parameter in theirs.parameters():
            if parameter.dim() == 3 and parameter.dtype == torch.float16:  # merged experts, whatever the dtype that is asked for
                parameter.data = parameter.data.float()
                weights |= {name: weight.half() for name, weight in weights.items() if ".experts." in name}
    with ours.swapped(weights):
        return float((ours.model(ids).logits - theirs.eval()(ids).logits).abs().max())


def check_bytes(found: Applied) -> None:
    """Against the disk: promised, plus every cause that was told, is what is there."""
    on_disk = sum(file.stat().st_size for file in found.out.glob("*.safetensors"))
    assert on_disk == found.disk_bytes == found.promised_bytes + sum(found.causes.values())
    assert found.promised_bytes == found.plan.size.total_bytes
    assert "counted otherwise by the plan" not in found.causes
