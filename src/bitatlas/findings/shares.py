"""Who does the damage: each layer's share of it, its criticality, and the verdict on the layer.

Let v(S) be the damage of the model with the layers S at the low format and the others at the high one, and let it be quadratic:
v(S) = v(none) + sum_{i in S} a_i + sum_{i<j in S} q_ij. Lowering layer i alone adds v({i}) - v(none) = a_i; undoing only layer i in
the all-low model takes away v(all) - v(all without i) = a_i + sum_j q_ij. Their mean, a_i + sum_j q_ij / 2, is the Shapley value of
layer i: an interaction is shared equally by its two layers. So two measured models a layer give the exact values, whatever the
signs of q. How far they are from adding up to v(all) - v(none) is the misfit of the quadratic model, and is reported.

Criticality = share of the damage / share of the weights. Shares are ratios of means over rows, resampled jointly.
The same arithmetic serves units, and kinds of modules, as the parts that the model is made of (see `parts`).
Left out: interactions of three and more layers (that is the misfit).
Sources: Shapley 1953; the mean of first-in and last-in marginals for 2-additive games: Grabisch & Roubens 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitatlas.evaluation.bootstrap import (
    RESAMPLES,
    benjamini_hochberg,
    measured,
    percentile_interval,
    resample_means,
    two_sided_p,
)
from bitatlas.records import Layer, Measured

Floats = NDArray[np.float64]

FALSE_DISCOVERIES = 0.05
# a screen over L layers asks for tails of 0.025 / L: resamples beyond that, but no more than memory and time allow
RESAMPLES_A_LAYER, MOST_RESAMPLES = 1000, 50_000


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

    @property
    def layers(self) -> int:
        return len(self.weights)

    @property
    def rows(self) -> int:
        return len(self.high)

    @property
    def high_base(self) -> str:
        return f"uniform:{self.high_name}"

    @property
    def low_base(self) -> str:
        return f"uniform:{self.low_name}"

    @property
    def both_bases(self) -> str:
        return f"{self.high_base} and {self.low_base}"

    @cached_property
    def added(self) -> Floats:
        """[rows, layers]: what lowering each layer alone adds, nats/token."""
        return (self.lowered - self.high).T

    @cached_property
    def values(self) -> Floats:
        """[rows, layers]: Shapley values of the layers, nats/token."""
        return (self.added + (self.low - self.raised).T) / 2


@dataclass(frozen=True)
class Shares:
    """Shapley values of the layers with their resampled means: shares and criticality of any group of layers come from here."""

    rows: LayerRows
    mean: Floats  # [layers], nats/token
    resampled: Floats  # [resamples, layers], nats/token

    @cached_property
    def defined(self) -> bool:
        """Whether there is a damage to share: the interval of the sum over layers lies above 0."""
        low, _ = percentile_interval(self.resampled.sum(axis=1), self.rows.rows)
        return bool(self.rows.rows > 1 and low > 0)

    def share(self, layers: Sequence[int]) -> tuple[float, Floats]:
        """(share of the damage of a group of layers, the same resampled [resamples]); all 0 where there is no damage."""
        return float(self._share(self.mean[None], layers)[0]), self._share(self.resampled, layers)

    def _share(self, values: Floats, layers: Sequence[int]) -> Floats:
        total = values.sum(axis=1)
        return np.divide(values[:, layers].sum(axis=1), total, out=np.zeros(len(values)), where=total != 0)

    def criticality(self, layers: Sequence[int]) -> tuple[float, Floats]:
        """(criticality of a group of layers, the same resampled [resamples])."""
        weight_share = float(self.rows.weights[layers].sum() / self.rows.weights.sum())
        share, resampled = self.share(layers)
        return share / weight_share, resampled / weight_share

    def damage(self, layers: Sequence[int]) -> Measured:
        """What a group of layers adds when low, interactions included: the sum of its Shapley values."""
        return self.record(float(self.mean[layers].sum()), self.resampled[:, layers].sum(axis=1), "nats/token")

    def record(self, mean: float, resampled: Floats, unit: str) -> Measured:
        """The interval is missing where there are too few rows, or no damage to share."""
        ends = None
        if self.rows.rows > 1 and (self.defined or unit == "nats/token"):
            low, high = percentile_interval(resampled, self.rows.rows)
            ends = (float(low), float(high))
        return Measured(float(mean), ends, unit, self.rows.both_bases, self.rows.split, self.rows.rows)


def shares_of(rows: LayerRows, seed: int = 0) -> Shares:
    """Shapley values with resampled means; the same seed gives the same."""
    resamples = min(MOST_RESAMPLES, max(RESAMPLES, RESAMPLES_A_LAYER * rows.layers))
    return Shares(rows, rows.values.mean(axis=0), resample_means(rows.values, resamples, seed))


def misfit(rows: LayerRows, seed: int = 0) -> Measured:
    """(sum of the Shapley values - measured damage between the bases) / that damage: 0 where damage is quadratic in layers."""
    whole = rows.low - rows.high
    both = np.stack([rows.values.sum(axis=1), whole], axis=1)  # [rows, 2]
    mean, resampled = both.mean(axis=0), resample_means(both, seed=seed)
    value = float(mean[0] / mean[1] - 1) if mean[1] else 0.0
    ends = None
    if rows.rows > 1 and percentile_interval(resampled[:, 1], rows.rows)[0] > 0:  # a ratio needs a denominator that is not 0
        low, high = percentile_interval(resampled[:, 0] / resampled[:, 1] - 1, rows.rows)
        ends = (float(low), float(high))
    return Measured(value, ends, "share", rows.both_bases, rows.split, rows.rows)


def verdict_of(criticality: Measured, added_at_most: float, tolerance: float, q_value: float = 0.0) -> str:
    """ "critical", "safe" or "uncertain". `added_at_most`: upper end of the interval of the damage added, nats/token."""
    if criticality.ci95 is None or q_value > FALSE_DISCOVERIES:
        return "uncertain"
    low, high = criticality.ci95
    if low > 1:
        return "critical"
    return "safe" if high < 1 and added_at_most <= tolerance else "uncertain"


class Part(NamedTuple):
    """The evidence on one layer, or whatever else the rows are of."""

    lowered: Measured
    raised: Measured
    share: Measured
    criticality: Measured
    q_value: float  # two-sided, criticality = 1, Benjamini-Hochberg over the parts


def parts_of(rows: LayerRows, shares: Shares, seed: int = 0) -> list[Part]:
    """One record a part, in order."""
    ratios = [shares.criticality([part]) for part in range(rows.layers)]
    p = [two_sided_p(resampled, 1.0, rows.rows) if shares.defined else 1.0 for _, resampled in ratios]
    q = benjamini_hochberg(p)
    return [
        Part(
            lowered=measured(rows.lowered[part], "nats/token", rows.high_base, rows.split, seed),
            raised=measured(rows.raised[part], "nats/token", rows.low_base, rows.split, seed),
            share=shares.record(*shares.share([part]), "share"),
            criticality=shares.record(*ratio, "ratio"),
            q_value=float(q[part]),
        )
        for part, ratio in enumerate(ratios)
    ]


def layer_records(rows: LayerRows, tolerance: float, shares: Shares | None = None, seed: int = 0) -> list[Layer]:
    """The evidence on every layer and its verdict; `tolerance` in nats/token.

    Critical: interval of criticality above 1 and q <= 0.05. Safe: interval below 1, q <= 0.05, and the damage that lowering this layer
    alone adds to uniform high within the tolerance up to the upper end of its interval. Otherwise uncertain.
    """
    shares = shares or shares_of(rows, seed)
    added_high = percentile_interval(resample_means(rows.added, seed=seed), rows.rows)[1]  # [layers]
    return [
        Layer(
            layer,
            int(rows.weights[layer]),
            *part,
            verdict_of(part.criticality, float(added_high[layer]), tolerance, part.q_value),
        )
        for layer, part in enumerate(parts_of(rows, shares, seed))
    ]
