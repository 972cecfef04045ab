"""The sentences about plan, layers, zones, tasks and attention, from the records that carry the numbers.

One statement a thing, each with its evidence; what could not be told is said in the same place, in the same form.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bitatlas.findings.correlations import ATTENTION_MEASURES, cannot_tell, significant_sign
from bitatlas.findings.shares import FAILS, FALSE_DISCOVERIES, HOLDS, OPEN, VERDICTS
from bitatlas.plan.judge import BETTER, WORSE
from bitatlas.records import AttentionLayer, Correlation, Finding, Layer, Measured, Plan, TaskPair, TaskScore, Zone
from bitatlas.records.text import given, interval, listed, named_layers, number, p_is, percent

GOOD_FIT = 0.1  # of the damage that the quadratic model may miss before its shares are called rough
DESCRIBED = "described"
ADD_UP = "the damage of layers adds up but for pairs"


# --- plan --------------------------------------------------------------------------------------------------------------


def plan_findings(plan: Plan | None, zones: Sequence[Zone], low: str) -> list[Finding]:
    """Whether the plan earns its place, and where it spends its bits. `zones` with `low_share` filled."""
    if plan is None:
        return []
    if plan.recommended is None:
        verdict, text = OPEN, "Not compared with other plans of its size; its damage is a prediction."
    else:
        verdict = {BETTER: HOLDS, WORSE: FAILS}.get(plan.standing, OPEN)
        text = f"{plan.verdict[:1].upper()}{plan.verdict[1:]}."
    found = [Finding("plan", "the plan does less damage than simple plans of its size", verdict, text, plan.damage.measured)]
    parts = [
        f"{zone.name} ({named_layers(range(zone.first, zone.last + 1))}): {percent(zone.low_share)}"
        for zone in zones
        if zone.low_share is not None
    ]
    if parts:
        text = f"{number(plan.size.code_bits)} bits a code, {number(plan.size.stored_bits)} stored bits a weight. At {low}: {'; '.join(parts)} of the weights."
        found.append(Finding("plan", "where the plan puts its bits", DESCRIBED, text))
    return found


# --- layers and zones --------------------------------------------------------------------------------------------------


def layer_findings(layers: Sequence[Layer], fit: Measured | None, tolerance: float) -> list[Finding]:
    """Which layers are critical, safe, light, uncertain; one statement for each critical one; how far the shares can be trusted."""
    groups = {verdict: [one.layer for one in layers if one.verdict == verdict] for verdict in VERDICTS}
    named = [f"{len(group)} {verdict} ({named_layers(group)})" for verdict, group in groups.items() if group]
    verdict = HOLDS if any(one.q_value <= FALSE_DISCOVERIES for one in layers) else OPEN
    text = (
        f"Of {len(layers)} layers: {listed(named)}. Safe means less damage than its size, and at most {given(tolerance)} nats/token added "
        "when lowered alone; light, less than its size but not shown to be within that."
    )
    found = [Finding("layers", "some layers are more critical than others of their size", verdict, text)]
    for one in layers:
        if one.verdict == "critical":
            q = p_is(one.q_value, one.q_is_bound, "q")
            share = (
                f"{percent(one.share.mean)} of the damage with {percent(one.share.mean / one.criticality.mean)} of the weights"
            )
            found.append(Finding("layers", f"layer {one.layer}", one.verdict, f"{share}; {q}.", one.criticality))
    if fit is not None:
        found.append(_fit_finding(fit))
    return found


def _fit_finding(fit: Measured) -> Finding:
    """The quadratic model is good where the whole interval of its misfit is small, bad where the interval lies beyond."""
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
    """One statement a zone, or that there are none."""
    if len(zones) < 2:
        return [Finding("zones", "the layers form zones", OPEN, "No split of the layers predicts rows that did not choose it.")]
    found = []
    for zone in zones:
        name = f"{zone.name}: " if zone.name.startswith("zone") else f"{zone.name} "
        count = zone.last - zone.first + 1
        text = f"{count} layer{'s' if count > 1 else ''}, criticality {interval(zone.criticality)}"
        if zone.border95:
            text += f"; starts at layer {zone.first} [{zone.border95[0]}, {zone.border95[1]}]"
        text += (
            f"; the plan puts {percent(zone.low_share)} of the weights at the lowest format."
            if zone.low_share is not None
            else "."
        )
        found.append(
            Finding("zones", f"{name}{named_layers(range(zone.first, zone.last + 1))}", zone.verdict, text, zone.criticality)
        )
    return found


# --- cheap measures ----------------------------------------------------------------------------------------------------


def measure_findings(found: Sequence[Correlation], told: Collection[str] = ()) -> list[Finding]:
    """Whether weight statistics and attention measures earn a say in the bits: one statement each. found: of layers, tested as one family.

    Measures that are `told` elsewhere are not repeated, with the same q there.
    """
    statements = []
    for topic, claim in (
        ("layers", "weight statistics tell where the damage is"),
        ("attention", "attention tells where the damage is"),
    ):
        about = [
            one for one in found if (one.measure in ATTENTION_MEASURES) == (topic == "attention") and one.measure not in told
        ]
        if not any(one.q_value is not None for one in about):
            continue
        good = [one.measure for one in about if significant_sign(one)]
        seen = "; ".join(f"{one.measure} {number(one.rho, 2)}{_ends(one)}" for one in about)
        text = f"Rank correlation with criticality over {about[0].n} layers (intervals are over rows, for these layers): {seen}. "
        least = min((one for one in about if one.q_value is not None), key=lambda one: one.q_value or 0.0)
        text += f"Beyond chance over layers: {listed(good)}" if good else "None is beyond chance over layers"
        text += f" (smallest {p_is(least.q_value or 0.0, least.q_is_bound, 'q')})"
        few = cannot_tell(found)
        text += f": {few}." if few and not good else "."
        why = {one.measure: one.not_tested for one in about if one.not_tested}
        text += "".join(f" {name.capitalize()} was not tested: {reason}." for name, reason in why.items())
        statements.append(Finding(topic, claim, HOLDS if good else OPEN, text))
    return statements


def _ends(one: Correlation) -> str:
    return f" [{number(one.ci95[0], 2)}, {number(one.ci95[1], 2)}]" if one.ci95 else ""


# --- tasks -------------------------------------------------------------------------------------------------------------


def task_findings(scores: Sequence[TaskScore], pairs: Sequence[TaskPair]) -> list[Finding]:
    """Each task's scores, then each of its compared pairs."""
    found = []
    for task in dict.fromkeys(score.task for score in scores):
        own = [score for score in scores if score.task == task]
        seen = "; ".join(
            f"{score.precision} {score.correct}/{score.n} ({percent(score.correct / score.n)}, {percent(score.wilson95[0])} to {percent(score.wilson95[1])})"
            for score in own
        )
        above = [score.precision for score in own if score.above_chance]
        text = f"Right: {seen}; chance {percent(own[0].chance)}."
        below = [score.precision for score in own if score.below_chance]
        if below:
            text += f" Below chance: {listed(below)}; that is not guessing, something else is asked or answered."
        if not above:
            text += " A score not above chance supports no claim about bits."
        verdict = HOLDS if len(above) == len(own) else FAILS if len(below) == len(own) else OPEN
        found.append(Finding("tasks", f"{task} is above chance", verdict, text))
        for pair in pairs:
            if pair.task == task:
                claim = f"{task}, {pair.first} to {pair.second}"
                found.append(Finding("tasks", claim, pair.verdict, _sentence(pair), pair.difference, pair.holm_p))
    return found


