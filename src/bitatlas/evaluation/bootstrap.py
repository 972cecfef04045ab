"""Intervals and p-values by resampling rows or items, and the two corrections for asking many questions at once.

The unit that is resampled is a sequence or a problem, never a token or a head: tokens of one sequence depend on each other.
One call resamples all columns with the same draws, and equal (rows, resamples, seed) give the same draws in any call, so
that differences and ratios of resampled means stay paired.

Percentile intervals of a small sample are too short (16 rows: about 92 % where 95 % is claimed). The quantiles are taken
further out, where a normal sample of that size would need them: the expanded percentile interval (arXiv:1411.5279).
`two_sided_p` uses the same expansion when it is given the sample size.
Left out: BCa and bootstrap-t intervals; they need a jackknife or a nested bootstrap of every ratio that is reported.

Sources: Efron & Tibshirani 1993; Hesterberg 2014, arXiv:1411.5279; Benjamini & Hochberg 1995; Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bitatlas.records import Measured

RESAMPLES = 2000
CHUNK_NUMBERS = 2**22  # counts in memory at a time: 32 MiB
KEPT_NUMBERS = 2**18  # counts of one sample that are kept, eight such at most: 16 MiB

Floats = NDArray[np.float64]


def resample_means(values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means over rows drawn with replacement; the same drawn rows for all columns.

    values: [rows, ...] -> [resamples, ...] float64, in the unit of `values`.
    Raises ValueError where there is no row or a value is not finite.
    """
    array = _finite(values)
    rows = array.shape[0]
    # measured from the first row, a constant column stays exactly constant
    deviations = (array - array[0]).reshape(rows, -1)  # [rows, columns]
    means = np.empty((resamples, deviations.shape[1]))
    start = 0
    for counts in _draws(rows, resamples, seed):
        means[start : start + len(counts)] = counts @ deviations / rows
        start += len(counts)
    return array[0] + means.reshape(resamples, *array.shape[1:])


def _draws(rows: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each row is drawn: arrays [part of the resamples, rows]. The small ones are kept, since one survey asks again and again."""
    step = max(1, CHUNK_NUMBERS // rows)
    if rows * resamples <= KEPT_NUMBERS:
        yield _kept_draws(rows, resamples, seed)
        return
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, step):
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=min(step, resamples - start)).astype(np.float64)


@lru_cache(maxsize=8)
def _kept_draws(rows: int, resamples: int, seed: int) -> Floats:
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[0] == 0:
        raise ValueError("values: at least one row is needed")
    if not np.isfinite(array).all():
        raise ValueError("values: all must be finite")
    return array


def percentile_interval(resampled: ArrayLike, n: int, level: float = 0.95) -> tuple[Floats, Floats]:
    """Interval (low, high) of any statistic from its resampled values, expanded for a sample of `n` rows.

    resampled: [resamples, ...] -> two arrays [...]. One row tells nothing about spread: (-inf, inf).
    """
    array = np.asarray(resampled, dtype=np.float64)
    if n < 2:
        return np.full(array.shape[1:], -np.inf), np.full(array.shape[1:], np.inf)
    tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(array, [tail, 1 - tail], axis=0)
    return low, high


def mean_interval(values: ArrayLike, seed: int = 0) -> tuple[float, float, float]:
    """values: [rows] -> (mean, low, high), a 95 % interval in the unit of `values`; (mean, -inf, inf) of one row."""
    array = _finite(values)
    low, high = percentile_interval(resample_means(array, seed=seed), len(array))
    return float(array[0] + (array - array[0]).mean()), float(low), float(high)


def measured(values: ArrayLike, unit: str, base: str, rows: str, seed: int = 0) -> Measured:
    """The record of a mean over rows. values: [rows], in `unit`. A single row has no interval."""
    array = _finite(values)
    mean, low, high = mean_interval(array, seed)
    return Measured(mean, (low, high) if len(array) > 1 else None, unit, base, rows, len(array))


def two_sided_p(resampled: ArrayLike, null: float, n: int | None = None) -> float:
    """Two-sided p of "the statistic is `null`": twice the smaller tail of resampled values beyond it, ties in both.

    resampled: [resamples]. With `n` (rows behind it) the tail is expanded as in `percentile_interval`: p < 0.05 and the
    95 % interval agree. No tail is below 1 / (resamples + 1): a screen over m layers wants well over 40 m resamples.
    """
    array = np.asarray(resampled, dtype=np.float64)
    below, above = np.count_nonzero(array <= null), np.count_nonzero(array >= null)
    tail = min(0.5, (min(below, above) + 1) / (len(array) + 1))
    if n is None:
        return 2 * tail
    if n < 2:
        return 1.0
    return float(2 * stats.t.cdf(stats.norm.ppf(tail) * math.sqrt((n - 1) / n), n - 1))


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """q-values: [tests] -> [tests]. Calling each q < 0.05 a discovery, the expected share of false ones is below 5 %."""
    values = _probabilities(p)
    order = np.argsort(values, kind="stable")[::-1]  # largest first
    ranks = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum.accumulate(values[order] * len(values) / ranks)
    return np.minimum(adjusted, 1.0)


def holm(p: ArrayLike) -> Floats:
    """Adjusted p: [tests] -> [tests]. Rejecting every one below 0.05 makes any false rejection at most 5 % likely."""
    values = _probabilities(p)
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * factors)
    return np.minimum(adjusted, 1.0)


def _probabilities(p: ArrayLike) -> Floats:
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p: one row of values from 0 to 1")
    return values
