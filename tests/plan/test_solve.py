"""The knapsack against brute force (with the rule for ties), against HiGHS, and on the shapes that make it hard."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bitatlas.errors import UserError
from bitatlas.plan.knapsack import KnapsackSolution, solve_knapsack


def every_choice(units: int, formats: int) -> np.ndarray:
    """[formats ** units, units], in lexicographic order."""
    return np.array(list(itertools.product(range(formats), repeat=units)))


def sums(table: np.ndarray, choices: np.ndarray) -> np.ndarray:
    return table[np.arange(len(table)), choices].sum(axis=1)


def best_of(choices: np.ndarray, first: np.ndarray, second: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Least `first`, then least `second`, then the first in lexicographic order: lexsort is stable."""
    order = np.lexsort((second, first))
    return choices[order[allowed[order]][0]]


def game(seed: int, units: int, formats: int, damage_top: int, cost_top: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, damage_top, (units, formats)) / 8, rng.integers(1, cost_top, (units, formats))


games = {
    "seed": st.integers(0, 2**32 - 1),
    "units": st.integers(1, 6),
    "formats": st.integers(1, 3),
    "damage_top": st.sampled_from([2, 5, 10**6]),
    "cost_top": st.sampled_from([2, 5, 10**9]),
    "place": st.floats(0, 1),
}


@settings(max_examples=150, deadline=None)
@given(**games)
def test_knapsack_equals_brute_force_and_breaks_ties_by_the_rule(seed, units, formats, damage_top, cost_top, place):
    damage, cost = game(seed, units, formats, damage_top, cost_top)  # eighths: sums are exact, ties are real
    choices = every_choice(units, formats)
    damages, costs = sums(damage, choices), sums(cost, choices)
    limit = int(costs.min() + place * (costs.max() - costs.min()))
    found = solve_knapsack(damage, cost, limit)
    assert found.choice.tolist() == best_of(choices, damages, costs, costs <= limit).tolist()
    assert (found.value, found.gap) == (damages[costs <= limit].min(), 0.0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), place=st.floats(0, 1))
def test_damages_over_eight_orders_of_magnitude_are_solved_to_the_last_digit(seed, place):
    rng = np.random.default_rng(seed)
    cost = rng.integers(10**5, 10**9, 8)[:, None] * np.array([2, 3, 4])
    damage = 10 ** rng.uniform(-7, 1, (8, 1)) * np.sort(rng.uniform(-0.2, 1, (8, 3)), axis=1)[:, ::-1]
    choices = every_choice(8, 3)
    damages, costs = sums(damage, choices), sums(cost, choices)
    limit = int(costs.min() + place * (costs.max() - costs.min()))
    found = solve_knapsack(damage, cost, limit)
    assert sums(cost, found.choice[None])[0] <= limit
    # float64 sums of eight numbers up to 10 differ by about 1e-15 with their order
    assert found.value <= damages[costs <= limit].min() + 1e-14
    assert found.gap == 0.0


def highs(damage: np.ndarray, cost: np.ndarray, limit: int) -> float:
    """The same problem by an independent solver; well conditioned numbers only (its tolerances are 1e-6)."""
    units, formats = damage.shape
    one_each = csr_array(np.kron(np.eye(units), np.ones(formats)))
    within = LinearConstraint(cost.reshape(1, -1), -np.inf, limit)
    result = milp(
        damage.ravel(),
        integrality=np.ones(damage.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        options={"mip_rel_gap": 0},
    )
    return float(damage.ravel() @ np.round(result.x))


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_highs_on_60_units(seed):
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 50, 60)[:, None] * np.array([2, 3, 4, 8])
    damage = rng.uniform(1, 100, (60, 1)) * np.sort(rng.uniform(0, 1, (60, 4)), axis=1)[:, ::-1]
    limit = int(cost.sum() * 0.2)
    found = solve_knapsack(damage, cost, limit)
    assert found.gap == 0.0
    assert found.value == pytest.approx(highs(damage, cost, limit), abs=1e-6)


def model_shaped(rng: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Few distinct shapes, six formats, damages over six orders of magnitude: what a checkpoint looks like."""
    weights = rng.choice([4096 * 4096, 1024 * 4096, 14336 * 4096], units)[:, None]
    cost = weights * np.array([2, 2, 3, 3, 4, 8]) + weights // np.array([128, 32, 128, 32, 64, 64]) * 32
    return 10 ** rng.uniform(-6, 0, (units, 1)) * np.sort(rng.uniform(0, 1, (units, 6)), axis=1)[:, ::-1], cost


@pytest.mark.parametrize("place", [0.05, 0.3, 0.7])
def test_500_units_by_6_formats_are_proven_within_five_seconds(place):
    damage, cost = model_shaped(np.random.default_rng(1), 500)
    limit = int((1 - place) * cost.min(axis=1).sum() + place * cost.max(axis=1).sum())
    start = time.process_time()
    found = solve_knapsack(damage, cost, limit)
    assert time.process_time() - start < 5
    assert found.gap == 0.0
    assert cost[np.arange(500), found.choice].sum() <= limit


def tied(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Damage falls in proportion to cost: every plan lies on the bound, the worst case for proofs."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(10**6, 10**9, 16)[:, None]
    return weights * 1e-9 * (10 - np.array([2, 3, 4, 5, 6, 8])), weights * np.array([2, 3, 4, 5, 6, 8])


def test_without_a_proof_the_gap_says_so_and_is_small():
    damage, cost = tied(3)
    limit = int(cost[:, 0].sum() * 1.7)
    found = solve_knapsack(damage, cost, limit)
    used = int(cost[np.arange(16), found.choice].sum())
    assert used <= limit
    # here damage = (10 * weights - cost) * 1e-9: what a plan leaves of the budget is what it loses, and the bound loses nothing
    best_imaginable = 1e-9 * (5 * cost[:, 0].sum() - limit)
    assert found.bound <= best_imaginable * (1 + 1e-9)
    assert found.value >= found.bound
    assert 0 < found.gap == found.value - found.bound
    assert found.gap < 1e-4 * found.value


def test_the_same_input_gives_the_same_solution():
    damage, cost = tied(4)
    first, second = (solve_knapsack(damage, cost, int(cost[:, 0].sum() * 2)) for _ in range(2))
    assert first.choice.tolist() == second.choice.tolist()
    assert (first.value, first.bound) == (second.value, second.bound)


def test_one_format_has_one_answer():
    found = solve_knapsack(np.array([[0.1], [0.2]]), np.array([[3], [4]]), 7)
    assert found.choice.tolist() == [0, 0]
    assert found == KnapsackSolution(found.choice, math.fsum([0.1, 0.2]), math.fsum([0.1, 0.2]), 0.0)


def test_impossible_requests_are_refused_by_one_line():
    damage, cost = np.array([[1.0, 0.5]]), np.array([[2, 4]])
    with pytest.raises(UserError, match="budget of 1 is below 2"):
        solve_knapsack(damage, cost, 1)


@pytest.mark.parametrize(
    ("damage", "cost"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3), dtype=int)),
        (np.zeros((0, 2)), np.zeros((0, 2), dtype=int)),
        (np.array([[np.nan]]), np.array([[1]])),
        (np.array([[1.0]]), np.array([[1.5]])),
        (np.array([[1.0]]), np.array([[2**61]])),
    ],
)
def test_malformed_input_is_an_error(damage, cost):
    with pytest.raises(ValueError, match=r"damage|cost"):
        solve_knapsack(damage, cost, 10)
