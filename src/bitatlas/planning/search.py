"""Find the plan under a budget: knapsacks on measured scores, refined with measurements; the least damage on the select rows wins.

A tolerated damage is a search over sizes: the smallest knapsack plan within it, by bisection; then smaller limits, each refined, in
steps that double until one fails and a bisection of what is left. The model is reached only through `Tools`, so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitatlas.planning.budget import Unit, costs_of, units_of
from bitatlas.planning.choose import Candidate, Measure, Scores, candidates, choose, choose_smallest
from bitatlas.planning.refine import Probe, Refined, Step, refine
from bitatlas.planning.solve import spent
from bitatlas.records import Budget, ModelInfo, Module

KNAPSACK = "certified knapsack on {}"
REFINED = "quadratic models between the uniform ends, then rounds of {}"
FIRST_STEP = 0.01  # of the range of sizes, below the smallest knapsack plan that is good enough
SMALLER = 5  # limits that are tried below it, at most

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """What a plan is for. `formats`: the candidates, narrowest first; `codes`: whose quantized weights they are (`Bank.identity`).

    `test_blocks`: of the rows that it is judged on (see `evaluation.bootstrap`).
    """

    info: ModelInfo
    modules: Sequence[Module]
    formats: Sequence[str]
    quantizer: str
    codes: str = ""
    seed: int = 0
    test_blocks: Sequence[int] | None = None

    @property
    def units(self) -> list[Unit]:
        return units_of(self.modules)


@dataclass(frozen=True)
class Tools:
    """`on_select`: choices by name -> mean damage on the select rows. Without `probe` the knapsack plans stand as they are."""

    scores: Scores
    on_select: Measure
    probe: Probe | None = None
    told: Callable[[Step], None] | None = None
    where: str = "did on the select rows"  # what the damages are, to end the sentence of a refusal
    effort: str = "full"  # of a refinement


@dataclass(frozen=True)
class Found:
    """`selected`: damage on the select rows; `predicted`: nats/token; `limit`: the cost it was found under; `solver`: for the record."""

    choice: Ints
    predicted: float
    selected: float
    limit: int
    solver: dict[str, Any] = field(default_factory=dict)
    near: Refined | None = None  # what the refinement knew at its end: a start for a budget near this one


def search(subject: Subject, budget: Budget, tools: Tools, starts: Mapping[str, Ints] | None = None) -> Found:
    """The best plan found under `budget`. `starts`: further plans to begin from; those that do not fit are left out."""
    costs = costs_of(budget, subject.units, subject.formats, subject.info)
    if costs.limit is not None:
        return under(costs.cost, costs.limit, tools, starts)
    best, selected, tried, _limit = choose_smallest(tools.scores, costs.cost, budget.value, tools.on_select, tools.where)
    found = _found(tools.scores, best, selected, spent(costs.cost, best.choice), tried)
    return _smaller(costs.cost, budget.value, tools, found) if tools.probe else found


def under(cost: Ints, limit: int, tools: Tools, starts: Mapping[str, Ints] | None = None, near: Refined | None = None) -> Found:
    """The best plan of cost at most `limit`. cost: [units, formats]; `near`: of a budget near this one, for a shorter search."""
    if tools.probe is None:
        best, selected, tried = choose(tools.scores, cost, limit, tools.on_select)
        return _found(tools.scores, best, selected, limit, tried)
    knapsacks = {candidate.scores: candidate for candidate in candidates(tools.scores, cost, limit)}
    plans = {name: candidate.choice for name, candidate in knapsacks.items()}
    plans |= {name: choice for name, choice in (starts or {}).items() if spent(cost, choice) <= limit}
    refined = refine(tools.probe, cost, limit, plans, tools.told, near, "short" if near else tools.effort)
    damage = tools.on_select({"refined": refined.choice, **{name: known.choice for name, known in knapsacks.items()}})
    best = knapsacks[min(knapsacks, key=lambda name: damage[name])]
    more = {"reason": refined.reason, "steps": refined.steps}
    found = replace(_found(tools.scores, best, damage[best.scores], limit, damage, **more), near=refined)
    if found.selected < damage["refined"]:
        return found
    predicted = refined.predicted if np.isfinite(refined.predicted) else best.predicted
    solver = {
        **found.solver,
        "method": REFINED.format(tools.probe.rounds_of),
        "gap": refined.gap,
        "select_damage": damage["refined"],
    }
    return replace(found, choice=refined.choice, predicted=predicted, selected=damage["refined"], solver=solver)


def _smaller(cost: Ints, tolerated: float, tools: Tools, found: Found) -> Found:
    """Refined plans below `found`'s size, while they are within `tolerated`."""
    least = int(cost.min(axis=1).sum())
    failed, step = least - 1, max(1, round(FIRST_STEP * (int(cost.max(axis=1).sum()) - least)))
    best = found
    for _ in range(SMALLER):
        limit = best.limit - step if failed < least else (best.limit + failed) // 2
        if limit <= failed or limit < least or limit >= best.limit:
            break
        tried = under(cost, limit, tools, near=best.near)
        if tried.selected <= tolerated:
            best, step = replace(tried, limit=spent(cost, tried.choice)), 2 * step
        else:
            failed = limit
    return best


def _found(scores: Scores, best: Candidate, selected: float, limit: int, tried: Mapping[str, float], **more: Any) -> Found:
    solver = {
        "method": KNAPSACK.format(scores.source),
        "scores": best.scores,
        "gap": best.gap,
        "select_damage": selected,
        "select_damage_by_scores": dict(tried),
        **more,
    }
    return Found(best.choice, best.predicted, selected, limit, solver)
