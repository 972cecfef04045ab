"""Baselines keep the budget, fill it, and are what their names say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.errors import UserError
from bitatlas.plan.baselines import RANDOM_PLANS, baselines, outside_uniform
from bitatlas.plan.budget import costs_of
from bitatlas.records import Budget, ModelInfo, Module
from bitatlas.records.sizes import Unit, units_of


def units_with(layers: list[int], weights: list[int]) -> list[Unit]:
    return [Unit(f"u{i}", (), layer, size) for i, (layer, size) in enumerate(zip(layers, weights, strict=True))]


def game(seed: int, formats: int = 2) -> tuple[list[Unit], np.ndarray]:
    rng = np.random.default_rng(seed)
    layers = np.sort(rng.integers(0, 5, rng.integers(1, 20)))
    weights = rng.integers(1, 1000, len(layers))
    bits = np.sort(rng.choice(np.arange(2, 9), formats, replace=False))
    return units_with(layers.tolist(), weights.tolist()), weights[:, None] * bits


def total(cost: np.ndarray, choice: np.ndarray) -> int:
    return int(cost[np.arange(len(cost)), choice].sum())


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), formats=st.integers(2, 4), place=st.floats(0, 1))
def test_every_baseline_keeps_the_budget_and_leaves_no_room_for_what_it_raises(seed, formats, place):
    units, cost = game(seed, formats)
    limit = int(cost[:, 0].sum() + place * (cost[:, -1] - cost[:, 0]).sum())
    plans = dict(baselines(units, cost, limit, seed))
    assert len(plans) == 3 + RANDOM_PLANS
    assert all(total(cost, choice) <= limit for choice in plans.values())
    for number in range(1, RANDOM_PLANS + 1):
        choice = plans[f"random {number}"]
        slack = limit - total(cost, choice)
        extra = cost - cost[np.arange(len(cost)), choice][:, None]
        assert not ((extra > 0) & (extra <= slack)).any()


def test_first_and_last_layers_high_raise_whole_layers_then_fill_the_next():
    units = units_with([0, 0, 1, 1, 2, 2], [10, 1, 10, 1, 10, 1])
    cost = np.array([10, 1, 10, 1, 10, 1])[:, None] * np.array([2, 3, 4])
    plans = dict(baselines(units, cost, 66 + 22 + 2, seed=0))
    # 24 bits to give: layer 0 takes 22, and in layer 1 only the small unit fits
    assert plans["first layers high"].tolist() == [2, 2, 0, 2, 0, 0]
    assert plans["last layers high"].tolist() == [0, 0, 0, 2, 2, 2]
    assert total(cost, plans["first layers high"]) == 90


def test_the_layer_that_does_not_fit_is_filled_largest_first():
    units = units_with([0, 0, 0], [3, 5, 4])
    plans = dict(baselines(units, np.array([[6, 12], [10, 20], [8, 16]]), 24 + 14, seed=0))
    assert plans["first layers high"].tolist() == [0, 1, 0]


def test_nothing_beyond_the_layer_that_does_not_fit_is_raised():
    units = units_with([0, 1, 2], [1, 9, 1])
    plans = dict(baselines(units, np.array([[2, 4], [18, 36], [2, 4]]), 22 + 5))
    assert plans["first layers high"].tolist() == [1, 0, 0]
    assert plans["last layers high"].tolist() == [0, 0, 1]


def test_layers_count_in_their_order_not_in_the_order_of_units():
    units = units_with([1, 0], [1, 1])
    assert dict(baselines(units, np.array([[2, 4], [2, 4]]), 6))["first layers high"].tolist() == [0, 1]


@pytest.mark.parametrize(("limit", "widest"), [(20, 0), (29, 0), (30, 1), (40, 2), (99, 2)])
def test_uniform_is_the_widest_that_fits(limit, widest):
    cost = np.array([4, 6])[:, None] * np.array([2, 3, 4])
    name, choice = baselines(units_with([0, 1], [4, 6]), cost, limit, formats=["int2_g64", "int3_g64", "int4_g64"])[0]
    assert name == f"uniform int{widest + 2}_g64"
    assert choice.tolist() == [widest, widest]


def with_head(weights: list[int]) -> list[Unit]:
    """Units of two layers, and a head behind them."""
    head = Module("head", 2, "head", (1, 8), "head", part="head", candidates=("int3_g64", "int4_g64", "int8_g64"))
    return [*units_with([0, 1], weights), Unit("head", (head,), 2, 8)]


@pytest.mark.parametrize(("limit", "layers", "head"), [(40, 0, 0), (45, 0, 1), (50, 1, 0), (55, 1, 1), (60, 2, 0), (95, 2, 2)])
def test_one_width_in_the_layers_comes_before_a_wider_head(limit: int, layers: int, head: int):
    cost = np.array([[10, 15, 20], [10, 15, 20], [20, 25, 55]])
    plans = dict(baselines(with_head([5, 5]), cost, limit, formats=["int2_g64", "int3_g64", "int4_g64"]))
    (name,) = [name for name in plans if name.startswith("uniform")]
    assert plans[name].tolist() == [layers, layers, head]
    for choice in plans.values():
        assert cost[np.arange(3), choice].sum() <= limit
    assert plans["first layers high"][2] == plans["last layers high"][2]  # no layer


def test_cheapest_and_dearest_are_found_wherever_they_stand():
    units = units_with([0, 1], [1, 1])
    plans = dict(baselines(units, np.array([[4, 2, 3], [4, 2, 3]]), 6))
    assert plans["first layers high"].tolist() == [0, 1]
    assert plans["uniform"].tolist() == [2, 2]


def test_random_plans_repeat_with_the_seed_and_differ_among_themselves():
    units, cost = game(5)
    limit = int(cost.sum() / 2)
    first, second, other = (baselines(units, cost, limit, seed) for seed in (1, 1, 2))
    as_text = [[choice.tolist() for _, choice in plans] for plans in (first, second, other)]
    assert as_text[0] == as_text[1]
    assert as_text[0][3:] != as_text[2][3:]
    assert len({str(choice) for choice in as_text[0][3:]}) > RANDOM_PLANS / 2


def test_random_plans_use_every_format():
    units, cost = units_with(list(range(12)), [1] * 12), np.ones((12, 1), dtype=int) * np.array([2, 3, 4])
    used = {int(column) for name, choice in baselines(units, cost, 36) if "random" in name for column in choice}
    assert used == {0, 1, 2}


def test_one_format_gives_the_same_plan_everywhere():
    plans = baselines(units_with([0, 1], [1, 1]), np.array([[2], [2]]), 4)
    assert {str(choice.tolist()) for _, choice in plans} == {"[0, 0]"}


def test_too_small_a_budget_and_a_wrong_shape_are_refused():
    with pytest.raises(UserError, match="budget of 3 is below 4"):
        baselines(units_with([0, 1], [1, 1]), np.array([[2, 4], [2, 4]]), 3)
    with pytest.raises(ValueError, match="2 units"):
        baselines(units_with([0, 1], [1, 1]), np.array([[2, 4]]), 3)


def test_layers_high_in_a_given_order():
    units = units_with([0, 1, 2], [10, 10, 10])
    plans = dict(baselines(units, np.array([[20, 40]] * 3), 60 + 20, seed=0, most_critical=[1, 0, 2]))
    assert plans["most critical layers high"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("formats", "code_bits", "outside"),
    [
        (["int2_g64", "int4_g64"], 3.0, "int3_g64"),  # a third width between the two fits exactly
        (["int2_g64", "int4_g64"], 2.99, None),
        (["int2_g64", "int4_g64"], 4.0, None),  # the widest candidate fits everywhere
        (["int2_g64", "int3_g64", "int4_g64"], 3.5, None),
        (["int2_g32_sym", "int8_g32_sym"], 5.0, "int5_g32_sym"),  # of the candidates' own kind
    ],
)
def test_a_uniform_width_outside_the_candidates_is_named_where_it_fits_better(formats, code_bits, outside):
    modules = [Module(f"m{i}", i, "up_proj", (64, 64), f"m{i}") for i in range(3)]
    units = units_of(modules)
    info = ModelInfo("m", None, "0" * 64, "LlamaForCausalLM", 3, 4, 128, "float32", 3 * 64 * 64, 0, 3 * 64 * 64 * 4)
    budget = Budget("code_bits", code_bits)
    limit = costs_of(budget, units, formats, info).limit
    assert outside_uniform(budget, units, formats, info, limit) == outside
