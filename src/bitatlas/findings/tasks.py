"""What each task asks of the bits: on its own text, and in its scores at every uniform width.

*Own text.* Criticality of the layers on the task's rows against that on the general test rows. The two sets of rows are independent, and so
are their bootstraps. A layer differs where the interval of the difference excludes 0 (Benjamini-Hochberg over the task's layers); the rank
correlation of the two profiles is lowered by the noise of few rows, so it describes and decides nothing.

*Held.* A width holds a task where "no loss within x points" against the reference is shown, loses it where the score falls and that is not
shown, and is inconclusive or at chance otherwise (see `evaluation.paired`). The smallest width held is the narrowest such, of those below
which no wider one loses the task.
Left out: widths of single layers; plans that hold a task (`planning.protect`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from bitatlas.evaluation.bootstrap import benjamini_hochberg, measured, percentile_interval, two_sided_p
from bitatlas.evaluation.paired import AT_CHANCE, BELOW_CHANCE, UNIFORM, within
from bitatlas.findings.folk import HOLDS, OPEN
from bitatlas.findings.shares import FALSE_DISCOVERIES, LayerRows, Shares, shares_of
from bitatlas.formats import by_width
from bitatlas.records import Correlation, Finding, TaskDamage, TaskPair
from bitatlas.words import interval, listed, named_layers, number

Floats = np.ndarray
HELD, LOST = "held", "lost"
AGREEMENT = "criticality on the general text"


# --- a task's own text -------------------------------------------------------------------------------------------------


def task_damage(task: str, widths: Mapping[str, Floats], rows: LayerRows, general: Shares, seed: int = 0) -> TaskDamage:
    """The record of one task. widths: format -> damage on its rows, nats/token; `general`: shares on the test rows."""
    own = shares_of(rows, seed + 1)  # other draws than the general rows': the two are independent
    layers = range(rows.layers)
    ratios = [(own.criticality([layer]), general.criticality([layer])) for layer in layers]
    fit = own.defined and general.defined
    least = min(rows.rows, general.rows.rows)
    p = [two_sided_p(here[1] - there[1], 0.0, least) if fit else 1.0 for here, there in ratios]
    return TaskDamage(
        task=task,
        uniform={name: measured(values, "nats/token", f"uniform:{name}", rows.split, seed) for name, values in widths.items()},
        criticality=[own.record(*here, "ratio") for here, _ in ratios],
        q_values=[float(q) for q in benjamini_hochberg(p)],
        agreement=_agreement(own, general, least) if fit and rows.layers > 2 else None,
    )


def _agreement(own: Shares, general: Shares, least: int) -> Correlation:
    """Spearman's rank correlation of damage per weight, here and there."""
    weights = own.rows.weights
    rho = _rank_correlation(own.mean[None] / weights, general.mean[None] / weights)
    low, high = percentile_interval(_rank_correlation(own.resampled / weights, general.resampled / weights), least)
    return Correlation(AGREEMENT, float(rho[0]), (float(low), float(high)), own.rows.layers)


def _rank_correlation(x: Floats, y: Floats) -> Floats:
    """x, y: [resamples, layers] -> [resamples], row by row; 0 where either is constant."""
    ranks = [rankdata(one, axis=-1) for one in (x, y)]
    a, b = (one - one.mean(axis=-1, keepdims=True) for one in ranks)
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), spread, out=np.zeros_like(spread), where=spread > 0)


def differing(record: TaskDamage) -> list[int]:
    """Layers whose criticality on the task's text differs from that on the general text."""
    return [layer for layer, q in enumerate(record.q_values) if q <= FALSE_DISCOVERIES]


def task_text_findings(records: Sequence[TaskDamage], general: Shares) -> list[Finding]:
    """One statement a task: is its profile of critical layers another than the general text's?"""
    found = []
    for record in records:
        claim = f"{record.task}'s own text weighs the layers differently than the general text"
        damage = "; ".join(f"{interval(m)} at {name}" for name, m in record.uniform.items())
        n = next((m.n for m in record.uniform.values()), 0)
        text = f"Damage on {n} rows of its questions and answers, nats/token: {damage}. "
        if record.agreement is None:
            found.append(
                Finding("tasks", claim, OPEN, text + "Its layers cannot be compared: too little damage or too few layers.")
            )
            continue
        rho = record.agreement
        assert rho.ci95 is not None
        text += f"Rank correlation of the layers' criticality: {number(rho.rho, 2)} [{number(rho.ci95[0], 2)}, {number(rho.ci95[1], 2)}]. "
        other = differing(record)
        text += _differences(record, general, other) if other else "No layer's criticality is shown to differ."
        text += f" Smallest q = {number(min(record.q_values))}."
        found.append(Finding("tasks", claim, HOLDS if other else OPEN, text))
    return found


def _differences(record: TaskDamage, general: Shares, other: Sequence[int]) -> str:
    means = {layer: (record.criticality[layer].mean, general.criticality([layer])[0]) for layer in other}
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
    """Task -> its uniform widths, narrowest first; tasks without a pair from the reference are left out."""
    found: dict[str, list[TaskWidth]] = {}
    for pair in pairs:
        if pair.first == "reference" and pair.second.startswith(UNIFORM) and pair.no_loss is not None:
            found.setdefault(pair.task, []).append(TaskWidth(pair.task, pair.second.removeprefix(UNIFORM), _held(pair), pair))
    order = by_width([one.format for widths in found.values() for one in widths])
    return {task: sorted(widths, key=lambda one: order.index(one.format)) for task, widths in found.items()}


def _held(pair: TaskPair) -> str:
    if pair.verdict in (AT_CHANCE, BELOW_CHANCE):
        return pair.verdict
    if pair.no_loss is not None and pair.no_loss.held:
        return HELD
    return LOST if pair.verdict == "falls" else OPEN


def smallest_held(widths: Sequence[TaskWidth]) -> TaskWidth | None:
    """The narrowest width held, no wider one lost. widths: of one task, narrowest first."""
    best = None
    for one in reversed(widths):
        if one.verdict == LOST:
            break
        best = one if one.verdict == HELD else best
    return best


def width_findings(pairs: Sequence[TaskPair]) -> list[Finding]:
    """One statement a task: the smallest uniform width at which it is held."""
    found = []
    for task, widths in task_widths(pairs).items():
        best = smallest_held(widths)
        named = {
            verdict: [one.format for one in widths if one.verdict == verdict]
            for verdict in (HELD, LOST, OPEN, AT_CHANCE, BELOW_CHANCE)
        }
        text = "; ".join(f"{verdict}: {listed(names)}" for verdict, names in named.items() if names)
        shown = widths[0].pair.no_loss
        assert shown is not None
        word = (
            best.format
            if best
            else (BELOW_CHANCE if named[BELOW_CHANCE] else AT_CHANCE)
            if len(named[AT_CHANCE]) + len(named[BELOW_CHANCE]) == len(widths)
            else LOST
            if len(named[LOST]) == len(widths)
            else OPEN
        )
        claim = f"{task}: smallest uniform width that holds it ({within(shown.margin_points)})"
        evidence = best.pair.difference if best else None
        p = best.pair.no_loss.holm_p if best and best.pair.no_loss else None
        found.append(Finding("tasks", claim, word, f"{text[:1].upper()}{text[1:]}.", evidence, p))
    return found
