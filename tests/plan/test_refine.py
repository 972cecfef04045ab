"""Refinement on planted damage: it finds the best plan where the models are right, improves where they are not, and stops with a reason."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from bitatlas.measure.interactions import Interactions
from bitatlas.plan.refine import EFFORTS, Change, Probe, refine
from planners import Planted, costs


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cubic", [0.0, 0.02])
def test_the_best_plan_of_all_is_found(seed: int, cubic: float):
    game, (cost, limit) = Planted(10, seed=seed, cubic=cubic), costs(10, 2, seed)
    every = [np.array(plan) for plan in itertools.product(range(2), repeat=10)]
    best = min(game.of(plan) for plan in every if cost[np.arange(10), plan].sum() <= limit)
    found = refine(game.probe(), cost, limit, {})
    assert cost[np.arange(10), found.choice].sum() <= limit
    assert found.damage == game.of(found.choice) == pytest.approx(best, rel=1e-2)
    assert game.measured < 40


def test_it_never_ends_above_its_starts_and_every_step_is_told():
    game, (cost, limit) = Planted(40, 3, cubic=0.05), costs(40, 3)
    told: list[dict] = []
    cheapest = cost.argmin(axis=1)
    found = refine(game.probe(), cost, limit, {"cheapest": cheapest}, told.append)
    assert told == found.steps
    accepted = [step["damage"] for step in found.steps if step["accepted"]]
    assert accepted == sorted(accepted, reverse=True)
    assert found.damage <= min(step["damage"] for step in found.steps) * (1 + 1e-5)  # steps are written with six digits
    assert found.damage < game.of(cheapest)
    assert found.reason


def test_only_the_promising_changes_of_many_are_measured():
    game, (cost, limit) = Planted(60, 3), costs(60, 3)
    asked: list[int] = []

    def swaps(base: np.ndarray, changes: Sequence[Change], split: str) -> Interactions:
        asked.append(len(changes))
        return game.swaps(base, changes, split)

    found = refine(Probe(swaps, game.damage), cost, limit, {})
    assert asked and max(asked[2:]) <= EFFORTS["full"].swaps  # the first two are the screens at both ends
    assert cost[np.arange(60), found.choice].sum() <= limit


def test_a_budget_without_room_and_one_without_limit():
    game, (cost, _) = Planted(6), costs(6, 2)
    assert (refine(game.probe(), cost, int(cost[:, 0].sum()), {}).choice == 0).all()
    assert refine(game.probe(), cost, int(cost[:, 1].sum()), {}).damage == pytest.approx(0, abs=1e-12)


def test_equal_input_gives_equal_steps():
    cost, limit = costs(30, 2)
    assert refine(Planted(30).probe(), cost, limit, {}).steps == refine(Planted(30).probe(), cost, limit, {}).steps
