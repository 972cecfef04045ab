"""Intervals and p-values by resampling rows or items, and the two corrections for asking many questions at once.

The unit that is resampled is a sequence or a problem, never a token or a head: tokens of one sequence depend on each other.
Rows of one document depend on each other, too: rows come with the number of their *block* (a document, or a stretch of a long one), whole
blocks are drawn, and a mean is the drawn rows' sum over their count. Blocks may differ in size; what counts as sample size then is
(sum of sizes)^2 / sum of squared sizes (`effective_sample_size`), the number of equal blocks that would be as good.
One call resamples all columns with the same draws, and equal (rows, resamples, seed) give the same draws in any call, so
that differences and ratios of resampled means stay paired.

Percentile intervals of a small sample are too short (16 rows: about 92 % where 95 % is claimed). The quantiles are taken
further out, where a normal sample of that size would need them: the expanded percentile interval (arXiv:1411.5279).
`two_sided_p` uses the same expansion when it is given the sample size. Far out in the tails of few rows no resample is left, since a
resampled mean never passes the largest value: `t_interval` is for these.
`two_sided_p` cannot go below what its resamples resolve: `smallest_p` is that floor, and `is_bound` tells which p and q are only bounds.
Left out: BCa and bootstrap-t intervals; they need a jackknife or a nested bootstrap of every ratio that is reported.

Sources: Efron & Tibshirani 1993; cluster bootstrap: Davison & Hinkley 1997, 3.8; effective sample size: Kish 1965; Hesterberg 2014, arXiv:1411.5279; Benjamini & Hochberg 1995; Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bitatlas.records import Measured

RESAMPLES = 2000
CHUNK_NUMBERS = 2**22  # counts in memory at a time: 32 MiB
CACHED_NUMBERS = 2**18  # counts of one sample that are kept, eight such at most: 16 MiB

Floats = NDArray[np.float64]
Blocks = Sequence[int] | None  # a number for each row, equal for rows that belong together


def resample_means(values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, blocks: Blocks = None) -> Floats:
    """Return means over rows drawn with replacement, one draw for all columns.

    values: [rows, ...] -> [resamples, ...] float64, in the unit of `values`. blocks: [rows], equal for rows that are drawn together;
    without them every row is drawn by itself. Raises ValueError where there is no row or a value is not finite.
    """
    array = _finite(values)
    rows = array.shape[0]
    # measured from the first row, a constant column stays exactly constant
    deviations = (array - array[0]).reshape(rows, -1)  # [rows, columns]
    sizes = np.ones(rows)
    if blocks is not None:
        index, sizes = _number_blocks(blocks, rows)
        sums = np.zeros((len(sizes), deviations.shape[1]))
        np.add.at(sums, index, deviations)
        deviations = sums  # [blocks, columns]
    means = np.empty((resamples, deviations.shape[1]))
    start = 0
    for counts in _draws(len(sizes), resamples, seed):
        means[start : start + len(counts)] = counts @ deviations / (counts @ sizes)[:, None]
        start += len(counts)
    return array[0] + means.reshape(resamples, *array.shape[1:])


def row_weights(rows: int, resamples: int = RESAMPLES, seed: int = 0, blocks: Blocks = None) -> Floats:
    """Return what `resample_means` weighs each row with: [resamples, rows], every line with the sum 1."""
    index, sizes = _number_blocks(range(rows) if blocks is None else blocks, rows)
    counts = np.concatenate(list(_draws(len(sizes), resamples, seed)))
    return counts[:, index] / (counts @ sizes)[:, None]


def effective_sample_size(rows: int, blocks: Blocks = None) -> float:
    """Return how many equal, independent blocks the rows are worth (Kish): `rows` itself where each is a block of its own."""
    if blocks is None:
        return float(rows)
    _, sizes = _number_blocks(blocks, rows)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def standard_errors(values: ArrayLike, blocks: Blocks = None) -> Floats:
    """Return standard errors of means over rows that come in blocks. values: [rows, ...] -> [...]; 0 of a single block."""
    array = np.asarray(values, dtype=np.float64)
    index, sizes = _number_blocks(range(len(array)) if blocks is None else blocks, len(array))
    sums = np.zeros((len(sizes), *array.shape[1:]))
    np.add.at(sums, index, array - array.mean(axis=0))
    count = len(sizes)
    return np.sqrt((sums**2).sum(axis=0) * count / max(1, count - 1)) / len(array)


def _number_blocks(blocks: Iterable[int], rows: int) -> tuple[NDArray[np.int64], Floats]:
    """Number blocks in the order in which they come: (number of each row's block [rows], rows of each block [blocks])."""
    numbers: dict[int, int] = {}
    index = np.array([numbers.setdefault(int(block), len(numbers)) for block in blocks], dtype=np.int64)
    if len(index) != rows:
        raise ValueError(f"blocks: one a row, got {len(index)} for {rows} rows")
    return index, np.bincount(index).astype(np.float64)


def _draws(count: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each block is drawn: arrays [part of the resamples, blocks]. Small ones are cached: one survey asks again and again."""
    if count * resamples <= CACHED_NUMBERS:
        yield _cached_draws(count, resamples, seed)
        return
    step = max(1, CHUNK_NUMBERS // count)
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, step):
        yield generator.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start)).astype(np.float64)


@lru_cache(maxsize=8)
def _cached_draws(count: int, resamples: int, seed: int) -> Floats:
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[0] == 0:
        raise ValueError("values: at least one row is needed")
    if not np.isfinite(array).all():
        raise ValueError("values: all must be finite")
    return array


def percentile_interval(resampled: ArrayLike, n: float, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return the interval (low, high) of any statistic from its resampled values, expanded for a sample of `n` rows (or as many independent blocks).

    resampled: [resamples, ...] -> two arrays [...]. One row tells nothing about spread: (-inf, inf).
    """
    array = np.asarray(resampled, dtype=np.float64)
    if n < 2:
        return np.full(array.shape[1:], -np.inf), np.full(array.shape[1:], np.inf)
    tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(array, [tail, 1 - tail], axis=0)
    return low, high


def t_interval(values: ArrayLike, level: float = 0.95, blocks: Blocks = None) -> tuple[Floats, Floats]:
    """Return Student's interval (low, high) of means over rows that come in blocks, with the blocks' effective number less 1 degrees of freedom.

    values: [rows, ...] -> two arrays [...]. One row or block tells nothing about spread: (-inf, inf).
    """
    array = _finite(values)
    n = effective_sample_size(len(array), blocks)
    mean = array[0] + (array - array[0]).mean(axis=0)
    if n < 2:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    half = stats.t.ppf((1 + level) / 2, n - 1) * standard_errors(array, blocks)
    return mean - half, mean + half


def interval_ends(resampled: ArrayLike, n: float) -> tuple[float, float] | None:
    """Return the 95 % interval of one statistic, for a record; None of a single row or block. resampled: [resamples]."""
    low, high = percentile_interval(resampled, n)
    return None if n < 2 else (float(low), float(high))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> Floats:
    """Return Spearman's rho along the last axis: [..., n] and [..., n], broadcast -> [...]; ties get their mean rank, 0 where either is constant."""
    ranks = [stats.rankdata(values, axis=-1) for values in (x, y)]
    a, b = (values - values.mean(axis=-1, keepdims=True) for values in ranks)
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), spread, out=np.zeros_like(spread), where=spread > 0)


