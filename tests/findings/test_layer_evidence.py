"""Units, kinds, sampled orders, reliability and borders against planted truth, brute force and repeated surveys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from bitatlas.findings.folk import role_of, value_and_down
from bitatlas.findings.reliability import (
    needed_text,
    reliability,
    reliability_findings,
    shapley_check,
    shapley_findings,
    with_rows_needed,
)
from bitatlas.findings.shares import LayerRows, layer_records, shares_of
from bitatlas.findings.units import unit_records
from bitatlas.findings.zones import border_intervals
from bitatlas.records import Module, WeightProfile
from bitatlas.stats.bootstrap import rank_correlation
from games import LOW, flat, interactions, quadratic_rows, zones_of

GENEROUS = 100.0  # nats/token: nothing is unsafe for its damage


# --- sampled orders ----------------------------------------------------------------------------------------------------


def pairs_of_orders(rows: LayerRows, triple: float, seed: int = 0, pairs: int = 6) -> np.ndarray:
    """[pairs, rows, layers]: what a screen of orders sees in a quadratic game with one interaction of the layers 0, 1 and 2 added."""
    first = rows.added  # [rows, layers]
    # q_ij from what the last-in values add to the first-in ones is not unique; games here have equal ones for all pairs
    together = ((rows.low - rows.raised).T - first) / (rows.layers - 1)
    hard = together.mean(axis=1)

    def damage(chosen: frozenset) -> np.ndarray:
        count = len(chosen)
        own = first[:, sorted(chosen)].sum(axis=1) + hard * count * (count - 1) / 2
        return own + (triple if {0, 1, 2} <= chosen else 0.0)

    rng = np.random.default_rng(seed)
    found = np.zeros((pairs, rows.rows, rows.layers))
    for pair in range(pairs):
        order = [int(layer) for layer in rng.permutation(rows.layers)]
        for one in (order, order[::-1]):
            for place, layer in enumerate(one):
                found[pair, :, layer] += (damage(frozenset(one[: place + 1])) - damage(frozenset(one[:place]))) / 2
    return found


def equal_pairs(first: np.ndarray, rows: int) -> LayerRows:
    pairs = np.full((len(first),) * 2, 0.004)
    np.fill_diagonal(pairs, 0)
    return quadratic_rows(first, pairs, rows)


def test_orders_of_a_quadratic_game_agree_to_the_last_digit():
    rows = equal_pairs(np.linspace(0.01, 0.05, 6), 30)
    check = shapley_check(pairs_of_orders(rows, 0.0)[:, :8], 99, rows)
    assert check is not None
    np.testing.assert_allclose([one.mean for one in check.sampled], check.quadratic, atol=1e-12)
    assert max(check.standard_errors) < 1e-12
    assert check.largest.mean < 1e-12
    assert check.rank.mean == pytest.approx(1)
    assert (check.orders, check.models, check.rank.n) == (12, 99, 8)
    (said,) = shapley_findings(check)
    assert said.verdict == "holds"
    assert shapley_findings(None) == []


def test_an_interaction_of_three_layers_is_seen_by_orders_and_missed_by_the_quadratic_shares():
    """Exact: a triple's bonus is shared by its three layers alone; raising and lowering single layers of six never shows a third of it."""
    rows = equal_pairs(np.full(6, 0.02), 40)
    triple = 0.2
    low = rows.low + triple
    raised = rows.raised + np.array([0.0] * 3 + [triple] * 3)[:, None]  # undoing layer 0, 1 or 2 takes the bonus away
    game = LayerRows(rows.high, low, rows.lowered, raised, rows.weights)
    check = shapley_check(pairs_of_orders(rows, triple, pairs=400)[:, :8], 1, game)
    exact = rows.values[:8].mean(axis=0) + np.array([triple / 3] * 3 + [0.0] * 3)
    assert check is not None
    np.testing.assert_allclose([one.mean for one in check.sampled], exact / exact.sum(), atol=0.02)
    # a half of the bonus for each of the three, instead of a third
    quadratic = rows.values[:8].mean(axis=0) + np.array([triple / 2] * 3 + [0.0] * 3)
    np.testing.assert_allclose(check.quadratic, quadratic / quadratic.sum(), atol=1e-12)
    expected = np.abs(quadratic / quadratic.sum() - exact / exact.sum()).max()
    assert check.largest.mean == pytest.approx(expected, abs=0.02)
    assert check.largest.ci95[0] > 0


def test_rows_of_two_tables_are_correlated_as_scipy_does():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (2, 20, 7)).astype(float)
    np.testing.assert_allclose(rank_correlation(x, y), [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])


