"""A plan becomes a checkpoint: packed weights that transformers loads, with everything a model's folder needs beside them.

The checkpoint is never loaded. Its headers say what there is, the plan says what becomes of it, so the new files' sizes and headers
are known before a weight is read; then one module after the other goes from the bank (or through the quantizer) into its place, and
every other tensor is copied byte for byte, or written as transformers loads it where the checkpoint stores it in other pieces
(`export/conversion.py`). At most one module is held, beside its codes. All of it happens in a hidden folder next to the one that was
asked for; `config.json` and the files' headers come last, so that what an interrupted run leaves is nothing that loads, and the next
run to the same place removes it. The finished folder is loaded and run (`export/trial.py`), and only then renamed.

Not everything that compressed-tensors holds does transformers load: no embedding, no Conv1D, and experts only if all of them share one
symmetric format. Where a plan goes beyond that the folder holds the same tensors, says so in its config (`OURS`), so that nothing takes
it for what it cannot read, and is opened by `load_packed`.

A module whose weight transformers reads before it unpacks any is written whole, with the plan's own values: what was measured, in more
bytes than the plan counts; the note says which and how many. Left out: other runtimes' layouts.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.export.blueprint import Blueprint, blueprint_of, every_cause, is_part, keys_of, planned_modules, read_weight
from bitatlas.export.card import Evidence, card_text, evidence_beside
from bitatlas.export.compressed_tensors import PACKAGE, quantization_config, tensors
from bitatlas.export.trial import OURS, PACK_QUANTIZED, check_folder
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint, skeleton_of
from bitatlas.model.decoder import Decoder
from bitatlas.model.folder import atomic_folder, check_free_space, check_out, companion_files, find_folder, read_config
from bitatlas.model.linear import is_transposed
from bitatlas.model.tensor_files import DTYPES, SHARD_BYTES, Writer
from bitatlas.progress import Reporter
from bitatlas.quantize import get_quantizer
from bitatlas.quantize.bank import bank_of_plan, needs_bank
from bitatlas.quantize.codes import Codes, Kept
from bitatlas.quantize.ggml import Blocks
from bitatlas.records import Module, Plan
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.plan import without_kept
from bitatlas.records.text import listed

SMALL_BYTES = 2**20  # room for config, plan, card and index
COPIED_TOGETHER = 2**24  # bytes
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}
TRANSFORMERS = "5.24"  # in which was tried what it loads
EXPERTS_TARGET = "re:.*\\.experts\\.\\d+\\..*"
FLOATS = ("F64", "F32", "F16", "BF16")  # in which a module's values can be written whole

Conversions = dict[str, dict[str, Callable[[Tensor], Tensor]]]  # parameter of the model -> new tensors -> how each is made of it


@dataclass(frozen=True)
class Applied:
    """What was written. `causes`: bytes on disk that the plan does not count, or counts and are not there (negative)."""

    out: Path
    plan: Plan
    promised_bytes: int  # the plan's, of all weights
    disk_bytes: int  # of the weights' files
    causes: dict[str, int]
    carried: list[str]
    whole: list[str]  # modules of the plan that are not packed
    converted: list[str]  # tensors that are not written as the checkpoint stores them, packed ones apart
    tried: str  # how the folder was loaded and run
    beyond: str = ""  # why transformers alone does not load the folder

    @property
    def notes(self) -> list[str]:
        """Return lines that the command prints."""
        lines = []
        if self.beyond:
            lines.append(f"Opened by bitatlas.load_packed: {self.beyond}")
        if self.whole:
            lines.append(f"Written whole, since transformers reads them before it unpacks any: {listed(self.whole)}")
        if self.converted:
            lines.append(
                f"Written as transformers holds them, not as the checkpoint does: {len(self.converted)} tensors like {self.converted[0]}"
            )
        return [*lines, f"Tried: {self.tried}"]


def apply_plan(
    model_name: str, plan_file: Path, out: Path, reporter: Reporter, shard_bytes: int = SHARD_BYTES, runtime: str = "transformers"
) -> Applied:
    """Write the packed checkpoint to `out`; UserError, and nothing written, where that is impossible. `runtime`: that reads it, if not transformers."""
    check_package()
    whole_plan = read_record(plan_file, Plan)
    plan = without_kept(whole_plan)
    _check_formats(plan)
    get_quantizer(plan.quantizer).check(list(plan.formats.values()))
    check_out(out)
    with reporter.stage("opening the checkpoint"):
        checkpoint = fitted(plan, open_checkpoint(model_name, plan.model.revision, fuse=False))
        skeleton, decoder = checkpoint.skeleton(), checkpoint.meta_decoder()
        blueprint = blueprint_of(plan, checkpoint, skeleton, shard_bytes)
        others = companion_files(checkpoint.folder)
        check_free_space(out, blueprint.disk_bytes + sum(file.stat().st_size for file in others) + SMALL_BYTES)
        if needs_bank(plan):
            for module in plan.modules:
                bank_of_plan(plan, plan_file, decoder, [module])
    evidence = evidence_beside(plan_file, plan)
    with atomic_folder(out) as folder:
        with reporter.stage("packing") as progress:
            _write_weights(folder, plan, plan_file, checkpoint, decoder, blueprint, progress)
        checkpoint.check_unchanged()
        for file in others:
            shutil.copyfile(file, folder / file.name)
        write_text(folder / "plan.json", to_json(whole_plan))
        write_text(folder / "README.md", card_of(plan, checkpoint, evidence, blueprint.disk_bytes))
        layout_name = OURS if blueprint.beyond and runtime != "vllm" else PACK_QUANTIZED
        write_text(folder / "config.json", config_text(plan, checkpoint, skeleton, blueprint, layout_name))
        with reporter.stage("loading it in transformers"):
            dtypes = {name: DTYPES[entry.dtype] for name, entry in blueprint.whole.items()} | _rounded(
                plan, checkpoint, blueprint
            )
            tried = check_folder(folder, plan, plan_file, checkpoint, dtypes, blueprint.unused, bool(blueprint.beyond))
    return Applied(
        out, plan, plan.size.total_bytes, blueprint.disk_bytes, every_cause(plan, blueprint), [file.name for file in others],
        list(blueprint.whole), [name for parts in blueprint.converted.values() for name in parts], tried,
        blueprint.beyond,
    )  # fmt: skip


def _rounded(plan: Plan, checkpoint: Checkpoint, blueprint: Blueprint) -> dict[str, torch.dtype]:
    """Return what transformers unpacks in another dtype than float32: experts that it merges, in that of their scales."""
    experts = [m for m in planned_modules(plan, checkpoint) if is_part(m) and keys_of(m, blueprint.conversion)]
    return {} if blueprint.beyond else {module.name: torch.float16 for module in experts}


# --- checks ------------------------------------------------------------------------------------------------------------


def check_package() -> None:
    """Raise UserError where the package that reads packed checkpoints is not here."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError("packed checkpoints need a package that is not here: pip install 'bitatlas[export]'")


