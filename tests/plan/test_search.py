"""The search under a budget on planted damage: never above the limit, never worse than the knapsacks, smaller for a tolerance."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.plan.knapsack import total_cost
from bitatlas.plan.search import PlannerHooks, _smaller, search, search_within, smallest_knapsack
from bitatlas.records import Budget
from planners import FORMATS, SUBJECT, UNITS, Planted, scores_of


def tools_of(game: Planted, refined: bool = True) -> PlannerHooks:
    return PlannerHooks(scores_of(game), game.damage, game.probe() if refined else None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2.25, 3.0, 3.6])
def test_a_refined_plan_keeps_the_budget_and_loses_to_no_knapsack(seed: int, bits: float):
    game = Planted(UNITS, seed=seed, cubic=0.02)
    budget = Budget("code_bits", bits)
    found, plain = (search(SUBJECT, budget, tools_of(game, refined)) for refined in (True, False))
    assert sum(int(FORMATS[k][3]) for k in found.choice) <= bits * UNITS
    assert found.selected == game.of(found.choice) <= plain.selected
    assert found.solver["select_damage"] == found.selected


@pytest.mark.parametrize("seed", range(6))
def test_a_tolerance_is_met_by_a_plan_that_is_no_larger_than_the_knapsack(seed: int):
    game = Planted(UNITS, seed=seed, cubic=0.02)
    whole = game.of(np.zeros(UNITS, dtype=int))
    budget = Budget("max_damage", whole / 4)
    found, plain = (search(SUBJECT, budget, tools_of(game, refined)) for refined in (True, False))
    assert game.of(found.choice) == found.selected <= budget.value
    assert (found.choice == 1).sum() <= (plain.choice == 1).sum()


@pytest.mark.parametrize(("seed", "part"), [(20, 5), (23, 5), (24, 12), (27, 5)])
def test_refining_finds_the_smallest_plan_where_the_knapsacks_do_not(seed: int, part: int):
    """Games on which the knapsacks' bisection ends one unit too large; brute force says what is smallest."""
    game = Planted(UNITS, seed=seed)
    budget = Budget("max_damage", game.of(np.zeros(UNITS, dtype=int)) / part)
    found, plain = (search(SUBJECT, budget, tools_of(game, refined)) for refined in (True, False))
    plans = [np.array(bits) for bits in np.ndindex(*(2,) * UNITS)]
    least = min((plan == 1).sum() for plan in plans if game.of(plan) <= budget.value)
    assert (found.choice == 1).sum() == least < (plain.choice == 1).sum()


@pytest.mark.parametrize("refined", [True, False])
def test_a_start_that_does_not_fit_is_left_out_and_one_that_fits_bounds_the_result(refined: bool):
    game = Planted(UNITS, seed=1, cubic=0.1)
    cost = np.array([[2, 4]] * UNITS)
    best = min((np.array(p) for p in np.ndindex(*(2,) * UNITS) if sum(p) == 3), key=game.of)
    too_large = np.ones(UNITS, dtype=int)
    found = search_within(cost, 2 * UNITS + 6, tools_of(game, refined), {"given": best, "too large": too_large})
    assert total_cost(cost, found.choice) <= 2 * UNITS + 6
    assert found.selected == game.of(found.choice) <= game.of(best)
    assert "too large" not in found.solver["select_damage_by_scores"]
    assert not any("too large" in step["kind"] for step in found.solver.get("steps", ()))
    assert game.of(search_within(cost, 2 * UNITS + 6, tools_of(game, False)).choice) > game.of(best)  # the start is needed


def test_smaller_limits_stop_at_the_cheapest_plan():
    game = Planted(UNITS, seed=2)
    cost = np.array([[2, 4]] * UNITS)
    tools = tools_of(game)
    everything = 10 * game.of(np.zeros(UNITS, dtype=int))
    start = smallest_knapsack(tools.scores, cost, everything, tools.on_select)
    assert start[3] == 2 * UNITS
    found = search_within(cost, 2 * UNITS + 8, tools)
    assert total_cost(cost, _smaller(cost, everything, tools, found).choice) >= 2 * UNITS
