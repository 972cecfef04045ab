"""From scores to a judged plan: chosen on the select rows, measured once on the test rows beside what anybody could have done.

The knapsack plans of the scores are the starts of the refinement and its fallback: the least damage on the select rows wins.
A tolerated damage is met by knapsack plans alone (a bisection would refine a dozen times).
`measure` is the only way to the model; it is handed in, so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitatlas.evaluation.bootstrap import measured
from bitatlas.findings import verdict_on_plan
from bitatlas.formats import FORMATS
from bitatlas.planning.baselines import baselines, outside_uniform
from bitatlas.planning.budget import assignment_of, costs_of, size_of, units_of
from bitatlas.planning.choose import Candidate, Measure, Scores, candidates, choose, choose_smallest
from bitatlas.planning.refine import Probe, Step, refine
from bitatlas.records import Baseline, Budget, CurvePoint, Measured, ModelInfo, Module, Plan, PlanDamage, PlanModel
from bitatlas.words import number

NOT_A_CANDIDATE = "not in --formats"

REFINED = "quadratic model re-based at measured plans, then measured swaps"
Assignment = dict[str, str]
MeasureRows = Callable[[Mapping[str, Assignment], str], dict[str, np.ndarray]]  # (plans by name, split) -> damage [rows]


@dataclass(frozen=True)
class Judged:
    """The plan with its verdict, and every plan that was measured on the test rows."""

    plan: Plan
    curve: list[CurvePoint]


def find_and_judge(
    info: ModelInfo,
    modules: Sequence[Module],
    formats: Sequence[str],
    quantizer: str,
    budget: Budget,
    scores: Scores,
    measure: MeasureRows,
    seed: int,
    most_critical: Sequence[int] = (),
    probe: Probe | None = None,
    told: Callable[[Step], None] | None = None,
) -> Judged:
    """Choose a plan under `budget` and judge it on the test rows. `formats`: narrowest first; `most_critical`: layers, worst first.

    Without `probe` the knapsack plans stand as they are. `told` gets every step of the refinement.
    """
    units = units_of(modules)
    costs = costs_of(budget, units, formats, info)

    def on_select(plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        found = measure({name: assignment_of(units, formats, choice) for name, choice in plans.items()}, "select")
        return {name: float(rows.mean()) for name, rows in found.items()}

    more: dict[str, Any] = {}
    if costs.limit is not None and probe is not None:
        best, selected, tried, more = choose_refined(probe, scores, costs.cost, costs.limit, on_select, told)
        limit = costs.limit
    elif costs.limit is None:
        best, selected, tried, _ = choose_smallest(scores, costs.cost, budget.value, on_select)
        limit = int(costs.cost[np.arange(len(units)), best.choice].sum())
    else:
        best, selected, tried = choose(scores, costs.cost, costs.limit, on_select)
        limit = costs.limit
    plan = unverified_plan(info, modules, formats, quantizer, budget, best, selected, tried, seed)
    plan = replace(plan, solver={**plan.solver, **more})
    rules = baselines(units, costs.cost, limit, seed, formats, most_critical)
    others = {name: assignment_of(units, formats, choice) for name, choice in rules}
    outside = outside_uniform(budget, units, formats, info, limit)
    if outside:
        others = {f"uniform {outside} ({NOT_A_CANDIDATE})": {m.name: outside for m in modules}, **others}
    return _judge(plan, others, info, modules, measure({"plan": plan.modules, **others}, "test"), seed)


def choose_refined(
    probe: Probe, scores: Scores, cost: np.ndarray, limit: int, measure: Measure, told: Callable[[Step], None] | None
) -> tuple[Candidate, float, dict[str, float], dict[str, Any]]:
    """The refined plan, or the knapsack plan that beats it on the select rows; its damage, all damages, and what goes into `solver`."""
    found = {candidate.scores: candidate for candidate in candidates(scores, cost, limit)}
    refined = refine(probe, cost, limit, {name: candidate.choice for name, candidate in found.items()}, told)
    measured = measure({"refined": refined.choice, **{name: candidate.choice for name, candidate in found.items()}})
    knapsack = found[min(found, key=lambda name: measured[name])]
    more = {"reason": refined.reason, "steps": refined.steps}
    if measured[knapsack.scores] < measured["refined"]:
        return knapsack, measured[knapsack.scores], measured, more
    predicted = refined.predicted if np.isfinite(refined.predicted) else knapsack.predicted
    best = Candidate(knapsack.scores, refined.choice, predicted, refined.gap)
    return best, measured["refined"], measured, {**more, "method": REFINED}


def unverified_plan(
    info: ModelInfo,
    modules: Sequence[Module],
    formats: Sequence[str],
    quantizer: str,
    budget: Budget,
    best: Candidate,
    selected: float | None,
    tried: Mapping[str, float],
    seed: int,
) -> Plan:
    """A plan whose damage is predicted. `selected`, `tried`: measured damage on the select rows, of it and of all candidates."""
    assignment = assignment_of(units_of(modules), formats, best.choice)
    solver = {
        "method": "certified knapsack on measured single-unit damage",
        "scores": best.scores,
        "gap": best.gap,
        "select_damage": selected,
        "select_damage_by_scores": dict(tried),
        "seed": seed,
    }
    return Plan(
        model=PlanModel(info.name, info.revision, info.weights_sha256),
        formats={name: FORMATS[name] for name in formats},
        quantizer=quantizer,
        modules=assignment,
        budget=budget,
        size=size_of(modules, assignment, info),
        damage=PlanDamage(best.predicted, None),
        solver=solver,
    )


def on_tolerance(damage: Measured, tolerated: float) -> str:
    """Whether the test rows bear out what the select rows promised; choosing among many plans on them flatters the chosen one."""
    low, high = damage.ci95 or (-np.inf, np.inf)
    if high <= tolerated:
        return f"within the tolerated {number(tolerated)} on test rows"
    shown = "above" if low > tolerated else "not shown to be within"
    return f"{shown} the tolerated {number(tolerated)} on test rows"


def _judge(
    plan: Plan,
    others: Mapping[str, Assignment],
    info: ModelInfo,
    modules: Sequence[Module],
    rows: dict[str, np.ndarray],
    seed: int,
) -> Judged:
    """Add measured damage, baselines and the verdict."""
    verdict = verdict_on_plan(rows["plan"], {name: rows[name] for name in others}, seed=seed)
    text = verdict.text
    if NOT_A_CANDIDATE in verdict.winner:
        text += f"; add {verdict.winner.split()[1]} to --formats"
    if plan.budget.kind == "max_damage":
        text += f"; {on_tolerance(measured(rows['plan'], 'nats/token', 'plan', 'test', seed), plan.budget.value)}"
    sizes = {name: size_of(modules, assignment, info) for name, assignment in others.items()}
    damage = measured(rows["plan"], "nats/token", "plan", "test", seed)
    lines = [
        Baseline(name, sizes[name].code_bits, sizes[name].quantized_bytes, one, difference)
        for name, one, difference in verdict.baselines
    ]
    judged = Plan(
        **{
            **plan.__dict__,
            "damage": PlanDamage(plan.damage.predicted, damage),
            "baselines": lines,
            "recommended": verdict.recommended,
            "verdict": text,
        }
    )
    size = plan.size
    curve = [CurvePoint("plan", "plan", size.code_bits, size.stored_bits, size.total_bytes, damage)]
    for line in lines:
        own = sizes[line.name]
        kind = "random" if line.name.startswith("random") else "baseline"
        curve.append(CurvePoint(line.name, kind, own.code_bits, own.stored_bits, own.total_bytes, line.damage))
    return Judged(judged, curve)
