"""What each task asks of the bits: on its own text, and in its scores at every uniform width.

*Own text.* Criticality of the layers on the task's rows against that on general test rows that were cut to the same length: what comes
early in a row hurts otherwise than what comes late, whatever the text. The two sets of rows are independent, and so are their bootstraps.
A layer differs where Welch's t of the difference says so, with the bootstraps' standard errors (no resampled tail is small enough for a screen
of so many), Benjamini-Hochberg over all tasks and layers; the rank correlation of the two profiles is lowered by the noise of few rows, so it
describes and decides nothing.

*Held.* A width holds a task where "no loss within x points" against the reference is shown, loses it where the score falls and that is not
shown, and is inconclusive or at chance otherwise (see `stats.paired`). The smallest width held is the narrowest such, of those below
which no wider one loses the task.
Left out: widths of single layers; plans that hold a task (`plan.protect`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from bitatlas.findings.shares import FALSE_DISCOVERIES, HOLDS, OPEN, Floats, LayerRows, Shares, shares_of
from bitatlas.records import Correlation, Finding, Measured, TaskDamage, TaskPair
from bitatlas.records.formats import by_width
from bitatlas.records.text import interval, listed, named_layers, number, p_value
from bitatlas.stats.bootstrap import benjamini_hochberg, interval_ends, measured, rank_correlation
from bitatlas.stats.paired import AT_CHANCE, BELOW_CHANCE, UNIFORM, within

TaskRows = tuple[Mapping[str, Floats], LayerRows]  # format -> damage [rows] on a task's text; its layers
HELD, LOST = "held", "lost"
AGREEMENT = "criticality on the general text"


# --- a task's own text -------------------------------------------------------------------------------------------------


def task_damages(texts: Mapping[str, TaskRows], general: LayerRows | None, seed: int = 0) -> list[TaskDamage]:
    """Return one record a task. texts: task -> (format -> damage on its rows, nats/token; its layers); `general`: general text at the same length.

    Without `general` text no layers are compared.
    """
    of_tasks = {task: shares_of(rows, seed + 1) for task, (_, rows) in texts.items()}  # other draws than the general text's
    of_general = None if general is None else shares_of(general, seed)
    p = [_welch_p(on_task, of_general, layer) for on_task in of_tasks.values() for layer in range(on_task.rows.layers)]
    q = iter(benjamini_hochberg(p)) if p else iter(())
    return [
        TaskDamage(
            task=task,
            uniform={
                name: measured(values, "nats/token", f"uniform:{name}", on_task.rows.split, seed)
                for name, values in texts[task][0].items()
            },
            criticality=_criticality(on_task),
            q_values=[float(next(q)) for _ in range(on_task.rows.layers)],
            agreement=_agreement(on_task, of_general) if of_general and _comparable(on_task, of_general) else None,
            general=_criticality(of_general) if of_general else [],
        )
        for task, on_task in of_tasks.items()
    ]


def _criticality(shares: Shares) -> list[Measured]:
    return [shares.record(*shares.criticality([layer]), "ratio") for layer in range(shares.rows.layers)]


def _comparable(on_task: Shares, general: Shares) -> bool:
    return on_task.defined and general.defined and on_task.rows.layers > 2


def _welch_p(on_task: Shares, general: Shares | None, layer: int) -> float:
    """Return the two-sided p of "the layer is as critical on both texts"."""
    if general is None or not on_task.defined or not general.defined:
        return 1.0
    means, variances, free = [], [], []
    for shares in (on_task, general):
        mean, resampled = shares.criticality([layer])
        rows = shares.rows.independent
        means.append(mean)
        variances.append(float(resampled.var()) * rows / (rows - 1))  # a bootstrap's variance is short by that
        free.append(rows - 1)
    total = sum(variances)
    if total == 0:
        return 1.0
    degrees = total**2 / sum(variance**2 / freedom for variance, freedom in zip(variances, free, strict=True))
    return float(2 * stats.t.sf(abs(means[0] - means[1]) / math.sqrt(total), degrees))


def _agreement(on_task: Shares, general: Shares) -> Correlation:
    """Return Spearman's rank correlation of damage per weight on both texts."""
    weights = on_task.rows.weights
    rho = rank_correlation(on_task.mean / weights, general.mean / weights)
    resampled = rank_correlation(on_task.resampled / weights, general.resampled / weights)
    ends = interval_ends(resampled, min(on_task.rows.independent, general.rows.independent))
    return Correlation(AGREEMENT, float(rho), ends, on_task.rows.layers)


def differing(record: TaskDamage) -> list[int]:
    """Return the layers whose criticality on the task's text differs from that on the general text."""
    return [layer for layer, q in enumerate(record.q_values) if q <= FALSE_DISCOVERIES]


