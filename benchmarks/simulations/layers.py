"""Rules about where critical layers and kinds of modules stand, in worlds where they are false, or true by a known amount."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitatlas.findings.folk import (
    EARLY,
    ENDS,
    LATE,
    VALUE_AND_DOWN,
    early_is_safe,
    ends_matter_most,
    late_is_critical,
    value_and_down,
)
from bitatlas.findings.shares import HOLDS, LayerRows, Shares, shares_of
from bitatlas.records import Finding, Module
from simulations import Simulation

ROWS = 32
ANY = 1e9  # nats/token: nothing is unsafe for its damage
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def rows_of(criticality: Sequence[float] | np.ndarray, rows: int, seed: int, noise: float = 0.5) -> LayerRows:
    """Damage of layers of one size: `criticality` on average (its mean is 1), noisy by row, some rows harder than others."""
    rng = np.random.default_rng(seed)
    layers = len(criticality)
    hardness = rng.lognormal(-0.125, 0.5, rows)  # mean 1
    added = 0.02 * np.asarray(criticality)[:, None] * (1 + noise * rng.standard_normal((layers, rows))) * hardness
    high = 0.05 * hardness
    low = high + added.sum(axis=0)
    return LayerRows(high, low, high + added, low - added, np.full(layers, 1000))


def shares_at(criticality: Sequence[float] | np.ndarray, seed: int) -> Shares:
    return shares_of(rows_of(criticality, ROWS, seed))


def _kinds(criticality: Sequence[float], seed: int) -> Finding:
    modules = [Module(f"model.layers.0.x.{kind}", 0, kind, (8, 8), kind) for kind in KINDS]
    return value_and_down(modules, rows_of(criticality, ROWS, seed))


def _missed(finding: Finding, truth: float) -> bool:
    assert finding.evidence is not None
    assert finding.evidence.ci95 is not None
    low, high = finding.evidence.ci95
    return not low <= truth <= high


EQUAL = [1.0] * 8
LAST_ALONE = [0.8] * 7 + [2.4]
MANY_ENDS = [1.3, 1.3, 0.7, 0.7, 0.7, 0.7, 1.3, 1.3]  # a layer between is as critical as either end
ONE_KIND = [0.4, 1.4, 1.4, 0.7, 0.7, 1.4]  # keys are as critical as values and down projections

SIMULATIONS = [
    Simulation(EARLY, "all layers equal", lambda seed: early_is_safe(shares_at(EQUAL, seed), ANY).verdict == HOLDS),
    Simulation(EARLY, "all equal but the last one", lambda seed: early_is_safe(shares_at(LAST_ALONE, seed), ANY).verdict == HOLDS),
    Simulation(LATE, "all layers equal", lambda seed: late_is_critical(shares_at(EQUAL, seed)).verdict == HOLDS),
    Simulation(LATE, "all equal but the last one", lambda seed: late_is_critical(shares_at(LAST_ALONE, seed)).verdict == HOLDS),
    Simulation(ENDS, "a layer between equals the ends", lambda seed: ends_matter_most(shares_at(MANY_ENDS, seed)).verdict == HOLDS),
    Simulation(
        f"interval of “{ENDS}”", "two layers between equal the ends", lambda seed: _missed(ends_matter_most(shares_at(MANY_ENDS, seed)), 0.0)
    ),
    Simulation(VALUE_AND_DOWN, "keys equal them", lambda seed: _kinds(ONE_KIND, seed).verdict == HOLDS),
    Simulation(f"interval of “{VALUE_AND_DOWN}”", "keys equal them", lambda seed: _missed(_kinds(ONE_KIND, seed), 0.0)),
]  # fmt: skip
