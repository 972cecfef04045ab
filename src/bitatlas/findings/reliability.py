"""How far the ranking of the layers can be trusted, and how many rows would settle what is uncertain.

*Reliability*: the rows (in their blocks, where they come in blocks) are cut into random halves, criticality is ranked on each, and the two rankings are correlated; the mean over many
cuts, stepped up from half the rows to all of them (Spearman-Brown), is about what a second survey of as many rows would agree with this
one. Its interval is a jackknife over rows or blocks (a bootstrap would put copies of a row into both halves, or halve the halves again), with
the same cuts every time, on the scale of Fisher's z. What is ranked are the quadratic shares of the rows, before sampled orders correct them.

*Rows needed*: an interval shrinks like one over the root of the rows, so a layer whose criticality is 1 + d with half-width h needs
about n (h / d)^2 rows, and more where the screen over all layers asks for more than 95 %. A layer that is light, clearly below 1, may lack
only the proof of its damage being within the tolerance: the same formula with that distance. Where the damage is above, no row helps.
Left out: that d itself is uncertain, so the numbers are rough, given with two digits.
Sources: Spearman 1910 and Brown 1910; jackknife: Efron & Tibshirani 1993.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from bitatlas.findings.shares import FAILS, FALSE_DISCOVERIES, HOLDS, LIGHT, OPEN, UNCERTAIN, Floats, LayerRows, Shares
from bitatlas.records import Calibration, Correlation, Finding, Layer, Measured, ShapleyCheck
from bitatlas.records.text import interval, listed, number, rows_of
from bitatlas.stats.bootstrap import (
    RESAMPLES,
    block_count,
    effective_sample_size,
    interval_ends,
    percentile_interval,
    rank_correlation,
    resample_means,
    row_weights,
    two_sided_p,
)

CUTS = 200  # into halves: the mean over them is then known to about a hundredth of a correlation
FEWEST_ROWS = 8  # four in a half
GOOD = 0.9  # correlation from which a ranking is called stable
MOST_ROWS = 10_000  # beyond, "more than that" is said
STABLE_CLAIM = "the ranking of the layers is stable"


def reliability(rows: LayerRows, seed: int = 0) -> Measured | None:
    """Return the rank correlation that a second survey of as many rows would have with this one; None with under 3 layers or 8 rows."""
    if rows.layers < 3 or rows.independent < FEWEST_ROWS:
        return None
    per_weight = rows.values / rows.weights  # [rows, layers]; ranks of criticality, whatever the whole damage
    numbers = np.unique(range(rows.rows) if rows.blocks is None else rows.blocks, return_inverse=True)[1]  # [rows], block of each
    blocks = int(numbers.max()) + 1
    shuffled = np.random.default_rng(seed).permuted(np.tile(np.arange(blocks), (CUTS, 1)), axis=1)  # [cuts, blocks]
    in_first = np.zeros((CUTS, blocks), dtype=bool)
    np.put_along_axis(in_first, shuffled[:, : blocks // 2], True, axis=1)
    first = in_first[:, numbers]  # [cuts, rows]
    value = _stepped_up(_agreement(per_weight, first, np.ones(rows.rows)))
    left_out = [_fisher(_stepped_up(_agreement(per_weight, first, numbers != block))) for block in range(blocks)]
    error = math.sqrt((blocks - 1) / blocks * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    z, reach = _fisher(value), float(stats.t.ppf(0.975, blocks - 1)) * error
    return rows.record(value, (min(math.tanh(z - reach), value), max(math.tanh(z + reach), value)), "ratio")


def _agreement(per_weight: Floats, first: np.ndarray, included: np.ndarray) -> float:
    """Return the mean over cuts of the rank correlation between the halves. first: bool [cuts, rows], included: [rows] of 0 and 1."""
    sums = [(half * included) @ per_weight for half in (first, ~first)]  # [cuts, layers] each; their ranks are those of means
    return float(rank_correlation(*sums).mean())


def _stepped_up(r: float) -> float:
    """Return Spearman-Brown's correlation for twice the length; a negative agreement says nothing about twice the rows, and stays."""
    return 2 * r / (1 + r) if r > 0 else r


