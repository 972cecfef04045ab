"""The sentences about plan, layers, zones, tasks and attention, from the records that carry the numbers.

One statement a thing, each with its evidence; what could not be told is said in the same place, in the same form.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitatlas.findings.correlations import ATTENTION_MEASURES, cannot_tell, significant_sign
from bitatlas.findings.shares import FAILS, FALSE_DISCOVERIES, HOLDS, OPEN, VERDICTS, Floats
from bitatlas.plan.judge import BETTER, WORSE
from bitatlas.records import Ablation, AttentionLayer, Correlation, Finding, Layer, Measured, Plan, TaskPair, TaskScore, Zone
from bitatlas.records.text import given, interval, listed, named_layers, number, p_is, percent
from bitatlas.stats.bootstrap import RESAMPLES, interval_ends

GOOD_FIT = 0.1  # of the damage that the quadratic model may miss before its shares are called rough
DESCRIBED = "described"
ADD_UP = "the damage of layers adds up but for pairs"
MEASURES_TELL = {"layers": "weight statistics tell where the damage is", "attention": "attention tells where the damage is"}


# --- plan --------------------------------------------------------------------------------------------------------------


def plan_findings(plan: Plan | None, zones: Sequence[Zone], low: str) -> list[Finding]:
    """Say whether the plan earns its place, and where it spends its bits. `zones` with `low_share` filled."""
    if plan is None:
        return []
    if plan.recommended is None:
        verdict, text = OPEN, "Not compared with other plans of its size; its damage is a prediction."
    else:
        verdict = {BETTER: HOLDS, WORSE: FAILS}.get(plan.standing, OPEN)
        text = f"{plan.verdict[:1].upper()}{plan.verdict[1:]}."
    findings = [Finding("plan", "the plan does less damage than simple plans of its size", verdict, text, plan.damage.measured)]
    parts = [
        f"{zone.name} ({named_layers(range(zone.first, zone.last + 1))}): {percent(zone.low_share)}"
        for zone in zones
        if zone.low_share is not None
    ]
    if parts:
        text = f"{number(plan.size.code_bits)} bits a code, {number(plan.size.stored_bits)} stored bits a weight. At {low}: {'; '.join(parts)} of the weights."
        findings.append(Finding("plan", "where the plan puts its bits", DESCRIBED, text))
    return findings


# --- layers and zones --------------------------------------------------------------------------------------------------


def layer_findings(layers: Sequence[Layer], fit: Measured | None, tolerance: float) -> list[Finding]:
    """Say which layers are critical, safe, light, uncertain; one statement for each critical one; how far the shares can be trusted."""
    groups = {verdict: [layer.layer for layer in layers if layer.verdict == verdict] for verdict in VERDICTS}
    named = [f"{len(group)} {verdict} ({named_layers(group)})" for verdict, group in groups.items() if group]
    verdict = HOLDS if any(layer.q_value <= FALSE_DISCOVERIES for layer in layers) else OPEN
    text = (
        f"Of {len(layers)} layers: {listed(named)}. Safe means less damage than its size, and at most {given(tolerance)} nats/token added "
        "when lowered alone; light, less than its size but not shown to be within that."
    )
    findings = [Finding("layers", "some layers are more critical than others of their size", verdict, text)]
    for layer in layers:
        if layer.verdict == "critical":
            q = p_is(layer.q_value, layer.q_is_bound, "q")
            weights = percent(layer.share.mean / layer.criticality.mean)
            share = f"{percent(layer.share.mean)} of the damage with {weights} of the weights; {q}."
            findings.append(Finding("layers", f"layer {layer.layer}", layer.verdict, share, layer.criticality))
    if fit is not None:
        findings.append(_fit_finding(fit))
    return findings


def _fit_finding(fit: Measured) -> Finding:
    """Say whether damage is quadratic: the model is good where the whole interval of its misfit is small, bad where the interval lies beyond."""
    if fit.ci95 is None:
        return Finding("layers", ADD_UP, OPEN, "Too little damage or too few rows to tell.", fit)
    low, high = fit.ci95
    verdict = HOLDS if max(abs(low), abs(high)) <= GOOD_FIT else FAILS if low > GOOD_FIT or high < -GOOD_FIT else OPEN
    text = (
        f"What layers do when they are lowered first and last, halved, adds up to {percent(1 + fit.mean)} of the damage between {fit.base}; what is "
        "missing or too much is interaction of three and more layers. Shares are of the measured damage, and this error is in their intervals."
    )
    return Finding("layers", ADD_UP, verdict, text, fit)


def zone_findings(zones: Sequence[Zone]) -> list[Finding]:
    """Return one statement a zone, or that there are none."""
    if len(zones) < 2:
        return [Finding("zones", "the layers form zones", OPEN, "No split of the layers predicts rows that did not choose it.")]
    findings = []
    for zone in zones:
        layers = range(zone.first, zone.last + 1)
        claim = f"{zone.name}{':' if zone.name.startswith('zone') else ''} {named_layers(layers)}"
        text = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}, criticality {interval(zone.criticality)}"
        if zone.border95:
            text += f"; starts at layer {zone.first} [{zone.border95[0]}, {zone.border95[1]}]"
        if zone.low_share is not None:
            text += f"; the plan puts {percent(zone.low_share)} of the weights at the lowest format"
        findings.append(Finding("zones", claim, zone.verdict, f"{text}.", zone.criticality))
    return findings


# --- cheap measures ----------------------------------------------------------------------------------------------------


def measure_findings(correlated: Sequence[Correlation], excluded: Collection[str] = ()) -> list[Finding]:
    """Say whether weight statistics and attention measures earn a say in the bits. correlated: of layers, tested as one family.

    `excluded` measures are said elsewhere, with the q of this family.
    """
    findings = []
    for topic, claim in MEASURES_TELL.items():
        about = [
            result
            for result in correlated
            if (result.measure in ATTENTION_MEASURES) == (topic == "attention") and result.measure not in excluded
        ]
        tested = [result for result in about if result.q_value is not None]
        if not tested:
            continue
        good = [result.measure for result in about if significant_sign(result)]
        seen = "; ".join(f"{result.measure} {number(result.rho, 2)}{_ends(result)}" for result in about)
        text = f"Rank correlation with criticality over {about[0].n} layers (intervals are over rows, for these layers): {seen}. "
        least = min(tested, key=lambda result: result.q_value or 0.0)
        text += f"Beyond chance over layers: {listed(good)}" if good else "None is beyond chance over layers"
        text += f" (smallest {p_is(least.q_value or 0.0, least.q_is_bound, 'q')})"
        few = cannot_tell(correlated)
        text += f": {few}." if few and not good else "."
        reasons = {result.measure: result.not_tested for result in about if result.not_tested}
        text += "".join(f" {name.capitalize()} was not tested: {reason}." for name, reason in reasons.items())
        findings.append(Finding(topic, claim, HOLDS if good else OPEN, text))
    return findings


def _ends(result: Correlation) -> str:
    return f" [{number(result.ci95[0], 2)}, {number(result.ci95[1], 2)}]" if result.ci95 else ""


# --- tasks -------------------------------------------------------------------------------------------------------------


def task_findings(scores: Sequence[TaskScore], pairs: Sequence[TaskPair]) -> list[Finding]:
    """Return each task's scores, then each of its compared pairs."""
    findings = []
    for task in dict.fromkeys(score.task for score in scores):
        of_task = [score for score in scores if score.task == task]
        seen = "; ".join(
            f"{score.precision} {score.correct}/{score.n} ({percent(score.correct / score.n)}, {percent(score.wilson95[0])} to {percent(score.wilson95[1])})"
            for score in of_task
        )
        above = [score.precision for score in of_task if score.above_chance]
        text = f"Right: {seen}; chance {percent(of_task[0].chance)}."
        below = [score.precision for score in of_task if score.below_chance]
        if below:
            text += f" Below chance: {listed(below)}; that is not guessing, something else is asked or answered."
        if not above:
            text += " A score not above chance supports no claim about bits."
        verdict = HOLDS if len(above) == len(of_task) else FAILS if len(below) == len(of_task) else OPEN
        findings.append(Finding("tasks", f"{task} is above chance", verdict, text))
        for pair in pairs:
            if pair.task == task:
                claim = f"{task}, {pair.first} to {pair.second}"
                findings.append(Finding("tasks", claim, pair.verdict, _sentence(pair), pair.difference, pair.holm_p))
    return findings


