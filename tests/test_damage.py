"""Swaps restore, resumed passes equal full ones to the last bit, damage equals an independent computation, the journal remembers."""

from pathlib import Path

import pytest
import torch

from bitatlas.bank import Bank
from bitatlas.checkpoint import Checkpoint, open_checkpoint
from bitatlas.formats import FORMATS
from bitatlas.journal import Journal
from bitatlas.layerwise import batch_rows, resume, run_layer, trace
from bitatlas.sensitivity.damage import DamageMeter, Swap
from bitatlas.swap import swapped, weight_of
from bitatlas.tokens import make_rows
from tiny import FAMILIES, TEXT, make_checkpoint

CANDIDATES = {name: FORMATS[name] for name in ("int2_g32", "int4_g32")}


def setup(folder: Path, journal: Journal | None = None) -> tuple[Checkpoint, torch.nn.Module, DamageMeter]:
    checkpoint = open_checkpoint(str(folder), fuse=False)
    model = checkpoint.load_model()
    bank = Bank(model, [m.name for m in checkpoint.modules], "rtn")
    return checkpoint, model, DamageMeter(model, bank, checkpoint.info.weights_sha256, "rtn", journal or Journal(None))


def rows_for(checkpoint: Checkpoint) -> torch.Tensor:
    return make_rows([TEXT], checkpoint.load_tokenizer(), "text", (20, 2, 2), 16, 128, 0).fit


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_resumed_passes_equal_full_passes_to_the_last_bit(family: str, tmp_path: Path):
    checkpoint, model, meter = setup(make_checkpoint(tmp_path / family, family))
    ids = rows_for(checkpoint)[:4]
    before = {name: p.clone() for name, p in model.named_parameters()}
    recorded = trace(model, ids)
    hidden = recorded.embedded
    for layer, call in enumerate(recorded.calls):
        changed = meter.bank.weights({m.name: "int2_g32" for m in checkpoint.modules if m.layer == layer})
        with swapped(model, changed):
            assert torch.equal(resume(model, ids, layer, recorded.outputs), model(ids).logits)
            assert not torch.equal(model(ids).logits, recorded.logits)
        hidden = run_layer(model, layer, hidden, call)
        output = recorded.outputs[layer]
        assert torch.equal(hidden, output[0] if isinstance(output, tuple) else output)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(model(ids).logits, recorded.logits)


def test_a_swap_restores_after_an_error_and_refuses_a_wrong_shape(tiny_llama: Path):
    _, model, _ = setup(tiny_llama)
    name = "model.layers.1.mlp.up_proj"
    before = weight_of(model, name).clone()
    with pytest.raises(KeyboardInterrupt), swapped(model, {name: torch.zeros_like(before)}):
        assert not weight_of(model, name).any()
        raise KeyboardInterrupt
    assert torch.equal(weight_of(model, name), before)
    with pytest.raises(ValueError, match="does not fit"), swapped(model, {name: torch.zeros(3, 3)}):
        pass


def test_damage_equals_a_float64_computation(tiny_llama: Path):
    checkpoint, model, meter = setup(tiny_llama)
    rows = rows_for(checkpoint)
    plan = {m.name: "int2_g32" if m.layer == 1 else "int4_g32" for m in checkpoint.modules}
    measured = meter.plans({"plan": plan}, rows)["plan"]
    model.double()
    reference = torch.log_softmax(model(rows).logits, -1)
    with swapped(model, {name: w.double() for name, w in meter.bank.weights(plan).items()}):
        changed = torch.log_softmax(model(rows).logits, -1)
    exact = torch.nn.functional.kl_div(changed, reference, reduction="none", log_target=True).sum(-1).mean(1)
    assert torch.allclose(torch.from_numpy(measured), exact, rtol=2e-4, atol=1e-6)  # float32 logits against float64


def test_swaps_equal_whole_plans(tiny_llama: Path):
    checkpoint, _, meter = setup(tiny_llama)
    rows = rows_for(checkpoint)
    base = {m.name: "int4_g32" for m in checkpoint.modules}
    swaps = {m.name: Swap(m.layer, {m.name: "int2_g32"}) for m in checkpoint.modules}
    alone = meter.swaps(base, swaps, rows)
    meter.journal = Journal(None)
    whole = meter.plans({name: {**base, name: "int2_g32"} for name in swaps}, rows)
    assert all((alone[name] == whole[name]).all() for name in swaps)


def test_nothing_is_measured_twice(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path / "run.sqlite")
    checkpoint, model, meter = setup(tiny_llama, journal)
    rows = rows_for(checkpoint)
    plans = {name: dict.fromkeys([m.name for m in checkpoint.modules], name) for name in CANDIDATES}
    first = meter.plans({"int2_g32": plans["int2_g32"]}, rows)
    journal.close()
    _, model, meter = setup(tiny_llama, Journal(tmp_path / "run.sqlite"))
    count = 0
    forward = model.forward

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    second = meter.plans(plans, rows)
    batches = -(-len(rows) // batch_rows(16, 300))
    assert count == 2 * batches  # the reference and the one plan that was missing
    assert (second["int2_g32"] == first["int2_g32"]).all()
    meter.plans(plans, rows)
    assert count == 2 * batches


def test_zero_damage_of_the_reference(tiny_llama: Path):
    checkpoint, _, meter = setup(tiny_llama)
    assert meter.plans({"reference": {}}, rows_for(checkpoint))["reference"].max() < 1e-6