def _fisher(r: float) -> float:
    return math.atanh(min(r, 1 - 1e-9))


def reliability_findings(rows: LayerRows, layers: Sequence[Layer], seed: int = 0) -> list[Finding]:
    """Return one statement, with the rows that would settle the uncertain layers; none where there is no ranking to speak of."""
    result = reliability(rows, seed)
    if result is None or result.ci95 is None:
        return []
    low, high = result.ci95
    verdict = HOLDS if low >= GOOD else FAILS if high < GOOD else OPEN
    text = (
        f"Split in half at random, the {rows_of(result)} agree on the order of criticality; stepped up to all rows, rank correlation "
        f"{interval(result)}.{needed_text(layers)}"
    )
    return [Finding("layers", STABLE_CLAIM, verdict, text, result)]


def needed_text(layers: Sequence[Layer]) -> str:
    """Return the rows that would settle each uncertain layer, and whether each light one is safe; "" where there is none."""
    text = ""
    for verdict, about in ((UNCERTAIN, "what is uncertain"), (LIGHT, "whether light layers are safe")):
        chosen = {layer.layer: layer.rows_needed for layer in layers if layer.verdict == verdict and layer.criticality.ci95}
        needed = [
            f"layer {layer} about {number(count, 0)}{' or more' if count == MOST_ROWS else ''}"
            for layer, count in chosen.items()
            if count is not None
        ]
        if needed:
            text += f" Test rows that would settle {about}: {'; '.join(needed)}."
    return text


def with_rows_needed(layers: Sequence[Layer], rows: LayerRows, shares: Shares, tolerance: float, seed: int = 0) -> list[Layer]:
    """Return the layers, `rows_needed` filled where they are uncertain, or light with a damage below the tolerance, in nats/token."""
    if not shares.defined:
        return list(layers)
    added = rows.added.mean(axis=0)
    low, high = percentile_interval(resample_means(rows.added, seed=seed, blocks=rows.blocks), rows.independent)
    filled = []
    for index, layer in enumerate(layers):
        needed = None
        if layer.verdict == UNCERTAIN and layer.criticality.ci95 is not None:
            p = two_sided_p(shares.criticality([index])[1], 1.0, rows.independent)
            needed = _rows_for(rows.rows, layer.criticality.mean - 1, layer.criticality.ci95, _screen_factor(p, layer.q_value))
        elif layer.verdict == LIGHT and added[index] < tolerance:
            needed = _rows_for(rows.rows, float(added[index]) - tolerance, (float(low[index]), float(high[index])))
        filled.append(replace(layer, rows_needed=needed))
    return filled


def _rows_for(n: int, distance: float, ends: tuple[float, float], factor: float = 1.0) -> int | None:
    """Return about how many rows bring an interval that is now `ends` off a value that lies `distance` away; two digits, at most `MOST_ROWS`."""
    half_width = (ends[1] - ends[0]) / 2
    if distance == 0:
        return None
    needed = n * (half_width / distance) ** 2 * factor
    if needed >= MOST_ROWS:
        return MOST_ROWS
    step = 10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1)
    return max(n, math.ceil(needed / step) * step)


def _screen_factor(p: float, q: float) -> float:
    """Return how many times more rows the screen over all layers asks for than a single 95 % interval: (z at its level / z at 5 %)^2."""
    level = FALSE_DISCOVERIES * min(1.0, p / q) if q > 0 else FALSE_DISCOVERIES
    return float((stats.norm.isf(level / 2) / stats.norm.isf(FALSE_DISCOVERIES / 2)) ** 2)


