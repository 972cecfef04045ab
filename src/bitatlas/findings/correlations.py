"""Do cheap measures tell where the damage is? Spearman's rank correlation of each with the layers' criticality.

Two questions, two answers. How well is the correlation of *these* layers known? The interval: rows are resampled, the layers
stay. Could it be chance? A model has only so many layers, and neighbours are alike, so that two smooth curves that have nothing to do with
each other line up often: random orders of the layers call 16 to 30 % of them related. The null here keeps how smooth a measure is. Its ranks
are written as a sum of shapes over depth (a line, an arc, then ever faster waves), and each shape keeps its size while its sign is
drawn anew: a measure of the same smoothness that runs otherwise. Two trends have one shape in common, whose sign says nothing, so a trend
alone is never beyond chance, and depth, which is nothing else, is not tested. A measure earns a say in the bits when the interval over
rows excludes 0 and p, corrected over all measures (Benjamini-Hochberg), is at most 5 %.

Few layers have few shapes: no p is below 2 / 2^(layers - 1), which is said where it decides.
Left out: partial correlations (the measures hang together), modules instead of layers.
Sources: Spearman 1904; random signs of orthogonal components: Winkler et al. 2014 (sign flipping), Theiler et al. 1992 (phases; cosines here, since
layers are no circle).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.fft import dct

from bitatlas.findings.shares import FAILS, FALSE_DISCOVERIES, HOLDS, OPEN, Floats, Shares
from bitatlas.records import AttentionLayer, Correlation, Finding, Sparsity, SparsityPoint, WeightProfile
from bitatlas.records.text import p_is, p_value, percent
from bitatlas.stats.bootstrap import benjamini_hochberg, interval_ends, is_bound, rank_correlation

MOST_EXACT = 15  # layers, of which all 2^13 choices of signs are tried
DRAWS = 10_000  # of signs, for more layers
DEPTH = "depth"
ATTENTION_MEASURES = ("attention entropy", "head specialization", "reasoning focus")


def weight_measures(groups: Sequence[Sequence[WeightProfile]], low: str) -> dict[str, Floats]:
    """Return cheap measures of groups of modules: name -> [groups], means weighted by size; NaN where `low` was not profiled."""
    columns: dict[str, Callable[[WeightProfile], float]] = {
        "sparsity": lambda profile: profile.sparsity,
        "kurtosis": lambda profile: profile.kurtosis,
        "outlier ratio": lambda profile: profile.outlier_ratio,
        "relative error": lambda profile: profile.relative_error.get(low, math.nan),
        "squared error": lambda profile: profile.relative_error.get(low, math.nan) * profile.std**2,
    }
    return {
        name: np.array([np.average([value(p) for p in group], weights=[p.weights for p in group]) for group in groups])
        for name, value in columns.items()
    }


def layer_measures(
    profiles: Sequence[WeightProfile], attention: Sequence[AttentionLayer], layers: int, low: str
) -> dict[str, Floats]:
    """Return cheap measures of every layer: name -> [layers]. Attention measures are of base `reference`; one that some layer lacks is left out."""
    measures: dict[str, Floats] = {}
    if {profile.layer for profile in profiles} == set(range(layers)):
        measures = weight_measures([[p for p in profiles if p.layer == layer] for layer in range(layers)], low)
        del measures["squared error"]  # of units alone
    reference = {record.layer: record for record in attention if record.base == "reference"}
    if set(reference) == set(range(layers)):
        ordered = [reference[layer] for layer in range(layers)]
        measures["attention entropy"] = np.array([record.entropy.mean for record in ordered])
        measures["head specialization"] = np.array([record.specialization_percent.mean for record in ordered])
        focus = [record.focus_percent.mean if record.focus_percent else math.nan for record in ordered]
        measures["reasoning focus"] = np.array(focus)
    measures[DEPTH] = np.arange(layers, dtype=np.float64)
    return {name: values for name, values in measures.items() if np.isfinite(values).all()}


@lru_cache(maxsize=8)
def _shapes(layers: int) -> Floats:
    """Return [layers - 1, layers], orthonormal and each of mean 0: a line, an arc, then cosines of growing frequency."""
    depth = np.linspace(-1, 1, layers)
    polynomials = [depth**degree for degree in range(min(3, layers))]
    waves = dct(np.eye(layers), norm="ortho", axis=0)[3:]
    return np.linalg.qr(np.array([*polynomials, *waves]).T)[0].T[1:]


@lru_cache(maxsize=8)
def _signs(layers: int, seed: int) -> Floats:
    """Return [draws, layers - 1] of 1 and -1; all choices of few. The first is never turned: turning all of them changes no size."""
    if layers <= MOST_EXACT:
        choices = np.arange(2 ** (layers - 2))
        turned = (choices[:, None] >> np.arange(layers - 2)) & 1
    else:
        turned = np.random.default_rng(seed).integers(0, 2, (DRAWS, layers - 2))
        turned[0] = 0  # what was seen is one of them
    return np.concatenate([np.ones((len(turned), 1)), 1.0 - 2 * turned], axis=1)


def chance_p(x: ArrayLike, y: ArrayLike, seed: int = 0) -> float:
    """Return the two-sided p of "x: [layers] and y: [layers] have nothing to do with each other", neighbouring layers being alike; 1 below 3 layers."""
    layers = len(np.asarray(x))
    if layers < 3:
        return 1.0
    ranks = [stats.rankdata(np.asarray(values, dtype=np.float64)) for values in (x, y)]
    # [layers - 1]; the sum is the covariance of ranks
    products = np.prod([_shapes(layers) @ (rank - rank.mean()) for rank in ranks], axis=0)
    observed = abs(float(products.sum())) - 1e-9  # equal sums may differ in the last digit
    return float((np.abs(_signs(layers, seed) @ products) >= observed).mean())


def least_p(layers: int) -> float:
    """Return the smallest p that so many layers allow."""
    return 2.0 ** (2 - layers) if layers <= MOST_EXACT else 1 / DRAWS


def cannot_tell(correlated: Sequence[Correlation]) -> str:
    """Return why no single measure could pass, "" where one could. correlated: of layers."""
    tested = [result for result in correlated if result.q_value is not None]
    if not tested or least_p(tested[0].n) * len(tested) <= FALSE_DISCOVERIES:
        return ""
    measures = "1 measure" if len(tested) == 1 else f"{len(tested)} measures"
    return f"{tested[0].n} layers cannot tell: the smallest p that they allow is {p_value(least_p(tested[0].n))}, for {measures} at once"


def correlations(measures: Mapping[str, Floats], shares: Shares, sizes: Floats | float = 1.0) -> list[Correlation]:
    """Return one record a measure, with its interval over rows. Constant measures are left out: they have no order.

    Correlated with the share of the damage, or with criticality where `sizes` are the weights.
    """
    records = []
    for name, values in measures.items():
        if len(values) < 3 or np.ptp(values) == 0:
            continue
        ends = interval_ends(rank_correlation(values, shares.resampled / sizes), shares.rows.independent)
        records.append(Correlation(name, float(rank_correlation(values, shares.mean / sizes)), ends, len(values)))
    return records


def layer_correlations(
    measures: Mapping[str, Floats], shares: Shares, untested: Mapping[str, str] | None = None, seed: int = 0
) -> list[Correlation]:
    """Return one record a measure with its p and q against chance: one family. untested: measures that are not in it, and why."""
    reasons = {DEPTH: "a trend over depth cannot be told from chance in one model", **(untested or {})}
    results = correlations(measures, shares, shares.rows.weights)
    if not shares.defined:
        reasons |= {result.measure: "there is too little damage to share" for result in results}
    tested = [result.measure for result in results if result.measure not in reasons]
    p = [chance_p(measures[name], shares.mean / shares.rows.weights, seed) for name in tested]
    sampled = shares.rows.layers > MOST_EXACT  # of few layers all signs are tried, and p is exact
    bound = is_bound(p, least_p(shares.rows.layers)) if sampled and p else np.zeros(len(p), dtype=bool)
    values = dict(zip(tested, zip(p, benjamini_hochberg(p).tolist(), bound.tolist(), strict=True), strict=True)) if p else {}
    return [
        replace(result, not_tested=reasons[result.measure])
        if result.measure in reasons
        else replace(result, **dict(zip(("p_value", "q_value", "q_is_bound"), values[result.measure], strict=True)))
        for result in results
    ]


def significant_sign(result: Correlation) -> int:
    """Return 1 or -1 where a measure is beyond chance over layers and its interval over rows excludes 0; else 0."""
    if result.ci95 is None or result.q_value is None or result.q_value > FALSE_DISCOVERIES:
        return 0
    return 1 if result.ci95[0] > 0 else -1 if result.ci95[1] < 0 else 0


# --- sparsity --------------------------------------------------------------------------------------------------------------
#
# Are there more weights near 0 than a Gaussian has, and does it differ between layers?
#
# Any Gaussian has 0.80 % of its values within 1 % of its standard deviation, so that such a sparsity says nothing. Shares are counted over
# all modules, each by its own standard deviation, at every threshold of the curve. Of millions of weights every difference is significant, so size decides
# too: "more" and "fewer" are claimed where the interval of the ratio to the Gaussian's share lies beyond 10 %, "as many" where it lies within.
# Layers differ where chi-squared says so and the standard deviation between them, less what so many weights vary by chance, is at least 5 % of
# the mean; where they do not, no rule about sparse layers can be tested.
#
# Left out: dependence between weights (intervals are those of independent draws); zeros in a pattern.
# Sources: chi-squared test of homogeneity, Pearson 1900; variance between groups by moments, DerSimonian & Laird 1986; equivalence by
# interval, Schuirmann 1987.

SPARSITY_CLAIM = "more weights are near 0 than a Gaussian has"
BAND = 0.1  # of the Gaussian's share: less is no difference worth a word
SPREAD = 0.05  # standard deviation between layers, of the mean: likewise
MORE, AS_MANY, FEWER = "more", "as many", "fewer"
COMPARED = {MORE: "more than", AS_MANY: "as", FEWER: "fewer than", OPEN: "not told apart from"}
CONVENTION = "0.01"  # standard deviations


def gaussian_share(threshold: float) -> float:
    """Return the share of a Gaussian within `threshold` standard deviations."""
    return math.erf(threshold / math.sqrt(2))


def sparsity_of(profiles: Sequence[WeightProfile], layers: int) -> Sparsity | None:
    """Return the record of a whole model; None where a layer has no profile."""
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
    """Return (chi-squared p, spread relative to the mean) of shares of layers; below, sizes: weights, [layers]."""
    whole = float(sizes.sum())
    mean = float(below.sum()) / whole
    if len(sizes) < 2 or not 0 < mean < 1:
        return 1.0, 0.0
    squares = float(((below - sizes * mean) ** 2 / (sizes * mean * (1 - mean))).sum())
    free = len(sizes) - 1
    excess = max(0.0, squares - free) * mean * (1 - mean) / (whole - float((sizes**2).sum()) / whole)
    return float(stats.chi2.sf(squares, free)), math.sqrt(excess) / mean


def untested_sparsity(sparsity: Sparsity | None) -> Mapping[str, str]:
    """Return the measure "sparsity" and why it is not tested, where layers do not differ."""
    return {} if sparsity is None or sparsity.differ else {"sparsity": f"the layers do not differ: {_range_text(sparsity)}"}


def _range_text(sparsity: Sparsity) -> str:
    """Return `0.79% to 0.82% of their weights below 1% of σ, as a Gaussian's 0.80% (chi-squared p = 0.80)`."""
    points = [point for point in sparsity.curve if point.threshold == float(CONVENTION)]
    beside = f", {COMPARED[points[0].verdict]} a Gaussian's {percent(points[0].gaussian, 2)}" if points else ""
    shares = f"{percent(min(sparsity.layers), 2)} to {percent(max(sparsity.layers), 2)} of their weights below 1% of σ"
    return f"{shares}{beside} (chi-squared {p_is(sparsity.p_value)})"


def sparsity_findings(sparsity: Sparsity | None) -> list[Finding]:
    """Return one statement, with the whole curve; none where it was not measured."""
    if sparsity is None or not sparsity.curve:
        return []
    convention = next((point for point in sparsity.curve if point.threshold == float(CONVENTION)), sparsity.curve[0])
    verdict = {MORE: HOLDS, OPEN: OPEN}.get(convention.verdict, FAILS)
    curve = "; ".join(
        f"{percent(point.share, 2)} below {percent(point.threshold, 1)} of σ ({COMPARED[point.verdict]} a Gaussian's {percent(point.gaussian, 2)})"
        for point in sparsity.curve
    )
    text = f"Of all weights {curve}. Layers {'differ' if sparsity.differ else 'do not differ'}: {_range_text(sparsity)}, "
    text += f"standard deviation between them {percent(sparsity.spread)} of the mean beyond chance."
    return [Finding("layers", SPARSITY_CLAIM, verdict, text)]
