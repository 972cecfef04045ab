"""Choosing among plans: the tables add up, the best measured candidate wins, the bisection finds the smallest plan that is good enough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from bitatlas.errors import UserError
from bitatlas.plan.search import best_knapsack, damage_tables, knapsack_plans, smallest_knapsack

UNITS, FORMATS = [f"u{i}" for i in range(6)], ["int2_g32", "int4_g32"]
COST = np.array([[2, 4]] * 6)


class Quadratic:
    """A planted damage model with interactions: what the screens would measure on it, and the truth about any plan."""

    def __init__(self, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.first = generator.uniform(0.01, 0.1, len(UNITS))
        pairs = np.triu(generator.uniform(-0.02, 0.03, (len(UNITS), len(UNITS))), 1)
        self.pairs = pairs + pairs.T

    def damage(self, choice: np.ndarray) -> float:
        low = (choice == 0).astype(float)
        return 0.01 + float(self.first @ low + low @ self.pairs @ low / 2)

    def screens(self) -> tuple[dict, dict]:
        high, low = np.ones(6, dtype=int), np.zeros(6, dtype=int)
        flip = [np.eye(6, dtype=int)[i] for i in range(6)]
        damage = {
            "uniform:int4_g32": {u: {"int2_g32": self.damage(high - f)} for u, f in zip(UNITS, flip, strict=True)},
            "uniform:int2_g32": {u: {"int4_g32": self.damage(low + f)} for u, f in zip(UNITS, flip, strict=True)},
        }
        return damage, {"uniform:int4_g32": self.damage(high), "uniform:int2_g32": self.damage(low)}

    def measure(self, plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {name: self.damage(choice) for name, choice in plans.items()}


def test_the_mean_of_both_screens_is_the_shapley_value():
    game = Quadratic()
    scores = damage_tables(UNITS, FORMATS, *game.screens())
    shapley = game.first + game.pairs.sum(1) / 2
    assert scores.tables["mean of both"][:, 0] == pytest.approx(shapley, abs=1e-12)
    assert (scores.tables["mean of both"][:, 1] == 0).all()
    # Shapley values share out the whole damage, so the prediction for uniform low is exact.
    assert scores.at_high + scores.tables["mean of both"][:, 0].sum() == pytest.approx(game.damage(np.zeros(6)), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_measured_candidate_is_chosen(seed: int):
    game = Quadratic(seed)
    scores = damage_tables(UNITS, FORMATS, *game.screens())
    best, damage, tried = best_knapsack(scores, COST, 18, game.measure)
    assert COST[np.arange(6), best.choice].sum() <= 18
    assert damage == min(tried.values()) == game.damage(best.choice)
    assert all(candidate.gap == 0 for candidate in knapsack_plans(scores, COST, 18))


def test_no_damage_is_predicted_below_that_of_the_widest_format():
    """Around uniform low a narrower format can look better than the widest: such scores sum to less than nothing."""
    widths = ["int2_g32", "int4_g32", "int8_g32"]
    around = {"int8_g32": {"int2_g32": 0.3, "int4_g32": 0.011}, "int2_g32": {"int4_g32": 1.0, "int8_g32": 1.2}}
    damage = {f"uniform:{base}": dict.fromkeys(UNITS, own) for base, own in around.items()}
    scores = damage_tables(UNITS, widths, damage, {"uniform:int8_g32": 0.01, "uniform:int2_g32": 2.0})
    found = knapsack_plans(scores, np.array([[2, 4, 8]] * 6), 44)
    assert min(scores.tables["mean of both"][:, 1]) < 0  # the game is one of these
    assert [candidate.predicted for candidate in found] == [0.01] * len(found)
    for table in scores.tables.values():
        wide, low = (scores.predicted(table, choice) for choice in (np.array([1, 2, 2, 2, 2, 2]), np.zeros(6, int)))
        assert wide >= 0.01 and low > 1


def test_a_tolerance_just_below_what_is_possible_is_told_with_its_digits():
    game = Quadratic()
    scores = damage_tables(UNITS, FORMATS, *game.screens())
    with pytest.raises(UserError, match=r"--max-damage 0\.0099999 is below 0\.01 nats/token"):
        smallest_knapsack(scores, COST, 0.0099999, game.measure)


def test_the_smallest_plan_within_a_tolerance_is_found():
    game = Quadratic(3)
    scores = damage_tables(UNITS, FORMATS, *game.screens())
    tolerated = 0.2
    best, damage, _, limit = smallest_knapsack(scores, COST, tolerated, game.measure)
    assert damage <= tolerated
    spent = int(COST[np.arange(6), best.choice].sum())
    assert spent <= limit
    smaller = [best_knapsack(scores, COST, cost, game.measure)[1] for cost in range(12, spent)]
    assert all(value > tolerated for value in smaller)


def test_an_impossible_tolerance_is_refused():
    game = Quadratic()
    scores = damage_tables(UNITS, FORMATS, *game.screens())
    with pytest.raises(UserError, match=r"--max-damage 0\.001 is below 0\.01 nats/token"):
        smallest_knapsack(scores, COST, 0.001, game.measure)
