"""From a few starting plans to one that no nearby plan beats: measure single changes, solve with their interactions, measure, go on.

1. *Starts*: the plans that are handed in, and the best plans of the interpolated models (`plan.quadratic`), whose measurements the
   survey's screens have already paid for. All are measured; the best is the base.
2. *Swaps*: the changes that look promising are measured one by one around the base, on the fit rows, with all their interactions. The solver
   picks a step of at most `radius` units. Measured better: the new base. Worse: half the radius.
3. Where the fit rows see no further, the best changes are measured on the select rows too, and the few nearest plans that
   look best are tried. When that fails, the search is over.

Whatever is accepted was measured better on the fit and select rows together. Every step is recorded, with what was predicted and what came.
The model is reached only through `Probe`, so nothing here needs torch. Deterministic: no clock, no chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitatlas.plan.knapsack import Ints
from bitatlas.plan.quadratic import (
    SHARES,
    InterpolatedModel,
    Quadratic,
    nearest_plans,
    recentred,
    single_changes,
    solve_quadratic,
)

Change = tuple[int, int]  # unit, format
Step = dict[str, Any]

LEAST_GAIN = 1e-3  # of the damage: a step that promises less is not measured
FORBIDDEN = 1e3  # nats/token, for changes that were not measured


@dataclass(frozen=True)
class Effort:
    """How much is measured. `short` is for a budget near one whose plan is known."""

    rounds: int  # of measured swaps
    swaps: int  # changes measured around the first base, at most
    later: int  # around the others: the last round tells which changes are too far from the budget's price
    pairs: int  # plans measured when the solver's step failed


EFFORTS = {
    "full": Effort(8, 48, 20, 6),
    "half": Effort(4, 32, 16, 4),
    "quarter": Effort(2, 24, 12, 2),
    "short": Effort(2, 16, 16, 2),
}


class MeasuredChanges(Protocol):
    """Changes around a base: true damage added [changes], and half the curvature between them [changes, changes]."""

    @property
    def added(self) -> np.ndarray: ...
    @property
    def together(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Probe:
    """The ways to the model. Choices are [units]. Columns of formats go from the narrowest to the widest.

    outside: units outside the decoder layers, which have their widest format at both uniform ends.
    """

    swaps: Callable[[Ints, Sequence[Change], str], MeasuredChanges]  # on the rows of that split
    damage: Callable[[Mapping[str, Ints]], Mapping[str, float]]  # on fit and select rows together, nats/token
    outside: Sequence[int] = ()


@dataclass(frozen=True)
class Refined:
    """`damage`, `predicted`: nats/token; `gap`: of the solution of the interpolated model; `model`: what the last round knew."""

    choice: Ints
    damage: float
    predicted: float
    gap: float
    reason: str
    steps: list[Step]
    model: Quadratic


@dataclass
class _Search:
    probe: Probe
    cost: Ints
    limit: int
    effort: Effort
    on_step: Callable[[Step], None] | None
    guide: Quadratic = field(default_factory=lambda: Quadratic(np.zeros((0, 0)), np.zeros((0, 0))))
    base: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    damage: float = float("inf")
    predicted: float = float("nan")
    steps: list[Step] = field(default_factory=list)
    known: dict[bytes, float] = field(default_factory=dict)

    def measure(self, plans: Mapping[str, Ints]) -> dict[str, float]:
        """Return the damage of plans by name; equal plans are measured once."""
        new = {name: plan for name, plan in plans.items() if plan.tobytes() not in self.known}
        for name, value in self.probe.damage(new).items() if new else ():
            self.known[new[name].tobytes()] = float(value)
        return {name: self.known[plan.tobytes()] for name, plan in plans.items()}

    def offer(self, kind: str, plan: Ints, predicted: float, damage: float, **more: Any) -> bool:
        """Record a measured plan; it becomes the base where it is better."""
        better, predicted = damage < self.damage, max(predicted, 0.0)  # NaN stays; the models know no floor
        changed = int((plan != self.base).sum()) if len(self.base) else None
        numbers = {"predicted": _short(predicted), "damage": _short(damage)}
        self.steps.append({"kind": kind, "changed": changed, **numbers, "accepted": better, **more})
        if self.on_step:
            self.on_step(self.steps[-1])
        if better:
            self.base, self.damage, self.predicted = plan.copy(), damage, predicted
        return better


def _short(value: float) -> float | None:
    """Return six digits, which are enough for a record; None of NaN or infinity."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def step_text(step: Step) -> str:
    """Return a step as a line for the screen."""
    changed = f", {step['changed']} units changed" if step["changed"] else ""
    predicted = f" (predicted {step['predicted']:.4g})" if step["predicted"] is not None else ""
    return f"{step['kind']}{changed}: {step['damage']:.4g} nats/token{predicted}{', better' if step['accepted'] else ''}"


