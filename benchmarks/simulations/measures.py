"""Measures that have nothing to do with damage, each as smooth over depth as real ones are; weights that are Gaussian."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bitatlas.findings.correlations import (
    SPARSITY_CLAIM,
    gaussian_share,
    layer_correlations,
    sparsity_findings,
    sparsity_of,
    untested_sparsity,
)
from bitatlas.findings.folk import RULED, SHARP, SPARSE, SPECIAL, marking_rules
from bitatlas.findings.shares import FAILS, HOLDS, Shares, shares_of
from bitatlas.findings.statements import measure_findings
from bitatlas.measure.weights import weight_profile
from bitatlas.records import Finding, Module, WeightProfile
from bitatlas.stats.bootstrap import resample_means
from simulations import Simulation
from simulations.layers import rows_of

Curve = Callable[[int, np.random.Generator], np.ndarray]  # layers, generator -> [layers]
MEASURES = ("kurtosis", "outlier ratio", "relative error", *RULED, "reasoning focus", "depth")


def alike_neighbours(phi: float) -> Curve:
    """Each layer is like the one before it: lag-1 autocorrelation `phi`."""

    def draw(layers: int, rng: np.random.Generator) -> np.ndarray:
        values = rng.standard_normal(layers)
        for layer in range(1, layers):
            values[layer] = phi * values[layer - 1] + np.sqrt(1 - phi**2) * values[layer]
        return values

    return draw


def trend(layers: int, rng: np.random.Generator) -> np.ndarray:
    """Rises or falls over depth, beside neighbours that are a little alike."""
    return rng.choice([-2.0, 2.0]) * np.linspace(-1, 1, layers) + alike_neighbours(0.3)(layers, rng)


def smooth(layers: int, rng: np.random.Generator) -> np.ndarray:
    """A slow curve of a few waves, with little else."""
    depth = (np.arange(layers) + 0.5) / layers
    return (
        np.sum([rng.standard_normal() / k * np.cos(np.pi * k * depth) for k in (1, 2, 3)], axis=0)
        + alike_neighbours(0.2)(layers, rng) / 3
    )


def sentences(curve: Curve, layers: int, seed: int) -> list[Finding]:
    """All that is said about measures in a world where none has to do with damage."""
    rng = np.random.default_rng(seed)
    rows = rows_of(np.exp(0.5 * curve(layers, rng)), 24, seed, noise=0.2)
    whole = np.column_stack([rows.values, rows.low - rows.high])  # [rows, layers + 1]
    mean, resampled = whole.mean(axis=0), resample_means(whole, 200)  # fewer than in a survey: only signs of intervals count
    shares = Shares(rows, mean[:-1], resampled[:, :-1], float(mean[-1]), resampled[:, -1])
    measures = {name: curve(layers, rng) for name in MEASURES[:-1]} | {"depth": np.arange(layers, dtype=float)}
    correlated = layer_correlations(measures, shares)
    return [*marking_rules(correlated, shares), *measure_findings(correlated, RULED)]


def _said(curve: Curve, layers: int, claim: str) -> Callable[[int], bool]:
    return lambda seed: any(finding.verdict == HOLDS for finding in sentences(curve, layers, seed) if claim in finding.claim)


def _any(curve: Curve, layers: int) -> Callable[[int], bool]:
    return lambda seed: any(finding.verdict in (HOLDS, FAILS) for finding in sentences(curve, layers, seed))


# --- weights near 0 ----------------------------------------------------------------------------------------------------


def _gaussian_layers(seed: int) -> list[WeightProfile]:
    generator = torch.Generator().manual_seed(seed)
    modules = [Module(f"m{layer}", layer, "m", (64, 256), f"m{layer}") for layer in range(8)]
    return [weight_profile(module, torch.randn(module.shape, generator=generator), {}) for module in modules]


def _sparse_rule(seed: int) -> bool:
    profiles = _gaussian_layers(seed)
    shares: Shares = shares_of(rows_of(np.ones(8), 32, seed))
    measures = {"sparsity": np.array([profile.sparsity for profile in profiles])}
    correlated = layer_correlations(measures, shares, untested_sparsity(sparsity_of(profiles, 8)))
    return any(finding.verdict in (HOLDS, FAILS) for finding in marking_rules(correlated, shares))


def _sparse_claim(times: float, verdict: str) -> Callable[[int], bool]:
    """Of two million weights `times` a Gaussian's share are near 0: is `verdict` said?"""

    def wrong(seed: int) -> bool:
        weights, share = 250_000, times * gaussian_share(0.01)
        counts = np.random.default_rng(seed).binomial(weights, share, 8) / weights
        profiles = [
            WeightProfile(f"m{i}", i, "m", weights, 1.0, c, {"0.01": c}, 0.0, 5.0, 0.0, {}) for i, c in enumerate(counts.tolist())
        ]
        return sparsity_findings(sparsity_of(profiles, 8))[0].verdict == verdict

    return wrong


SIMULATIONS = [
    Simulation(SHARP, "unrelated, neighbours alike (0.5), 16 layers", _said(alike_neighbours(0.5), 16, SHARP)),
    Simulation(SPECIAL, "unrelated, both with trends, 16 layers", _said(trend, 16, SPECIAL)),
    Simulation(SPARSE, "unrelated, slow curves, 24 layers", _said(smooth, 24, SPARSE)),
    Simulation("weight statistics tell where the damage is", "unrelated, neighbours alike (0.6), 12 layers", _said(alike_neighbours(0.6), 12, "weight statistics")),
    Simulation("weight statistics tell where the damage is", "unrelated, all with trends, 32 layers", _said(trend, 32, "weight statistics")),
    Simulation("attention tells where the damage is", "unrelated, neighbours alike (0.2), 8 layers", _said(alike_neighbours(0.2), 8, "attention tells")),
    Simulation("any rule that a measure marks layers", "unrelated, neighbours alike (0.5), 16 layers", _any(alike_neighbours(0.5), 16)),
    Simulation("any rule that a measure marks layers", "unrelated, all with trends, 30 layers", _any(trend, 30)),
    Simulation("any rule that a measure marks layers", "unrelated, slow curves, 12 layers", _any(smooth, 12)),
    Simulation(SPARSE, "Gaussian weights, equal layers: said or denied", _sparse_rule),
    Simulation(SPARSITY_CLAIM, "10 % more weights near 0, too few for the word", _sparse_claim(1.1, HOLDS)),
    Simulation("as many weights near 0 as a Gaussian has", "10 % more weights near 0", _sparse_claim(1.1, FAILS)),
]  # fmt: skip
