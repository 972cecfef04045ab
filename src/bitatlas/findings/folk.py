"""Rules of thumb about low bits, each turned into a number that this checkpoint can contradict.

Every test has one effect with a 95 % interval over rows and three outcomes: *holds*, *does not hold* (the interval lies on
the other side), *inconclusive*. What is tested is written next to each rule. Effects on criticality say which layers are worse
than others of their size; whether they are harmless is a second question, answered by the tolerance.
Left out: a correction over the rules (each is a question of its own, asked once), and anything about other checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.evaluation.bootstrap import percentile_interval, resample_means, two_sided_p
from bitatlas.findings.correlations import Floats, permutation_p, spearman
from bitatlas.findings.shares import Shares
from bitatlas.records import Finding, Measured, TaskScore
from bitatlas.words import given, interval, listed, named_layers, number, percent

HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"
CHANCE_LEVEL = 0.05
RULED = ("attention entropy", "head specialization")  # measures that a rule is about
POWER_SIGMAS = 2.80  # standard errors that a two-sided 5 % test finds with 80 % power

EARLY = "early layers are safe"
LATE = "late layers are critical"
SPARSE = "sparse layers are safe"
SHARP = "low attention entropy marks critical layers"
SPECIAL = "specialized heads mark critical layers"
ENDS = "the first and last layers matter most"
MATH = "math needs higher precision"


def folk_findings(shares: Shares, tolerance: float, sparsity: Floats | None = None, seed: int = 0) -> list[Finding]:
    """The rules about layers. sparsity: [layers]; `tolerance` in nats/token."""
    rules = [early_is_safe(shares, tolerance), late_is_critical(shares)]
    rules.append(sparse_is_safe(shares, sparsity, seed))
    rules.append(ends_matter_most(shares))
    return rules


def not_tested(topic: str, claim: str, why: str) -> Finding:
    return Finding(topic, claim, OPEN, f"Not tested: {why}.")


def _unfit(shares: Shares, least: int) -> str | None:
    """Why the layers of this model cannot be compared, if they cannot."""
    if shares.rows.layers < least:
        return f"the model has {shares.rows.layers} layers, the test needs {least}"
    return None if shares.defined else "the low format does no more damage than the high one beyond chance"


def side_of(effect: Measured, wanted: int) -> str:
    """Where an interval lies: on the `wanted` side of 0 (holds), on the other (fails) or on both (open)."""
    assert effect.ci95 is not None
    low, high = effect.ci95
    if (low > 0 and wanted > 0) or (high < 0 and wanted < 0):
        return HOLDS
    return FAILS if low > 0 or high < 0 else OPEN


def early_is_safe(shares: Shares, tolerance: float) -> Finding:
    """Two conditions. The first half is less critical than the second (pooled criticality, first minus second, below 0), and lowering
    the whole first half adds no more than the tolerance (sum of its Shapley values). Fails where either interval is on the other side.
    An odd middle layer belongs to neither half.
    """
    if why := _unfit(shares, 2):
        return not_tested("folk", EARLY, why)
    half = shares.rows.layers // 2
    first, second = list(range(half)), list(range(shares.rows.layers - half, shares.rows.layers))
    (mean_1, resampled_1), (mean_2, resampled_2) = shares.criticality(first), shares.criticality(second)
    effect = shares.record(mean_1 - mean_2, resampled_1 - resampled_2, "ratio")
    damage = shares.damage(first)
    assert damage.ci95 is not None
    side = side_of(effect, -1)
    if side == FAILS or damage.ci95[0] > tolerance:
        verdict = FAILS
    else:
        verdict = HOLDS if side == HOLDS and damage.ci95[1] <= tolerance else OPEN
    order = {HOLDS: "less critical than", FAILS: "more critical than", OPEN: "not shown to differ from"}[side]
    within = "within" if damage.ci95[1] <= tolerance else "above" if damage.ci95[0] > tolerance else "not shown to be within"
    text = (
        f"The first half ({named_layers(first)}) is {order} the second: criticality {number(mean_1)} against {number(mean_2)}, "
        f"difference {interval(effect, unit=True)}. Its part of the damage is {interval(damage, unit=True)}, {within} the tolerance of {given(tolerance)}."
    )
    return Finding("folk", EARLY, verdict, text, effect, two_sided_p(resampled_1 - resampled_2, 0.0, shares.rows.rows))


def late_is_critical(shares: Shares) -> Finding:
    """Pooled criticality of the last third of the layers (at least one) above 1."""
    if why := _unfit(shares, 2):
        return not_tested("folk", LATE, why)
    layers = shares.rows.layers
    last = list(range(layers - max(1, layers // 3), layers))
    mean, resampled = shares.criticality(last)
    criticality = shares.record(mean, resampled, "ratio")
    verdict = side_of(shares.record(mean - 1, resampled - 1, "ratio"), +1)
    how = {HOLDS: "more than", FAILS: "less than", OPEN: "not shown to differ from"}[verdict]
    share, _ = shares.share(last)
    text = (
        f"The last third ({named_layers(last)}) does {percent(share)} of the damage with {percent(share / mean if mean else 0.0)} of the weights, "
        f"{how} its size: criticality {interval(criticality, unit=True)}."
    )
    return Finding("folk", LATE, verdict, text, criticality, two_sided_p(resampled, 1.0, shares.rows.rows))


def sparse_is_safe(shares: Shares, sparsity: Floats | None, seed: int = 0) -> Finding:
    """The sparser a layer, the less critical."""
    return _marks(SPARSE, "sparsity", sparsity, -1, shares, seed)


def attention_rules(shares: Shares, measures: Mapping[str, Floats], seed: int = 0) -> list[Finding]:
    """The rules about attention. measures: name -> [layers], of the unquantized model."""
    return [
        _marks(SHARP, "attention entropy", measures.get("attention entropy"), -1, shares, seed),
        _marks(SPECIAL, "head specialization", measures.get("head specialization"), +1, shares, seed),
    ]


def _marks(claim: str, name: str, measure: Floats | None, wanted: int, shares: Shares, seed: int) -> Finding:
    """Rank correlation of a measure with criticality on the `wanted` side of 0, and rarer than 5 % among random orders of the layers.

    It fails where the correlation is on the other side, just as rarely: in this model the rule is the wrong way round.
    """
    if measure is None or np.ptp(measure) == 0:
        return not_tested("folk", claim, f"{name} was not measured or is the same everywhere")
    if why := _unfit(shares, 4):
        return not_tested("folk", claim, why)
    # within a model, ranks of criticality are ranks of damage per weight
    per_weight = shares.rows.weights
    rho, resampled = spearman(measure, shares.mean / per_weight), spearman(measure, shares.resampled / per_weight)
    effect = shares.record(float(rho), resampled, "rank correlation")
    p = permutation_p(measure, shares.mean / per_weight, seed)
    verdict = side_of(effect, wanted)
    if p > CHANCE_LEVEL:
        verdict = OPEN
    text = (
        f"Rank correlation of {name} with criticality over {shares.rows.layers} layers: {interval(effect)} "
        f"(permutation p = {number(p)})."
    )
    return Finding("folk", claim, verdict, text, effect, p)


def ends_matter_most(shares: Shares) -> Finding:
    """The less critical one of the first and the last layer against the pooled criticality of all between: above 0."""
    if why := _unfit(shares, 3):
        return not_tested("folk", ENDS, why)
    last = shares.rows.layers - 1
    between = list(range(1, last))
    (first_mean, first), (last_mean, at_last) = shares.criticality([0]), shares.criticality([last])
    rest_mean, rest = shares.criticality(between)
    resampled = np.minimum(first, at_last) - rest
    effect = shares.record(min(first_mean, last_mean) - rest_mean, resampled, "ratio")
    text = (
        f"Criticality of layer 0 is {number(first_mean)}, of layer {last} {number(last_mean)}, of those between {number(rest_mean)}; "
        f"the lesser end minus those between: {interval(effect, unit=True)}."
    )
    return Finding("folk", ENDS, side_of(effect, +1), text, effect, two_sided_p(resampled, 0.0, shares.rows.rows))


def math_needs_more(
    outcomes: Mapping[str, Mapping[str, ArrayLike]],
    math_tasks: Collection[str],
    scores: Sequence[TaskScore],
    high: str,
    low: str,
    seed: int = 0,
) -> Finding:
    """Task x precision: do word problems lose more from precision `high` to `low` than questions do?

    outcomes: task -> precision -> right or wrong, [items]. A task counts when it is above chance at `high`: below, there is nothing to
    lose. Drops are in points, averaged over the tasks of a kind; items are resampled within their task.
    """
    fit = {score.task for score in scores if score.precision == high and score.above_chance}
    drops = {
        task: 100 * (np.asarray(right[high], dtype=np.float64) - np.asarray(right[low], dtype=np.float64))
        for task, right in outcomes.items()
        if task in fit and high in right and low in right
    }
    kinds = [[task for task in drops if (task in math_tasks) is wanted] for wanted in (True, False)]
    if not all(kinds):
        missing = listed(name for name, tasks in zip(("word problems", "questions"), kinds, strict=True) if not tasks)
        return not_tested("tasks", MATH, f"no task of {missing} was scored above chance at {high}")
    resampled_of = {task: resample_means(drop, seed=seed + place) for place, (task, drop) in enumerate(drops.items())}
    (math_mean, questions_mean) = (np.mean([drops[task].mean() for task in tasks]) for tasks in kinds)
    (on_math, on_questions) = (np.mean([resampled_of[task] for task in tasks], axis=0) for tasks in kinds)
    resampled, items = on_math - on_questions, [len(drop) for drop in drops.values()]
    ends = percentile_interval(resampled, min(items))
    ci95 = (float(ends[0]), float(ends[1])) if math.isfinite(ends[0]) else None
    where = "items:" + "+".join([*kinds[0], *kinds[1]])
    effect = Measured(float(math_mean - questions_mean), ci95, "points", high, where, sum(items))
    verdict = side_of(effect, +1) if ci95 else OPEN
    text = (
        f"From {high} to {low}, word problems ({listed(kinds[0])}) change by {number(-math_mean, 1)} points and questions ({listed(kinds[1])}) "
        f"by {number(-questions_mean, 1)}; word problems lose more by {interval(effect, unit=True)}."
    )
    if verdict == OPEN:
        text += f" A difference under about {number(POWER_SIGMAS * float(resampled.std()), 0)} points would not have shown."
    return Finding("tasks", MATH, verdict, text, effect, two_sided_p(resampled, 0.0, min(items)))
