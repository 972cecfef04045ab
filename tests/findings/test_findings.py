"""Shares, criticality, zones and correlations against planted truth: quadratic games with known Shapley values, steps, nulls."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bitatlas.findings.conclude import DamageEvidence, Evidence, conclude
from bitatlas.findings.correlations import _shapes, cannot_tell, chance_p, layer_correlations, layer_measures, least_p
from bitatlas.findings.folk import folk_findings, marking_rules
from bitatlas.findings.shares import LayerRows, layer_records, layer_verdict, misfit, shares_of
from bitatlas.findings.zones import _word as zone_word
from bitatlas.findings.zones import joint_damage, joint_findings, number_of_zones, segmentations, with_low_share
from bitatlas.records import Measured, Module
from bitatlas.stats.bootstrap import rank_correlation
from games import HIGH, LOW, attention_of, flat, interactions, profiles, quadratic_rows, zones_of

GENEROUS = 100.0  # nats/token: nothing is unsafe for its damage


def shapley(values: dict[frozenset, float], players: int) -> np.ndarray:
    """Mean marginal contribution over all orders: the definition."""
    total = np.zeros(players)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            total[player] += values[before | {player}] - values[before]
    return total / len(orders)


# --- shares and criticality --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 5))
def test_values_are_the_shapley_values_of_a_quadratic_game(seed, layers):
    rng = np.random.default_rng(seed)
    first, pairs = rng.normal(size=layers), interactions(layers, 1.0, seed)
    game = {
        frozenset(members): 0.7 + first[list(members)].sum() + pairs[np.ix_(members, members)].sum() / 2
        for size in range(layers + 1)
        for members in itertools.combinations(range(layers), size)
    }
    everything = frozenset(range(layers))
    one = [[game[frozenset({layer})]] for layer in range(layers)]
    all_but_one = [[game[everything - {layer}]] for layer in range(layers)]
    rows = LayerRows([game[frozenset()]], [game[everything]], one, all_but_one, np.ones(layers))
    np.testing.assert_allclose(rows.values[0], shapley(game, layers), rtol=0, atol=1e-12)


def test_a_planted_critical_layer_is_found_and_intervals_hold_the_truth():
    first = np.array([0.02, 0.02, 0.02, 0.15, 0.02, 0.02, 0.02, 0.02])  # only layer 3 does more than its size
    pairs = interactions(8, 0.002)
    truth = first + pairs.sum(axis=1) / 2
    weights = np.array([1, 1, 1, 1, 1, 1, 4, 1]) * 1000
    records = layer_records(quadratic_rows(first, pairs, 48, weights=weights), GENEROUS)
    assert [record.layer for record in records if record.verdict == "critical"] == [3]
    expected = truth / truth.sum()
    assert sum(record.share.mean for record in records) == pytest.approx(1)
    for record, share in zip(records, expected, strict=True):
        weight_share = record.weights / weights.sum()
        assert record.share.ci95[0] < share < record.share.ci95[1]
        assert record.criticality.mean == pytest.approx(record.share.mean / weight_share)
        assert record.criticality.ci95[0] == pytest.approx(record.share.ci95[0] / weight_share)
    # four times the weights at the same damage
    assert records[6].verdict == "safe"
    assert records[6].q_value <= 0.05
    assert (records[6].lowered.base, records[6].raised.base) == ("uniform:int4_g64", "uniform:int2_g64")
    assert (records[6].criticality.unit, records[6].criticality.rows, records[6].criticality.n) == ("ratio", "test", 48)


def test_safe_needs_the_added_damage_within_the_tolerance():
    rows = quadratic_rows(np.array([0.002, 0.05, 0.05]), np.zeros((3, 3)), 48)
    added = rows.added[:, 0].mean()
    verdicts = [layer_records(rows, tolerance)[0].verdict for tolerance in (added * 2, added, added / 2)]
    # at the tolerance itself the interval reaches beyond it
    assert verdicts == ["safe", "light", "light"]


def test_a_clear_interval_that_the_screen_does_not_confirm_is_uncertain():
    above = Measured(1.5, (1.1, 1.9), "ratio", "", "test", 20)
    below = Measured(0.5, (0.1, 0.9), "ratio", "", "test", 20)
    assert [layer_verdict(above, 0.0, 1.0, q) for q in (0.05, 0.06)] == ["critical", "uncertain"]
    assert [layer_verdict(below, 0.0, 1.0, q) for q in (0.05, 0.06)] == ["safe", "uncertain"]


def test_no_false_critical_layers_beyond_the_nominal_rate():
    games = 60
    false = sum(
        any(one.verdict == "critical" for one in layer_records(flat(5, 24, seed), GENEROUS, seed=seed)) for seed in range(games)
    )
    # nominal: false discoveries of either sign 5 %, critical ones half of that; 24 rows make the bootstrap a little generous
    assert false <= stats.binom.ppf(0.999, games, 0.05)


def test_no_damage_to_share_leaves_everything_uncertain():
    rng = np.random.default_rng(0)
    high, low = rng.normal(1, 0.1, (2, 20))
    rows = LayerRows(high, low, high + rng.normal(0, 0.1, (3, 20)), low + rng.normal(0, 0.1, (3, 20)), np.ones(3))
    records = layer_records(rows, GENEROUS)
    assert {record.verdict for record in records} == {"uncertain"}
    assert {record.criticality.ci95 for record in records} == {None}
    assert {record.q_value for record in records} == {1.0}
    assert [(zone.name, zone.verdict) for zone in zones_of(rows, GENEROUS)] == [("whole model", "uncertain")]
    assert {finding.verdict for finding in folk_findings(shares_of(rows), 0.05)} == {"inconclusive"}


def test_identical_formats_and_a_single_row_are_no_crash():
    same = np.ones((1, 1))
    for rows in (LayerRows([1.0], [1.0], same, same, [5]), LayerRows([1.0], [2.0], same * 2, same, [5])):
        told = conclude(Evidence(DamageEvidence(rows)), 0.05)
        assert [layer.verdict for layer in told.layers] == ["uncertain"]
        assert np.isfinite(told.layers[0].criticality.mean)


def test_misfit_is_zero_for_a_quadratic_game_and_seen_for_a_cubic_one():
    rows = quadratic_rows(np.full(5, 0.02), interactions(5, 0.01), 30)
    fit = misfit(rows)
    assert fit.mean == pytest.approx(0, abs=1e-12)
    assert fit.ci95 == pytest.approx((0, 0), abs=1e-12)
    # an interaction of all five layers is only in the all-low model
    extra = 0.5 * (rows.low - rows.high)
    cubic = LayerRows(rows.high, rows.low + extra, rows.lowered, rows.raised, rows.weights)
    expected = (rows.values.sum(axis=1) + 5 * extra / 2).mean() / (rows.low - rows.high + extra).mean() - 1
    assert misfit(cubic).mean == pytest.approx(expected)
    assert misfit(cubic).ci95[0] > 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"low": np.ones(3)},
        {"lowered": np.ones((3, 4))},
        {"weights": np.array([1, 0])},
        {"high": np.array([1, np.nan, 1, 1])},
    ],
)
def test_malformed_rows_are_an_error(change):
    good = {"high": np.ones(4), "low": np.ones(4), "lowered": np.ones((2, 4)), "raised": np.ones((2, 4)), "weights": np.ones(2)}
    LayerRows(**good)
    with pytest.raises(ValueError, match=r"high|low|weights"):
        LayerRows(**(good | change))


# --- zones -------------------------------------------------------------------------------------------------------------


def brute_force_error(values: np.ndarray, weights: np.ndarray, count: int) -> float:
    best = np.inf
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        ends = [0, *cuts, len(values)]
        parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        error = sum((weights[p] * (values[p] - np.average(values[p], weights=weights[p])) ** 2).sum() for p in parts)
        best = min(best, error)
    return best


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 9))
def test_segmentation_equals_brute_force(seed, layers):
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(1, 1, layers), rng.uniform(0.1, 3, layers)
    for count, (cuts, error) in enumerate(segmentations(values, weights, 4), start=1):
        assert len(cuts) == count
        assert [layer for first, last in cuts for layer in range(first, last + 1)] == list(range(layers))
        assert error == pytest.approx(brute_force_error(values, weights, count), abs=1e-9)
        parts = [slice(first, last + 1) for first, last in cuts]
        own = sum((weights[p] * (values[p] - np.average(values[p], weights=weights[p])) ** 2).sum() for p in parts)
        assert own == pytest.approx(error, abs=1e-9)


def by_row(truth: np.ndarray, rows: int, noise: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return truth * rng.lognormal(-0.125, 0.5, (rows, 1)) + noise * rng.standard_normal((rows, len(truth)))


def test_flat_noise_is_one_zone_most_of_the_time():
    one = sum(number_of_zones(by_row(np.ones(16), 32, 1.0, seed), np.ones(16) / 16, 5, seed) == 1 for seed in range(60))
    assert one >= 45


@pytest.mark.parametrize(("levels", "names"), [((0.5, 1.5), ["early", "late"]), ((0.3, 1.0, 1.7), ["early", "middle", "late"])])
def test_planted_steps_are_recovered(levels, names):
    first = np.repeat(levels, 4) * 0.02
    found = zones_of(quadratic_rows(first, np.zeros((len(first),) * 2), 48), GENEROUS)
    assert [(zone.first, zone.last) for zone in found] == [(4 * k, 4 * k + 3) for k in range(len(levels))]
    assert [zone.name for zone in found] == names
    assert (found[0].verdict, found[-1].verdict) == ("safe", "critical")
    assert [zone.criticality.mean for zone in found] == pytest.approx(levels, abs=0.1)


def test_a_zone_is_safe_only_if_lowering_all_of_it_is_within_the_tolerance():
    first = np.repeat([0.5, 1.5], 4) * 0.02
    rows = quadratic_rows(first, np.zeros((8, 8)), 48)
    assert [zone.verdict for zone in zones_of(rows, 0.02)] == ["safe", "critical"]
    assert [zone.verdict for zone in zones_of(rows, 0.02, together={0, 1, 2})] == ["light", "critical"]
    assert [zone.verdict for zone in zones_of(rows, 0.005)] == ["light", "critical"]


def test_the_word_of_a_zone_follows_its_layers():
    ends = {"critical": (1.1, 1.5), "safe": (0.5, 0.9), "": (0.8, 1.2)}

    def word(interval: str, *verdicts: str, together: bool = False) -> str:
        return zone_word(Measured(1.0, ends[interval], "ratio", "", "test", 20), verdicts, together)

    assert word("critical", "critical", "uncertain") == "critical"
    assert word("critical", "critical", "safe") == word("critical", "uncertain") == "uncertain"
    assert word("safe", "safe", "safe", together=True) == "safe"
    assert word("safe", "safe", "safe") == word("safe", "safe", "light", together=True) == "light"
    assert word("safe", "safe", "uncertain", together=True) == word("", "safe", together=True) == "uncertain"


def test_safe_layers_are_measured_together_and_the_largest_group_is_named():
    """Any three of them are within the tolerance, four are not."""
    rows = quadratic_rows(np.array([0.01, 0.008, 0.009, 0.011, 0.2, 0.2]), np.zeros((6, 6)), 48)
    layers = layer_records(rows, 0.03)
    assert [one.verdict for one in layers[:4]] == ["safe"] * 4
    asked: list[int] = []

    def lowered(chosen):
        asked.append(len(chosen))
        return rows.added[:, list(chosen)].sum(axis=1)

    joint = joint_damage(layers, lowered, 0.0315, "uniform:int4_g64", None)
    least = sorted(sorted(range(4), key=lambda layer: layers[layer].lowered.mean)[:3])
    assert (joint.layers, joint.together) == ([0, 1, 2, 3], least)
    assert joint.added.mean == pytest.approx(rows.added[:, :4].sum(axis=1).mean())
    assert joint.added_together.ci95[1] <= 0.0315 < joint.added.ci95[0]
    assert len(asked) == len(set(asked)) <= 3
    (told,) = joint_findings(joint, 0.0315)
    assert told.verdict == "does not hold"
    assert "Safe together: layers" in told.text
    assert joint_damage(layers[4:], lowered, 0.0315, "", None) is None
    assert joint_damage(layers, lowered, 1.0, "", None).together == [0, 1, 2, 3]
    assert joint_damage(layers, lowered, 0.0, "", None).together == []


def test_more_than_three_zones_are_numbered():
    first = np.repeat([1.0, 4.0, 1.0, 4.0], 3) * 0.02
    found = zones_of(quadratic_rows(first, np.zeros((12, 12)), 48), GENEROUS)
    assert [zone.name for zone in found] == ["zone 1", "zone 2", "zone 3", "zone 4"]


def test_low_share_is_the_share_of_weights_at_the_lowest_format():
    modules = [
        Module(f"m{layer}{kind}", layer, kind, shape, "u") for layer in range(2) for kind, shape in (("a", (2, 2)), ("b", (4, 3)))
    ]
    found = zones_of(quadratic_rows(np.array([0.01, 0.05, 0.05, 0.05]), np.zeros((4, 4)), 30), GENEROUS)
    filled = with_low_share(found, modules, {"m0a": LOW, "m0b": HIGH, "m1a": LOW, "m1b": LOW}, LOW)
    assert (filled[0].first, filled[0].last, filled[0].low_share) == (0, 0, 4 / 16)
    assert filled[1].low_share == 1.0


# --- correlations ------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(3, 12))
def test_rank_correlation_equals_scipy(seed, layers):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, layers).astype(float), rng.integers(0, 6, (4, layers)).astype(float)
    expected = [stats.spearmanr(x, row).statistic if np.ptp(x) and np.ptp(row) else 0.0 for row in y]
    np.testing.assert_allclose(rank_correlation(x, y), expected, atol=1e-12)


def test_chance_p_of_few_layers_is_every_choice_of_signs():
    """Oracle: all 2^(L-1) signs of the shapes, surrogates made as curves and correlated with numpy; p counts both sides."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7))
    ranks = stats.rankdata(y) - 4
    shapes = _shapes(7)
    np.testing.assert_allclose(shapes @ shapes.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(shapes.sum(axis=1), 0, atol=1e-12)
    sizes = shapes @ ranks
    surrogates = [(np.array(signs) * sizes) @ shapes for signs in itertools.product([1, -1], repeat=6)]
    rho = [np.corrcoef(stats.rankdata(x), surrogate)[0, 1] for surrogate in surrogates]
    seen = stats.spearmanr(x, y).statistic
    assert chance_p(x, y) == np.mean([abs(one) >= abs(seen) - 1e-9 for one in rho])


def test_chance_p_knows_that_trends_are_one_observation_and_that_rough_order_is_many():
    up = np.arange(16.0)
    rough = np.random.default_rng(5).permutation(up)
    assert chance_p(up, up) > 0.9  # two trends
    assert chance_p(up**2, np.sqrt(up)) > 0.05
    assert chance_p(rough, rough) < 0.001
    assert chance_p(rough, -rough) == chance_p(rough, rough)
    assert chance_p([1, 2, 3, 2], [1, 1, 1, 1]) == 1.0
    assert chance_p([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_the_smallest_p_is_reached_and_few_layers_say_that_they_cannot_tell():
    for layers in (3, 5, 8, 12):
        alternating = (-1.0) ** np.arange(layers) * np.arange(1, layers + 1)
        assert chance_p(alternating, alternating) == least_p(layers) == 2 / 2 ** (layers - 1)
    first = np.array([0.01, 0.06, 0.03, 0.02, 0.05])
    shares = shares_of(quadratic_rows(first, np.zeros((5, 5)), 48))
    found = layer_correlations({"sparsity": -first, "depth": np.arange(5.0)}, shares)
    assert found[0].rho < -0.9
    assert found[0].q_value == 1 / 8
    assert cannot_tell(found) == "5 layers cannot tell: the smallest p that they allow is 0.12, for 1 measure at once"
    assert "5 layers cannot tell" in marking_rules(found, shares)[0].text
    assert found[1].not_tested
    assert found[1].q_value is None


def test_a_measure_that_follows_damage_is_told_from_one_that_does_not():
    first = np.random.default_rng(1).permutation(np.linspace(0.01, 0.06, 12))
    shares = shares_of(quadratic_rows(first, np.zeros((12, 12)), 40))
    measures = {"sparsity": -first, "kurtosis": np.random.default_rng(3).normal(size=12), "constant": np.ones(12)}
    found = {one.measure: one for one in layer_correlations(measures, shares)}
    assert set(found) == {"sparsity", "kurtosis"}
    assert found["sparsity"].ci95[0] <= found["sparsity"].rho < -0.9
    assert found["sparsity"].q_value == 2 * found["sparsity"].p_value <= 0.05 < found["kurtosis"].q_value


def test_layer_measures_are_means_weighted_by_size_and_leave_out_what_is_not_whole():
    found = layer_measures(profiles(3, np.array([0.4, 0.2, 0.0])), attention_of(3), 3, LOW)
    np.testing.assert_allclose(found["sparsity"], [0.1, 0.05, 0.0])
    np.testing.assert_allclose(found["relative error"], [0.1, 0.11, 0.12])
    np.testing.assert_allclose(found["reasoning focus"], [10, 11, 12])
    assert set(layer_measures([], attention_of(2), 3, LOW)) == {"depth"}
    assert "relative error" not in layer_measures(profiles(3, np.zeros(3)), [], 3, "int3_g64")
