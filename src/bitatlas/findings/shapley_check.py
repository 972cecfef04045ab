"""Are the quadratic shares right? Those of the quadratic model against sampled orders of the layers, on the same rows.

Every pair of an order and its reverse gives one estimate of each layer's Shapley value without any model of the damage; their mean is
unbiased. Rows (in their blocks) and pairs are both drawn, so both are resampled for the intervals. What is checked are the quadratic shares as
they come; the shares that are reported have the difference taken off, with its own error (see `shares`). The largest difference over the layers is an upper
bound in expectation: sampling alone makes the largest of many differences larger.
Left out: more orders until the sampling error is small; that takes hundreds of models, and the screen of layers two a layer.
Source: permutation sampling of Shapley values: Castro et al. 2009.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.evaluation.bootstrap import RESAMPLES, block_count, independent, percentile_interval, row_weights
from bitatlas.findings.correlations import Floats, spearman_by_row
from bitatlas.findings.folk import FAILS, HOLDS, OPEN
from bitatlas.findings.shares import LayerRows
from bitatlas.records import Finding, Measured, ShapleyCheck
from bitatlas.words import interval, number

CLAIM = "two models a layer are enough for the layers' shares"
GOOD_RANK = 0.9


def shapley_check(added: ArrayLike, models: int, rows: LayerRows, seed: int = 0) -> ShapleyCheck | None:
    """added: [pairs, rows, layers], nats/token, on the first of the rows that `rows` is of. None where there is no damage to share."""
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
    n = min(pairs, independent(few, blocks))
    where = f"{rows.split}, {2 * pairs} orders"

    def record(value: float, resampled: Floats, unit: str) -> Measured:
        low, high = percentile_interval(resampled, n)
        ends = (min(float(low), value), max(float(high), value))  # resampled extremes may all lie beyond what was seen
        known = ends if math.isfinite(low) else None
        return Measured(float(value), known, unit, rows.both_bases, where, few, block_count(blocks))

    by_pair = _shares(sampled.mean(axis=1))  # [pairs, layers]
    return ShapleyCheck(
        orders=2 * pairs,
        models=models,
        sampled=[record(mean[i], ours[:, i], "share") for i in range(layers)],
        standard_errors=[float(one) for one in by_pair.std(axis=0, ddof=1) / math.sqrt(pairs)],
        quadratic=[float(one) for one in mean_quadratic],
        largest=record(np.abs(mean - mean_quadratic).max(), np.abs(ours - theirs).max(axis=1), "share"),
        rank=record(spearman_by_row(mean[None], mean_quadratic[None])[0], spearman_by_row(ours, theirs), "ratio"),
    )


def _shares(values: Floats) -> Floats:
    """[..., layers] -> the same, with the sum 1."""
    return values / values.sum(axis=-1, keepdims=True)


def shapley_findings(check: ShapleyCheck | None) -> list[Finding]:
    """One statement; none where it was not measured."""
    if check is None:
        return []
    low, high = check.rank.ci95 or (-1.0, 1.0)
    verdict = HOLDS if low >= GOOD_RANK else FAILS if high < GOOD_RANK else OPEN
    differences = np.abs(np.array(check.quadratic) - [one.mean for one in check.sampled])
    where = int(differences.argmax())
    text = (
        f"In {check.orders} random orders of the layers ({check.models} models on {check.rank.n} rows, no model of the damage), shares rank "
        f"like the quadratic ones with a correlation of {interval(check.rank)}. The largest difference is {interval(check.largest)} of the "
        f"damage, at layer {where} (standard error of its sampled share {number(100 * check.standard_errors[where], 1)}%). The shares that are "
        f"reported have the differences taken off, and their errors in their intervals."
    )
    return [Finding("layers", CLAIM, verdict, text, check.rank)]
