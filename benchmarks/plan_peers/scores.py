"""What the re-implemented rules ask of a model: gradients, weight errors, and true KL of single changes.

Sensitivities are in the unit the rule wants; only their order (or their sums, for a knapsack) matters. Gradients are those of weights,
formed by autograd, one batch or one row at a time.

Sources: mlx-lm `quant/dynamic_quant.py` (estimate_sensitivities); HAWQ-V2 (NeurIPS 2020) with the empirical Fisher diagonal for the
Hessian; |g dW| as AutoRound's AutoScheme counts it, here around the reference; exllamav3 `conversion/measure_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitatlas.measure.damage import Swap
from bitatlas.measure.screens import uniform
from bitatlas.model.layerwise import batch_rows
from bitatlas.model.linear import oriented
from plan_peers.problem import Problem

Floats = NDArray[np.float64]


@contextmanager
def weight_gradients(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block, `backward` fills the gradients of these modules' weights; afterwards there are none."""
    weights = [model.get_submodule(name).weight for name in names]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def gradient_of(model: nn.Module, name: str) -> Tensor:
    """The weight's gradient as [out, in], and none is left behind."""
    module = model.get_submodule(name)
    found = module.weight.grad
    module.weight.grad = None
    assert isinstance(found, Tensor)
    return oriented(module, found)


def change_between(problem: Problem, name: str, start: str | None, end: str) -> Tensor:
    """W_end - W_start [out, in] of one module; start None: the reference."""
    bank = problem.meter.bank
    return bank.weights({name: end})[name] - (bank.reference(name) if start is None else bank.weights({name: start})[name])


def relative_errors(problem: Problem) -> Floats:
    """||W - Q||^2 / ||W||^2 of every unit and format. [units, formats]"""
    table = np.zeros((len(problem.units), len(problem.formats)))
    for index, unit in enumerate(problem.units):
        size = sum(float(problem.meter.bank.reference(m.name).double().square().sum()) for m in unit.modules)
        for column, name in enumerate(problem.formats):
            error = sum(float(change_between(problem, m.name, None, name).double().square().sum()) for m in unit.modules)
            table[index, column] = error / size if size else 0.0
    return table


def mlx_sensitivity(problem: Problem) -> Floats:
    """<grad KL(reference || low model), W_low - W_high> a million weights: what raising a unit promises. [units]"""
    meter, names = problem.meter, [module.name for module in problem.modules]
    total = dict.fromkeys(names, 0.0)
    batches = problem.rows.split(batch_rows(problem.rows.shape[1], meter.decoder.vocabulary))
    meter.reference.see(batches)
    references = [meter.reference.log_p(batch, slice(0, batch.shape[1])) for batch in batches]
    with (
        meter.decoder.swapped(meter.bank.weights(uniform(problem.modules, problem.low))),
        weight_gradients(meter.decoder.model, names),
    ):
        for batch, reference in zip(batches, references, strict=True):
            changed = torch.log_softmax(meter.decoder.model(input_ids=batch, use_cache=False).logits.float(), dim=-1)
            kl = (reference.exp() * (reference - changed)).sum(-1).sum() / problem.rows.numel()
            kl.backward()
            for name in names:
                step = change_between(problem, name, problem.high, problem.low)
                total[name] += float((gradient_of(meter.decoder.model, name) * step).sum())
    return np.array([sum(total[m.name] for m in unit.modules) / (unit.weights / 1e6) for unit in problem.units])


def gradient_scores(problem: Problem, squared: bool) -> Floats:
    """Mean over rows of sum(g^2 dW^2) / 2 (`squared`) or sum |g dW|, g the gradient of one row's loss at the reference. [units, formats]

    The loss is the next token's cross-entropy, summed over the row: its squared gradient is the empirical Fisher diagonal.
    """
    meter, names = problem.meter, [module.name for module in problem.modules]
    place = {module.name: index for index, unit in enumerate(problem.units) for module in unit.modules}
    changes = {(name, fmt): change_between(problem, name, None, fmt) for name in names for fmt in problem.formats}
    table = np.zeros((len(problem.units), len(problem.formats)))
    with weight_gradients(meter.decoder.model, names):
        for row in problem.rows.split(1):
            logits = meter.decoder.model(input_ids=row, use_cache=False).logits.float()
            torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum").backward()
            for name in names:
                gradient = gradient_of(meter.decoder.model, name)
                for column, fmt in enumerate(problem.formats):
                    moved = gradient * changes[name, fmt]
                    value = moved.square().sum() / 2 if squared else moved.abs().sum()
                    table[place[name], column] += float(value)
    return table / len(problem.rows)


def single_swaps(problem: Problem, base: str | None) -> Floats:
    """True KL of the model with one unit in each format and the others at `base` (None: unquantized). [units, formats], nats/token"""
    whole = {} if base is None else uniform(problem.modules, base)
    swaps = {
        f"{index}|{name}": Swap(unit.layer, {m.name: name for m in unit.modules})
        for index, unit in enumerate(problem.units)
        for name in problem.formats
    }
    found = problem.meter.swaps(whole, swaps, problem.rows)
    return np.array([[found[f"{i}|{name}"].mean() for name in problem.formats] for i in range(len(problem.units))])


def raised_groups(problem: Problem, groups: Sequence[Sequence[int]]) -> Floats:
    """Change of KL when a group of units (of one layer) is raised, alone, in the low model. [groups, 1], nats/token"""
    low = uniform(problem.modules, problem.low)
    swaps = {
        str(number): Swap(
            problem.units[group[0]].layer, {m.name: problem.high for index in group for m in problem.units[index].modules}
        )
        for number, group in enumerate(groups)
    }
    base = float(problem.meter.plans({"low": low}, problem.rows)["low"].mean())
    found = problem.meter.swaps(low, swaps, problem.rows)
    return np.array([[found[str(number)].mean() - base] for number in range(len(groups))])