def refine(
    probe: Probe,
    cost: NDArray,
    limit: int,
    starts: Mapping[str, NDArray],
    on_step: Callable[[Step], None] | None = None,
    near: Refined | None = None,
    effort: str = "full",
) -> Refined:
    """Return the best plan found within `limit`. cost: [units, formats], whole numbers; starts: name -> choice [units], each within `limit`.

    `near`: what was found for a budget near this one. Its model gives a start and the first guide, in place of the interpolated models.
    `effort`: a key of `EFFORTS`.
    """
    search = _Search(probe, np.asarray(cost, dtype=np.int64), limit, EFFORTS[effort], on_step)
    gap = _start(search, {name: np.asarray(choice, dtype=np.int64) for name, choice in starts.items()}, near)
    reason = _swap(search)
    return Refined(search.base, search.damage, search.predicted, gap, reason, search.steps, search.guide)


# --- starts ------------------------------------------------------------------------------------------------------------


def _start(search: _Search, starts: Mapping[str, Ints], near: Refined | None) -> float:
    """Measure all starts; the base is the best. Returns the gap of the model that guides from there."""
    if near is None:
        models, level = _interpolated(search)
    else:
        models, level = {"near plan": near.model}, near.damage - near.model.value(near.choice)
    solutions = {name: solve_quadratic(model, search.cost, search.limit) for name, model in models.items()}
    plans = {**starts, **{name: solution.choice for name, solution in solutions.items() if solution.value < FORBIDDEN / 2}}
    damage = search.measure(plans)
    seen: set[bytes] = set()
    for name, plan in plans.items():
        if plan.tobytes() not in seen:  # equal plans once
            predicted = level + solutions[name].value if name in solutions else float("nan")
            search.offer(f"start: {name}", plan, predicted, damage[name])
        seen.add(plan.tobytes())
    guide = min(models, key=lambda name: damage.get(name, np.inf))
    search.guide = models[guide]
    return solutions[guide].gap


def _interpolated(search: _Search) -> tuple[dict[str, Quadratic], float]:
    """Return the interpolated models by name, and the damage at the wide end that their values are added to."""
    units, formats = search.cost.shape
    tables, together = [], np.zeros((units * formats, units * formats))
    for end in (0, formats - 1):
        base = np.full(units, end)
        base[list(search.probe.outside)] = formats - 1
        changes = [(unit, fmt) for unit in range(units) for fmt in range(formats) if fmt != base[unit]]
        measured = search.probe.swaps(base, changes, "fit")
        index = _flat(changes, formats)
        table = np.zeros(units * formats)
        table[index] = measured.added
        tables.append(table.reshape(units, formats))
    together[np.ix_(index, index)] = measured.together  # of the wide end
    ends = InterpolatedModel(tables[1], tables[0], together)
    level = search.measure({"": np.full(units, formats - 1)})[""]
    return {f"{share:g} of the interactions at the wide end": ends.at(share) for share in SHARES}, level


def _flat(changes: Sequence[Change], formats: int) -> Ints:
    return np.array([unit * formats + fmt for unit, fmt in changes])


# --- measured changes --------------------------------------------------------------------------------------------------


