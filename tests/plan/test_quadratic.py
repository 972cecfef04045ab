"""The quadratic problem: against brute force, within budget and radius, bounds below every plan."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.errors import UserError
from bitatlas.plan.quadratic import Quadratic, nearest_plans, relaxed_knapsack, solve_quadratic


def problem_of(generator: np.random.Generator, units: int, formats: int, kept: float = 0.7) -> Quadratic:
    """Interactions with a common direction, so that they matter."""
    scores = 3 * (generator.normal(size=(18, units * formats)) + generator.normal(size=(18, 1)))
    return model_of(generator.normal(size=(6, units, formats)).mean(axis=0), scores, 10, kept)


def model_of(first: np.ndarray, scores: np.ndarray, tokens: int, kept: float) -> Quadratic:
    """The model of `scores` [samples, units x formats]; its off-diagonal times `kept`, which leaves it positive semidefinite."""
    matrix = scores.T @ scores / (2 * tokens * len(scores))
    return Quadratic(first, kept * matrix + (1 - kept) * np.diag(np.diag(matrix)))


def costs(generator: np.random.Generator, units: int, formats: int) -> tuple[np.ndarray, int]:
    cost = np.sort(generator.integers(1, 30, size=(units, formats)), axis=1)
    return cost, int(generator.integers(cost.min(1).sum(), cost.max(1).sum() + 1))


def every_plan(units: int, formats: int, cost: np.ndarray, limit: int) -> list[np.ndarray]:
    plans = (np.array(plan) for plan in itertools.product(range(formats), repeat=units))
    return [plan for plan in plans if cost[np.arange(units), plan].sum() <= limit]


@given(seed=st.integers(0, 10_000), formats=st.integers(2, 3), data=st.data())
@settings(max_examples=40, deadline=None)
def test_brute_force_finds_nothing_better(seed: int, formats: int, data: st.DataObject):
    units = data.draw(st.integers(1, 8 if formats == 2 else 5))
    generator = np.random.default_rng(seed)
    problem = problem_of(generator, units, formats, kept=float(generator.uniform()))
    cost, limit = costs(generator, units, formats)
    plans = every_plan(units, formats, cost, limit)
    best = min(problem.value(plan) for plan in plans)
    found = solve_quadratic(problem, cost, limit)
    assert cost[np.arange(units), found.choice].sum() <= limit
    assert found.value == pytest.approx(problem.value(found.choice))
    assert found.bound <= best + 1e-9
    assert found.value == pytest.approx(best, abs=1e-9)
    assert found.gap == found.value - found.bound >= 0


@pytest.mark.parametrize("seed", range(3))
def test_twelve_units_against_brute_force(seed: int):
    generator = np.random.default_rng(seed)
    problem = problem_of(generator, 12, 2)
    cost, limit = costs(generator, 12, 2)
    best = min(problem.value(plan) for plan in every_plan(12, 2, cost, limit))
    assert solve_quadratic(problem, cost, limit).value == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("radius", [0, 1, 2, 4])
def test_the_trust_region_is_kept_and_used(radius: int):
    generator = np.random.default_rng(radius)
    problem = problem_of(generator, 7, 2)
    cost, limit = costs(generator, 7, 2)
    plans = every_plan(7, 2, cost, limit)
    centre = plans[len(plans) // 2]
    near = [plan for plan in plans if (plan != centre).sum() <= radius]
    found = solve_quadratic(problem, cost, limit, centre, radius)
    assert (found.choice != centre).sum() <= radius
    assert found.value == pytest.approx(min(problem.value(plan) for plan in near), abs=1e-9)


def test_an_impossible_budget_and_a_centre_outside_it_are_refused():
    problem = problem_of(np.random.default_rng(0), 3, 2)
    cost = np.array([[2, 4]] * 3)
    with pytest.raises(UserError, match="the budget of 5 is below 6"):
        solve_quadratic(problem, cost, 5)
    with pytest.raises(ValueError, match="does not fit"):
        solve_quadratic(problem, cost, 8, np.ones(3, dtype=int), 1)


def test_nearest_plans_are_the_best_singles_and_pairs():
    generator = np.random.default_rng(5)
    problem = problem_of(generator, 6, 3)
    cost, limit = costs(generator, 6, 3)
    plans = every_plan(6, 3, cost, limit)
    choice = plans[7]
    near = sorted(problem.value(plan) for plan in plans if 1 <= (plan != choice).sum() <= 2)
    found = nearest_plans(problem, cost, limit, choice, 9)
    assert [problem.value(plan) for plan in found] == pytest.approx(near[:9], abs=1e-9)


def test_the_relaxed_knapsack_is_a_linear_programme():
    from scipy.optimize import linprog

    generator = np.random.default_rng(2)
    for _ in range(20):
        damage, (cost, limit) = generator.normal(size=(5, 3)), costs(generator, 5, 3)
        rows = np.kron(np.eye(5), np.ones(3))
        exact = linprog(damage.ravel(), A_ub=cost.reshape(1, -1), b_ub=[limit], A_eq=rows, b_eq=np.ones(5), bounds=(0, 1))
        z = relaxed_knapsack(damage, cost, limit)
        assert (z * cost).sum() <= limit + 1e-9
        assert (z * damage).sum() == pytest.approx(exact.fun, abs=1e-7)


@pytest.mark.slow
def test_a_large_problem_is_quick_and_the_gap_small():
    generator = np.random.default_rng(0)
    units, formats = 500, 6
    scores = (generator.normal(size=(24, 4, units, formats)) + generator.normal(size=(24, 4, 1, 1))) * np.linspace(
        1, 0.1, formats
    )
    first = 0.001 * generator.normal(size=(24, units, formats)).mean(axis=0)
    problem = model_of(first, scores.reshape(96, -1), 192, 0.5)
    cost = np.sort(generator.integers(1, 30_000, size=(units, formats)), axis=1)
    start = time.process_time()
    found = solve_quadratic(problem, cost, int(cost.mean(axis=1).sum()))
    assert time.process_time() - start < 5 * 2  # twice the promise: test machines are slow
    assert found.gap < 0.01 * found.value


def test_equal_input_gives_equal_plans():
    problem = problem_of(np.random.default_rng(1), 30, 3)
    cost, limit = costs(np.random.default_rng(1), 30, 3)
    assert (solve_quadratic(problem, cost, limit).choice == solve_quadratic(problem, cost, limit).choice).all()