def task_text_findings(records: Sequence[TaskDamage]) -> list[Finding]:
    """Return one statement a task: is its profile of critical layers another than the general text's?"""
    findings = []
    for record in records:
        claim = f"{record.task}'s own text weighs the layers differently than the general text"
        damage = "; ".join(f"{interval(m)} at {name}" for name, m in record.uniform.items())
        n = next((m.n for m in record.uniform.values()), 0)
        text = f"Damage on {n} rows of its questions and answers, nats/token: {damage}. "
        if record.agreement is None:
            text += "Its layers cannot be compared: too little damage or too few layers."
            findings.append(Finding("tasks", claim, OPEN, text))
            continue
        rho = record.agreement
        assert rho.ci95 is not None
        text += (
            f"Rank correlation of the layers' criticality with that on {record.general[0].n} general rows of the same length: "
            f"{number(rho.rho, 2)} [{number(rho.ci95[0], 2)}, {number(rho.ci95[1], 2)}]. "
        )
        other = differing(record)
        text += _differences(record, other) if other else "No layer's criticality is shown to differ."
        least = p_value(min(record.q_values))
        text += f" Smallest q {least if least.startswith('<') else f'= {least}'}."
        findings.append(Finding("tasks", claim, HOLDS if other else OPEN, text))
    return findings


def _differences(record: TaskDamage, other: Sequence[int]) -> str:
    means = {layer: (record.criticality[layer].mean, record.general[layer].mean) for layer in other}
    above = [layer for layer, (here, there) in means.items() if here > there]
    below = [layer for layer in other if layer not in above]
    parts = [f"{word} critical there: {named_layers(group)}" for word, group in (("more", above), ("less", below)) if group]
    most = max(other, key=lambda layer: abs(means[layer][0] - means[layer][1]))
    here, there = means[most]
    return f"{listed(parts).capitalize()} (layer {most}: {number(here)} against {number(there)})."


# --- widths that hold a task -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskWidth:
    """One task at one uniform width against the reference. `verdict`: "held", "lost", "inconclusive", "at chance" or "below chance"."""

    task: str
    format: str
    verdict: str
    pair: TaskPair


def task_widths(pairs: Sequence[TaskPair]) -> dict[str, list[TaskWidth]]:
    """Return task -> its uniform widths, narrowest first; tasks without a pair from the reference are left out."""
    by_task: dict[str, list[TaskWidth]] = {}
    for pair in pairs:
        if pair.first == "reference" and pair.second.startswith(UNIFORM) and pair.no_loss is not None:
            by_task.setdefault(pair.task, []).append(TaskWidth(pair.task, pair.second.removeprefix(UNIFORM), _held(pair), pair))
    order = by_width([width.format for widths in by_task.values() for width in widths])
    return {task: sorted(widths, key=lambda width: order.index(width.format)) for task, widths in by_task.items()}


def _held(pair: TaskPair) -> str:
    if pair.verdict in (AT_CHANCE, BELOW_CHANCE):
        return pair.verdict
    if pair.no_loss is not None and pair.no_loss.held:
        return HELD
    return LOST if pair.verdict == "falls" else OPEN


def smallest_held(widths: Sequence[TaskWidth]) -> TaskWidth | None:
    """Return the narrowest width held, no wider one lost. widths: of one task, narrowest first."""
    best = None
    for width in reversed(widths):
        if width.verdict == LOST:
            break
        best = width if width.verdict == HELD else best
    return best


def width_findings(pairs: Sequence[TaskPair]) -> list[Finding]:
    """Return one statement a task: the smallest uniform width at which it is held."""
    findings = []
    for task, widths in task_widths(pairs).items():
        best = smallest_held(widths)
        named = {
            verdict: [width.format for width in widths if width.verdict == verdict]
            for verdict in (HELD, LOST, OPEN, AT_CHANCE, BELOW_CHANCE)
        }
        text = "; ".join(f"{verdict}: {listed(names)}" for verdict, names in named.items() if names)
        shown = widths[0].pair.no_loss
        assert shown is not None
        if best:
            word = best.format
        elif len(named[AT_CHANCE]) + len(named[BELOW_CHANCE]) == len(widths):
            word = BELOW_CHANCE if named[BELOW_CHANCE] else AT_CHANCE
        else:
            word = LOST if len(named[LOST]) == len(widths) else OPEN
        claim = f"{task}: smallest uniform width that holds it ({within(shown.margin_points)})"
        evidence = best.pair.difference if best else None
        p = best.pair.no_loss.holm_p if best and best.pair.no_loss else None
        findings.append(Finding("tasks", claim, word, f"{text[:1].upper()}{text[1:]}.", evidence, p))
    return findings
