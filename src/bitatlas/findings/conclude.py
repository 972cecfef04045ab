"""Numbers -> statements: who does the damage, where the zones are, which rules of thumb hold, whether the plan is worth having.

Each stage of a survey hands in one record of evidence. Damage comes as arrays with one value a row; nothing here needs the model. Every
statement carries its evidence or the word "inconclusive", and what was not measured is left out or said so. Fields of the evidence on
attention and on the plan, and of the conclusions, are called as in the atlas, which takes them over as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import ArrayLike

from bitatlas.findings.correlations import layer_correlations, layer_measures, sparsity_findings, sparsity_of, untested_sparsity
from bitatlas.findings.folk import RULED, folk_findings, marking_rules, math_needs_more, value_and_down
from bitatlas.findings.reliability import (
    calibration_findings,
    reliability_findings,
    shapley_check,
    shapley_findings,
    with_rows_needed,
)
from bitatlas.findings.shares import LayerRows, Shares, layer_records, misfit, shares_of
from bitatlas.findings.statements import (
    ablation_findings,
    attention_findings,
    layer_findings,
    measure_findings,
    plan_findings,
    task_findings,
    zone_findings,
)
from bitatlas.findings.tasks import TaskRows, task_damages, task_text_findings, width_findings
from bitatlas.findings.units import unit_records
from bitatlas.findings.zones import joint_findings, with_low_share, zones
from bitatlas.records import (
    Ablation,
    AttentionHead,
    AttentionLayer,
    Calibration,
    Correlation,
    CurvePoint,
    Finding,
    HeadMap,
    JointDamage,
    KindDamage,
    Layer,
    Module,
    Plan,
    ShapleyCheck,
    Sparsity,
    TaskDamage,
    TaskPair,
    TaskScore,
    UnitDamage,
    WeightProfile,
    Zone,
)


@dataclass(frozen=True)
class DamageEvidence:
    """Damage of layers, and of kinds of modules and units in the order in which they come among `modules`."""

    layers: LayerRows
    modules: Sequence[Module] = ()
    kinds: LayerRows | None = None
    units: LayerRows | None = None  # on the fit rows
    order_models: int = 0  # that were measured for the orders of the layers
    joint: JointDamage | None = None


@dataclass(frozen=True)
class AttentionEvidence:
    """Attention at every base, and heads removed from the reference."""

    attention: list[AttentionLayer] = field(default_factory=list)
    heads: list[AttentionHead] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    head_maps: list[HeadMap] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was not read of this checkpoint, and why


@dataclass(frozen=True)
class PlanEvidence:
    """The judged plan, those at other sizes from small to large, and everything on the curve."""

    plan: Plan | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    calibration: Calibration | None = None


@dataclass(frozen=True)
class TaskEvidence:
    """The tasks: scores and pairs, and the outcomes they come from (task -> precision -> right or wrong, [items])."""

    scores: list[TaskScore] = field(default_factory=list)
    pairs: list[TaskPair] = field(default_factory=list)
    outcomes: Mapping[str, Mapping[str, ArrayLike]] = field(default_factory=dict)
    math_tasks: Collection[str] = ()  # those whose items are word problems
    items: list[dict[str, Any]] = field(default_factory=list)  # one line a task, precision and item
    texts: Mapping[str, TaskRows] = field(default_factory=dict)  # damage on each task's own text
    general: LayerRows | None = None  # the same on test rows of the same length


@dataclass(frozen=True)
class Evidence:
    """What the stages of a survey measured, one record a stage."""

    damage: DamageEvidence
    weights: list[WeightProfile] = field(default_factory=list)
    attention: AttentionEvidence = field(default_factory=AttentionEvidence)
    plan: PlanEvidence = field(default_factory=PlanEvidence)
    tasks: TaskEvidence = field(default_factory=TaskEvidence)


@dataclass(frozen=True)
class Conclusions:
    """What goes into the atlas. `findings` in reading order: plan, layers, zones, folk rules, tasks, attention."""

    layers: list[Layer]
    zones: list[Zone]
    correlations: list[Correlation]
    task_damage: list[TaskDamage]
    sparsity: Sparsity | None
    shapley: ShapleyCheck | None
    units: list[UnitDamage] = field(default_factory=list)
    unit_correlations: list[Correlation] = field(default_factory=list)
    kinds: list[KindDamage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def conclude(evidence: Evidence, tolerance: float, seed: int = 0) -> Conclusions:
    """Return everything that can be said. `tolerance`: damage that a user accepts, nats/token."""
    damage, weights, plan, tasks = evidence.damage, evidence.weights, evidence.plan.plan, evidence.tasks
    rows, joint = damage.layers, damage.joint
    shares = shares_of(rows, seed)
    layers = with_rows_needed(layer_records(rows, tolerance, shares, seed), rows, shares, tolerance, seed)
    runs = zones(rows, layers, joint.together if joint else (), shares, seed)
    sparsity = sparsity_of(weights, rows.layers)
    measures = layer_measures(weights, evidence.attention.attention, rows.layers, rows.low_name)
    inside = unit_records(damage.modules, weights, damage.units, damage.kinds, seed) if damage.units and damage.kinds else None
    conclusions = Conclusions(
        layers=layers,
        zones=with_low_share(runs, damage.modules, plan.modules, rows.low_name) if plan else runs,
        correlations=layer_correlations(measures, shares, untested_sparsity(sparsity), seed),
        task_damage=task_damages(tasks.texts, tasks.general, seed),
        sparsity=sparsity,
        shapley=None if rows.orders is None else shapley_check(rows.orders, damage.order_models, rows, seed),
        **(vars(inside) if inside else {}),
    )
    return replace(conclusions, findings=statements(evidence, conclusions, shares, tolerance, seed))


def statements(evidence: Evidence, reached: Conclusions, shares: Shares, tolerance: float, seed: int) -> list[Finding]:
    """Return the statements on evidence and the conclusions reached from it, in reading order."""
    damage, attention, tasks, rows = evidence.damage, evidence.attention, evidence.tasks, evidence.damage.layers
    about_measures, bases = measure_findings(reached.correlations, RULED), (rows.high_base, rows.low_base)
    return [
        *plan_findings(evidence.plan.plan, reached.zones, rows.low_name),
        *calibration_findings(evidence.plan.calibration),
        *layer_findings(reached.layers, misfit(rows, seed), tolerance),
        *joint_findings(damage.joint, tolerance),
        *shapley_findings(reached.shapley),
        *reliability_findings(rows, reached.layers, seed),
        *(finding for finding in about_measures if finding.topic == "layers"),
        *sparsity_findings(reached.sparsity),
        *zone_findings(reached.zones),
        *folk_findings(shares, tolerance),
        *marking_rules(reached.correlations, shares),
        value_and_down(damage.modules, damage.kinds, seed),
        *task_findings(tasks.scores, tasks.pairs),
        *width_findings(tasks.pairs),
        *([math_needs_more(tasks.outcomes, tasks.math_tasks, tasks.scores, *bases, seed)] if tasks.outcomes else []),
        *task_text_findings(reached.task_damage),
        *attention_findings(attention.attention, rows.low_name, rows.high_name),
        *ablation_findings(attention.ablations),
        *(finding for finding in about_measures if finding.topic == "attention"),
    ]