def _swap(search: _Search) -> str:
    """Measure swaps in rounds, and return why they ended."""
    radius = max(4, len(search.base) // 4)
    count = search.effort.swaps
    for _ in range(search.effort.rounds):
        changes = _promising(search, count)
        fit = search.probe.swaps(search.base, changes, "fit")
        measured = _measured(search, changes, fit.added, fit.together)
        if not _steps(search, "swaps", measured, radius):
            row = {change: i for i, change in enumerate(changes)}
            search.guide = measured.guide
            changes = _promising(search, search.effort.later, set(changes))
            index = [row[change] for change in changes]
            select = search.probe.swaps(search.base, changes, "select")
            together = (fit.together[np.ix_(index, index)] + select.together) / 2
            measured = _measured(search, changes, (fit.added[index] + select.added) / 2, together)
            if not (_steps(search, "swaps", measured, radius, rows="fit and select") or _try_pairs(search, measured)):
                search.guide = measured.guide
                return "no change and no pair of changes that looked promising was measured better"
        search.guide, count = measured.guide, search.effort.later
    return f"{search.effort.rounds} rounds of measured swaps"


@dataclass(frozen=True)
class _Measured:
    """`problem`: the measured changes alone, all others forbidden; `guide`: the others as the last guide saw them."""

    problem: Quadratic
    guide: Quadratic


def _measured(search: _Search, changes: Sequence[Change], added: np.ndarray, together: np.ndarray) -> _Measured:
    units, formats = search.cost.shape
    index = _flat(changes, formats)
    old = recentred(search.guide, search.base)
    matrix = old.matrix.copy()
    matrix[np.ix_(index, index)] = together
    first = old.first.ravel().copy()
    first[index] = added - np.diag(together)
    allowed = np.zeros(units * formats, dtype=bool)
    allowed[index] = allowed[np.arange(units) * formats + search.base] = True
    only = np.where(allowed, first, FORBIDDEN).reshape(units, formats)
    return _Measured(
        Quadratic(only, np.where(np.outer(allowed, allowed), matrix, 0.0)), Quadratic(first.reshape(units, formats), matrix)
    )


def _steps(search: _Search, kind: str, measured: _Measured, radius: int, **more: Any) -> bool:
    """Solve and measure, with a smaller radius after each failure, until a plan is better; return whether one was."""
    while radius >= 1:
        solution = solve_quadratic(measured.problem, search.cost, search.limit, search.base, radius, bounded=False)
        changed = int((solution.choice != search.base).sum())
        if changed == 0 or -solution.value < LEAST_GAIN * search.damage:
            return False
        damage = search.measure({"": solution.choice})[""]
        if search.offer(kind, solution.choice, search.damage + solution.value, damage, radius=radius, **more):
            return True
        radius = min(radius, changed) // 2
    return False


def _try_pairs(search: _Search, measured: _Measured) -> bool:
    """Measure the nearest plans that look best, and offer the best of them; return whether it was better."""
    near = nearest_plans(measured.problem, search.cost, search.limit, search.base, 2 * search.effort.pairs)
    plans = {str(i): plan for i, plan in enumerate(near) if plan.tobytes() not in search.known}
    plans = dict(list(plans.items())[: search.effort.pairs])
    damage = search.measure(plans)
    if not plans:
        return False
    best = min(damage, key=lambda name: damage[name])
    predicted = search.damage + measured.problem.value(plans[best])
    return search.offer("nearest plans", plans[best], predicted, damage[best], tried=len(plans))


def _promising(search: _Search, count: int, among: set[Change] | None = None) -> list[Change]:
    """Return the `count` single changes that look best to the guide at the budget's price, up and down alike."""
    moves = single_changes(search.guide, search.cost, search.base)
    every = list(zip(moves.unit.tolist(), moves.format.tolist(), strict=True))
    index = np.array([i for i, change in enumerate(every) if among is None or change in among], dtype=np.int64)
    damage, extra = moves.damage[index], moves.cost[index]
    ranks = damage + _price(damage, extra) * extra
    chosen: list[int] = []
    for side, other in ((extra > 0, extra <= 0), (extra <= 0, extra > 0)):
        room = max(count // 2, count - int(other.sum()))
        members = np.flatnonzero(side)
        chosen += index[members[np.argsort(ranks[members], kind="stable")[:room]]].tolist()
    return [every[i] for i in sorted(chosen)]


def _price(damage: np.ndarray, extra: np.ndarray) -> float:
    """Return the damage that a unit of cost is worth at the base: the median over changes that trade one for the other."""
    trading = (damage * extra < 0) & (extra != 0)
    return float(np.median(-damage[trading] / extra[trading])) if trading.any() else 0.0