# --- shapley check ---------------------------------------------------------------------------------------------------------
#
# Are the quadratic shares right? Those of the quadratic model against sampled orders of the layers, on the same rows.
#
# Every pair of an order and its reverse gives one estimate of each layer's Shapley value without any model of the damage; their mean is
# unbiased. Rows (in their blocks) and pairs are both drawn, so both are resampled for the intervals. What is checked are the quadratic shares as
# they come; the shares that are reported have the difference taken off, with its own error (see `findings.shares`). The largest difference over the layers is an upper
# bound in expectation: sampling alone makes the largest of many differences larger.
# Left out: more orders until the sampling error is small; that takes hundreds of models, and the screen of layers two a layer.
# Source: permutation sampling of Shapley values: Castro et al. 2009.

SHARES_CLAIM = "two models a layer are enough for the layers' shares"
GOOD_RANK = 0.9


def shapley_check(added: ArrayLike, models: int, rows: LayerRows, seed: int = 0) -> ShapleyCheck | None:
    """Return quadratic shares beside sampled ones; None where there is no damage to share.

    added: [pairs, rows, layers], nats/token, on the first of the rows that `rows` is of.
    """
    sampled = np.asarray(added, dtype=np.float64)
    pairs, few, layers = sampled.shape
    quadratic = rows.values[:few]  # [few, layers]
    if min(pairs, few, layers) < 2 or sampled.mean(axis=(0, 1)).sum() <= 0 or quadratic.mean(axis=0).sum() <= 0:
        return None
    rng = np.random.default_rng(seed)
    of_pairs = rng.multinomial(pairs, np.full(pairs, 1 / pairs), RESAMPLES) / pairs  # [resamples, pairs]
    blocks = None if rows.blocks is None else rows.blocks[:few]
    of_rows = row_weights(few, RESAMPLES, seed + 1, blocks)  # [resamples, rows]
    ours = _shares(np.einsum("bp,br,prl->bl", of_pairs, of_rows, sampled))  # [resamples, layers]
    theirs = _shares(of_rows @ quadratic)
    mean, mean_quadratic = _shares(sampled.mean(axis=(0, 1))), _shares(quadratic.mean(axis=0))
    n = min(pairs, effective_sample_size(few, blocks))
    where = f"{rows.split}, {2 * pairs} orders"

    def record(value: float, resampled: Floats, unit: str) -> Measured:
        ends = interval_ends(resampled, n)
        # resampled extremes may all lie beyond the value itself
        covering = (min(ends[0], value), max(ends[1], value)) if ends else None
        return Measured(float(value), covering, unit, rows.both_bases, where, few, block_count(blocks))

    by_pair = _shares(sampled.mean(axis=1))  # [pairs, layers]
    return ShapleyCheck(
        orders=2 * pairs,
        models=models,
        sampled=[record(mean[i], ours[:, i], "share") for i in range(layers)],
        standard_errors=(by_pair.std(axis=0, ddof=1) / math.sqrt(pairs)).tolist(),
        quadratic=mean_quadratic.tolist(),
        largest=record(np.abs(mean - mean_quadratic).max(), np.abs(ours - theirs).max(axis=1), "share"),
        rank=record(rank_correlation(mean[None], mean_quadratic[None])[0], rank_correlation(ours, theirs), "ratio"),
    )


def _shares(values: Floats) -> Floats:
    """Return values divided by their sum. [..., layers]"""
    return values / values.sum(axis=-1, keepdims=True)


def shapley_findings(check: ShapleyCheck | None) -> list[Finding]:
    """Return one statement; none where it was not measured."""
    if check is None:
        return []
    low, high = check.rank.ci95 or (-1.0, 1.0)
    verdict = HOLDS if low >= GOOD_RANK else FAILS if high < GOOD_RANK else OPEN
    differences = np.abs(np.array(check.quadratic) - [share.mean for share in check.sampled])
    layer = int(differences.argmax())
    text = (
        f"In {check.orders} random orders of the layers ({check.models} models on {check.rank.n} rows, no model of the damage), shares rank "
        f"like the quadratic ones with a correlation of {interval(check.rank)}. The largest difference is {interval(check.largest)} of the "
        f"damage, at layer {layer} (standard error of its sampled share {number(100 * check.standard_errors[layer], 1)}%). The shares that are "
        f"reported have the differences taken off, and their errors in their intervals."
    )
    return [Finding("layers", SHARES_CLAIM, verdict, text, check.rank)]


