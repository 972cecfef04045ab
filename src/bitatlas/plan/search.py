"""Find the plan under a budget: knapsacks on measured scores, refined with measurements; the least damage on the select rows wins.

A tolerated damage is a search over sizes: the smallest knapsack plan within it, by bisection; then smaller limits, each refined, in
steps that double until one fails and a bisection of what is left. The model is reached only through `Tools`, so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bitatlas.errors import UserError
from bitatlas.plan.budget import costs_of
from bitatlas.plan.knapsack import Ints, solve_knapsack, total_cost
from bitatlas.plan.refine import Probe, Refined, Step, refine
from bitatlas.records import Budget, ModelInfo, Module
from bitatlas.records.sizes import Unit, units_of
from bitatlas.records.text import given

KNAPSACK = "certified knapsack on {}"
REFINED = "quadratic models between the uniform ends, then rounds of {}"
FIRST_STEP = 0.01  # of the range of sizes, below the smallest knapsack plan that is good enough
SMALLER = 5  # limits that are tried below it, at most


@dataclass(frozen=True)
class PlanningProblem:
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
class PlannerHooks:
    """`on_select`: choices by name -> mean damage on the select rows. Without `probe` the knapsack plans stand as they are."""

    scores: Scores
    on_select: MeasureDamage
    probe: Probe | None = None
    told: Callable[[Step], None] | None = None
    where: str = "did on the select rows"  # what the damages are, to end the sentence of a refusal
    effort: str = "full"  # of a refinement


@dataclass(frozen=True)
class Candidate:
    """`selected`: damage on the select rows; `predicted`: nats/token; `limit`: the cost it was found under; `solver`: for the record."""

    choice: Ints
    predicted: float
    selected: float
    limit: int
    solver: dict[str, Any] = field(default_factory=dict)
    near: Refined | None = None  # what the refinement knew at its end: a start for a budget near this one


def search(subject: PlanningProblem, budget: Budget, tools: PlannerHooks, starts: Mapping[str, Ints] | None = None) -> Candidate:
    """The best plan found under `budget`. `starts`: further plans to begin from; those that do not fit are left out."""
    costs = costs_of(budget, subject.units, subject.formats, subject.info)
    if costs.limit is not None:
        return search_within(costs.cost, costs.limit, tools, starts)
    best, selected, tried, _limit = smallest_knapsack(tools.scores, costs.cost, budget.value, tools.on_select, tools.where)
    found = _found(tools.scores, best, selected, total_cost(costs.cost, best.choice), tried)
    return _smaller(costs.cost, budget.value, tools, found) if tools.probe else found


def search_within(
    cost: Ints, limit: int, tools: PlannerHooks, starts: Mapping[str, Ints] | None = None, near: Refined | None = None
) -> Candidate:
    """The best plan of cost at most `limit`. cost: [units, formats]; `near`: of a budget near this one, for a shorter search."""
    if tools.probe is None:
        best, selected, tried = best_knapsack(tools.scores, cost, limit, tools.on_select)
        return _found(tools.scores, best, selected, limit, tried)
    knapsacks = {candidate.scores: candidate for candidate in knapsack_plans(tools.scores, cost, limit)}
    plans = {name: candidate.choice for name, candidate in knapsacks.items()}
    plans |= {name: choice for name, choice in (starts or {}).items() if total_cost(cost, choice) <= limit}
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


def _smaller(cost: Ints, tolerated: float, tools: PlannerHooks, found: Candidate) -> Candidate:
    """Refined plans below `found`'s size, while they are within `tolerated`."""
    least = int(cost.min(axis=1).sum())
    failed, step = least - 1, max(1, round(FIRST_STEP * (int(cost.max(axis=1).sum()) - least)))
    best = found
    for _ in range(SMALLER):
        limit = best.limit - step if failed < least else (best.limit + failed) // 2
        if limit <= failed or limit < least or limit >= best.limit:
            break
        tried = search_within(cost, limit, tools, near=best.near)
        if tried.selected <= tolerated:
            best, step = replace(tried, limit=total_cost(cost, tried.choice)), 2 * step
        else:
            failed = limit
    return best


def _found(scores: Scores, best: KnapsackPlan, selected: float, limit: int, tried: Mapping[str, float], **more: Any) -> Candidate:
    solver = {
        "method": KNAPSACK.format(scores.source),
        "scores": best.scores,
        "gap": best.gap,
        "select_damage": selected,
        "select_damage_by_scores": dict(tried),
        **more,
    }
    return Candidate(best.choice, best.predicted, selected, limit, solver)


# --- choose ----------------------------------------------------------------------------------------------------------------

