"""Refinement on planted damage: it finds the best plan where the models are right, improves where they are not, and stops with a reason."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from bitatlas.planning.expansion import Expansion
from bitatlas.planning.refine import EFFORTS, Change, Probe, refine
from bitatlas.sensitivity.interactions import Interactions


class Planted:
    """damage(choice) = |level + sum of the units' errors|^2 / 2 + cubic x (sum of errors)^3: interactions by construction."""

    def __init__(self, units: int, formats: int = 2, seed: int = 0, cubic: float = 0.0, dimensions: int = 6):
        generator = np.random.default_rng(seed)
        widths = np.linspace(1, 0, formats)[None, :, None]
        self.errors = widths * (0.3 * generator.normal(size=(units, 1, dimensions)) + 0.2)  # [units, formats, dimensions]
        self.cubic = cubic
        self.units, self.formats = units, formats
        self.measured = 0

    def error(self, choice: np.ndarray | None) -> np.ndarray:
        return np.zeros(self.errors.shape[2]) if choice is None else self.errors[np.arange(self.units), choice].sum(axis=0)

    def of(self, choice: np.ndarray) -> float:
        error = self.error(choice)
        return float(error @ error / 2 + self.cubic * abs(error.sum()) ** 3)

    def moves(self, base: np.ndarray | None) -> np.ndarray:
        own = 0.0 if base is None else self.errors[np.arange(self.units), base][:, None]
        return self.errors - own  # [units, formats, dimensions]

    def curvature(self, base: np.ndarray | None) -> Expansion:
        """Exact but for the cubic part: one row a dimension, so that the mean of s s' is the curvature."""
        moves, dimensions = self.moves(base), self.errors.shape[2]
        first = np.repeat((moves @ self.error(base))[None], 2, axis=0)
        scores = np.moveaxis(moves, 2, 0)[None] * np.sqrt(dimensions)
        return Expansion(first, np.repeat(scores, 2, axis=0), 1)

    def swaps(self, base: np.ndarray, changes: Sequence[Change], split: str) -> Interactions:
        assert split in ("fit", "select")
        moves = np.stack([self.moves(base)[u, f] for u, f in changes])
        plans = np.repeat(base[None], len(changes), axis=0)
        for plan, (unit, fmt) in zip(plans, changes, strict=True):
            plan[unit] = fmt
        return Interactions(np.array([self.of(plan) - self.of(base) for plan in plans]), moves @ moves.T / 2)

    def damage(self, plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        self.measured += len(plans)
        return {name: self.of(plan) for name, plan in plans.items()}

    def probe(self) -> Probe:
        return Probe(self.curvature, self.swaps, self.damage)


def costs(units: int, formats: int, seed: int = 0) -> tuple[np.ndarray, int]:
    weights = np.random.default_rng(seed).integers(1, 5, size=units)
    cost = weights[:, None] * np.arange(2, 2 + formats)
    return cost, int(cost.mean(axis=1).sum())


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

    found = refine(Probe(game.curvature, swaps, game.damage), cost, limit, {})
    assert asked and max(asked[2:]) <= EFFORTS["full"].swaps  # the first two are the screens at both ends
    assert cost[np.arange(60), found.choice].sum() <= limit


def test_a_budget_without_room_and_one_without_limit():
    game, (cost, _) = Planted(6), costs(6, 2)
    assert (refine(game.probe(), cost, int(cost[:, 0].sum()), {}).choice == 0).all()
    assert refine(game.probe(), cost, int(cost[:, 1].sum()), {}).damage == pytest.approx(0, abs=1e-12)


def test_equal_input_gives_equal_steps():
    cost, limit = costs(30, 2)
    assert refine(Planted(30).probe(), cost, limit, {}).steps == refine(Planted(30).probe(), cost, limit, {}).steps
