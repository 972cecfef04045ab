"""Families of every shape are measured as a plain pass measures them: units, plans, prices, streamed or in memory.

The oracle knows nothing of layers: a copy of the model gets its weights set, and one whole forward pass gives the logits.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from bitatlas.errors import UserError
from bitatlas.measure.damage import DamageMeter, StateBudget, Swap
from bitatlas.measure.interactions import swap_interactions
from bitatlas.measure.prices import price_units
from bitatlas.model.checkpoint import Checkpoint, check_causal, open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import check_chain, is_chain
from bitatlas.quantize import moments
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.tune import Tuner, Tuning
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import Unit, units_of
from gradients import check_moments, check_prices
from tiny_shapes import SHAPES, WHOLE, build

FORMATS = ("int2_g32", "int4_g32")


class Plain:
    """A copy of the model whose weights are set, run whole."""

    def __init__(self, meter: DamageMeter, rows: Tensor):
        self.model, self.bank, self.rows = copy.deepcopy(meter.decoder.model), meter.bank, rows
        self.reference = self.log_p()

    @torch.no_grad()
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.model(input_ids=self.rows, use_cache=False).logits.double(), -1)

    @torch.no_grad()
    def put(self, assignment: dict[str, str]) -> None:
        for name, weight in self.bank.weights(assignment).items():
            self.model.get_submodule(name).weight.copy_(weight)

    def damage(self) -> np.ndarray:
        return (self.reference.exp() * (self.reference - self.log_p())).sum(-1).mean(-1).numpy()


def setup(folder: Path) -> tuple[Checkpoint, DamageMeter, Tensor]:
    checkpoint = open_checkpoint(str(folder))
    decoder = checkpoint.load_model()
    check_causal(decoder, "model")
    check_chain(decoder, "model")
    rows = torch.randint(3, 290, (3, 12), generator=torch.Generator().manual_seed(3))
    return checkpoint, meter_of(checkpoint, decoder), rows


def meter_of(checkpoint: Checkpoint, decoder: Decoder, budget: StateBudget | None = None) -> DamageMeter:
    bank = Bank(decoder, [module.name for module in checkpoint.modules], "rtn")
    return DamageMeter(decoder, bank, checkpoint.info.weights_sha256, "rtn", Journal(None), budget)


def swaps_of(units: list[Unit]) -> dict[str, Swap]:
    return {unit.name: Swap(unit.layer, {module.name: "int2_g32" for module in unit.modules}) for unit in units}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_what_is_measured_is_what_a_plain_pass_gives(shape: str, tmp_path: Path):
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    assert is_chain(meter.decoder) == (shape not in WHOLE)
    units, base = units_of(checkpoint.modules), {module.name: "int4_g32" for module in checkpoint.modules}
    swaps, plain = swaps_of(units), Plain(meter, rows)
    alone = meter.swaps(base, swaps, rows)
    paired = swap_interactions(meter, base, list(swaps.values()), rows)
    plain.put(base)
    before = plain.damage()
    close = {"rtol": 2e-3, "atol": 2e-4 * before.max()}  # float32 passes against float64 logarithms
    np.testing.assert_allclose(meter.plans({"plan": base}, rows)["plan"], before, **close)
    assert paired.by_row is not None
    for index, (name, swap) in enumerate(swaps.items()):
        plain.put(dict(swap.assignment))
        truly = plain.damage()
        plain.put(dict.fromkeys(swap.assignment, "int4_g32"))
        np.testing.assert_allclose(alone[name], truly, err_msg=name, **close)
        np.testing.assert_allclose(paired.by_row[:, index], truly - before, err_msg=name, rtol=1e-2, atol=1e-3 * before.max())


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - WHOLE))
def test_streamed_is_in_memory(shape: str, tmp_path: Path):
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    streamed = meter_of(checkpoint, checkpoint.stream_model(), StateBudget(2**16, 2**12, whole=False, folder=tmp_path))
    check_chain(streamed.decoder, "model")
    swaps, base = swaps_of(units_of(checkpoint.modules)), {module.name: "int4_g32" for module in checkpoint.modules}
    mine, theirs = (one.swaps(base, swaps, rows) for one in (streamed, meter))
    for name in swaps:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6)
    prices = [price_units(one, checkpoint.modules, FORMATS, rows) for one in (streamed, meter)]
    np.testing.assert_allclose(*prices, rtol=1e-3, atol=1e-4 * prices[1].max())


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - WHOLE))
def test_gradients_of_scales_layer_by_layer_are_those_of_a_whole_pass(shape: str, tmp_path: Path):
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    codes = {module.name: meter.bank.codes(module.name, "int4_g32") for module in checkpoint.modules}
    gradients = []
    for streamed in (False, True):
        tuner = Tuner(meter.decoder, codes, dict.fromkeys(codes, 4), Tuning(rows, rows[:1], 2))
        tuner.teacher.see(rows, range(3))
        tuner._streamed = streamed
        with tuner._tuned() as weights:
            tuner._step(weights, [0, 2], 0.0)
            gradients.append({name: weight.momentum for name, weight in weights.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


def test_what_cannot_be_run_layer_by_layer_is_not_streamed(tmp_path: Path):
    checkpoint = open_checkpoint(str(build(tmp_path / "model", *SHAPES["values of a router for the next one"])))
    with pytest.raises(UserError, match="hands more from layer to layer than can be kept"):
        check_chain(checkpoint.stream_model(), "model")


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_moments_are_those_of_a_plain_pass(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(moments, "FEW_TOKENS", 0)  # experts are fitted to what was routed to them
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    check_moments(meter.decoder, [module.name for module in checkpoint.modules], rows)
    check_prices(meter, checkpoint.modules, rows)


def test_what_is_kept_out_of_the_plan_is_told(tmp_path: Path):
    mixture = open_checkpoint(str(build(tmp_path / "mixture", *SHAPES["routed experts"])))
    assert not [m.name for m in mixture.modules if m.name.endswith(("mlp.gate", "shared_expert_gate"))]
    assert any(m.name.endswith("shared_expert.gate_proj") for m in mixture.modules)
    assert not mixture.notes
    rwkv = open_checkpoint(str(build(tmp_path / "rwkv", *SHAPES["several values, state"])))
    assert not rwkv.notes
    mamba = open_checkpoint(str(build(tmp_path / "mamba", *SHAPES["a weight that is read without its module"])))
    assert {m.kind for m in mamba.modules} == {"in_proj", "x_proj", "out_proj"}
    assert any(note.startswith("backbone.layers.{0,1}.mixer.dt_proj: not quantized") for note in mamba.notes)


def test_sizes_count_what_sees(tmp_path: Path):
    folder = build(tmp_path / "model", *SHAPES["a part that sees"])
    info = open_checkpoint(str(folder)).info
    model = AutoModelForImageTextToText.from_pretrained(folder)
    every = sum(4 * p.numel() for p in model.parameters())
    assert info.total_bytes == every
    assert info.other_bytes == every - 4 * info.quantizable_weights
    assert all("vision" not in m.name for m in open_checkpoint(str(folder)).modules)


def test_activations_beyond_float16_are_told(tiny_llama: Path):
    checkpoint = open_checkpoint(str(tiny_llama))
    decoder = checkpoint.load_model(dtype=torch.float16)
    with torch.no_grad():
        decoder.model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(6e4)
    with pytest.raises(UserError, match=r"activations overflow float16 .*use --dtype bfloat16 or float32"):
        check_chain(decoder, "model")
