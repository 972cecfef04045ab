"""Who does the damage: each layer's share of it, its criticality, and the verdict on the layer.

Let v(S) be the damage of the model with the layers S at the low format and the others at the high one, and let it be quadratic:
v(S) = v(none) + sum_{i in S} a_i + sum_{i<j in S} q_ij. Lowering layer i alone adds v({i}) - v(none) = a_i; undoing only layer i in
the all-low model takes away v(all) - v(all without i) = a_i + sum_j q_ij. Their mean, a_i + sum_j q_ij / 2, is the Shapley value of
layer i: an interaction is shared equally by its two layers. So two measured models a layer give the exact values, whatever the
signs of q. How far they are from adding up to v(all) - v(none) is the misfit of the quadratic model, and is reported.

A share is a share of the *measured* damage, v(all) - v(none): a ratio of means over rows, resampled jointly, in blocks where rows come in
blocks. Criticality = share of the damage / share of the weights. Damage is not quite quadratic, so shares have an error that no row sees:
- with sampled orders of the layers (`measure.screens`: few rows, few pairs of an order and its reverse, no model of the damage), what the
  quadratic shares miss on those rows is taken off all shares, which makes them unbiased whatever the game; the rows and the pairs that this was
  taken from are resampled. Pairs are few, so a layer's spread between pairs counts as at least that of all layers, and is drawn from Student's t;
- without (units, kinds of modules, a task's text), every share is blurred by what the shares' sum misses of the whole, relative to the lesser
  of the two, once for all parts alike and once for each.
The same arithmetic serves units, and kinds of modules, as the parts that the model is made of (see `findings.units`).
Left out: which three layers interact.
Sources: Shapley 1953; the mean of first-in and last-in marginals for 2-additive games: Grabisch & Roubens 1999; control variates: Owen
2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitatlas.records import Layer, Measured
from bitatlas.stats.bootstrap import (
    RESAMPLES,
    Blocks,
    benjamini_hochberg,
    block_count,
    effective_sample_size,
    interval_ends,
    is_bound,
    measured,
    percentile_interval,
    resample_means,
    smallest_p,
    two_sided_p,
)

HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"

Floats = NDArray[np.float64]

FALSE_DISCOVERIES = 0.05
CRITICAL, SAFE, LIGHT, UNCERTAIN = VERDICTS = ("critical", "safe", "light", "uncertain")
# a screen over L layers asks for tails of 0.025 / L: resamples beyond that, but no more than memory and time allow
RESAMPLES_A_LAYER, MOST_RESAMPLES = 1000, 50_000
LEAST_SUM = 0.05  # of the whole, that quadratic shares add up to: where they are less, nothing is known of them
POOLED = 2.0  # degrees of freedom that the spread of all layers adds to those of a layer's own pairs of orders


@dataclass(frozen=True)
class LayerRows:
    """Damage of whole models on the same rows, nats/token. `lowered[i]`: layer i low, the others high; `raised[i]`: the reverse."""

    high: Floats  # [rows], every layer high
    low: Floats  # [rows], every layer low
    lowered: Floats  # [layers, rows]
    raised: Floats  # [layers, rows]
    weights: Floats  # [layers], quantizable weights of each layer
    high_name: str = "high"  # format names
    low_name: str = "low"
    split: str = "test"
    blocks: Blocks = None  # [rows], equal for rows that belong together (see `stats.bootstrap`)
    orders: Floats | None = None  # [pairs, first rows, layers], what each layer adds in sampled orders

    def __post_init__(self) -> None:
        for name in ("high", "low", "lowered", "raised", "weights"):
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: all must be finite")
            object.__setattr__(self, name, array)
        layers, rows = len(self.weights), len(self.high)
        shapes = (self.low.shape, self.lowered.shape, self.raised.shape)
        if not layers or not rows or shapes != ((rows,), (layers, rows), (layers, rows)):
            raise ValueError(f"high and low: [rows], lowered and raised: [layers, rows]; got {self.high.shape} and {shapes}")
        if not (self.weights > 0).all():
            raise ValueError("weights: every layer needs some")
        if self.blocks is not None and len(self.blocks) != rows:
            raise ValueError(f"blocks: one a row, got {len(self.blocks)} for {rows} rows")

    @property
    def layers(self) -> int:
        return len(self.weights)

    @property
    def rows(self) -> int:
        return len(self.high)

    @cached_property
    def independent(self) -> float:
        """Return how many effective_sample_size rows or blocks of rows there are; less than 2 tell nothing of spread."""
        return effective_sample_size(self.rows, self.blocks)

    @property
    def high_base(self) -> str:
        return f"uniform:{self.high_name}"

    @property
    def low_base(self) -> str:
        return f"uniform:{self.low_name}"

    @property
    def both_bases(self) -> str:
        return f"{self.high_base} and {self.low_base}"

    def record(self, value: float, ends: tuple[float, float] | None, unit: str) -> Measured:
        """Return the record of a number that was made from both bases."""
        return Measured(float(value), ends, unit, self.both_bases, self.split, self.rows, block_count(self.blocks))

    @cached_property
    def added(self) -> Floats:
        """[rows, layers]: what lowering each layer alone adds, nats/token."""
        return (self.lowered - self.high).T

    @cached_property
    def whole(self) -> Floats:
        """[rows]: the damage between the two bases, nats/token."""
        return self.low - self.high

    @cached_property
    def values(self) -> Floats:
        """[rows, layers]: Shapley values of the layers, nats/token."""
        return (self.added + (self.low - self.raised).T) / 2


@dataclass(frozen=True)
class Shares:
    """Shapley values of the layers with their resampled means: shares and criticality of any group of layers come from here.

    Values are shares of the measured damage (see the module's docstring) times that damage, nats/token.
    """

    rows: LayerRows
    mean: Floats  # [layers]
    resampled: Floats  # [resamples, layers]
    whole: float  # the damage that is shared
    whole_resampled: Floats  # [resamples]

    @cached_property
    def defined(self) -> bool:
        """Return whether there is a damage to share: its interval lies above 0."""
        low, _ = percentile_interval(self.whole_resampled, self.rows.independent)
        return bool(low > 0)

    @cached_property
    def by_row(self) -> Floats:
        """[rows, layers]: Shapley values row by row, with the means of the corrected ones."""
        return self.rows.values + (self.mean - self.rows.values.mean(axis=0))

    def share(self, layers: Sequence[int]) -> tuple[float, Floats]:
        """Return the share of the damage of a group of layers, and its resampled values [resamples]; all 0 where there is no damage."""
        mean = float(self.mean[layers].sum() / self.whole) if self.whole else 0.0
        return mean, _ratio(self.resampled[:, layers].sum(axis=1), self.whole_resampled)

    def criticality(self, layers: Sequence[int]) -> tuple[float, Floats]:
        """Return the criticality of a group of layers, and its resampled values [resamples]."""
        weight_share = float(self.rows.weights[layers].sum() / self.rows.weights.sum())
        share, resampled = self.share(layers)
        return share / weight_share, resampled / weight_share

    def damage(self, layers: Sequence[int]) -> Measured:
        """Return what a group of layers adds when low, interactions included: the sum of its Shapley values."""
        return self.record(float(self.mean[layers].sum()), self.resampled[:, layers].sum(axis=1), "nats/token")

    def record(self, mean: float, resampled: Floats, unit: str) -> Measured:
        """Return the number with its interval, which is missing where there are too few rows, or no damage to share."""
        known = self.defined or unit == "nats/token"
        return self.rows.record(mean, interval_ends(resampled, self.rows.independent) if known else None, unit)


def _ratio(values: Floats, whole: Floats) -> Floats:
    """Return values / whole along the first axis, 0 where there is no whole."""
    shape = (len(whole),) + (1,) * (values.ndim - 1)
    return np.divide(values, whole.reshape(shape), out=np.zeros_like(values), where=whole.reshape(shape) != 0)


def shares_of(rows: LayerRows, seed: int = 0) -> Shares:
    """Return Shapley values with resampled means; the same seed gives the same."""
    resamples = min(MOST_RESAMPLES, max(RESAMPLES, RESAMPLES_A_LAYER * rows.layers))
    both = np.column_stack([rows.values, rows.whole])  # [rows, layers + 1]
    mean, resampled = both.mean(axis=0), resample_means(both, resamples, seed, rows.blocks)
    whole, whole_resampled = float(mean[-1]), resampled[:, -1]
    error, error_resampled = _model_error(rows, mean, resampled, seed)
    return Shares(
        rows, mean[:-1] - error * whole, resampled[:, :-1] - error_resampled * whole_resampled[:, None], whole, whole_resampled
    )


def _model_error(rows: LayerRows, mean: Floats, resampled: Floats, seed: int) -> tuple[Floats, Floats]:
    """Return what quadratic shares are wrong by, as shares: (its estimate [layers], drawn again [resamples, layers]).

    mean: [layers + 1] and resampled: [resamples, layers + 1], Shapley values and the whole.
    """
    rng = np.random.default_rng([seed, rows.layers])
    if rows.orders is not None and rows.orders.shape[0] > 1 and rows.whole[: rows.orders.shape[1]].mean() > 0:
        return _against_orders(rows, rows.orders, len(resampled), seed, rng)
    if mean[-1] <= 0:
        return np.zeros(rows.layers), np.zeros((len(resampled), rows.layers))
    share = mean[:-1] / mean[-1]
    miss = abs(share.sum() - 1) / min(1.0, max(share.sum(), LEAST_SUM))
    blur = rng.standard_normal((len(resampled), 1)) + rng.standard_normal((len(resampled), rows.layers))
    return np.zeros(rows.layers), miss * share * blur


def _against_orders(
    rows: LayerRows, orders: Floats, resamples: int, seed: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return `_model_error` from sampled orders on the first rows. orders: [pairs, first rows, layers]."""
    pairs, first, layers = orders.shape
    whole = rows.whole[:first]
    error = np.column_stack([rows.values[:first] - orders.mean(axis=0), whole])  # [first rows, layers + 1]
    mean = error[:, :-1].mean(axis=0) / whole.mean()
    drawn = resample_means(error, resamples, seed + 1, None if rows.blocks is None else rows.blocks[:first])
    residual = (orders.mean(axis=1) - orders.mean(axis=(0, 1))) / whole.mean()  # [pairs, layers], by pair
    variance = (residual**2).sum(axis=0) / (pairs - 1)  # [layers], between pairs
    freedom = POOLED + pairs - 1
    widened = np.maximum(variance.mean(), variance)
    scaled = residual * np.sqrt(np.divide(widened, variance, out=np.ones(layers), where=variance > 0) / (pairs * (pairs - 1)))
    tails = np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1)))
    return mean, _ratio(drawn[:, :-1], drawn[:, -1]) + tails * (rng.standard_normal((resamples, pairs)) @ scaled)