def mean_interval(values: ArrayLike, seed: int = 0, blocks: Blocks = None) -> tuple[float, float, float]:
    """Return (mean, low, high) of values [rows], a 95 % interval in their unit; (mean, -inf, inf) of one row or block."""
    array = _finite(values)
    low, high = percentile_interval(resample_means(array, seed=seed, blocks=blocks), effective_sample_size(len(array), blocks))
    return float(array[0] + (array - array[0]).mean()), float(low), float(high)


def measured(values: ArrayLike, unit: str, base: str, rows: str, seed: int = 0, blocks: Blocks = None) -> Measured:
    """Return the record of a mean over rows. values: [rows], in `unit`. A single row or block has no interval."""
    array = _finite(values)
    mean, low, high = mean_interval(array, seed, blocks)
    return Measured(mean, (low, high) if math.isfinite(low) else None, unit, base, rows, len(array), block_count(blocks))


def block_count(blocks: Blocks) -> int | None:
    """Return how many blocks there are, for the record; None where every row stands by itself."""
    count = None if blocks is None else len(set(blocks))
    return None if blocks is None or count == len(blocks) else count


def two_sided_p(resampled: ArrayLike, null: float, n: float | None = None) -> float:
    """Return the two-sided p of "the statistic is `null`": twice the smaller tail of resampled values beyond it, ties in both.

    resampled: [resamples]. With `n` (rows or independent blocks behind it) the tail is expanded as in `percentile_interval`: p < 0.05 and
    the 95 % interval agree. No tail is below 1 / (resamples + 1) (`smallest_p`): a screen over m layers wants well over 40 m resamples.
    """
    array = np.asarray(resampled, dtype=np.float64)
    below, above = np.count_nonzero(array <= null), np.count_nonzero(array >= null)
    return _from_tail(min(0.5, (min(below, above) + 1) / (len(array) + 1)), n)


def smallest_p(resamples: int, n: float | None = None) -> float:
    """Return the least p that `two_sided_p` can give: one that is so small is a bound, and printed with "<"."""
    return _from_tail(1 / (resamples + 1), n)


def _from_tail(tail: float, n: float | None) -> float:
    if n is None:
        return 2 * tail
    if n < 2:
        return 1.0
    return float(2 * stats.t.cdf(stats.norm.ppf(tail) * math.sqrt((n - 1) / n), n - 1))


def is_bound(p: ArrayLike, floor: float) -> NDArray[np.bool_]:
    """Return which q-values of `p` [tests] are bounds alone: bool [tests], since resampling cannot give a p below `floor`."""
    values = _probabilities(p)
    least = (values <= floor * (1 + 1e-9)) & (floor < 1)
    return benjamini_hochberg(np.where(least, 0.0, values)) < benjamini_hochberg(values)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Return q-values of p [tests]. Calling each q < 0.05 a discovery, the expected share of false ones is below 5 %."""
    values = _probabilities(p)
    order = np.argsort(values, kind="stable")[::-1]  # largest first
    ranks = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum.accumulate(values[order] * len(values) / ranks)
    return np.minimum(adjusted, 1.0)


def holm(p: ArrayLike) -> Floats:
    """Return adjusted p of p [tests]. Rejecting every one below 0.05 makes any false rejection at most 5 % likely."""
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
