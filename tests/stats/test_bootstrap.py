"""Resampling against brute force and simulation; the corrections against statsmodels."""

import math

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from bitatlas.stats import bootstrap
from bitatlas.stats.bootstrap import (
    benjamini_hochberg,
    holm,
    mean_interval,
    measured,
    percentile_interval,
    resample_means,
    two_sided_p,
)


def coverage(draw, truth, rows, runs=500):
    generator = np.random.default_rng(5)
    hits = 0
    for run in range(runs):
        _, low, high = mean_interval(draw(generator, rows), seed=run)
        hits += low <= truth <= high
    return hits / runs


@pytest.mark.parametrize("rows", [6, 16, 32])
def test_interval_covers_the_mean_of_normal_rows(rows):
    # 3 standard errors of a share of 500 runs at 95 % are 2.9 points
    assert coverage(lambda generator, n: generator.normal(3, 2, n), 3, rows) == pytest.approx(0.95, abs=0.03)


def test_interval_covers_the_mean_of_skewed_rows():
    # no percentile bootstrap of 32 log-normal rows reaches 95 %: over 3000 runs this one covers 90 %, the plain one 88.5 %
    assert coverage(lambda generator, n: generator.lognormal(0, 1, n), math.exp(0.5), 32) > 0.87


def test_means_equal_drawing_rows_by_hand():
    values = np.random.default_rng(0).normal(size=(7, 3, 2))
    counts = np.random.default_rng(4).multinomial(7, np.full(7, 1 / 7), size=50)
    by_hand = np.stack([np.repeat(values, row, axis=0).mean(axis=0) for row in counts])
    np.testing.assert_allclose(resample_means(values, 50, seed=4), by_hand, rtol=0, atol=1e-14)


def test_distribution_equals_drawing_indices():
    values = np.random.default_rng(0).exponential(size=20)
    indices = np.random.default_rng(1).integers(0, 20, size=(200_000, 20))
    wanted = np.quantile(values[indices].mean(axis=1), [0.025, 0.25, 0.5, 0.75, 0.975])
    found = np.quantile(resample_means(values, 200_000, seed=2), [0.025, 0.25, 0.5, 0.75, 0.975])
    np.testing.assert_allclose(found, wanted, atol=0.005)


def test_columns_stay_paired_within_and_across_calls():
    values = np.random.default_rng(0).normal(size=(30, 2))
    together = resample_means(values, 500, seed=3)
    np.testing.assert_allclose(together[:, 1], resample_means(values[:, 1], 500, seed=3), rtol=0, atol=1e-15)
    shifted = resample_means(np.stack([values[:, 0], values[:, 0] + 2], axis=1), 500)
    np.testing.assert_allclose(shifted[:, 1] - shifted[:, 0], 2, rtol=0, atol=1e-14)


def test_chunks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(0).normal(size=11)
    whole = resample_means(values, 100, seed=9)
    monkeypatch.setattr(bootstrap, "CHUNK_NUMBERS", 77)
    np.testing.assert_allclose(resample_means(values, 100, seed=9), whole, rtol=0, atol=1e-15)


def test_same_seed_same_bytes_other_seed_other_draws():
    values = np.arange(9.0)
    assert resample_means(values, seed=1).tobytes() == resample_means(values, seed=1).tobytes()
    assert resample_means(values, seed=1).tobytes() != resample_means(values, seed=2).tobytes()


def test_constant_rows_have_a_point_interval():
    assert mean_interval([0.1] * 7) == (0.1, 0.1, 0.1)


def test_measured_carries_what_it_rests_on():
    record = measured([1.0, 2.0, 3.0, 4.0], "nats/token", "reference", "test")
    assert (record.mean, record.unit, record.base, record.rows, record.n) == (2.5, "nats/token", "reference", "test", 4)
    assert record.ci95 is not None
    assert 1 <= record.ci95[0] < 2.5 < record.ci95[1] <= 4


def test_one_row_has_no_interval():
    assert measured([1.0], "ratio", "plan", "test").ci95 is None
    assert mean_interval([1.0]) == (1.0, -math.inf, math.inf)
    assert two_sided_p(np.ones(10), 0.0, n=1) == 1.0


@pytest.mark.parametrize("values", [[], 3.0, [1.0, math.nan], [math.inf, 0.0]])
def test_unusable_values_are_refused(values):
    with pytest.raises(ValueError, match="values:"):
        resample_means(values)


def test_p_and_interval_agree():
    generator = np.random.default_rng(8)
    for rows in (6, 20, 60):
        for _ in range(40):
            values = generator.normal(generator.normal(0, 1.5) / math.sqrt(rows), 1, rows)
            resampled = resample_means(values)
            low, high = percentile_interval(resampled, rows)
            if min(abs(low), abs(high)) > 0.05 / math.sqrt(rows):  # nearer than that, the quantile's rounding decides
                assert (two_sided_p(resampled, 0, n=rows) < 0.05) == bool(low > 0 or high < 0)


def test_p_is_uniform_when_the_null_is_true():
    generator = np.random.default_rng(11)
    p = np.array([two_sided_p(resample_means(generator.normal(size=12), seed=run), 0, n=12) for run in range(500)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p < level) == pytest.approx(level, abs=3.5 * math.sqrt(level * (1 - level) / 500))


def test_p_counts_ties_on_both_sides_and_is_never_zero():
    assert two_sided_p(np.zeros(100), 0) == 1.0
    assert two_sided_p(np.ones(99), 0) == pytest.approx(2 / 100)
    assert two_sided_p([-1.0, 1.0, 2.0, 3.0], 0) == pytest.approx(2 * 2 / 5)


@pytest.mark.parametrize("tests", [0, 1, 2, 3, 7, 40])
def test_corrections_equal_statsmodels(tests):
    generator = np.random.default_rng(tests)
    for power in (0, 1, 5, 30):  # from evenly spread to nearly all tiny
        p = generator.random(tests) ** power
        p[: tests // 3] = generator.choice([0.0, 0.01, 1.0], tests // 3)  # ties, and both ends
        for ours, method in ((benjamini_hochberg, "fdr_bh"), (holm, "holm")):
            expected = multipletests(p, method=method)[1] if tests else []
            np.testing.assert_allclose(ours(p), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [[-0.1], [1.1], [math.nan], [[0.5]]])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match="p:"):
        holm(p)