def _sentence(pair: TaskPair) -> str:
    """Return the pair's own text without the verdict it begins with, which is printed before it."""
    text = pair.text.removeprefix(f"{pair.verdict}: ")
    return f"{text[:1].upper()}{text[1:]}."


# --- attention ---------------------------------------------------------------------------------------------------------


def attention_findings(attention: Sequence[AttentionLayer], low: str, high: str) -> list[Finding]:
    """Say what attention looks like at the reference, and how far the low format moves it, beside the high one."""
    reference = [layer for layer in attention if layer.base == "reference"]
    findings = []
    if reference:
        sharp, broad = (pick(reference, key=lambda layer: layer.entropy.mean) for pick in (min, max))
        special = max(reference, key=lambda layer: layer.specialization_percent.mean)
        text = f"Entropy runs from {number(sharp.entropy.mean)} (layer {sharp.layer}) to {number(broad.entropy.mean)} (layer {broad.layer}); "
        if special.specialization_percent.mean > 0:
            text += f"layer {special.layer} has most heads with a recognized role ({interval(special.specialization_percent)}). "
        else:
            text += "no head has a recognized role. "
        focused = [(layer.focus_percent, layer.layer) for layer in reference if layer.focus_percent is not None]
        if focused:
            focus, highest = max(focused, key=lambda pair: pair[0].mean)
            text += f"Reasoning focus is highest in layer {highest}: {interval(focus, unit=True)} (0 is chance)."
        else:
            text += "Reasoning focus was not measured: no problem had tagged operands."
        findings.append(Finding("attention", "attention of the unquantized model", DESCRIBED, text))
    drift = drift_finding(attention, low, high)
    return [*findings, drift] if drift else findings


