"""Say of several files, measured on the same tokens, which are told apart, and in which order.

A token's divergence says little alone, and tokens of one document belong together: what is resampled, and flipped, is the document. Means are
ratios, all tokens' sum over their number, since documents differ in length.

*Are two told apart?* Under the hypothesis that two files do equally well, the sign of a document's difference is a coin's. The summed difference, over its
standard error, is compared with what the same differences give under `FLIPS` draws of signs (all of them where there are few). That is exact for files that
are interchangeable, whatever the distribution, and nearly so for equal means. Holm corrects over all pairs.

*Ranks.* A file's rank is 1 + the number of files that are told to do less damage. Files that are not told apart from each other and from the same others share a
rank; "not told apart" need not carry over from neighbour to neighbour, and then the ranks between say so.

*How many more tokens?* A difference d with the standard error s at n tokens is found in 80 % of the cases with n (2.80 s / d)² tokens, from more documents alike.
Sources: sign-flipping tests: Winkler et al. 2014; Hemerik, Goeman & Finos 2020; ratio estimators: Cochran 1977, chapter 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from bitatlas.records import Measured
from bitatlas.stats.bootstrap import Blocks, Floats, block_count, effective_sample_size, holm, percentile_interval, row_weights
from bitatlas.stats.margin import round_up

FLIPS = 9999
EXACT_BLOCKS = 13  # 2**13 signs are fewer than FLIPS
POWER_SIGMAS = 2.80  # 1.96 + 0.84: two-sided 5 %, 80 % power
QUANTILE_RESAMPLES = 500


def ratio_measured(
    sums: Floats, counts: Floats, blocks: Sequence[int], unit: str, base: str, rows: str, seed: int = 0
) -> Measured:
    """Return the record of the sum of `sums` over that of `counts`, with an interval over blocks. sums, counts: [rows]."""
    weights = row_weights(len(sums), seed=seed, blocks=blocks)  # [resamples, rows]
    below = weights @ counts
    means = (weights @ sums)[below > 0] / below[below > 0]
    n = effective_sample_size(len(sums), blocks)
    low, high = percentile_interval(means, n)
    mean = float(sums.sum() / counts.sum())
    return Measured(mean, (float(low), float(high)) if n >= 2 else None, unit, base, rows, len(sums), block_count(blocks))


def quantiles_measured(
    values: Floats,
    of_row: NDArray[np.int64],
    blocks: Sequence[int],
    percents: Sequence[float],
    unit: str,
    base: str,
    rows: str,
    seed: int = 0,
) -> list[Measured]:
    """Return the records of quantiles over tokens, with intervals over blocks. values, of_row: [tokens], the row of each; blocks: [rows]."""
    order = np.argsort(values, kind="stable")
    sorted_values, sorted_rows = values[order], of_row[order]
    weights = row_weights(len(blocks), QUANTILE_RESAMPLES, seed, blocks)
    n = effective_sample_size(len(blocks), blocks)
    resampled = np.empty((QUANTILE_RESAMPLES, len(percents)))
    for index, of_rows in enumerate(weights):
        sums = np.cumsum(of_rows[sorted_rows])
        places = np.searchsorted(sums, np.asarray(percents) / 100 * sums[-1])
        resampled[index] = sorted_values[np.minimum(places, len(values) - 1)]
    low, high = percentile_interval(resampled, n)
    means = np.quantile(values, np.asarray(percents) / 100)
    return [
        Measured(float(mean), (float(a), float(b)) if n >= 2 else None, unit, base, rows, len(blocks), block_count(blocks))
        for mean, a, b in zip(means, low, high, strict=True)
    ]


def block_sums(values: Floats, blocks: Blocks) -> Floats:
    """Return the sums over the rows of each block, in the order in which blocks come. values: [rows] -> [blocks]."""
    if blocks is None:
        return values
    _, index = np.unique(np.asarray(blocks), return_inverse=True)
    return np.bincount(index, weights=values).astype(np.float64)


def sign_flip_p(sums: Floats, seed: int = 0) -> float:
    """Return the two-sided p of "the differences of documents are as often negative as positive". sums: [blocks], a document's summed difference."""
    count = len(sums)
    total = float((sums**2).sum())
    if count < 2 or total == 0:
        return 1.0
    if count <= EXACT_BLOCKS:
        signs = np.array(list(product((1.0, -1.0), repeat=count)))
    else:
        signs = np.random.default_rng(seed).integers(0, 2, (FLIPS, count)) * 2.0 - 1
    # with the same squares, the statistic of Student rises with the sum alone
    flipped, seen = np.abs(signs @ sums), abs(float(sums.sum()))
    beyond = int((flipped >= seen * (1 - 1e-12)).sum())
    return beyond / len(signs) if count <= EXACT_BLOCKS else (beyond + 1) / (FLIPS + 1)


def tokens_needed(sums: Floats, tokens: int) -> int | None:
    """Return about how many tokens would tell a difference like this, two digits; None where none is seen. sums: [blocks]."""
    count, mean = len(sums), float(sums.mean())
    if count < 2 or mean == 0:
        return None
    error = float(sums.std(ddof=1)) / count**0.5
    return max(1, round_up(tokens * (POWER_SIGMAS * error / mean) ** 2))


def compare_pairs(sums: dict[str, Floats], seed: int = 0) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (p, Holm's p) of every pair. sums: by name, each document's summed divergence [blocks], the documents alike."""
    pairs = list(combinations(sums, 2))
    values = [sign_flip_p(sums[second] - sums[first], seed) for first, second in pairs]
    return dict(zip(pairs, zip(values, holm(values).tolist(), strict=True), strict=True)) if pairs else {}


def ranks(names: Sequence[str], better: set[tuple[str, str]]) -> dict[str, int]:
    """Return each name's rank: 1 + how many are told to be better than it. better: (the better, the worse)."""
    return {name: 1 + sum((other, name) in better for other in names) for name in names}


def front(sizes: dict[str, int], better: set[tuple[str, str]]) -> set[str]:
    """Return the names that no other of at most their size is told to be better than."""
    return {
        name
        for name, size in sizes.items()
        if not any(other_size <= size and (other, name) in better for other, other_size in sizes.items())
    }
