"""Are there more weights near 0 than a Gaussian has, and does it differ between layers?

Any Gaussian has 0.80 % of its values within 1 % of its standard deviation, so that such a sparsity says nothing. Shares are counted over
all modules, each by its own standard deviation, at every threshold of the curve. Of millions of weights every difference is significant, so size decides
too: "more" and "fewer" are claimed where the interval of the ratio to the Gaussian's share lies beyond 10 %, "as many" where it lies within.
Layers differ where chi-squared says so and the standard deviation between them, less what so many weights vary by chance, is at least 5 % of
the mean; where they do not, no rule about sparse layers can be tested.

Left out: dependence between weights (intervals are those of independent draws); zeros in a pattern.
Sources: chi-squared test of homogeneity, Pearson 1900; variance between groups by moments, DerSimonian & Laird 1986; equivalence by
interval, Schuirmann 1987.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from bitatlas.findings.folk import FAILS, HOLDS, OPEN
from bitatlas.findings.shares import FALSE_DISCOVERIES
from bitatlas.records import Finding, Sparsity, SparsityPoint, WeightProfile
from bitatlas.records.text import p_is, percent

CLAIM = "more weights are near 0 than a Gaussian has"
BAND = 0.1  # of the Gaussian's share: less is no difference worth a word
SPREAD = 0.05  # standard deviation between layers, of the mean: likewise
MORE, AS_MANY, FEWER = "more", "as many", "fewer"
SAID = {MORE: "more than", AS_MANY: "as", FEWER: "fewer than", OPEN: "not told apart from"}
CONVENTION = "0.01"  # standard deviations


def gaussian_share(threshold: float) -> float:
    """Share of a Gaussian within `threshold` standard deviations."""
    return math.erf(threshold / math.sqrt(2))


def sparsity_of(profiles: Sequence[WeightProfile], layers: int) -> Sparsity | None:
    """The record of a whole model; None where a layer has no profile."""
    if not profiles or {profile.layer for profile in profiles} != set(range(layers)):
        return None
    curve = []
    for name in sorted(set.intersection(*(set(profile.sparsity_curve) for profile in profiles)), key=float):
        small = sum(profile.sparsity_curve[name] * profile.weights for profile in profiles)
        curve.append(_point(float(name), small, sum(profile.weights for profile in profiles)))
    groups = [[profile for profile in profiles if profile.layer == layer] for layer in range(layers)]
    sizes = np.array([sum(profile.weights for profile in group) for group in groups], dtype=np.float64)
    below = np.array([sum(profile.sparsity * profile.weights for profile in group) for group in groups])
    p, spread = _between(below, sizes)
    differ = p <= FALSE_DISCOVERIES and spread >= SPREAD
    return Sparsity(curve, [float(share) for share in below / sizes], p, spread, differ)


def _point(threshold: float, below: float, weights: int) -> SparsityPoint:
    share, normal = below / weights, gaussian_share(threshold)
    reach = 1.96 * math.sqrt(max(share, 1 / weights) / weights)  # of a share, few of many
    low, high = max(0.0, share - reach) / normal, (share + reach) / normal
    inside = low >= 1 - BAND and high <= 1 + BAND
    verdict = AS_MANY if inside else MORE if low > 1 + BAND else FEWER if high < 1 - BAND else OPEN
    return SparsityPoint(threshold, share, normal, (low, high), verdict)


def _between(below: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """(chi-squared p, spread relative to the mean) of shares of layers; below, sizes: weights, [layers]."""
    whole = float(sizes.sum())
    mean = float(below.sum()) / whole
    if len(sizes) < 2 or not 0 < mean < 1:
        return 1.0, 0.0
    squares = float(((below - sizes * mean) ** 2 / (sizes * mean * (1 - mean))).sum())
    free = len(sizes) - 1
    excess = max(0.0, squares - free) * mean * (1 - mean) / (whole - float((sizes**2).sum()) / whole)
    return float(stats.chi2.sf(squares, free)), math.sqrt(excess) / mean


def alike(found: Sparsity | None) -> Mapping[str, str]:
    """The measure "sparsity" and why it is not tested, where layers do not differ."""
    return {} if found is None or found.differ else {"sparsity": f"the layers do not differ: {range_text(found)}"}


def range_text(found: Sparsity) -> str:
    """`0.79% to 0.82%, as a Gaussian's 0.80% (chi-squared p = 0.80)`."""
    least, most = min(found.layers), max(found.layers)
    return f"{percent(least, 2)} to {percent(most, 2)} of their weights below 1% of σ{_beside(found)} (chi-squared {p_is(found.p_value)})"


def _beside(found: Sparsity) -> str:
    points = [point for point in found.curve if point.threshold == float(CONVENTION)]
    return f", {SAID[points[0].verdict]} a Gaussian's {percent(points[0].gaussian, 2)}" if points else ""


def sparsity_findings(found: Sparsity | None) -> list[Finding]:
    """One statement, with the whole curve; none where it was not measured."""
    if found is None or not found.curve:
        return []
    point = next((point for point in found.curve if point.threshold == float(CONVENTION)), found.curve[0])
    verdict = HOLDS if point.verdict == MORE else OPEN if point.verdict == OPEN else FAILS
    curve = "; ".join(
        f"{percent(one.share, 2)} below {percent(one.threshold, 1)} of σ ({SAID[one.verdict]} a Gaussian's {percent(one.gaussian, 2)})"
        for one in found.curve
    )
    text = f"Of all weights {curve}. Layers {'differ' if found.differ else 'do not differ'}: {range_text(found)}, "
    text += f"standard deviation between them {percent(found.spread)} of the mean beyond chance."
    return [Finding("layers", CLAIM, verdict, text)]