def fitted(plan: Plan, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the outer modules that the plan names among its modules; UserError where the plan is about other weights."""
    if plan.model.weights_sha256 != checkpoint.info.weights_sha256:
        raise UserError(f"{checkpoint.info.name}: these are not the weights that the plan was made for ({plan.model.name})")
    checkpoint = checkpoint.planning(module for module in checkpoint.outer if module.name in plan.modules)
    unknown = sorted(set(plan.modules) - {module.name for module in checkpoint.modules})
    if unknown:
        raise UserError(f"the plan names {unknown[0]}, which the checkpoint lacks")
    return checkpoint


def check_transposed(plan: Plan, model_name: str, message: str) -> None:
    """Raise UserError for GPT-2's transposed layers, from the config alone: before a byte of the weights is read. `message`: about a module."""
    folder = find_folder(model_name, plan.model.revision)
    kinds = dict(skeleton_of(read_config(folder, model_name), model_name).named_modules())
    for name in plan.modules:
        if is_transposed(kinds.get(name)):
            raise UserError(message.format(name))


def _check_formats(plan: Plan) -> None:
    foreign = [fmt for fmt in plan.formats.values() if fmt.runtime]
    if foreign:
        raise UserError(
            f"the plan's formats ({foreign[0].name}) are of the runtime {foreign[0].runtime}: use bitatlas export --to {foreign[0].runtime}"
        )


def config_text(plan: Plan, checkpoint: Checkpoint, skeleton: nn.Module, blueprint: Blueprint, layout_name: str) -> str:
    """Return the checkpoint's own config, with how to read the weights. layout_name: `PACK_QUANTIZED` or `OURS`."""
    content: dict[str, Any] = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    linear = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    pieces_of = [
        name.removesuffix(".weight") for parts in blueprint.converted.values() for name in parts if name.endswith(".weight")
    ]
    ignored = [name for name in [*linear, *pieces_of] if name not in blueprint.packed]
    named: dict[str, tuple[Module, tuple[int, int]]] = {}  # what a format belongs to -> module, shape
    for module in (module for module in planned_modules(plan, checkpoint) if module.name in blueprint.packed):
        parts = blueprint.packed[module.name]
        if layout_name == OURS or is_part(module):
            named |= {piece.prefix.removesuffix("."): (module, piece.shape) for piece in parts}
        else:
            names = dict.fromkeys([module.name, blueprint.aliases.get(module.name, module.name)])
            named |= dict.fromkeys(names, (module, module.shape))
    quantization = quantization_config(
        {name: plan.formats[plan.modules[module.name]] for name, (module, _) in named.items()},
        {name: shape for name, (_, shape) in named.items()},
        ignored,
        get_quantizer(plan.quantizer).whole_zeros,
        version("compressed-tensors"),
        layout_name,
    )
    if layout_name == PACK_QUANTIZED:
        _name_experts(quantization, [name for name, (module, _) in named.items() if is_part(module)])
    content["quantization_config"] = quantization
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _name_experts(quantization: dict[str, Any], experts: Sequence[str]) -> None:
    """Let the group of the experts be known as theirs, in place: transformers takes the one that has such a target for all of them."""
    for group in quantization["config_groups"].values():
        if experts and experts[0] in group["targets"]:
            group["targets"].append(EXPERTS_TARGET)


def card_of(plan: Plan, checkpoint: Checkpoint, evidence: Evidence, disk_bytes: int) -> str:
    """Return the model card."""
    source = checkpoint.folder / "README.md"
    return card_text(plan, checkpoint.modules, evidence, source if source.is_file() else None, disk_bytes, checkpoint.info)


# --- writing -----------------------------------------------------------------------------------------------------------


def _write_weights(
    folder: Path, plan: Plan, plan_file: Path, checkpoint: Checkpoint, decoder: Decoder, blueprint: Blueprint, progress: Any
) -> None:
    with Writer(folder, blueprint.shards) as writer:
        for key in blueprint.copied:
            copy_tensor(writer, key, *blueprint.sources[key])
        for parameter, parts in blueprint.converted.items():
            tensor = blueprint.read(parameter)
            for name, how in parts.items():
                writer.write(name, _bytes(how(tensor)))
        modules = planned_modules(plan, checkpoint)
        for done, module in enumerate(modules, start=1):
            weight = read_weight(blueprint, module)
            if entry := blueprint.whole.get(module.name):
                values = stored_of(plan, plan_file, decoder, module.name, weight).weight()
                writer.write(entry.name, _bytes(values.to(DTYPES[entry.dtype])))
            else:
                codes = codes_of(plan, plan_file, decoder, module.name, weight)
                for piece in blueprint.packed[module.name]:
                    rows = codes.rows(torch.arange(piece.start, piece.start + piece.shape[0]))
                    for suffix, tensor in _packed(plan, module.name, rows).items():
                        writer.write(piece.prefix + suffix, _bytes(tensor))
            progress(done, len(modules))


def copy_tensor(writer: Writer, key: str, file: Path, start: int, end: int) -> None:
    """Write the bytes of `file` from `start` to `end` as the tensor `key`."""
    with file.open("rb") as stream:
        stream.seek(start)
        while start < end:
            if not (piece := stream.read(min(COPIED_TOGETHER, end - start))):
                raise UserError(f"{file}: ends too early")
            start += len(piece)
            writer.write(key, piece)


def codes_of(plan: Plan, plan_file: Path, decoder: Decoder, name: str, weight: Tensor) -> Codes:
    """Return the module's codes, of a plan of integer formats."""
    codes = stored_of(plan, plan_file, decoder, name, weight)
    assert isinstance(codes, Codes)
    return codes


def stored_of(plan: Plan, plan_file: Path, decoder: Decoder, name: str, weight: Tensor) -> Codes | Blocks:
    """Return what the bank holds of a module.

    The model of `decoder`, a skeleton, holds its weight, in float32 as everything was measured, for this long alone.
    """
    module = decoder.model.get_submodule(name)
    before = module.weight
    module.weight = nn.Parameter(weight.float(), requires_grad=False)
    try:
        codes = bank_of_plan(plan, plan_file, decoder, [name]).codes(name, plan.modules[name])
        assert not isinstance(codes, Kept)
        return codes
    finally:
        module.weight = before


def _packed(plan: Plan, name: str, codes: Codes) -> dict[str, Tensor]:
    """Return the tensors of some rows of a module."""
    try:
        return tensors(codes, plan.formats[plan.modules[name]])
    except ValueError as error:
        raise UserError(f"{name}: cannot be packed as {plan.modules[name]}: {error}") from None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