# Find a plan: certified knapsacks on measured damage, the best of them chosen on the select rows.
#
# Three sets of scores, each a table [units, formats] of damage in nats/token with 0 at the widest format:
# *high*, what lowering a unit adds around `uniform:high`; *low*, what not raising it leaves around `uniform:low`; and their mean,
# which is the exact Shapley value of a quadratic damage model. Scores taken around one base alone add up badly at 2 bits, because
# damages interact; which of the three misleads least differs from model to model, so all three plans are measured.
#
# For `--max-damage` the size is bisected: the smallest limit whose best plan, *measured* on the select rows, is within the tolerance.
# These plans are where the search with interactions starts (`refine`), and what it has to beat.

MeasureDamage = Callable[
    [Mapping[str, np.ndarray]], dict[str, float]
]  # plans by name -> mean damage on the select rows, nats/token
BISECTIONS = 12


@dataclass(frozen=True)
class Scores:
    """Damage tables [units, formats], formats narrowest first, and the measured damage of uniform high they are added to."""

    tables: dict[str, np.ndarray]
    at_high: float
    source: str = "measured single-unit damage"

    def predicted(self, table: np.ndarray, choice: np.ndarray) -> float:
        """Damage of a choice [units] by one of the tables, nats/token.

        Scores taken around uniform low can sum to less than 0 near the widest formats; no plan is promised less than these do.
        """
        return self.at_high + max(0.0, float(table[np.arange(len(table)), choice].sum()))


@dataclass(frozen=True)
class KnapsackPlan:
    """`choice[u]` = index of unit u's format. `gap` is the solver's proven distance to the optimum of `scores`."""

    scores: str
    choice: np.ndarray
    predicted: float  # nats/token
    gap: float


def damage_tables(
    units: Sequence[str],
    formats: Sequence[str],
    damage: Mapping[str, Mapping[str, Mapping[str, float]]],
    base: Mapping[str, float],
) -> Scores:
    """Tables from the two screens of units (see `sensitivity.screens.UnitScreen`); `formats` narrowest first."""
    low, high = formats[0], formats[-1]

    def around(name: str) -> np.ndarray:
        """What each unit in each format adds to the damage of uniform `name`; 0 for the base's own format."""
        own = damage[f"uniform:{name}"]
        rows = [[own[unit][f] - base[f"uniform:{name}"] if f != name else 0.0 for f in formats] for unit in units]
        return np.asarray(rows)

    return scores_of_bases(around(high), around(low), base[f"uniform:{high}"])


def scores_of_bases(wide: np.ndarray, narrow: np.ndarray, at_high: float, source: str = Scores.source) -> Scores:
    """Tables from what each unit adds in each format around uniform high (`wide`) and around uniform low (`narrow`), 0 for the base's own."""
    low = narrow - narrow[:, -1:]
    return Scores({"high": wide, "low": low, "mean of both": (wide + low) / 2}, at_high, source)


def knapsack_plans(scores: Scores, cost: np.ndarray, limit: int) -> list[KnapsackPlan]:
    """The proven optimum of each table under `limit`; equal plans once."""
    found: list[KnapsackPlan] = []
    for name, table in scores.tables.items():
        solution = solve_knapsack(table, cost, limit)
        if any(np.array_equal(solution.choice, other.choice) for other in found):
            continue
        reference = scores.tables.get("mean of both", table)
        found.append(KnapsackPlan(name, solution.choice, scores.predicted(reference, solution.choice), solution.gap))
    return found


def best_knapsack(
    scores: Scores, cost: np.ndarray, limit: int, measure: MeasureDamage
) -> tuple[KnapsackPlan, float, dict[str, float]]:
    """The candidate with the least measured damage, that damage, and everybody's, by name."""
    found = knapsack_plans(scores, cost, limit)
    measured = measure({candidate.scores: candidate.choice for candidate in found})
    best = min(found, key=lambda candidate: measured[candidate.scores])  # ties: the first
    return best, measured[best.scores], measured


def smallest_knapsack(
    scores: Scores, cost: np.ndarray, tolerated: float, measure: MeasureDamage, where: str = "did on the select rows"
) -> tuple[KnapsackPlan, float, dict[str, float], int]:
    """The smallest plan whose measured damage is within `tolerated` (nats/token), and the limit it was found under.

    `where` ends the sentence of a refusal: what the damages are.

    Raises UserError where even the widest format does more.
    """
    least, most = int(cost.min(1).sum()), int(cost.max(1).sum())
    best = (*best_knapsack(scores, cost, most, measure), most)
    if best[1] > tolerated:
        least_damage = f"{best[1]:.3g}" if float(f"{best[1]:.3g}") > tolerated else given(best[1])
        raise UserError(
            f"--max-damage {given(tolerated)} is below {least_damage} nats/token, the least that these formats {where}; "
            "possible: more than that, or a wider format in --formats"
        )
    cheapest = (*best_knapsack(scores, cost, least, measure), least)
    if cheapest[1] <= tolerated:
        return cheapest
    for _ in range(BISECTIONS):
        middle = (least + most) // 2
        if middle in (least, most):
            break
        found = (*best_knapsack(scores, cost, middle, measure), middle)
        if found[1] <= tolerated:
            best, most = found, middle
        else:
            least = middle
    return best
