"""From a few starting plans to one that no nearby plan beats: expand, solve, measure, and expand again around the better plan.

1. *Starts*: the knapsack plans that are handed in, and the best plans of the quadratic models around the reference and around the
   narrowest formats. All are measured; the best is the first base.
2. *Re-basing*: the quadratic model at the base, from one forward and a few backward passes, says what to change, at most `radius` units
   at a time. Measured better: the new base. Worse: half the radius. At 0 this instrument is spent.
3. *Swaps*: single changes are measured around the base, with their interactions, first on the fit rows and, where those see no further,
   on the select rows too. The same solver picks a step; when that fails, the few pairs of changes that look best are measured.

Whatever is accepted was measured better on the fit and select rows together. Every step is recorded, with what was predicted and what came.
The model is reached only through `Probe`, so nothing here needs torch. Deterministic: no clock, no chance.
Left out: a second descent from a worse start, at twice the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitatlas.planning.expansion import Expansion, Quadratic, quadratic
from bitatlas.planning.quadratic import nearest_plans, single_changes, solve_quadratic

Ints = NDArray[np.int64]
Change = tuple[int, int]  # unit, format
Step = dict[str, Any]

REBASES = 6
ROUNDS = 8  # of measured swaps
SWAPS = 64  # changes measured around a base, at most
LATER = 0.6  # of them are measured again: the others are too far from the budget's price to be part of a better plan
FEW = 16  # changes are always measured
PAIRS = 6  # plans measured when the solver's step failed
LEAST_GAIN = 1e-3  # of the damage: a step that promises less is not measured
FORBIDDEN = 1e3  # nats/token, for changes that were not measured


class Together(Protocol):
    """Changes around a base: true damage added [changes], and half the curvature between them [changes, changes]."""

    @property
    def added(self) -> np.ndarray: ...
    @property
    def together(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Probe:
    """The ways to the model. Choices are [units]; None is the reference."""

    curvature: Callable[[Ints | None], Expansion]
    swaps: Callable[[Ints, Sequence[Change], str], Together]  # on the rows of that split
    damage: Callable[[Mapping[str, Ints]], Mapping[str, float]]  # on fit and select rows together, nats/token


@dataclass(frozen=True)
class Refined:
    """`damage`, `predicted`: nats/token; `gap`: of the quadratic model's solution around the reference, the only one without a trust region."""

    choice: Ints
    damage: float
    predicted: float
    gap: float
    reason: str
    steps: list[Step]


@dataclass
class _Search:
    probe: Probe
    cost: Ints
    limit: int
    told: Callable[[Step], None] | None = None
    base: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    model: Quadratic = field(
        default_factory=lambda: Quadratic(np.zeros((0, 0)), np.zeros((0, 0)), 1.0)
    )  # the last from curvature
    damage: float = float("inf")
    predicted: float = float("nan")
    steps: list[Step] = field(default_factory=list)
    known: dict[bytes, float] = field(default_factory=dict)

    def measure(self, plans: Mapping[str, Ints]) -> dict[str, float]:
        """Damage of plans by name; equal plans once."""
        new = {name: plan for name, plan in plans.items() if plan.tobytes() not in self.known}
        for name, value in self.probe.damage(new).items() if new else ():
            self.known[new[name].tobytes()] = float(value)
        return {name: self.known[plan.tobytes()] for name, plan in plans.items()}

    def offer(self, kind: str, plan: Ints, predicted: float, damage: float, **more: Any) -> bool:
        """Record a measured plan; it becomes the base where it is better."""
        better = damage < self.damage
        changed = int((plan != self.base).sum()) if len(self.base) else None
        numbers = {"predicted": _short(predicted), "damage": _short(damage)}
        self.steps.append({"kind": kind, "changed": changed, **numbers, "accepted": better, **more})
        if self.told:
            self.told(self.steps[-1])
        if better:
            self.base, self.damage, self.predicted = plan.copy(), damage, predicted
        return better


def _short(value: float) -> float | None:
    """Six digits are enough for a record."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def step_text(step: Step) -> str:
    """A step as a line for the screen."""
    changed = f", {step['changed']} units changed" if step["changed"] else ""
    predicted = f" (predicted {step['predicted']:.4g})" if step["predicted"] is not None else ""
    return f"{step['kind']}{changed}: {step['damage']:.4g} nats/token{predicted}{', better' if step['accepted'] else ''}"


def refine(
    probe: Probe, cost: NDArray, limit: int, starts: Mapping[str, NDArray], told: Callable[[Step], None] | None = None
) -> Refined:
    """The best plan found within `limit`. cost: [units, formats], whole numbers; starts: name -> choice [units], each within `limit`."""
    search = _Search(probe, np.asarray(cost, dtype=np.int64), limit, told)
    gap = _start(search, {name: np.asarray(choice, dtype=np.int64) for name, choice in starts.items()})
    _rebase(search)
    reason = _swap(search)
    return Refined(search.base, search.damage, search.predicted, gap, reason, search.steps)


def _start(search: _Search, starts: Mapping[str, Ints]) -> float:
    """Measure all starts; the base is the best. Returns the gap of the quadratic model's solution around the reference."""
    plans, predicted = dict(starts), dict.fromkeys(starts, float("nan"))
    more: dict[str, dict[str, float | None]] = {name: {} for name in starts}
    gap = float("nan")
    cheapest = search.cost.argmin(axis=1)
    for name, base in (("reference", None), ("narrowest", cheapest)):
        problem = quadratic(search.probe.curvature(base))
        solution = solve_quadratic(problem, search.cost, search.limit)
        label = f"quadratic around {name}"
        plans[label], predicted[label] = solution.choice, solution.value
        gap = solution.gap if base is None else gap
        more[label] = {"kept": _short(problem.kept), "gap": _short(solution.gap)}
    damage = search.measure(plans)
    predicted["quadratic around narrowest"] += search.measure({"": cheapest})[""]
    for name, plan in plans.items():
        search.offer(f"start: {name}", plan, predicted[name], damage[name], **more[name])
    return gap


