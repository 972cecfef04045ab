"""Rules of thumb about low bits, each turned into a number that this checkpoint can contradict.

Every test has one effect with a 95 % interval over rows and three outcomes: *holds*, *does not hold* (the interval lies on
the other side), *inconclusive*. What is tested is written next to each rule. Effects on criticality say which layers are worse
than others of their size; whether they are harmless is a second question, answered by the tolerance. A rule about a group of layers has to
survive the leaving out of any one layer, since what one layer does is no rule about many. Rules that a measure marks critical layers take
their verdicts from one family of tests (see `findings.correlations`).
Left out: a correction over the other rules (each is a question of its own, asked once), and anything about other checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.findings.correlations import cannot_tell, significant_sign
from bitatlas.findings.shares import FAILS, HOLDS, OPEN, Floats, LayerRows, Shares, shares_of
from bitatlas.records import Correlation, Finding, Measured, Module, TaskScore
from bitatlas.records.text import given, interval, listed, named_layers, number, p_is, percent
from bitatlas.stats.bootstrap import interval_ends, percentile_interval, resample_means, smallest_p, two_sided_p

RULED = ("sparsity", "attention entropy", "head specialization")  # measures that a rule is about
POWER_SIGMAS = 2.80  # standard errors that a two-sided 5 % test finds with 80 % power

EARLY = "early layers are safe"
LATE = "late layers are critical"
SPARSE = "sparse layers are safe"
SHARP = "low attention entropy marks critical layers"
SPECIAL = "specialized heads mark critical layers"
ENDS = "the first and last layers matter most"
MATH = "math needs higher precision"
NO_DAMAGE = "the low format does no more damage than the high one beyond chance"
MARKS = ((SPARSE, "sparsity", -1), (SHARP, "attention entropy", -1), (SPECIAL, "head specialization", 1))  # measure, sign


def folk_findings(shares: Shares, tolerance: float) -> list[Finding]:
    """Return the rules about where in the model layers stand; `tolerance` in nats/token."""
    return [early_is_safe(shares, tolerance), late_is_critical(shares), ends_matter_most(shares)]


def _not_tested(claim: str, reason: str, topic: str = "folk") -> Finding:
    return Finding(topic, claim, OPEN, f"Not tested: {reason}.")


def _tested(shares: Shares, claim: str, verdict: str, text: str, effect: Measured, p: float) -> Finding:
    """Return a rule with its p, a bound where resampling gives no smaller one."""
    is_bound = p <= smallest_p(len(shares.resampled), shares.rows.independent) < 1
    return Finding("folk", claim, verdict, text, effect, p, is_bound)


def _unfit(shares: Shares, least: int) -> str | None:
    """Return why the layers of this model cannot be compared, if they cannot."""
    if shares.rows.layers < least:
        return f"the model has {shares.rows.layers} layers, the test needs {least}"
    return None if shares.defined else NO_DAMAGE


def interval_verdict(effect: Measured, wanted: int) -> str:
    """Return where an interval lies: on the `wanted` side of 0 (holds), on the other (fails) or on both (open)."""
    assert effect.ci95 is not None
    low, high = effect.ci95
    if (low > 0 and wanted > 0) or (high < 0 and wanted < 0):
        return HOLDS
    return FAILS if low > 0 or high < 0 else OPEN


# --- groups of layers --------------------------------------------------------------------------------------------------


def criticality_difference(shares: Shares, first: Sequence[int], second: Sequence[int]) -> tuple[Measured, Floats]:
    """Return the pooled criticality of the `first` layers minus that of the `second`, and its resampled values."""
    (mean_1, resampled_1), (mean_2, resampled_2) = shares.criticality(first), shares.criticality(second)
    resampled = resampled_1 - resampled_2
    return shares.record(mean_1 - mean_2, resampled, "ratio"), resampled


def _rests_on_one(shares: Shares, first: Sequence[int], second: Sequence[int], shown: bool) -> tuple[bool, str]:
    """Return whether `first` and `second` are shown to differ by one layer alone, and the sentence; "" where no difference is `shown`.

    A layer is what the difference rests on where without it none is shown, or another one. Each group needs two layers or more.
    """
    whole = interval_verdict(criticality_difference(shares, first, second)[0], +1)
    alone: dict[int, Measured] = {}  # layer -> the difference without it
    for layer in [*first, *second] if whole != OPEN else []:
        effect, _ = criticality_difference(shares, *([other for other in group if other != layer] for group in (first, second)))
        if interval_verdict(effect, +1) != whole:
            alone[layer] = effect
    if not shown or not alone:
        return bool(alone), " That holds without any one of the layers." if shown else ""
    most = min(alone, key=lambda layer: abs(alone[layer].mean))
    others = sorted(layer for layer in alone if layer != most)
    also = f" (so it does on {named_layers(others)})" if others else ""
    return True, f" It rests on layer {most} alone: without it the difference is {interval(alone[most], unit=True)}{also}."


def early_is_safe(shares: Shares, tolerance: float) -> Finding:
    """Test two conditions. The first half is less critical than the second (pooled criticality, first minus second, below 0, also without any
    one layer), and lowering the whole first half adds no more than the tolerance (sum of its Shapley values). Fails where either is on
    the other side. An odd middle layer belongs to neither half.
    """
    if reason := _unfit(shares, 4):
        return _not_tested(EARLY, reason)
    half = shares.rows.layers // 2
    first, second = list(range(half)), list(range(shares.rows.layers - half, shares.rows.layers))
    effect, resampled = criticality_difference(shares, first, second)
    damage = shares.damage(first)
    assert damage.ci95 is not None
    which = interval_verdict(effect, -1)
    single, support = _rests_on_one(shares, first, second, which != OPEN)
    order = OPEN if single else which
    if order == FAILS or damage.ci95[0] > tolerance:
        verdict = FAILS
    else:
        verdict = HOLDS if order == HOLDS and damage.ci95[1] <= tolerance else OPEN
    compared = {HOLDS: "less critical than", FAILS: "more critical than", OPEN: "not shown to differ from"}[which]
    within = "within" if damage.ci95[1] <= tolerance else "above" if damage.ci95[0] > tolerance else "not shown to be within"
    text = (
        f"The first half ({named_layers(first)}) is {compared} the second: criticality {number(shares.criticality(first)[0])} against "
        f"{number(shares.criticality(second)[0])}, difference {interval(effect, unit=True)}.{support} "
        f"Its part of the damage is {interval(damage, unit=True)}, {within} the tolerance of {given(tolerance)}{_worst(shares, first)}."
    )
    return _tested(shares, EARLY, verdict, text, effect, two_sided_p(resampled, 0.0, shares.rows.independent))


def _worst(shares: Shares, layers: Sequence[int]) -> str:
    """Name the layer with most of the damage of these, where that is more than half of it."""
    most = max(layers, key=lambda layer: shares.mean[layer])
    if shares.mean[most] <= shares.mean[layers].sum() / 2:
        return ""
    rest = shares.damage([layer for layer in layers if layer != most])
    return f", most of it layer {most}'s (without it {interval(rest)})"


def late_is_critical(shares: Shares) -> Finding:
    """Test that pooled criticality of the last third of the layers is above 1; of all others then below 1, also without any one layer."""
    if reason := _unfit(shares, 6):
        return _not_tested(LATE, reason)
    layers = shares.rows.layers
    last, others = list(range(layers - layers // 3, layers)), list(range(layers - layers // 3))
    mean, resampled = shares.criticality(last)
    criticality = shares.record(mean, resampled, "ratio")
    which = interval_verdict(shares.record(mean - 1, resampled - 1, "ratio"), +1)
    single, support = _rests_on_one(shares, last, others, which != OPEN)
    how = {HOLDS: "more than", FAILS: "less than", OPEN: "not shown to differ from"}[which]
    share, _ = shares.share(last)
    text = (
        f"The last third ({named_layers(last)}) does {percent(share)} of the damage with {percent(share / mean if mean else 0.0)} of the weights, "
        f"{how} its size: criticality {interval(criticality, unit=True)}, {interval(criticality_difference(shares, last, others)[0], unit=True)} more than "
        f"that of the others.{support}"
    )
    p = two_sided_p(resampled, 1.0, shares.rows.independent)
    return _tested(shares, LATE, OPEN if single else which, text, criticality, p)


def ends_matter_most(shares: Shares) -> Finding:
    """Test the less critical one of the first and the last layer minus the most critical one between: above 0."""
    if reason := _unfit(shares, 3):
        return _not_tested(ENDS, reason)
    last = shares.rows.layers - 1
    inner = list(range(1, last))
    effect, p = least_minus_greatest(shares, [[0], [last]], [[layer] for layer in inner])
    first_mean, last_mean = (shares.criticality([layer])[0] for layer in (0, last))
    greatest = max(inner, key=lambda layer: shares.criticality([layer])[0])
    text = (
        f"Criticality of layer 0 is {number(first_mean)}, of layer {last} {number(last_mean)}, the greatest between "
        f"{number(shares.criticality([greatest])[0])} (layer {greatest}); the lesser end minus the greatest between: {interval(effect, unit=True)}."
    )
    return _tested(shares, ENDS, interval_verdict(effect, +1), text, effect, p)


def least_minus_greatest(
    shares: Shares, some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> tuple[Measured, float]:
    """Return the criticality of the least critical group of `some` minus that of the most critical of `others`, and its two-sided p.

    Which groups these are is chosen by the same rows, so the interval is made of the differences of all pairs: no pair may be below its
    own lower end for the least one to be (intersection and union, no correction), and the upper end is the least of upper ends that all
    pairs keep together (greatest of studentized differences). Sources: Berger 1982; Westfall & Young 1993.
    """
    ratios = [[shares.criticality(group) for group in groups] for groups in (some, others)]
    means = np.array([a[0] - b[0] for a in ratios[0] for b in ratios[1]])  # [pairs]
    resampled = np.stack([a[1] - b[1] for a in ratios[0] for b in ratios[1]], axis=1)  # [resamples, pairs]
    rows = shares.rows.independent
    low = float(np.min(percentile_interval(resampled, rows)[0]))
    error = resampled.std(axis=0)
    below = np.divide(means - resampled, error, out=np.zeros_like(resampled), where=error > 0).max(axis=1)  # [resamples]
    high = float(np.min(means + float(percentile_interval(below, rows)[1]) * error))
    effect = shares.record(float(means.min()), resampled[:, 0], "ratio")
    if effect.ci95 is None:
        return effect, 1.0
    p_above = max(two_sided_p(pair, 0.0, rows) if mean > 0 else 1.0 for mean, pair in zip(means, resampled.T, strict=True))
    needed = float(np.divide(-means, error, out=np.zeros_like(means), where=error > 0).max())  # standard errors below 0
    p_below = two_sided_p(below, needed, rows) if needed > np.median(below) else 1.0
    return replace(effect, ci95=(low, high)), min(p_above, p_below)


# --- measures that mark critical layers --------------------------------------------------------------------------------


def marking_rules(correlated: Sequence[Correlation], shares: Shares) -> list[Finding]:
    """Return the rules that a measure marks critical (or safe) layers. correlated: of layers, tested as one family.

    One fails where the measure is beyond chance on the other side: in this model the rule is the wrong way round.
    """
    by_name = {correlation.measure: correlation for correlation in correlated}
    return [_marks(claim, name, wanted, by_name, shares) for claim, name, wanted in MARKS]


def _marks(claim: str, name: str, wanted: int, family: Mapping[str, Correlation], shares: Shares) -> Finding:
    if name not in family:
        return _not_tested(claim, f"{name} was not measured or is the same everywhere")
    result = family[name]
    if reason := _unfit(shares, 4) or result.not_tested:
        return _not_tested(claim, reason)
    assert result.q_value is not None
    effect = shares.rows.record(result.rho, result.ci95, "rank correlation")
    sign = significant_sign(result)
    verdict = {wanted: HOLDS, -wanted: FAILS, 0: OPEN}[sign]
    measures = sum(other.q_value is not None for other in family.values())
    few = "" if sign else cannot_tell(list(family.values()))
    text = (
        f"Rank correlation of {name} with criticality over {result.n} layers: {interval(effect)}, the interval over rows, for these layers. "
        f"Against measures as smooth over depth that have nothing to do with damage: {p_is(result.q_value, result.q_is_bound, 'q')} of "
        f"{measures} measure{'s' if measures > 1 else ''}{f'; {few}' if few else ''}."
    )
    return Finding("folk", claim, verdict, text, effect, result.q_value, result.q_is_bound)


# --- tasks -------------------------------------------------------------------------------------------------------------


def math_needs_more(
    outcomes: Mapping[str, Mapping[str, ArrayLike]],
    math_tasks: Collection[str],
    scores: Sequence[TaskScore],
    high: str,
    low: str,
    seed: int = 0,
) -> Finding:
    """Test task x precision: do word problems lose more from precision `high` to `low` than questions do?

    outcomes: task -> precision -> right or wrong, [items]. A task counts when it is above chance at `high`: below, there is nothing to
    lose. Guessing hides a part of what is lost, and more where there are fewer choices, so losses are of (accuracy - chance) / (1 - chance),
    in points, averaged over the tasks of a kind; items are resampled within their task.
    """
    chance = {score.task: score.chance for score in scores if score.precision == high and score.above_chance and score.chance < 1}
    drops = {
        task: 100 * (np.asarray(right[high], dtype=np.float64) - np.asarray(right[low], dtype=np.float64)) / (1 - chance[task])
        for task, right in outcomes.items()
        if task in chance and high in right and low in right
    }
    kinds = [[task for task in drops if (task in math_tasks) is wanted] for wanted in (True, False)]
    if not all(kinds):
        missing = listed(name for name, tasks in zip(("word problems", "questions"), kinds, strict=True) if not tasks)
        return _not_tested(MATH, f"no task of {missing} was scored above chance at {high}", "tasks")
    resampled_of = {task: resample_means(drop, seed=seed + index) for index, (task, drop) in enumerate(drops.items())}
    (math_mean, questions_mean) = (np.mean([drops[task].mean() for task in tasks]) for tasks in kinds)
    (on_math, on_questions) = (np.mean([resampled_of[task] for task in tasks], axis=0) for tasks in kinds)
    resampled, items = on_math - on_questions, [len(drop) for drop in drops.values()]
    ci95 = interval_ends(resampled, min(items))
    where = "items:" + "+".join([*kinds[0], *kinds[1]])
    effect = Measured(float(math_mean - questions_mean), ci95, "points", high, where, sum(items))
    verdict = interval_verdict(effect, +1) if ci95 else OPEN
    text = (
        f"From {high} to {low}, of what is known beyond guessing, (accuracy − chance) / (1 − chance), word problems ({listed(kinds[0])}) lose "
        f"{number(math_mean, 1)} points and questions ({listed(kinds[1])}) {number(questions_mean, 1)}; word problems lose more by "
        f"{interval(effect, unit=True)}. This compares {listed([*kinds[0], *kinds[1]])}, no more: word problems are answered in writing "
        "and questions by choice, so the form of the answer may be what differs, and not the subject."
    )
    if verdict == OPEN:
        text += f" A difference under about {number(POWER_SIGMAS * float(resampled.std()), 0)} points would not have shown."
    p = two_sided_p(resampled, 0.0, min(items))
    return Finding("tasks", MATH, verdict, text, effect, p, p <= smallest_p(len(resampled), min(items)))


# --- kinds -----------------------------------------------------------------------------------------------------------------
#
# The rule that value and down projections matter most, tested on whole kinds of modules.
#
# What a module is for is read off its name, which differs by family. Where queries, keys and values are one module, values cannot be told
# apart: the rule can then fail by its down projections, but not hold.
# Left out: kinds within a layer, and roles that no family is known to name.

VALUE_AND_DOWN = "value and down projections matter most"
VALUES = {"v_proj", "value", "value_proj", "v_lin", "to_v"}
DOWNS = {"down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "lin2", "output_linear"}  # Llama, GPT-NeoX, OPT, GPT-J, Mixtral
DOWN_IN_MLP = {"c_proj", "output"}  # GPT-2: its attention has a c_proj as well
WITH_VALUES = {"query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "in_proj", "attn_qkv"}


def role_of(module: Module) -> str:
    """Return "value", "down", "with value" (one module with queries and keys) or ""."""
    *_, parent, last = ["", *module.name.split(".")]
    if last in VALUES:
        return "value"
    if last in DOWNS or (last in DOWN_IN_MLP and ("mlp" in parent or "ff" in parent)):
        return "down"
    return "with value" if last in WITH_VALUES else ""


def value_and_down(modules: Sequence[Module], rows: LayerRows | None, seed: int = 0) -> Finding:
    """Test the less critical one of the two (all value projections, all down projections) minus the most critical other kind: above 0.

    rows: of kinds, in the order in which they come among the modules.
    """
    if rows is None:
        return _not_tested(VALUE_AND_DOWN, "kinds of modules were not measured")
    kinds = list(dict.fromkeys(module.kind for module in modules))
    roles = {module.kind: role_of(module) for module in modules}
    named = {role: [index for index, kind in enumerate(kinds) if roles[kind] == role] for role in ("value", "down")}
    groups = {role: group for role, group in named.items() if group}
    others = [index for index, kind in enumerate(kinds) if roles[kind] not in groups]
    shares = shares_of(rows, seed)
    if not groups or not others:
        return _not_tested(VALUE_AND_DOWN, f"no kind of module is known to be one of these ({', '.join(kinds)})")
    if not shares.defined:
        return _not_tested(VALUE_AND_DOWN, NO_DAMAGE)
    effect, p = least_minus_greatest(shares, list(groups.values()), [[index] for index in others])
    ratios = {role: shares.criticality(group)[0] for role, group in groups.items()}
    greatest = max(others, key=lambda index: shares.criticality([index])[0])
    chosen = [index for group in groups.values() for index in group]
    text = (
        f"Criticality of the {listed(f'{role} projections is {number(mean, 2)}' for role, mean in ratios.items())}, the greatest of all other "
        f"kinds {number(shares.criticality([greatest])[0], 2)} ({kinds[greatest]}); {'the lesser' if len(groups) == 2 else 'it'} minus that: "
        f"{interval(effect, unit=True)}. They do "
        f"{percent(shares.share(chosen)[0])} of the damage with {percent(float(rows.weights[chosen].sum() / rows.weights.sum()))} of the weights."
    )
    verdict = interval_verdict(effect, +1)
    if len(groups) == 1:
        fused = " Values share a module with queries and keys: not told apart."
        text += fused if "with value" in roles.values() else " The other of the two is not known here."
        verdict = OPEN if verdict == HOLDS else verdict
    return _tested(shares, VALUE_AND_DOWN, verdict, text, effect, p)