# --- prediction ------------------------------------------------------------------------------------------------------------
#
# Does the prediction of damage hold around the plan? A word, and the sentence that carries the numbers.
#
# *Holds*: rank correlation of at least 0.95 whose interval stays above 0.90. *Does not hold*: the whole interval is below 0.95.
# Otherwise inconclusive: too low, or known too roughly, to be relied on.

GOOD_PREDICTION = 0.95  # rank correlation
SURE = 0.90  # that its interval must stay above
PREDICTION_CLAIM = "the damage of plans around this one is predicted"


def calibration_findings(calibration: Calibration | None) -> list[Finding]:
    """Return one statement; none where it was not tested."""
    if calibration is None:
        return []
    evidence = as_measured(calibration.prediction)
    return [Finding("plan", PREDICTION_CLAIM, calibration_verdict(calibration), calibration_text(calibration), evidence)]


def calibration_verdict(calibration: Calibration) -> str:
    """Return the word, from the rank correlation and its interval."""
    rho = calibration.prediction
    low, high = rho.ci95 or (-1.0, 1.0)
    if rho.rho >= GOOD_PREDICTION and low >= SURE:
        return HOLDS
    return FAILS if high < GOOD_PREDICTION else OPEN


def calibration_text(calibration: Calibration) -> str:
    """Return a sentence: what was compared, how well the ranks agree, the line, the error, and why the word is not "holds"."""
    changed = sorted({point.changed for point in calibration.points})
    span = f"{changed[0]} to {changed[-1]}" if len(changed) > 1 else f"{changed[0]}"
    others = [f"{interval(as_measured(other))} for the {other.measure}" for other in calibration.others]
    beside = f" ({'; '.join(others)})" if others else ""
    return (
        f"Of {len(calibration.points)} random plans with {span} units changed, damage predicted from fit rows and measured on "
        f"{calibration.centre.measured.rows} rows agree in rank with ρ = {interval(as_measured(calibration.prediction))}{beside}. "
        f"The line of measured on predicted has {line_text(calibration)}; the mean error is "
        f"{interval(calibration.relative_error)} of the damage.{_doubt(calibration)}"
    )


def line_text(calibration: Calibration) -> str:
    """Return the calibration line as text: measured on predicted, with intervals."""
    return f"slope {interval(calibration.slope)}, intercept {interval(calibration.intercept, unit=True)}"


def _doubt(calibration: Calibration) -> str:
    rho, word = calibration.prediction, calibration_verdict(calibration)
    if word == HOLDS:
        return ""
    if word == FAILS:
        return f" The whole interval is below {number(GOOD_PREDICTION, 2)}: predicted ranks are rough here, and only measured plans should be compared."
    low = rho.ci95[0] if rho.ci95 else -1.0
    reasons = [f"ρ is below {number(GOOD_PREDICTION, 2)}"] if rho.rho < GOOD_PREDICTION else []
    reasons += [f"its interval reaches below {number(SURE, 2)}"] if low < SURE else []
    return f" That is not settled: {listed(reasons)}.{_ceiling(calibration)}"


def _ceiling(calibration: Calibration) -> str:
    """Say whether the rows are what is missing: the plans themselves, measured on the fit rows, do not clearly rank better."""
    of_rows = calibration.on_fit
    if of_rows.rho >= GOOD_PREDICTION and (of_rows.ci95 or (-1.0, 1.0))[0] >= SURE:
        return ""
    shown = interval(as_measured(of_rows))
    return f" Even the same plans measured on fit rows are not sure to rank as they do on {calibration.centre.measured.rows} rows ({shown}): more rows (--rows) would tell."


def as_measured(result: Correlation) -> Measured:
    """Return a rank correlation as a number with its interval."""
    return Measured(result.rho, result.ci95, "ratio", "plan", "plans around it", result.n)