# --- reliability and rows needed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_reliability_is_the_agreement_of_two_surveys(noise: float):
    """Oracle: forty surveys of the same game, each on rows of its own, correlated with each other."""
    first = np.linspace(0.02, 0.03, 8)
    surveys = [quadratic_rows(first, np.zeros((8, 8)), 32, seed, noise) for seed in range(40)]
    means = np.array([rows.values.mean(axis=0) for rows in surveys])
    agreement = np.mean([stats.spearmanr(a, b).statistic for a, b in itertools.combinations(means, 2)])
    found = [reliability(rows) for rows in surveys]
    # 40 surveys: the standard error of either mean is below 0.03; Spearman-Brown is exact for Pearson's correlation only
    assert np.mean([one.mean for one in found]) == pytest.approx(agreement, abs=0.08)
    inside = np.mean([one.ci95[0] <= agreement <= one.ci95[1] for one in found])
    assert inside >= 0.8


def test_a_clear_order_is_stable_and_equal_layers_have_none():
    clear = quadratic_rows(np.linspace(0.01, 0.08, 8), np.zeros((8, 8)), 48)
    (said,) = reliability_findings(clear, layer_records(clear, GENEROUS))
    assert said.verdict == "holds"
    same = flat(8, 48, 1)
    (said,) = reliability_findings(same, layer_records(same, GENEROUS))
    assert said.verdict != "holds"
    assert reliability(flat(2, 48, 0)) is None
    assert reliability(flat(8, 7, 0)) is None


def test_the_rows_that_are_named_settle_an_uncertain_layer():
    """Layer 0 is a little more critical than its size. With twice the rows that were named it is nearly always found to be."""
    first = np.array([0.025, *[0.02] * 5])
    rows = quadratic_rows(first, np.zeros((6, 6)), 10, seed=0)
    shares = shares_of(rows)
    (layer, *_) = with_rows_needed(layer_records(rows, GENEROUS, shares), rows, shares, GENEROUS)
    assert layer.verdict == "uncertain"
    half, off = (layer.criticality.ci95[1] - layer.criticality.ci95[0]) / 2, layer.criticality.mean - 1
    assert layer.rows_needed >= 0.99 * 10 * (half / off) ** 2
    true_off = first[0] / first.mean() - 1
    count = int(2 * layer.rows_needed * max(1.0, (off / true_off) ** 2))
    settled = [layer_records(quadratic_rows(first, np.zeros((6, 6)), count, seed), GENEROUS)[0].verdict for seed in range(10)]
    assert settled.count("critical") >= 7
    assert str(layer.rows_needed) in needed_text([layer]).replace(",", "")


def test_no_rows_are_named_where_none_would_help():
    """Clearly below its size, and clearly above the tolerance: light, and no row would make it safe."""
    rows = quadratic_rows(np.array([0.02, 0.06, 0.06]), np.zeros((3, 3)), 48)
    shares = shares_of(rows)
    layers = with_rows_needed(layer_records(rows, 0.001, shares), rows, shares, 0.001)
    assert (layers[0].verdict, layers[0].rows_needed) == ("light", None)
    assert needed_text(layers) == ""
    near = float(rows.added[:, 0].mean()) * 1.01
    light = with_rows_needed(layer_records(rows, near, shares), rows, shares, near)
    assert (light[0].verdict, light[0].rows_needed > 48) == ("light", True)
    assert "whether light layers are safe: layer 0 about" in needed_text(light)
    assert layers[1].rows_needed is None


# --- borders -----------------------------------------------------------------------------------------------------------


def test_a_sharp_border_is_certain_and_a_vague_one_is_not():
    sharp = zones_of(quadratic_rows(np.repeat([0.01, 0.03], 4), np.zeros((8, 8)), 48), GENEROUS)
    assert [zone.border95 for zone in sharp] == [None, (4, 4)]
    by_row = quadratic_rows(np.linspace(0.018, 0.022, 12), np.zeros((12, 12)), 24, noise=1.0).values
    (_, vague) = border_intervals(by_row, np.full(12, 1 / 12), 2)
    assert vague is not None
    assert vague[1] - vague[0] >= 3
    assert border_intervals(by_row[:1], np.full(12, 1 / 12), 2) == [None, None]


# --- units and kinds ---------------------------------------------------------------------------------------------------


def modules_of(kinds: dict[str, tuple[int, int]], layers: int, place: str = "mlp") -> list[Module]:
    return [
        Module(f"model.layers.{layer}.{place}.{kind}", layer, kind, shape, f"{layer}.{kind}")
        for layer in range(layers)
        for kind, shape in kinds.items()
    ]


