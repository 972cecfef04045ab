"""From a choice to a judged plan: measured once on the test rows, beside what anybody could have done with the same room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitatlas.evaluation.bootstrap import measured
from bitatlas.findings import verdict_on_plan
from bitatlas.formats import FORMATS
from bitatlas.planning.baselines import RANDOM_PLANS, baselines, outside_uniform
from bitatlas.planning.budget import assignment_of, costs_of, size_of
from bitatlas.planning.search import Found, Subject
from bitatlas.records import Baseline, Budget, CurvePoint, Measured, Plan, PlanDamage, PlanModel
from bitatlas.words import byte_size, given

NOT_A_CANDIDATE = "not in --formats"

Assignment = dict[str, str]
MeasureRows = Callable[[Mapping[str, Assignment], str], dict[str, np.ndarray]]  # (plans by name, split) -> damage [rows]


CURVE = "curve"  # kind of a point of the atlas's curve: a plan at another size


@dataclass(frozen=True)
class Judged:
    """The plan with its verdict, and every plan that was measured on the test rows."""

    plan: Plan
    curve: list[CurvePoint]


def unverified_plan(subject: Subject, budget: Budget, found: Found) -> Plan:
    """A plan whose damage is predicted."""
    info, modules = subject.info, subject.modules
    assignment = assignment_of(subject.units, subject.formats, found.choice)
    return Plan(
        model=PlanModel(info.name, info.revision, info.weights_sha256),
        formats={name: FORMATS[name] for name in subject.formats},
        quantizer=subject.quantizer,
        modules=assignment,
        budget=budget,
        size=size_of(modules, assignment, info),
        damage=PlanDamage(found.predicted, None),
        solver={**found.solver, "seed": subject.seed},
        codes=subject.codes,
    )


def judge(
    subject: Subject,
    budget: Budget,
    found: Found,
    measure: MeasureRows,
    most_critical: Sequence[int] = (),
    random: int = RANDOM_PLANS,
) -> Judged:
    """Measure the plan and the baselines of at most its budget on the test rows. `most_critical`: layers, worst first; `random`: plans."""
    plan = unverified_plan(subject, budget, found)
    cost = costs_of(budget, subject.units, subject.formats, subject.info).cost
    rules = baselines(subject.units, cost, found.limit, subject.seed, subject.formats, most_critical, random)
    others = {name: assignment_of(subject.units, subject.formats, choice) for name, choice in rules}
    outside = outside_uniform(budget, subject.units, subject.formats, subject.info, found.limit)
    if outside:
        others = {f"uniform {outside} ({NOT_A_CANDIDATE})": {m.name: outside for m in subject.modules}, **others}
    return _judged(subject, plan, others, measure({"plan": plan.modules, **others}, "test"))


def curve_point(judged: Judged) -> CurvePoint:
    """The point of a plan that was found for another size than the survey's own."""
    return replace(judged.curve[0], name=f"plan of at most {byte_size(int(judged.plan.budget.value))}", kind=CURVE)


def on_tolerance(damage: Measured, tolerated: float) -> str:
    """Whether the test rows bear out what the select rows promised; choosing among many plans on them flatters the chosen one."""
    low, high = damage.ci95 or (-np.inf, np.inf)
    if high <= tolerated:
        return f"within the tolerated {given(tolerated)} on test rows"
    shown = "above" if low > tolerated else "not shown to be within"
    return f"{shown} the tolerated {given(tolerated)} on test rows"


def _judged(subject: Subject, plan: Plan, others: Mapping[str, Assignment], rows: Mapping[str, np.ndarray]) -> Judged:
    """Add measured damage, baselines and the verdict."""
    sizes = {name: size_of(subject.modules, assignment, subject.info) for name, assignment in others.items()}
    bytes_of = {"plan": plan.size.quantized_bytes} | {name: size.quantized_bytes for name, size in sizes.items()}
    blocks = subject.test_blocks
    verdict = verdict_on_plan(rows["plan"], {name: rows[name] for name in others}, "test", subject.seed, blocks, bytes_of)
    damage = measured(rows["plan"], "nats/token", "plan", "test", subject.seed, blocks)
    text = verdict.text
    if NOT_A_CANDIDATE in verdict.winner:
        text += f"; add {verdict.winner.split()[1]} to --formats"
    if plan.budget.kind == "max_damage":
        text += f"; {on_tolerance(damage, plan.budget.value)}"
    lines = [
        Baseline(name, sizes[name].code_bits, sizes[name].quantized_bytes, one, difference)
        for name, one, difference in verdict.baselines
    ]
    done = replace(
        plan,
        damage=PlanDamage(plan.damage.predicted, damage),
        baselines=lines,
        recommended=verdict.recommended,
        verdict=text,
        standing=verdict.standing,
    )
    size = plan.size
    curve = [CurvePoint("plan", "plan", size.code_bits, size.stored_bits, size.total_bytes, damage)]
    for line in lines:
        own = sizes[line.name]
        kind = "random" if line.is_random else "baseline"
        curve.append(CurvePoint(line.name, kind, own.code_bits, own.stored_bits, own.total_bytes, line.damage))
    return Judged(done, curve)
