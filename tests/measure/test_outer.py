"""Embeddings and heads are measured like layers: what is reported is what a plain pass of a changed model gives, tied at both ends."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitatlas.measure.damage import DamageMeter, StateBudget, Swap
from bitatlas.measure.interactions import swap_interactions
from bitatlas.model import layerwise
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint, outer_modules
from bitatlas.model.decoder import FRONT, Decoder
from bitatlas.model.gradients import label_points, labels_at
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.moments import SEED, module_moments
from bitatlas.records import Module
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import units_of
from tiny import make_checkpoint
from tiny_shapes import SHAPES, build

LOW, HIGH = "int2_g32", "int4_g32"
KINDS = {
    "tied": lambda folder: make_checkpoint(folder, "llama"),
    "untied": lambda folder: make_checkpoint(folder, "qwen2", tie_word_embeddings=False),
    "positions, transposed": lambda folder: make_checkpoint(folder, "gpt2"),
    "embeddings of each layer": lambda folder: build(folder, *SHAPES["several streams side by side"]),
    "run whole": lambda folder: make_checkpoint(folder, "llama"),
}


class Setup:
    """A checkpoint with a meter, and a copy whose weights are set."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, budget: StateBudget | None = None):
        self.outer = outer_modules(checkpoint.skeleton(), checkpoint.layers_path)
        self.modules = [*self.outer, *checkpoint.modules]
        self.bank = Bank(decoder, [module.name for module in self.modules], "rtn")
        self.meter = DamageMeter(decoder, self.bank, "", "rtn", Journal(None), budget)
        self.rows = torch.randint(3, 290, (5, 12), generator=torch.Generator().manual_seed(3))

    def plain(self, assignment: dict[str, str]) -> np.ndarray:
        model = copy.deepcopy(self.meter.decoder.model)
        reference = log_p(model, self.rows)
        with torch.no_grad():
            for name, weight in self.bank.weights(assignment).items():
                module = model.get_submodule(name)
                module.weight.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)
        return (reference.exp() * (reference - log_p(model, self.rows))).sum(-1).mean(-1).numpy()

    def swaps(self, modules: list[Module]) -> dict[str, Swap]:
        return {unit.name: Swap(unit.layer, {m.name: LOW for m in unit.modules}) for unit in units_of(modules)}


@torch.no_grad()
def log_p(model: torch.nn.Module, rows: Tensor) -> Tensor:
    return torch.log_softmax(model(input_ids=rows, use_cache=False).logits.double(), -1)


def opened(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    checkpoint = open_checkpoint(str(KINDS[kind](folder)))
    if kind == "run whole":
        for module in ("bitatlas.measure.damage", "bitatlas.model.layerwise"):
            monkeypatch.setattr(f"{module}.is_chain", lambda decoder: False)
    return Setup(checkpoint, checkpoint.load_model())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_measured_is_what_a_plain_pass_gives(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = opened(kind, tmp_path / "model", monkeypatch)
    meter, rows = setup.meter, setup.rows
    assert setup.outer and layerwise.is_chain(meter.decoder) == (kind != "run whole")
    base = {module.name: HIGH for module in setup.modules}
    close = {"rtol": 2e-3, "atol": 1e-6}
    plans = {"high": base, "low": dict.fromkeys(base, LOW), "outer alone": {m.name: LOW for m in setup.outer}}
    for name, damage in meter.plans(plans, rows).items():
        np.testing.assert_allclose(damage, setup.plain(plans[name]), err_msg=name, **close)
    chosen = [*setup.outer, *setup.modules[len(setup.outer) : len(setup.outer) + 2], setup.modules[-1]]
    swaps = setup.swaps([m for m in setup.modules if m.unit in {c.unit for c in chosen}])
    alone = meter.swaps(base, swaps, rows)
    paired = swap_interactions(meter, base, list(swaps.values()), rows)
    before = setup.plain(base)
    assert paired.by_row is not None
    for index, (name, swap) in enumerate(swaps.items()):
        truly = setup.plain({**base, **swap.assignment})
        np.testing.assert_allclose(alone[name], truly, err_msg=name, **close)
        np.testing.assert_allclose(paired.by_row[:, index], truly - before, err_msg=name, rtol=1e-2, atol=1e-3 * before.max())
    assert meter.plans({"none": {}}, rows)["none"] == pytest.approx(0, abs=1e-6)  # all as it was


def test_layer_by_layer_is_in_memory(tmp_path: Path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "model", "llama")))
    whole = Setup(checkpoint, checkpoint.load_model())
    streamed = Setup(checkpoint, checkpoint.stream_model(), StateBudget(2**16, 2**12, whole=False, folder=tmp_path))
    base = {module.name: HIGH for module in whole.modules}
    swaps = whole.swaps(whole.outer + whole.modules[-1:])
    for name, damage in whole.meter.swaps(base, swaps, whole.rows).items():
        np.testing.assert_allclose(streamed.meter.swaps(base, swaps, whole.rows)[name], damage, rtol=1e-4, atol=1e-7)
    plans = {"low": dict.fromkeys(base, LOW)}
    mine, theirs = (one.meter.plans(plans, whole.rows)["low"] for one in (streamed, whole))
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)


