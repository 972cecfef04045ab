"""Rows that come in blocks: whole blocks are drawn, against brute force; and every number over rows of a survey says how many there were."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitatlas.findings.reliability import reliability
from bitatlas.findings.shares import LayerRows, layer_records, shares_of
from bitatlas.findings.zones import number_of_zones
from bitatlas.records import Split, TokensInfo
from bitatlas.records.text import p_is, p_value
from bitatlas.report.facts import basis, generalizes
from bitatlas.stats.bootstrap import (
    effective_sample_size,
    is_bound,
    measured,
    resample_means,
    row_weights,
    smallest_p,
    standard_errors,
    two_sided_p,
)
from games import flat, quadratic_rows

BLOCKS = [7, 7, 7, 2, 2, 9]


def test_whole_blocks_are_drawn():
    values = np.random.default_rng(0).normal(size=(6, 2))
    draws = np.random.default_rng(4).multinomial(3, np.full(3, 1 / 3), size=50)
    members = [[0, 1, 2], [3, 4], [5]]
    by_hand = [
        values[[row for block, times in enumerate(drawn) for row in members[block] * times]].mean(axis=0) for drawn in draws
    ]
    np.testing.assert_allclose(resample_means(values, 50, seed=4, blocks=BLOCKS), by_hand, atol=1e-14)
    np.testing.assert_allclose(row_weights(6, 50, 4, BLOCKS) @ values, by_hand, atol=1e-14)


def test_blocks_of_one_row_are_rows():
    values = np.random.default_rng(0).normal(size=(9, 2))
    apart = resample_means(values, 50, seed=4, blocks=range(9))
    assert apart.tobytes() == resample_means(values, 50, seed=4).tobytes()
    assert effective_sample_size(9, range(9)) == effective_sample_size(9) == 9
    assert effective_sample_size(6, BLOCKS) == pytest.approx(36 / (9 + 4 + 1))
    assert measured(values[:, 0], "nats/token", "b", "test", blocks=range(9)).blocks is None


def test_one_block_has_no_interval_and_copies_are_no_evidence():
    values = np.array([1.0, 2.0, 4.0, 5.0])
    assert measured(values, "nats/token", "b", "test", blocks=[3] * 4).ci95 is None
    record = measured(np.repeat(values, 5), "nats/token", "b", "test", blocks=np.repeat(range(4), 5).tolist())
    assert record.ci95 == measured(values, "nats/token", "b", "test").ci95
    assert (record.n, record.blocks) == (20, 4)
    assert basis([record]) == "base b, test rows, n = 20 in 4 blocks"


def test_standard_errors_equal_those_of_block_means():
    values = np.random.default_rng(1).normal(size=(12, 3))
    blocks = np.repeat(range(4), 3).tolist()
    means = values.reshape(4, 3, 3).mean(axis=1)
    np.testing.assert_allclose(standard_errors(values, blocks), means.std(axis=0, ddof=1) / 2)
    np.testing.assert_allclose(standard_errors(values), values.std(axis=0, ddof=1) / math.sqrt(12))


def copies(rows: LayerRows, times: int) -> LayerRows:
    """Every row several times over, as one block."""
    high, low, lowered, raised = (np.repeat(a, times, axis=-1) for a in (rows.high, rows.low, rows.lowered, rows.raised))
    return LayerRows(high, low, lowered, raised, rows.weights, blocks=np.repeat(range(rows.rows), times).tolist())


def test_evidence_on_layers_is_that_of_the_blocks():
    once = quadratic_rows(np.array([0.02, 0.03, 0.02, 0.025]), np.zeros((4, 4)), 12)
    again = copies(once, 4)
    for one, other in zip(layer_records(once, 1.0), layer_records(again, 1.0), strict=True):
        assert one.criticality.ci95 == pytest.approx(other.criticality.ci95)
        assert (one.verdict, one.q_value) == (other.verdict, pytest.approx(other.q_value))
        assert (other.criticality.n, other.criticality.blocks) == (48, 12)
    assert reliability(again).ci95 == pytest.approx(reliability(once).ci95)
    assert reliability(copies(quadratic_rows(np.full(4, 0.02), np.zeros((4, 4)), 6), 8)) is None


def test_zones_are_not_found_in_what_copies_share():
    weights = np.ones(16) / 16
    found = []
    for seed in range(20):
        rows = copies(flat(16, 8, seed), 8)
        by_row = rows.values / rows.values.mean()
        found.append([number_of_zones(by_row, weights, 5, seed, blocks) for blocks in (None, rows.blocks)])
    without, with_blocks = (np.array(found) > 1).sum(axis=0)
    assert with_blocks < without


def test_shares_are_of_the_measured_damage_and_sampled_orders_correct_them():
    """Damage is the square of what is lowered, but for an interaction of all layers that only orders see."""
    rows = quadratic_rows(np.full(4, 0.02), np.zeros((4, 4)), 32)
    extra = 0.5 * rows.whole
    cubic = LayerRows(rows.high, rows.low + extra, rows.lowered, rows.raised, rows.weights)
    plain = shares_of(cubic)
    assert plain.share(range(4))[0] == pytest.approx((cubic.values.mean(axis=0).sum()) / cubic.whole.mean())
    assert plain.share(range(4))[0] > 1.3
    truth = (rows.added + extra[:, None] / 4)[:8]  # the interaction, a quarter to each
    noise = np.random.default_rng(0).normal(0, 1e-3, (3, 8, 4))
    corrected = shares_of(
        LayerRows(*(getattr(cubic, n) for n in ("high", "low", "lowered", "raised", "weights")), orders=truth + noise)
    )
    assert corrected.share(range(4))[0] == pytest.approx(1, abs=0.02)
    for layer in range(4):
        low, high = corrected.record(*corrected.share([layer]), "share").ci95
        assert low <= 0.25 <= high


def test_floors_of_resampling_are_bounds():
    resampled = np.linspace(1, 2, 999)
    p = two_sided_p(resampled, 0.0)
    assert p == smallest_p(999) == 0.002
    assert (p_is(p, True), p_is(p), p_value(0.0123, True)) == ("p < 0.0020", "p = 0.0020", "< 0.013")
    assert is_bound([p, 0.5], smallest_p(999)).tolist() == [True, False]
    assert is_bound([0.003, 0.5], smallest_p(999)).tolist() == [False, False]
    assert is_bound([1.0, 1.0], smallest_p(999, 1)).tolist() == [False, False]
    critical = layer_records(quadratic_rows(np.array([0.02, 0.02, 0.3]), np.zeros((3, 3)), 48), 1.0)[2]
    assert critical.q_is_bound


def test_reports_say_of_what_intervals_speak():
    split = {"test": Split(4, 8, "0", [0, 0, 1, 1])}
    assert "text like this" in generalizes(TokensInfo("t", 2, split, documents=9, by_document=True))
    assert "this text, not of others" in generalizes(TokensInfo("t", 2, split))
    assert TokensInfo("t", 2, {"test": Split(4, 8, "0")}).blocks("test") is None