def misfit(rows: LayerRows, seed: int = 0) -> Measured:
    """Return (sum of the quadratic Shapley values - measured damage between the bases) / that damage: 0 where damage is quadratic in layers."""
    both = np.stack([rows.values.sum(axis=1), rows.whole], axis=1)  # [rows, 2]
    mean, resampled = both.mean(axis=0), resample_means(both, seed=seed, blocks=rows.blocks)
    value = float(mean[0] / mean[1] - 1) if mean[1] else 0.0
    # a ratio needs a denominator that is not 0
    known = percentile_interval(resampled[:, 1], rows.independent)[0] > 0
    return rows.record(value, interval_ends(resampled[:, 0] / resampled[:, 1] - 1, rows.independent) if known else None, "share")


def layer_verdict(criticality: Measured, added_at_most: float, tolerance: float, q_value: float = 0.0) -> str:
    """Return "critical", "safe", "light" or "uncertain". `added_at_most`: upper end of the interval of the damage added, nats/token."""
    if criticality.ci95 is None or q_value > FALSE_DISCOVERIES:
        return UNCERTAIN
    low, high = criticality.ci95
    if low > 1:
        return CRITICAL
    if high >= 1:
        return UNCERTAIN
    return SAFE if added_at_most <= tolerance else LIGHT


