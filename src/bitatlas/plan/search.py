"""Find the plan under a budget: certified knapsacks on measured scores, refined with measurements; the least damage on the select rows wins.

Three sets of scores, each a table [units, formats] of damage in nats/token with 0 at the widest format:
*high*, what lowering a unit adds around `uniform:high`; *low*, what not raising it leaves around `uniform:low`; and their mean,
which is the exact Shapley value of a quadratic damage model. Scores taken around one base alone add up badly at 2 bits, because
damages interact; which of the three misleads least differs from model to model, so all three plans are measured. They are where the
search with interactions (`plan.refine`) starts, and what it has to beat.

A tolerated damage is a search over sizes: the smallest knapsack plan *measured* to be within it, by bisection; then smaller limits, each refined, in
steps that double until one fails and a bisection of what is left. The model is reached only through `PlannerHooks`, so nothing here needs torch.
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
REFINED = "quadratic models between the uniform ends, then rounds of measured swaps"
FIRST_STEP = 0.01  # of the range of sizes, below the smallest knapsack plan that is good enough
SMALLER = 5  # limits that are tried below it, at most
BISECTIONS = 12


MeasureDamage = Callable[
    [Mapping[str, np.ndarray]], dict[str, float]
]  # plans by name -> mean damage on the select rows, nats/token


@dataclass(frozen=True)
class Scores:
    """Damage tables [units, formats], formats narrowest first, and the measured damage of uniform high they are added to."""

    tables: dict[str, np.ndarray]
    at_high: float
    source: str = "measured single-unit damage"

    def predicted(self, table: np.ndarray, choice: np.ndarray) -> float:
        """Return the damage of a choice [units] by one of the tables, nats/token.

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


@dataclass(frozen=True)
class PlanningProblem:
    """What a plan is for. `formats`: the candidates, narrowest first; `codes`: whose quantized weights they are (`Bank.identity`).

    `test_blocks`: of the rows that it is judged on (see `stats.bootstrap`); `recipes`: what another program would make of the model, by
    name, module -> format.
    """

    info: ModelInfo
    modules: Sequence[Module]
    formats: Sequence[str]
    quantizer: str
    codes: str = ""
    seed: int = 0
    test_blocks: Sequence[int] | None = None
    recipes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def units(self) -> list[Unit]:
        return units_of(self.modules)

    @property
    def every_format(self) -> list[str]:
        """Return all candidates of all modules, each once."""
        names = (name for module in self.modules for name in module.formats(self.formats))
        return list(dict.fromkeys([*self.formats, *names]))

    @property
    def outside(self) -> dict[str, Sequence[str]]:
        """Return the candidates of each unit that is outside the decoder layers."""
        return {unit.name: unit.modules[0].candidates for unit in self.units if unit.part}


@dataclass(frozen=True)
class PlannerHooks:
    """`on_select`: choices by name -> mean damage on the select rows. Without `probe` the knapsack plans stand as they are."""

    scores: Scores
    on_select: MeasureDamage
    probe: Probe | None = None
    on_step: Callable[[Step], None] | None = None
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


def search(problem: PlanningProblem, budget: Budget, hooks: PlannerHooks, starts: Mapping[str, Ints] | None = None) -> Candidate:
    """Return the best plan found under `budget`. `starts`: further plans to begin from; those that do not fit are left out."""
    costs = costs_of(budget, problem.units, problem.formats, problem.info)
    if costs.limit is not None:
        return search_within(costs.cost, costs.limit, hooks, starts)
    best, selected, tried, _ = smallest_knapsack(hooks.scores, costs.cost, budget.value, hooks.on_select, hooks.where)
    candidate = _candidate(hooks.scores, best, selected, total_cost(costs.cost, best.choice), tried)
    return _smaller(costs.cost, budget.value, hooks, candidate) if hooks.probe else candidate


def search_within(
    cost: Ints, limit: int, hooks: PlannerHooks, starts: Mapping[str, Ints] | None = None, near: Refined | None = None
) -> Candidate:
    """Return the best plan of cost at most `limit`. cost: [units, formats]; `near`: of a budget near this one, for a shorter search."""
    knapsacks = {plan.scores: plan for plan in knapsack_plans(hooks.scores, cost, limit)}
    plans = {name: plan.choice for name, plan in knapsacks.items()}
    fitting = {name: choice for name, choice in (starts or {}).items() if total_cost(cost, choice) <= limit}
    refined = None
    if hooks.probe:
        refined = refine(hooks.probe, cost, limit, {**plans, **fitting}, hooks.on_step, near, "short" if near else hooks.effort)
    damage = hooks.on_select({**({"refined": refined.choice} if refined else {}), **plans, **fitting})
    best = min(knapsacks.values(), key=lambda plan: damage[plan.scores])  # ties: the first
    more = {"reason": refined.reason, "steps": refined.steps} if refined else {}
    candidate = _or_start(_candidate(hooks.scores, best, damage[best.scores], limit, damage, **more), hooks.scores, fitting)
    if refined is None:
        return candidate
    candidate = replace(candidate, near=refined)
    selected = damage["refined"]
    if candidate.selected < selected:
        return candidate
    predicted = refined.predicted if np.isfinite(refined.predicted) else best.predicted
    method = {"method": REFINED, "gap": refined.gap, "select_damage": selected}
    return replace(
        candidate, choice=refined.choice, predicted=predicted, selected=selected, solver={**candidate.solver, **method}
    )