def drift_finding(attention: Sequence[AttentionLayer], low: str, high: str) -> Finding | None:
    """Say whether the low format moves every layer's maps more than the high one does; None where no map was read at the low one.

    Maps move at any format, and beyond the noise floor at most; so that alone would be no news. "In every layer" asks each layer.
    """
    moved = {name: {record.layer: record for record in attention if record.base == f"uniform:{name}"} for name in (low, high)}
    drifted = [(record.drift_cumulative, record) for record in moved[low].values() if record.drift_cumulative is not None]
    if not drifted:
        return None
    (least, at_least), (drift, most) = (pick(drifted, key=lambda pair: pair[0].mean) for pick in (min, max))
    text = (
        f"Jensen-Shannon distance to the unquantized maps runs from {interval(least)} (layer {at_least.layer}) "
        f"to {interval(drift)} (layer {most.layer})"
    )
    text += f"; noise floor {interval(at_least.drift_noise)} in layer {at_least.layer}." if at_least.drift_noise else "."
    beside = {layer: record.drift_cumulative for layer, record in moved[high].items() if record.drift_cumulative is not None}
    if beside:
        narrow, wide = (pick(beside.values(), key=lambda drift: drift.mean) for pick in (min, max))
        text += f" At {high} it runs from {interval(narrow)} to {interval(wide)}."
    verdicts = {record.layer: _drift_verdict(moved_by, beside.get(record.layer)) for moved_by, record in drifted}
    more = [layer for layer, verdict in verdicts.items() if verdict == HOLDS]
    if len(more) < len(verdicts):
        text += f" Beyond that at {low}: {named_layers(more) if more else 'no layer'}."
    words = set(verdicts.values())
    verdict = words.pop() if len(words) == 1 else FAILS if FAILS in words else OPEN
    return Finding("attention", f"attention drifts more at {low} than at {high} in every layer", verdict, text, least)


def _drift_verdict(drift: Measured, beside: Measured | None) -> str:
    """Return the word for intervals that do not meet; more is asked than of a paired test."""
    if drift.ci95 is None or beside is None or beside.ci95 is None:
        return OPEN
    return HOLDS if drift.ci95[0] > beside.ci95[1] else FAILS if drift.ci95[1] < beside.ci95[0] else OPEN


# --- ablation --------------------------------------------------------------------------------------------------------------

# Are heads what they are called? What their removal does to the repetition of a random block, beside that of random other heads.
#
# The effect is paired: in every sequence, the loss without the named heads minus the mean loss without the random ones, nats/token.
# Both the sequences and the random sets were drawn, so both are resampled for the interval; only the sequences where every possible set
# was measured. How many random sets do at least as much is said beside the mean, which a single set can carry.
# Left out: a p-value for each head; a role is a statement about all heads that carry it.