def test_what_is_outside_the_layers(tmp_path: Path):
    names = {}
    for kind in ("tied", "untied", "positions, transposed", "embeddings of each layer"):
        checkpoint = open_checkpoint(str(KINDS[kind](tmp_path / kind)))
        names[kind] = {m.name: m.layer for m in outer_modules(checkpoint.skeleton(), checkpoint.layers_path)}
        decoder = checkpoint.load_model()
        assert {name: decoder.layer_of(name) for name in names[kind]} == names[kind]
    assert names["tied"] == {"model.embed_tokens": FRONT}
    assert names["untied"] == {"model.embed_tokens": FRONT, "lm_head": 3}
    assert names["positions, transposed"] == {"transformer.wte": FRONT, "transformer.wpe": FRONT}
    assert set(names["embeddings of each layer"]) == {"model.embed_tokens", "model.embed_tokens_per_layer"}
    assert open_checkpoint(str(tmp_path / "tied")).load_model().stages_of("model.embed_tokens") == (FRONT, 3)


@pytest.mark.parametrize("kind", ["untied", "tied", "positions, transposed"])
def test_moments_of_heads_and_embeddings_are_those_of_a_plain_pass(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = opened(kind, tmp_path / "model", monkeypatch)
    decoder, names = setup.meter.decoder, [module.name for module in setup.outer]
    moments = {part.names: part for part in module_moments(decoder, names, setup.rows)}
    assert set(moments) == {(name,) for name in names}
    heads = [name for name in names if decoder.stages_of(name)[-1] == decoder.behind]
    assert len(heads) == 1
    for name in names:
        module = decoder.module_at(name, decoder.stages_of(name)[-1])
        inputs, gradients = calls_of_plain_pass(decoder, module, setup.rows)
        vectors = inputs if name in heads else gradients
        found = moments[(name,)]
        assert found.tokens == len(vectors)
        torch.testing.assert_close(
            found.plain.double(), vectors.T @ vectors, rtol=1e-3, atol=1e-5 * float(vectors.abs().max()) ** 2
        )
        if name in heads:
            weights = gradients.square().sum(1)
            weighted = (inputs * (weights / weights.mean())[:, None]).T @ inputs
            torch.testing.assert_close(found.weighted.double(), weighted, rtol=1e-3, atol=1e-4 * float(weighted.abs().max()))
    codes = Bank(decoder, names, "gptq", rows=setup.rows)
    codes.fill([LOW])
    assert all(codes.codes(name, LOW).codes.shape == decoder.shape(name) for name in names)


def calls_of_plain_pass(decoder: Decoder, module: torch.nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what goes into a module [tokens, in], zeros of an embedding, and the gradient of the drawn labels' log-probability at its output [tokens, out]."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.detach().requires_grad_(True) if not output.requires_grad else output
        seen.append((args[0].detach().double(), output))
        return output.view_as(output)

    handle = module.register_forward_hook(hook)
    with torch.enable_grad():
        logits = decoder.model(input_ids=rows, use_cache=False).logits.float()
        labels = labels_at(torch.softmax(logits.detach(), -1), label_points(rows, SEED, 0))
        likelihood = torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).sum()
        (gradient,) = torch.autograd.grad(likelihood, [output for _, output in seen])
    handle.remove()
    (inputs, _), *_ = seen
    return inputs.reshape(-1, inputs.shape[-1]), gradient.flatten(0, -2).double()