def test_units_and_kinds_have_their_planted_shares():
    kinds = {"v_proj": (8, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
    modules = modules_of(kinds, 3)
    sizes = np.array([m.weights for m in modules])
    first = np.where([m.kind == "v_proj" for m in modules], 4.0, 1.0) * sizes / 1e5  # values: four times their size
    units = quadratic_rows(first, interactions(9, 1e-5), 40, weights=sizes)
    of_kinds = quadratic_rows(first.reshape(3, 3).sum(axis=0), np.zeros((3, 3)), 40, weights=sizes.reshape(3, 3).sum(axis=0))
    weights = [
        WeightProfile(m.name, m.layer, m.kind, m.weights, 2.0, 0.1 * m.layer, {}, float(first[i]), 5.0, 0.0, {LOW: 0.25})
        for i, m in enumerate(modules)
    ]
    found = unit_records(modules, weights, units, of_kinds)
    assert [one.unit for one in found.units] == [m.unit for m in modules]
    assert sum(one.share.mean for one in found.units) == pytest.approx(1)
    critical = [one.unit for one in found.units if one.criticality.ci95[0] > 1 and one.q_value <= 0.05]
    assert critical == ["0.v_proj", "1.v_proj", "2.v_proj"]
    truth = 4 * sizes.sum() / (4 * 3 * 64 + 6 * 128)
    assert found.kinds[0].criticality.ci95[0] < truth < found.kinds[0].criticality.ci95[1]
    assert [(one.kind, one.modules, one.weights) for one in found.kinds] == [
        ("v_proj", 3, 192),
        ("up_proj", 3, 384),
        ("down_proj", 3, 384),
    ]
    rho = {one.measure: one for one in found.unit_correlations}
    assert {one.n for one in found.unit_correlations} == {9}
    assert rho["kurtosis"].rho > 0.7  # it was planted to follow damage
    assert rho["weights"].rho == rho["squared error"].rho  # 0.25 x 2^2 x weights
    assert "relative error" not in rho  # the same everywhere


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [((3.0, 1.0, 3.0), "holds"), ((3.0, 1.0, 0.3), "does not hold"), ((1.0, 1.0, 1.0), "inconclusive")],
)
def test_value_and_down_is_about_both(damage: tuple[float, float, float], verdict: str):
    modules = modules_of({"v_proj": (8, 8), "up_proj": (8, 8), "down_proj": (8, 8)}, 2)
    said = value_and_down(modules, quadratic_rows(0.02 * np.array(damage), np.zeros((3, 3)), 48))
    assert said.verdict == verdict
    assert said.evidence.ci95 is not None


def test_value_and_down_have_to_exceed_the_greatest_other_kind():
    """Both are above the mean of the others, and keys are above both."""
    modules = modules_of({"v_proj": (8, 8), "k_proj": (8, 8), "up_proj": (8, 8), "gate_proj": (8, 8), "down_proj": (8, 8)}, 2)
    rows = quadratic_rows(0.02 * np.array([1.3, 2.0, 0.2, 0.2, 1.3]), np.zeros((5, 5)), 48)
    said = value_and_down(modules, rows)
    assert said.verdict == "does not hold"
    assert "(k_proj); the lesser minus that" in said.text
    tied = value_and_down(modules, quadratic_rows(0.02 * np.array([1.3, 1.3, 0.2, 0.2, 1.3]), np.zeros((5, 5)), 48, seed=3))
    assert tied.verdict == "inconclusive"


def test_value_and_down_says_what_it_could_not_tell_apart():
    fused = [Module("h.0.attn.c_attn", 0, "c_attn", (8, 8), "a"), Module("h.0.mlp.c_proj", 0, "mlp.c_proj", (8, 8), "b")]
    rows = quadratic_rows(np.array([0.01, 0.04]), np.zeros((2, 2)), 48)
    said = value_and_down(fused, rows)
    assert said.verdict == "inconclusive"
    assert "Values share a module with queries and keys" in said.text
    assert value_and_down(fused, quadratic_rows(np.array([0.04, 0.01]), np.zeros((2, 2)), 48)).verdict == "does not hold"
    unknown = [Module("h.0.x", 0, "x", (8, 8), "a"), Module("h.0.y", 0, "y", (8, 8), "b")]
    assert value_and_down(unknown, rows).text.startswith("Not tested: no kind")
    assert value_and_down(unknown, None).text.startswith("Not tested: kinds")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.1.self_attn.v_proj", "value"),
        ("gpt_neox.layers.1.attention.query_key_value", "with value"),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h", "down"),
        ("transformer.h.1.attn.c_attn", "with value"),
        ("transformer.h.1.attn.c_proj", ""),
        ("transformer.h.1.mlp.c_proj", "down"),
        ("model.layers.1.block_sparse_moe.experts.3.w2", "down"),
        ("model.decoder.layers.1.fc2", "down"),
        ("model.layers.1.self_attn.qkv_proj", "with value"),
        ("model.layers.1.mlp.gate_proj", ""),
    ],
)
def test_roles_by_name(name: str, role: str):
    assert role_of(Module(name, 1, name.rpartition(".")[2], (4, 4), name)) == role
