"""A small planning problem whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitatlas.measure.interactions import Interactions
from bitatlas.plan.refine import Change, Probe
from bitatlas.plan.search import PlanningProblem, Scores, damage_tables
from bitatlas.records import ModelInfo, Module

UNITS, FORMATS = 8, ["int2_g64", "int4_g64"]


MODULES = [Module(f"layers.{i}.up_proj", i, "up_proj", (64, 64), f"layers.{i}.up_proj") for i in range(UNITS)]


INFO = ModelInfo("m", None, "0" * 64, "LlamaForCausalLM", 8, 4, 128, "float32", 8 * 64 * 64, 0, 8 * 64 * 64 * 4)


SUBJECT = PlanningProblem(INFO, MODULES, FORMATS, "rtn")


def scores_of(game: Planted) -> Scores:
    """What the two screens of units measure."""
    names = [m.name for m in MODULES]
    damage, base = {}, {}
    for column, name in enumerate(FORMATS):
        whole = np.full(UNITS, column)
        base[f"uniform:{name}"] = game.of(whole)
        other = FORMATS[1 - column]
        flips = [np.where(np.arange(UNITS) == i, 1 - column, whole) for i in range(UNITS)]
        damage[f"uniform:{name}"] = {unit: {other: game.of(flip)} for unit, flip in zip(names, flips, strict=True)}
    return damage_tables(names, FORMATS, damage, base)


class Planted:
    """damage(choice) = |level + sum of the units' errors|^2 / 2 + cubic x (sum of errors)^3: interactions by construction."""

    def __init__(self, units: int, formats: int = 2, seed: int = 0, cubic: float = 0.0, dimensions: int = 6):
        generator = np.random.default_rng(seed)
        widths = np.linspace(1, 0, formats)[None, :, None]
        self.errors = widths * (0.3 * generator.normal(size=(units, 1, dimensions)) + 0.2)  # [units, formats, dimensions]
        self.cubic = cubic
        self.units, self.formats = units, formats
        self.measured = 0

    def error(self, choice: np.ndarray) -> np.ndarray:
        return self.errors[np.arange(self.units), choice].sum(axis=0)

    def of(self, choice: np.ndarray) -> float:
        error = self.error(choice)
        return float(error @ error / 2 + self.cubic * abs(error.sum()) ** 3)

    def moves(self, base: np.ndarray) -> np.ndarray:
        return self.errors - self.errors[np.arange(self.units), base][:, None]  # [units, formats, dimensions]

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
        return Probe(self.swaps, self.damage)


def costs(units: int, formats: int, seed: int = 0) -> tuple[np.ndarray, int]:
    weights = np.random.default_rng(seed).integers(1, 5, size=units)
    cost = weights[:, None] * np.arange(2, 2 + formats)
    return cost, int(cost.mean(axis=1).sum())