def _rebase(search: _Search) -> None:
    """Steps of the quadratic model at the base, from curvature; the trust region halves where one fails."""
    radius = max(1, len(search.base) // 2)
    for _ in range(REBASES):
        search.model = quadratic(search.probe.curvature(search.base))
        radius, accepted = _steps(search, "re-base", search.model, radius, kept=_short(search.model.kept))
        if not accepted:
            return


def _steps(search: _Search, kind: str, problem: Quadratic, radius: int, **more: Any) -> tuple[int, bool]:
    """Solve and measure, with a smaller radius after each failure, until a plan is better. (radius, whether one was)"""
    level = problem.value(search.base)
    while radius >= 1:
        solution = solve_quadratic(problem, search.cost, search.limit, search.base, radius)
        changed = int((solution.choice != search.base).sum())
        gain = level - solution.value
        if changed == 0 or gain < LEAST_GAIN * search.damage:
            return radius, False
        damage = search.measure({"": solution.choice})[""]
        if search.offer(kind, solution.choice, search.damage - gain, damage, radius=radius, **more):
            return radius, True
        radius = min(radius, changed) // 2
    return radius, False


def _swap(search: _Search) -> str:
    """Rounds of measured swaps. Returns why they ended."""
    radius = max(4, len(search.base) // 4)
    guide, share = search.model, 1.0
    for _ in range(ROUNDS):
        changes = _changes(search, guide, share)
        fit = search.probe.swaps(search.base, changes, "fit")
        problem = _measured_problem(search, changes, fit.added, fit.together)
        _, accepted = _steps(search, "swaps", problem, radius)
        if not accepted:
            fewer = _changes(search, problem, LATER)
            at = [changes.index(change) for change in fewer]
            select = search.probe.swaps(search.base, fewer, "select")
            added, together = (fit.added[at] + select.added) / 2, (fit.together[np.ix_(at, at)] + select.together) / 2
            problem = _measured_problem(search, fewer, added, together)
            _, accepted = _steps(search, "swaps", problem, radius, rows="fit and select")
            if not accepted and not _try_pairs(search, problem):
                return "no change and no pair of changes that looked promising was measured better"
        if (
            search.cost.size - len(search.base) <= SWAPS
        ):  # all were measured: they tell better than the curvature who may be left out
            guide, share = problem, LATER
    return f"{ROUNDS} rounds of measured swaps"


def _try_pairs(search: _Search, problem: Quadratic) -> bool:
    """Measure the nearest plans that look best; the best of them is offered."""
    level = problem.value(search.base)
    near = nearest_plans(problem, search.cost, search.limit, search.base, 2 * PAIRS)
    plans = {str(i): plan for i, plan in enumerate(near) if plan.tobytes() not in search.known}
    plans = dict(list(plans.items())[:PAIRS])
    damage = search.measure(plans)
    if not plans:
        return False
    best = min(damage, key=lambda name: damage[name])
    predicted = search.damage + problem.value(plans[best]) - level
    return search.offer("nearest plans", plans[best], predicted, damage[best], tried=len(plans))


def _changes(search: _Search, guide: Quadratic, share: float) -> list[Change]:
    """The single changes to measure: those most promising in the model `guide`, up and down alike."""
    moves = single_changes(guide, search.cost, search.base)
    known = np.flatnonzero(moves.damage < FORBIDDEN / 2)
    count = min(SWAPS, max(FEW, round(share * len(known))))
    damage, extra = moves.damage[known], moves.cost[known]
    ranks = damage + _price(damage, extra) * extra
    kept: list[int] = []
    for side, other in ((extra > 0, extra <= 0), (extra <= 0, extra > 0)):
        room = max(count // 2, count - int(other.sum()))
        index = np.flatnonzero(side)
        kept += known[index[np.argsort(ranks[index], kind="stable")[:room]]].tolist()
    return [(int(moves.unit[i]), int(moves.format[i])) for i in sorted(kept)]


def _price(damage: np.ndarray, extra: np.ndarray) -> float:
    """Damage that a unit of cost is worth at the base: the median over changes that trade one for the other."""
    trading = (damage * extra < 0) & (extra != 0)
    return float(np.median(-damage[trading] / extra[trading])) if trading.any() else 0.0


def _measured_problem(search: _Search, changes: Sequence[Change], added: np.ndarray, together: np.ndarray) -> Quadratic:
    """The quadratic model of measured changes alone."""
    units, formats = search.cost.shape
    at = np.array([unit * formats + f for unit, f in changes])
    matrix = np.zeros((units * formats, units * formats))
    matrix[np.ix_(at, at)] = together
    first = np.full(units * formats, FORBIDDEN)
    first[np.arange(units) * formats + search.base] = 0.0
    first[at] = added - np.diag(together)
    return Quadratic(first.reshape(units, formats), matrix, 1.0)
