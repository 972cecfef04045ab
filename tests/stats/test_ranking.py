"""Ranks of files: equal ones are rarely told apart, different ones often, and intervals are over documents."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitatlas.stats.ranking import (
    block_sums,
    compare_pairs,
    front,
    quantiles_measured,
    ranks,
    ratio_measured,
    sign_flip_p,
    tokens_needed,
)

RUNS = 500


def damages(rng: np.random.Generator, documents: int, extra: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Summed divergences of two files on documents of unequal length and unequal difficulty, skewed as divergences are. extra: of the second, in
    standard errors of the mean difference.
    """
    tokens = rng.integers(60, 256, documents)
    shared = rng.lognormal(0, 0.8, documents) * tokens
    noise = [shared * rng.lognormal(0, 0.3, documents) for _ in range(2)]
    spread = np.sqrt(2 * np.mean((shared * 0.31) ** 2) / documents) * np.exp(
        0.3**2
    )  # about one standard error of the mean difference
    return noise[0], noise[1] + extra * spread


@pytest.mark.parametrize("documents", [12, 24, 64])
def test_equal_files_are_rarely_told_apart(documents: int):
    rng = np.random.default_rng(documents)
    wrong = sum(sign_flip_p(np.subtract(*damages(rng, documents)), seed) < 0.05 for seed in range(RUNS))
    assert (
        wrong <= 0.05 * RUNS + (documents < 24) * 2 * (RUNS * 0.05 * 0.95) ** 0.5
    )  # the test is exact: half of such counts lie above 5 %


def test_a_difference_of_two_standard_errors_is_often_found():
    """Normal differences, whose standard error is known: 24 documents, a true difference of two standard errors."""
    rng = np.random.default_rng(0)
    seen = sum(sign_flip_p(rng.normal(2 / 24**0.5, 1.0, 24), seed) < 0.05 for seed in range(RUNS))
    assert seen >= 0.45 * RUNS
    skewed = sum(sign_flip_p(-np.subtract(*damages(rng, 64, 2.0)), seed) < 0.05 for seed in range(RUNS))
    assert skewed >= 0.45 * RUNS


def test_of_eight_equal_files_none_is_told_apart_in_most_runs():
    """Holm: any of the 28 pairs in at most 5 % of the runs (two standard errors of such a rate allowed)."""
    rng = np.random.default_rng(1)
    wrong = 0
    for seed in range(150):
        shared = rng.lognormal(0, 0.8, 24)
        sums = {str(name): shared * rng.lognormal(0, 0.3, 24) for name in range(8)}
        wrong += any(adjusted < 0.05 for _, adjusted in compare_pairs(sums, seed).values())
    assert wrong <= 150 * 0.05 + 2 * (150 * 0.05 * 0.95) ** 0.5


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_signs_are_all_tried_of_few_documents(values: list[float]):
    sums = np.array(values)
    flipped = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in product((1, -1), repeat=len(values))
    ]
    expected = np.mean([value >= abs(sums.sum()) * (1 - 1e-12) for value in flipped]) if (sums**2).sum() > 0 else 1.0
    assert sign_flip_p(sums) == pytest.approx(expected, abs=2 / 2 ** len(values))  # ties by rounding


def test_a_mean_is_over_tokens_and_its_interval_over_documents():
    rng = np.random.default_rng(2)
    counts, blocks = np.array([1.0, 200, 50, 50, 100, 100]), [0, 0, 1, 1, 2, 3]
    sums = counts * np.array([9.0, 0.2, 0.1, 0.3, 0.2, 0.4])
    result = ratio_measured(sums, counts, blocks, "nats/token", "reference", "text")
    assert result.mean == pytest.approx(sums.sum() / counts.sum())
    assert result.blocks == 4
    assert result.ci95 is not None
    # every resample of whole documents, by hand
    by_block = [(sums[np.array(blocks) == b].sum(), counts[np.array(blocks) == b].sum()) for b in range(4)]
    means = []
    for drawn in rng.integers(0, 4, (4000, 4)):
        means.append(sum(by_block[b][0] for b in drawn) / sum(by_block[b][1] for b in drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    assert result.ci95[0] <= low + 1e-9
    assert result.ci95[1] >= high - 1e-9  # expanded for a small sample
    assert ratio_measured(sums[:1], counts[:1], [0], "nats/token", "reference", "text").ci95 is None


def test_intervals_of_quantiles_cover():
    """The 90 % quantile of tokens whose documents differ: covered in at least 88 % of 100 worlds."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        level = rng.lognormal(0, 0.3, 30)
        values, of_row = (level[:, None] * rng.exponential(1, (30, 100))).ravel(), np.repeat(np.arange(30), 100)
        (result,) = quantiles_measured(values, of_row, range(30), [90.0], "nats", "reference", "text", seed)
        draws = np.random.default_rng(10_000).lognormal(0, 0.3, 200_000) * np.random.default_rng(10_001).exponential(1, 200_000)
        truth = np.quantile(draws, 0.9)
        assert result.mean == pytest.approx(np.quantile(values, 0.9))
        covered += result.ci95 is not None and result.ci95[0] <= truth <= result.ci95[1]
    assert covered >= 88


def test_tokens_needed_is_what_it_takes():
    """The number that is told, taken, finds the difference in about 80 % of the runs."""
    rng = np.random.default_rng(3)
    sample = rng.normal(0.1, 1.0, 400)
    sample += 0.1 - sample.mean()
    needed = tokens_needed(sample, 400 * 100)
    assert needed is not None
    assert needed == pytest.approx(400 * 100 * (2.8 * sample.std(ddof=1) / 20 / 0.1) ** 2, rel=0.1)
    documents = needed // 100
    found = sum(sign_flip_p(rng.normal(0.1, sample.std(), documents), seed) < 0.05 for seed in range(200))
    assert 0.7 <= found / 200 <= 0.9
    assert tokens_needed(np.zeros(5), 100) is None


def test_ranks_and_the_front():
    better = {("a", "c"), ("b", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    assert ranks(["a", "b", "c", "d"], better) == {"a": 1, "b": 1, "c": 3, "d": 4}
    assert front({"a": 100, "b": 90, "c": 80, "d": 85}, better) == {"a", "b", "c"}
    assert block_sums(np.array([1.0, 2, 3]), [7, 7, 1]).tolist() == [3, 3]
    assert compare_pairs({"alone": np.ones(4)}) == {}