def _sentence(pair: TaskPair) -> str:
    """The pair's own text without the verdict it begins with, which is printed before it."""
    text = pair.text.removeprefix(f"{pair.verdict}: ")
    return f"{text[:1].upper()}{text[1:]}."


# --- attention ---------------------------------------------------------------------------------------------------------


def attention_findings(attention: Sequence[AttentionLayer], low: str, high: str) -> list[Finding]:
    """What attention looks like at the reference, and how far the low format moves it, beside the high one."""
    reference = [one for one in attention if one.base == "reference"]
    found = []
    if reference:
        sharp, broad = (pick(reference, key=lambda one: one.entropy.mean) for pick in (min, max))
        special = max(reference, key=lambda one: one.specialization_percent.mean)
        text = f"Entropy runs from {number(sharp.entropy.mean)} (layer {sharp.layer}) to {number(broad.entropy.mean)} (layer {broad.layer}); "
        if special.specialization_percent.mean > 0:
            text += f"layer {special.layer} has most heads with a recognized role ({interval(special.specialization_percent)}). "
        else:
            text += "no head has a recognized role. "
        focused = [(one.focus_percent, one.layer) for one in reference if one.focus_percent is not None]
        if focused:
            focus, layer = max(focused, key=lambda pair: pair[0].mean)
            text += f"Reasoning focus is highest in layer {layer}: {interval(focus, unit=True)} (0 is chance)."
        else:
            text += "Reasoning focus was not measured: no problem had tagged operands."
        found.append(Finding("attention", "attention of the unquantized model", DESCRIBED, text))
    drift = drift_finding(attention, low, high)
    return [*found, drift] if drift else found


def drift_finding(attention: Sequence[AttentionLayer], low: str, high: str) -> Finding | None:
    """Whether the low format moves every layer's maps more than the high one does; None where no map was read at the low one.

    Maps move at any format, and beyond the noise floor at most; so that alone would be no news. "In every layer" asks each layer.
    """
    moved = {name: {one.layer: one for one in attention if one.base == f"uniform:{name}"} for name in (low, high)}
    drifted = [(one.drift_cumulative, one) for one in moved[low].values() if one.drift_cumulative is not None]
    if not drifted:
        return None
    (least, at_least), (drift, most) = (pick(drifted, key=lambda pair: pair[0].mean) for pick in (min, max))
    text = (
        f"Jensen-Shannon distance to the unquantized maps runs from {interval(least)} (layer {at_least.layer}) "
        f"to {interval(drift)} (layer {most.layer})"
    )
    text += f"; noise floor {interval(at_least.drift_noise)} in layer {at_least.layer}." if at_least.drift_noise else "."
    beside = {layer: one.drift_cumulative for layer, one in moved[high].items() if one.drift_cumulative is not None}
    if beside:
        narrow, wide = (pick(beside.values(), key=lambda one: one.mean) for pick in (min, max))
        text += f" At {high} it runs from {interval(narrow)} to {interval(wide)}."
    verdicts = {layer.layer: _drift_verdict(one, beside.get(layer.layer)) for one, layer in drifted}
    more = [layer for layer, verdict in verdicts.items() if verdict == HOLDS]
    if len(more) < len(verdicts):
        text += f" Beyond that at {low}: {named_layers(more) if more else 'no layer'}."
    words = set(verdicts.values())
    verdict = words.pop() if len(words) == 1 else FAILS if FAILS in words else OPEN
    return Finding("attention", f"attention drifts more at {low} than at {high} in every layer", verdict, text, least)


def _drift_verdict(drift: Measured, beside: Measured | None) -> str:
    """Intervals that do not meet; more is asked than of a paired test."""
    if drift.ci95 is None or beside is None or beside.ci95 is None:
        return OPEN
    return HOLDS if drift.ci95[0] > beside.ci95[1] else FAILS if drift.ci95[1] < beside.ci95[0] else OPEN
