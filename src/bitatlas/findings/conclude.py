"""Numbers -> statements: who does the damage, where the zones are, which rules of thumb hold, whether the plan is worth having.

    shares.py        share of the damage, criticality, and the verdict on each layer
    joint.py         which safe layers are safe together
    zones.py         runs of layers that are about equally critical, and how many there are
    correlations.py  do cheap measures tell where the damage is?
    sparsity.py      weights near 0 beside a Gaussian's, and whether the layers differ
    ablation.py      heads removed: are they what they are called?
    folk.py          rules of thumb, each tested on this checkpoint
    tasks.py         tasks on their own text, and the widths that hold them
    parts.py         the same as for layers for units and for kinds of modules
    kinds.py         the rule of thumb about value and down projections
    stability.py     how far the ranking of the layers can be trusted, and how many rows would tell more
    shapley_check.py the layers' shares against sampled orders of the layers
    verdict.py       the plan against its baselines
    prediction.py    predicted against measured damage around the plan
    statements.py    the sentences, from records

Everything measured comes in as arrays with one value a test row; nothing here needs the model. Every statement carries its
evidence or the word "inconclusive".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from bitatlas.findings.ablation import ablation_findings
from bitatlas.findings.correlations import alike, layer_correlations, layer_measures, sparsity_findings, sparsity_of
from bitatlas.findings.folk import RULED, folk_findings, marking_rules, math_needs_more, value_and_down
from bitatlas.findings.reliability import calibration_findings, reliability_findings, shapley_findings, with_rows_needed
from bitatlas.findings.shares import LayerRows, layer_records, misfit, shares_of
from bitatlas.findings.statements import (
    attention_findings,
    layer_findings,
    measure_findings,
    plan_findings,
    task_findings,
    zone_findings,
)
from bitatlas.findings.tasks import TaskRows, task_damages, task_text_findings, width_findings
from bitatlas.findings.zones import joint_findings, with_low_share, zones
from bitatlas.records import (
    Ablation,
    AttentionLayer,
    Calibration,
    Correlation,
    Finding,
    JointDamage,
    Layer,
    Module,
    Plan,
    ShapleyCheck,
    Sparsity,
    TaskDamage,
    TaskPair,
    TaskScore,
    WeightProfile,
    Zone,
)


@dataclass(frozen=True)
class TaskEvidence:
    """The tasks: scores and pairs, and the outcomes they come from (task -> precision -> right or wrong, [items])."""

    scores: Sequence[TaskScore] = ()
    pairs: Sequence[TaskPair] = ()
    outcomes: Mapping[str, Mapping[str, ArrayLike]] | None = None
    math_tasks: Collection[str] = ()  # those whose items are word problems
    texts: Mapping[str, TaskRows] = field(default_factory=dict)  # damage on each task's own text
    general: LayerRows | None = None  # the same on test rows of the same length


@dataclass(frozen=True)
class Conclusions:
    """What goes into the atlas. `findings` in reading order: plan, layers, zones, folk rules, tasks, attention."""

    layers: list[Layer]
    zones: list[Zone]
    correlations: list[Correlation]
    findings: list[Finding]
    task_damage: list[TaskDamage] = field(default_factory=list)
    sparsity: Sparsity | None = None


def conclude(
    rows: LayerRows,
    tolerance: float,
    *,
    modules: Sequence[Module] = (),
    weights: Sequence[WeightProfile] = (),
    attention: Sequence[AttentionLayer] = (),
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    kinds: LayerRows | None = None,
    shapley: ShapleyCheck | None = None,
    ablations: Sequence[Ablation] = (),
    joint: JointDamage | None = None,
    tested: TaskEvidence | None = None,
    seed: int = 0,
) -> Conclusions:
    """Everything that can be said. `tolerance`: damage that a user accepts, nats/token. What was not measured is left out or said so.

    kinds: damage of all modules of a kind, in the order in which kinds come among the modules.
    """
    tested = tested or TaskEvidence()
    shares = shares_of(rows, seed)
    layers = with_rows_needed(layer_records(rows, tolerance, shares, seed), rows, shares, tolerance, seed)
    found_zones = zones(rows, layers, joint.together if joint else (), shares, seed)
    if plan is not None:
        found_zones = with_low_share(found_zones, modules, plan.modules, rows.low_name)
    measures = layer_measures(weights, attention, rows.layers, rows.low_name)
    sparsity = sparsity_of(weights, rows.layers)
    correlated = layer_correlations(measures, shares, alike(sparsity), seed)
    about_measures = measure_findings(correlated, RULED)
    damage = task_damages(tested.texts, tested.general, seed)
    findings = [
        *plan_findings(plan, found_zones, rows.low_name),
        *calibration_findings(calibration),
        *layer_findings(layers, misfit(rows, seed), tolerance),
        *joint_findings(joint, tolerance),
        *shapley_findings(shapley),
        *reliability_findings(rows, layers, seed),
        *(finding for finding in about_measures if finding.topic == "layers"),
        *sparsity_findings(sparsity),
        *zone_findings(found_zones),
        *folk_findings(shares, tolerance),
        *marking_rules(correlated, shares),
        value_and_down(modules, kinds, seed),
        *task_findings(tested.scores, tested.pairs),
        *width_findings(tested.pairs),
        *_about_math(tested, rows, seed),
        *task_text_findings(damage),
        *attention_findings(attention, rows.low_name, rows.high_name),
        *ablation_findings(ablations),
        *(finding for finding in about_measures if finding.topic == "attention"),
    ]
    return Conclusions(layers, found_zones, correlated, findings, damage, sparsity)


def _about_math(tested: TaskEvidence, rows: LayerRows, seed: int) -> list[Finding]:
    if not tested.outcomes:
        return []
    return [math_needs_more(tested.outcomes, tested.math_tasks, tested.scores, rows.high_base, rows.low_base, seed)]
