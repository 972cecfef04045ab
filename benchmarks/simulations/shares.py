"""Shares, criticality and the words on layers and zones, in games whose Shapley values are known and that are not quadratic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from bitatlas.findings.reliability import GOOD_RANK, reliability_findings, shapley_check, shapley_findings
from bitatlas.findings.shares import CRITICAL, LIGHT, SAFE, LayerRows, layer_records, misfit, shares_of
from bitatlas.findings.statements import GOOD_FIT, _fit_finding
from bitatlas.findings.units import kind_records
from bitatlas.findings.zones import joint_damage, within_tolerance, zones
from bitatlas.records import Module
from simulations import Simulation

LAYERS = 6
ROWS, FIRST_ROWS, PAIRS = 48, 4, 3  # as in a short survey
GENEROUS = 100.0  # nats/token

Floats = np.ndarray
Game = Callable[[Floats], Floats]  # which layers are low, [sets, layers] of 0 and 1 -> damage [sets]


def saturating(rng: np.random.Generator) -> Game:
    alone = 0.05 * rng.lognormal(0, 0.7, LAYERS)
    return lambda sets: 0.3 * (1 - np.exp(-(sets @ alone) / 0.3))


def growing(rng: np.random.Generator) -> Game:
    alone = 0.05 * rng.lognormal(0, 0.7, LAYERS)
    return lambda sets: (sets @ alone) ** 1.6


def cubic(rng: np.random.Generator) -> Game:
    """Pairs, and a fifth of all three layers, do more together than apart."""
    alone, pairs = 0.05 * rng.lognormal(0, 0.7, LAYERS), 0.005 * rng.standard_normal((LAYERS, LAYERS))
    threes = [
        (list(three), 0.03 * rng.lognormal(0, 0.7)) for three in itertools.combinations(range(LAYERS), 3) if rng.random() < 0.2
    ]

    def game(sets: Floats) -> Floats:
        extra = sum((sets[:, three].prod(axis=1) * size for three, size in threes), np.zeros(len(sets)))
        return sets @ alone + np.einsum("si,ij,sj->s", sets, pairs, sets) + extra

    return game


def equal_saturating(rng: np.random.Generator) -> Game:
    return lambda sets: 0.3 * (1 - np.exp(-0.25 * sets.sum(axis=1)))


@lru_cache(maxsize=1)
def all_sets() -> Floats:
    return np.array(list(itertools.product((0.0, 1.0), repeat=LAYERS)))[:, ::-1]  # [2**layers, layers]; row m holds the bits of m


@lru_cache(maxsize=1)
def _weights() -> Floats:
    """What the Shapley value weighs a set of so many other layers with."""
    return np.array([math.factorial(s) * math.factorial(LAYERS - s - 1) / math.factorial(LAYERS) for s in range(LAYERS)])


def shapley(table: Floats) -> Floats:
    """By the definition, from the damage of all sets."""
    size, numbers = all_sets().sum(axis=1).astype(int), np.arange(len(table))
    values = np.empty(LAYERS)
    for layer in range(LAYERS):
        without = numbers[(numbers >> layer) & 1 == 0]
        values[layer] = (_weights()[size[without]] * (table[without | 1 << layer] - table[without])).sum()
    return values


def play(
    make: Callable[[np.random.Generator], Game], seed: int, orders: bool = True, noise: float = 0.3
) -> tuple[LayerRows, Floats]:
    """Rows that are harder and easier, with a part of their own in each layer: (what is measured of them, Shapley values of their mean)."""
    rng = np.random.default_rng(seed)
    table = make(rng)(all_sets())
    truth = shapley(table)
    hard = rng.lognormal(-0.125, 0.5, ROWS)
    linear = noise * truth * rng.standard_normal((ROWS, LAYERS))
    by_row = hard[:, None] * (0.05 + table + linear @ all_sets().T)  # [rows, sets]
    full, each = 2**LAYERS - 1, 1 << np.arange(LAYERS)
    added = np.stack([_in_orders(by_row[:FIRST_ROWS], rng) for _ in range(PAIRS)]) if orders else None
    rows = LayerRows(
        by_row[:, 0], by_row[:, full], by_row[:, each].T, by_row[:, full ^ each].T, np.full(LAYERS, 100), orders=added
    )
    return rows, truth


def _in_orders(by_row: Floats, rng: np.random.Generator) -> Floats:
    """What each layer adds, mean over a random order and its reverse: [rows, layers]."""
    first = rng.permutation(LAYERS)
    added = np.zeros((len(by_row), LAYERS))
    for order in (first, first[::-1]):
        number = 0
        for layer in order:
            added[:, layer] += (by_row[:, number | 1 << layer] - by_row[:, number]) / 2
            number |= 1 << layer
    return added


# --- intervals ---------------------------------------------------------------------------------------------------------


def share_missed(make: Callable[[np.random.Generator], Game], seed: int) -> bool:
    rows, truth = play(make, seed)
    layer, shares = seed % LAYERS, shares_of(rows, seed)
    record = shares.record(*shares.share([layer]), "share")
    assert record.ci95
    return not record.ci95[0] <= truth[layer] / truth.sum() <= record.ci95[1]


def kind_missed(make: Callable[[np.random.Generator], Game], seed: int) -> bool:
    """No sampled orders here: kinds in the place of layers."""
    rows, truth = play(make, seed, orders=False)
    modules = [Module(f"{kind}", 0, f"k{kind}", (10, 10), "u") for kind in range(LAYERS)]
    record = kind_records(modules, rows, seed)[seed % LAYERS].criticality
    assert record.ci95
    return not record.ci95[0] <= LAYERS * truth[seed % LAYERS] / truth.sum() <= record.ci95[1]


# --- words -------------------------------------------------------------------------------------------------------------


def called(words: set[str], seed: int) -> bool:
    """Is any layer called one of `words`, where all are as harmful as their size?"""
    rows, _ = play(equal_saturating, seed)
    return any(layer.verdict in words for layer in layer_records(rows, GENEROUS, seed=seed))


def safe_at_the_tolerance(seed: int) -> bool:
    """Five layers do a tenth of what the last does; lowering layer 0 alone adds just more than the tolerance."""
    rng = np.random.default_rng(seed)
    size = np.array([0.02, 0.02, 0.02, 0.02, 0.02, 0.2])
    rows = additive(size, rng)
    return layer_records(rows, 0.02, seed=seed)[0].verdict == SAFE


def additive(size: Floats, rng: np.random.Generator, rows: int = ROWS) -> LayerRows:
    hard = rng.lognormal(-0.125, 0.5, rows)
    parts = hard[:, None] * size * (1 + 0.3 * rng.standard_normal((rows, len(size))))
    low = parts.sum(axis=1)
    return LayerRows(
        0.05 * hard, 0.05 * hard + low, (0.05 * hard + parts.T), 0.05 * hard + low - parts.T, np.full(len(size), 100)
    )


def together_at_the_tolerance(seed: int) -> bool:
    """Five layers are safe alone; any four of them together add just more than the tolerance. Is a group of four or five called safe?"""
    size = np.array([0.02, 0.02, 0.02, 0.02, 0.02, 0.3])
    test, select = (additive(size, np.random.default_rng([seed, part])) for part in range(2))
    layers = layer_records(test, 0.08, seed=seed)
    joint = joint_damage(layers, lambda chosen: select.added[:, list(chosen)].sum(axis=1), 0.08, "uniform:high", None, seed)
    return joint is not None and (len(joint.together) >= 4 or (len(joint.layers) >= 4 and within_tolerance(joint.added, 0.08)))


def zone_called(seed: int) -> bool:
    """All layers are alike: is a zone called critical, safe or light?"""
    rows, _ = play(equal_saturating, seed)
    shares = shares_of(rows, seed)
    layers = layer_records(rows, GENEROUS, shares, seed)
    return any(zone.verdict in (CRITICAL, SAFE, LIGHT) for zone in zones(rows, layers, range(LAYERS), shares, seed))


def adds_up(seed: int) -> bool:
    """The quadratic shares truly add up to a tenth too much."""
    rng = np.random.default_rng(seed)
    rows = additive(np.full(LAYERS, 0.02), rng)
    extra = rows.whole * (GOOD_FIT + 0.2 * rng.standard_normal(ROWS)) / LAYERS  # [rows], of each layer
    misfitting = LayerRows(rows.high, rows.low, rows.lowered + 2 * extra, rows.raised, rows.weights)
    return _fit_finding(misfit(misfitting, seed)).verdict == "holds"


def ranks_agree(seed: int) -> bool:
    """The quadratic shares are in another order than the true ones (rank correlation below 0.9)."""
    rng = np.random.default_rng(seed)
    rows, truth = play(cubic, seed)
    assert rows.orders is not None
    swapped = rng.permutation(LAYERS)
    while np.corrcoef(truth.argsort().argsort(), truth[swapped].argsort().argsort())[0, 1] >= GOOD_RANK:
        swapped = rng.permutation(LAYERS)
    others = LayerRows(rows.high, rows.low, rows.lowered[swapped], rows.raised[swapped], rows.weights)
    check = shapley_check(rows.orders, 10, others, seed)
    return shapley_findings(check)[0].verdict == "holds"


def order_is_stable(seed: int) -> bool:
    """Layers differ by less than what another survey of as many rows would move them."""
    rng = np.random.default_rng(seed)
    rows = additive(0.02 * (1 + 0.05 * rng.standard_normal(LAYERS)), rng)
    (finding,) = reliability_findings(rows, layer_records(rows, GENEROUS, seed=seed), seed)
    return finding.verdict == "holds"


SHARE, CRITICALITY = "share of the damage of a layer [95 % interval]", "criticality of a kind of module [95 % interval]"
SIMULATIONS = [
    Simulation(SHARE, "damage saturates", lambda seed: share_missed(saturating, seed)),
    Simulation(SHARE, "damage grows faster than layers are lowered", lambda seed: share_missed(growing, seed)),
    Simulation(SHARE, "three layers interact", lambda seed: share_missed(cubic, seed)),
    Simulation(CRITICALITY, "damage saturates", lambda seed: kind_missed(saturating, seed)),
    Simulation(CRITICALITY, "three interact", lambda seed: kind_missed(cubic, seed)),
    Simulation("layer … critical", "all layers alike, damage saturates", lambda seed: called({CRITICAL}, seed)),
    Simulation("layer … safe, or light", "all layers alike, damage saturates", lambda seed: called({SAFE, LIGHT}, seed)),
    Simulation("layer … safe", "its damage is just above the tolerance", safe_at_the_tolerance),
    Simulation("the safe layers are safe together", "four of them are just above the tolerance", together_at_the_tolerance),
    Simulation("a zone critical, safe or light", "all layers alike, damage saturates", zone_called),
    Simulation("the damage of layers adds up but for pairs", "a tenth of it is missed", adds_up),
    Simulation("two models a layer are enough for the layers' shares", "their order is another", ranks_agree),
    Simulation("the ranking of the layers is stable", "another survey would rank otherwise", order_is_stable),
]
