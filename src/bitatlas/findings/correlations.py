"""Do cheap measures tell where the damage is? Spearman's rank correlation of each with the layers' share of the damage.

Two questions, two answers. How well is the correlation of *these* layers known? The interval: rows are resampled, the layers
stay. Could it be chance? The permutation p: would a measure that has nothing to do with damage line up with these layers as
well? A measure earns a say in the bits when the interval excludes 0 and p, corrected over all measures, is at most 5 %.
Left out: partial correlations (the measures hang together), modules instead of layers.
Source: Spearman 1904; exact permutation test: Pitman 1937.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from bitatlas.evaluation.bootstrap import percentile_interval
from bitatlas.findings.shares import Shares
from bitatlas.records import AttentionLayer, Correlation, WeightProfile

Floats = NDArray[np.float64]

MOST_EXACT = 7  # layers whose 5040 orders are all tried
PERMUTATIONS = 10_000
DEPTH = "depth"
ATTENTION_MEASURES = ("attention entropy", "head specialization", "reasoning focus")


def layer_measures(
    profiles: Sequence[WeightProfile], attention: Sequence[AttentionLayer], layers: int, low: str
) -> dict[str, Floats]:
    """Cheap measures of every layer: name -> [layers]. Weight measures are means over modules, weighted by their size.

    Attention measures come from base `reference`. A measure that some layer lacks is left out.
    """
    found: dict[str, Floats] = {}
    if {profile.layer for profile in profiles} == set(range(layers)):
        each = [[profile for profile in profiles if profile.layer == layer] for layer in range(layers)]
        columns = {
            "sparsity": lambda profile: profile.sparsity,
            "kurtosis": lambda profile: profile.kurtosis,
            "outlier ratio": lambda profile: profile.outlier_ratio,
            "relative error": lambda profile: profile.relative_error.get(low, math.nan),
        }
        for name, read in columns.items():
            found[name] = np.array([np.average([read(p) for p in group], weights=[p.weights for p in group]) for group in each])
    reference = {record.layer: record for record in attention if record.base == "reference"}
    if set(reference) == set(range(layers)):
        ordered = [reference[layer] for layer in range(layers)]
        found["attention entropy"] = np.array([record.entropy.mean for record in ordered])
        found["head specialization"] = np.array([record.specialization_percent.mean for record in ordered])
        focus = [record.focus_percent.mean if record.focus_percent else math.nan for record in ordered]
        found["reasoning focus"] = np.array(focus)
    found[DEPTH] = np.arange(layers, dtype=np.float64)
    return {name: values for name, values in found.items() if np.isfinite(values).all()}


def spearman(x: ArrayLike, y: ArrayLike) -> Floats:
    """Rank correlation of x: [layers] with y: [..., layers] -> [...]; ties get their mean rank, 0 where either is constant."""
    ranks_x = rankdata(np.asarray(x, dtype=np.float64))
    ranks_y = rankdata(np.asarray(y, dtype=np.float64), axis=-1)
    centred_x = ranks_x - ranks_x.mean()
    centred_y = ranks_y - ranks_y.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred_x**2).sum() * (centred_y**2).sum(axis=-1))
    return np.divide(centred_y @ centred_x, spread, out=np.zeros_like(spread), where=spread > 0)


def spearman_by_row(x: ArrayLike, y: ArrayLike) -> Floats:
    """Rank correlation of each row of x with the same row of y: [n, layers] both -> [n]; 0 where either is constant."""
    a, b = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (rankdata(x, axis=-1), rankdata(y, axis=-1)))
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), spread, out=np.zeros_like(spread), where=spread > 0)


def permutation_p(x: ArrayLike, y: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of "x: [layers] and y: [layers] are in unrelated order": all orders of few layers, else random ones."""
    y = np.asarray(y, dtype=np.float64)
    seen = abs(float(spearman(x, y))) - 1e-12  # equal correlations may differ in the last digit
    if len(y) <= MOST_EXACT:
        orders = np.array(list(itertools.permutations(y)))
        return float((np.abs(spearman(x, orders)) >= seen).mean())
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(y, (PERMUTATIONS, 1)), axis=1)  # [permutations, layers]
    return float((np.count_nonzero(np.abs(spearman(x, orders)) >= seen) + 1) / (PERMUTATIONS + 1))


def correlations(measures: Mapping[str, Floats], shares: Shares) -> list[Correlation]:
    """One record a measure, with the interval over rows. Constant measures are left out: they have no order."""
    found = []
    for name, values in measures.items():
        if len(values) < 3 or np.ptp(values) == 0:
            continue
        ends = None
        if shares.rows.rows > 1:
            low, high = percentile_interval(spearman(values, shares.resampled), shares.rows.rows)
            ends = (float(low), float(high))
        found.append(Correlation(name, float(spearman(values, shares.mean)), ends, len(values)))
    return found