if TYPE_CHECKING:  # the module itself needs torch, which this package does without
    from bitatlas.measure.attention.ablation import Removal

ROWS = "repeated random tokens"
RARE = 0.05  # a random set that does as much, counted with the named heads as one of them
NAMED = 6  # heads in a sentence
SECOND = 1  # half of a sequence, on the last axis of the losses


def ablation_record(removal: Removal, seed: int = 0) -> Ablation:
    """Return the record of losses by sequence; where nothing was tested, only the heads and the reason."""
    heads = [list(head) for head in removal.heads]
    if removal.not_tested:
        return Ablation(removal.role, heads, not_tested=removal.not_tested)
    second = removal.intact[:, SECOND]
    named = removal.removed[:, SECOND] - second  # [sequences]
    others = removal.random[..., SECOND] - second  # [draws, sequences]
    draws, sequences = others.shape
    rng = np.random.default_rng(seed)
    of_rows = rng.multinomial(sequences, np.full(sequences, 1 / sequences), RESAMPLES) / sequences  # [resamples, sequences]
    of_draws = rng.multinomial(draws, np.full(draws, 1 / draws), RESAMPLES) / draws
    if removal.every_draw:
        of_draws = np.full_like(of_draws, 1 / draws)
    added = of_rows @ named
    by_chance = ((of_draws @ others) * of_rows).sum(axis=1)
    n = sequences if removal.every_draw else min(sequences, draws)

    def record(value: float, resampled: Floats, count: int) -> Measured:
        return Measured(float(value), interval_ends(resampled, count), "nats/token", "reference", ROWS, sequences)

    return Ablation(
        role=removal.role,
        heads=heads,
        draws=draws,
        as_harmful=int((others.mean(axis=1) >= named.mean()).sum()),
        first_half=record(removal.intact[:, 0].mean(), of_rows @ removal.intact[:, 0], sequences),
        second_half=record(second.mean(), of_rows @ second, sequences),
        added=record(named.mean(), added, sequences),
        added_by_chance=record(others.mean(), by_chance, n),
        effect=record(named.mean() - others.mean(), added - by_chance, n),
    )


def ablation_findings(ablations: Sequence[Ablation]) -> list[Finding]:
    """Return one statement a role; none where no attention was read."""
    return [_finding(ablation) for ablation in ablations]


def _finding(ablation: Ablation) -> Finding:
    claim = f"removing the heads called {ablation.role} hurts repetition more than removing random heads"
    if ablation.effect is None or ablation.added is None:
        return Finding("attention", claim, OPEN, f"Not tested: {ablation.not_tested}.")
    many = len(ablation.heads) > 1
    heads = f"{len(ablation.heads)} heads" if many else "1 head"
    text = (
        f"Predicting the second half of a random block of tokens twice costs {interval(ablation.second_half, unit=True)} (the first half: "
        f"{interval(ablation.first_half)}). Without the {heads} called {ablation.role} ({head_names(ablation.heads)}) it costs "
        f"{interval(ablation.added, unit=True)} more, without {len(ablation.heads)} random other{'s' if many else ''} {interval(ablation.added_by_chance)} "
        f"({ablation.as_harmful} of {ablation.draws} random {'sets do' if many else 'heads do'} at least as much). "
        f"Difference: {interval(ablation.effect, unit=True)}."
    )
    return Finding("attention", claim, ablation_verdict(ablation), text, ablation.effect)


def ablation_verdict(ablation: Ablation) -> str:
    """Return the word: holds where the whole interval is above 0 and few random sets do as much, does not hold where the interval is below."""
    if ablation.effect is None or ablation.effect.ci95 is None:
        return OPEN
    low, high = ablation.effect.ci95
    rare = (ablation.as_harmful + 1) / (ablation.draws + 1) <= RARE
    return HOLDS if low > 0 and rare else FAILS if high < 0 else OPEN


def head_names(heads: Sequence[Sequence[int]]) -> str:
    """Return `3.1, 5.0`: layer and head, the first of them."""
    names = [f"{layer}.{head}" for layer, head in heads]
    more = f" and {number(len(names) - NAMED, 0)} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
