"""True damage along random orders of the layers: the sampled Shapley values that the quadratic shares are checked against.

In an order, layers go from the high format to the low one, one after the other; what each adds when its turn comes is one sample of its
Shapley value, whatever the interactions. Orders come in pairs, each with its reverse (antithetic): in a quadratic game one pair is
exact, so what differs between pairs is interaction of three and more layers. A set of layers that two orders share is measured once.
Left out: orders of units (a hundred of them would take a hundred models an order).
Source: permutation sampling with antithetic pairs: Mitchell et al., JMLR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.sensitivity.damage import DamageMeter

ROWS = 8  # of the test rows: the quadratic shares are taken on the same ones, so more would sharpen little
SHORT_ROWS = 4  # in a short survey: under ten seconds on the demo's 16 layers, a quarter of the whole check
MOST_PAIRS, FEWEST_PAIRS = 6, 3
MOST_MODELS = 192  # beyond which fewer pairs are drawn: on 8 rows about the cost of the screen of 16 layers on 64


@dataclass(frozen=True)
class OrderScreen:
    """`added[p, r, i]`: what layer i adds on row r, nats/token, mean over the order p and its reverse."""

    added: np.ndarray  # float64 [pairs, rows, layers]
    models: int  # that were measured


def pairs_for(layers: int, short: bool = False) -> int:
    """Pairs of orders that are drawn; 0 where there is nothing to order."""
    if layers < 2:
        return 0
    return FEWEST_PAIRS if short else max(FEWEST_PAIRS, min(MOST_PAIRS, MOST_MODELS // (2 * (layers - 1))))


def screen_orders(
    meter: DamageMeter,
    modules: Sequence[Module],
    low: str,
    high: str,
    rows: Tensor,
    seed: int,
    reporter: Reporter,
    short: bool = False,
) -> OrderScreen | None:
    """Sampled on the first of `rows` [rows, tokens]; None of a model with one layer. `short`: few orders on few rows."""
    layers = sorted({module.layer for module in modules})
    pairs = pairs_for(len(layers), short)
    if not pairs:
        return None
    rng = np.random.default_rng(seed)
    drawn = [[int(layer) for layer in rng.permutation(layers)] for _ in range(pairs)]
    orders = [order for first in drawn for order in (first, first[::-1])]
    sets = {name_of(order[:place]): frozenset(order[:place]) for order in orders for place in range(len(order) + 1)}
    plans = {name: {m.name: low if m.layer in chosen else high for m in modules} for name, chosen in sets.items()}
    with reporter.stage(f"{len(orders)} orders of the layers") as progress:
        damage = meter.plans(plans, rows[: SHORT_ROWS if short else ROWS], progress)
    added = np.empty((len(orders), len(damage[""]), len(layers)))
    for number, order in enumerate(orders):
        for place, layer in enumerate(order):
            before, after = name_of(order[:place]), name_of(order[: place + 1])
            added[number, :, layers.index(layer)] = damage[after] - damage[before]
    return OrderScreen((added[::2] + added[1::2]) / 2, len(plans))


def name_of(layers: Sequence[int]) -> str:
    """One name for a set of layers."""
    return ",".join(map(str, sorted(layers)))