class Part(NamedTuple):
    """The evidence on one layer, or whatever else the rows are of."""

    lowered: Measured
    raised: Measured
    share: Measured
    criticality: Measured
    q_value: float  # two-sided, criticality = 1, Benjamini-Hochberg over the parts
    q_is_bound: bool  # resampling cannot give a smaller one


def part_records(rows: LayerRows, shares: Shares, seed: int = 0) -> list[Part]:
    """Return one record a part, in order."""
    ratios = [shares.criticality([part]) for part in range(rows.layers)]
    p = [two_sided_p(resampled, 1.0, rows.independent) if shares.defined else 1.0 for _, resampled in ratios]
    q, bound = benjamini_hochberg(p), is_bound(p, smallest_p(len(shares.resampled), rows.independent))
    return [
        Part(
            lowered=measured(rows.lowered[part], "nats/token", rows.high_base, rows.split, seed, rows.blocks),
            raised=measured(rows.raised[part], "nats/token", rows.low_base, rows.split, seed, rows.blocks),
            share=shares.record(*shares.share([part]), "share"),
            criticality=shares.record(*ratio, "ratio"),
            q_value=float(q[part]),
            q_is_bound=bool(bound[part]),
        )
        for part, ratio in enumerate(ratios)
    ]


def layer_records(rows: LayerRows, tolerance: float, shares: Shares | None = None, seed: int = 0) -> list[Layer]:
    """Return the evidence on every layer and its verdict; `tolerance` in nats/token.

    Critical: interval of criticality above 1 and q <= 0.05. Below 1, as sure: safe where the damage that lowering this layer alone adds to
    uniform high is within the tolerance up to the upper end of its interval, else light. Otherwise uncertain.
    """
    shares = shares or shares_of(rows, seed)
    added_high = percentile_interval(resample_means(rows.added, seed=seed, blocks=rows.blocks), rows.independent)[1]  # [layers]
    return [
        Layer(
            layer,
            int(rows.weights[layer]),
            **part._asdict(),
            verdict=layer_verdict(part.criticality, float(added_high[layer]), tolerance, part.q_value),
        )
        for layer, part in enumerate(part_records(rows, shares, seed))
    ]