def _or_start(candidate: Candidate, scores: Scores, starts: Mapping[str, Ints]) -> Candidate:
    """Return the start that does less damage on the select rows than the candidate, or the candidate."""
    damage = candidate.solver["select_damage_by_scores"]
    best = min(starts, key=lambda name: damage[name], default=None)
    if best is None or damage[best] >= candidate.selected:
        return candidate
    predicted = scores.predicted(scores.tables.get("mean of both", next(iter(scores.tables.values()))), starts[best])
    solver = {**candidate.solver, "method": f"the {best}", "select_damage": damage[best]}
    return replace(candidate, choice=starts[best], predicted=predicted, selected=damage[best], solver=solver)


def _smaller(cost: Ints, tolerated: float, hooks: PlannerHooks, start: Candidate) -> Candidate:
    """Return the smallest refined plan below `start`'s size whose damage is within `tolerated`, or `start`."""
    least = int(cost.min(axis=1).sum())
    failed, step = least - 1, max(1, round(FIRST_STEP * (int(cost.max(axis=1).sum()) - least)))
    best = start
    for _ in range(SMALLER):
        limit = best.limit - step if failed < least else (best.limit + failed) // 2
        if limit <= failed or limit < least or limit >= best.limit:
            break
        candidate = search_within(cost, limit, hooks, near=best.near)
        if candidate.selected <= tolerated:
            best, step = replace(candidate, limit=total_cost(cost, candidate.choice)), 2 * step
        else:
            failed = limit
    return best


def _candidate(
    scores: Scores, best: KnapsackPlan, selected: float, limit: int, tried: Mapping[str, float], **more: Any
) -> Candidate:
    solver = {
        "method": KNAPSACK.format(scores.source),
        "scores": best.scores,
        "gap": best.gap,
        "select_damage": selected,
        "select_damage_by_scores": dict(tried),
        **more,
    }
    return Candidate(best.choice, best.predicted, selected, limit, solver)


# --- knapsacks on scores -----------------------------------------------------------------------------------------------


def damage_tables(
    units: Sequence[str],
    formats: Sequence[str],
    damage: Mapping[str, Mapping[str, Mapping[str, float]]],
    base: Mapping[str, float],
    candidates: Mapping[str, Sequence[str]] | None = None,
) -> Scores:
    """Return the tables of the two screens of units (see `measure.screens.UnitScreen`); `formats` narrowest first.

    candidates: of units outside the layers, whose widest one both bases have.
    """
    low, high, own = formats[0], formats[-1], candidates or {}

    def around(name: str) -> np.ndarray:
        """Return what each unit in each format adds to the damage of uniform `name`, 0 for the base's own format. [units, formats]"""
        key = f"uniform:{name}"

        def of_unit(unit: str) -> list[float]:
            unchanged = own[unit][-1] if unit in own else name
            return [damage[key][unit][fmt] - base[key] if fmt != unchanged else 0.0 for fmt in own.get(unit, formats)]

        return np.array([of_unit(unit) for unit in units])

    return scores_of_bases(around(high), around(low), base[f"uniform:{high}"])


def scores_of_bases(wide: np.ndarray, narrow: np.ndarray, at_high: float, source: str = Scores.source) -> Scores:
    """Return the tables of what each unit adds in each format around uniform high (`wide`) and around uniform low (`narrow`), 0 for the base's own."""
    low = narrow - narrow[:, -1:]
    return Scores({"high": wide, "low": low, "mean of both": (wide + low) / 2}, at_high, source)


def knapsack_plans(scores: Scores, cost: Ints, limit: int) -> list[KnapsackPlan]:
    """Return the proven optimum of each table under `limit`; equal plans once."""
    plans: dict[bytes, KnapsackPlan] = {}
    for name, table in scores.tables.items():
        solution = solve_knapsack(table, cost, limit)
        predicted = scores.predicted(scores.tables.get("mean of both", table), solution.choice)
        plans.setdefault(solution.choice.tobytes(), KnapsackPlan(name, solution.choice, predicted, solution.gap))
    return list(plans.values())


def best_knapsack(scores: Scores, cost: Ints, limit: int, measure: MeasureDamage) -> tuple[KnapsackPlan, float, dict[str, float]]:
    """Return the knapsack plan with the least measured damage, that damage, and the damage of all by name."""
    plans = knapsack_plans(scores, cost, limit)
    measured = measure({plan.scores: plan.choice for plan in plans})
    best = min(plans, key=lambda plan: measured[plan.scores])  # ties: the first
    return best, measured[best.scores], measured


def smallest_knapsack(
    scores: Scores, cost: Ints, tolerated: float, measure: MeasureDamage, where: str = PlannerHooks.where
) -> tuple[KnapsackPlan, float, dict[str, float], int]:
    """Return the smallest plan whose measured damage is within `tolerated` (nats/token), as `best_knapsack`, and the limit it was found under.

    `where` ends the sentence of a refusal: what the damages are. Raises UserError where even the widest format does more.
    """
    least, most = int(cost.min(axis=1).sum()), int(cost.max(axis=1).sum())
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
        result = (*best_knapsack(scores, cost, middle, measure), middle)
        if result[1] <= tolerated:
            best, most = result, middle
        else:
            least = middle
    return best
