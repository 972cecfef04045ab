"""Planted truth for the tests of findings: quadratic games, flat ones, and profiles of layers."""

import numpy as np

from bitatlas.findings.shares import LayerRows, layer_records
from bitatlas.findings.zones import zones
from bitatlas.records import AttentionLayer, Measured, WeightProfile, Zone

HIGH, LOW = "int4_g64", "int2_g64"


def quadratic_rows(
    first: np.ndarray, pairs: np.ndarray, rows: int, seed: int = 0, noise: float = 0.3, weights: np.ndarray | None = None
) -> LayerRows:
    """Damage v(S) = v(none) + sum a_i + sum q_ij on every row, its parts noisy by row and scaled by how hard the row is.

    first: a, [layers]; pairs: q, [layers, layers], symmetric with zero diagonal.
    """
    rng = np.random.default_rng(seed)
    layers = len(first)
    hardness = rng.lognormal(-0.125, 0.5, rows)  # mean 1
    a = first * (1 + noise * rng.standard_normal((rows, layers))) * hardness[:, None]
    high = 0.05 * hardness
    low = high + a.sum(axis=1) + pairs.sum() / 2 * hardness
    last_in = a + pairs.sum(axis=1) * hardness[:, None]
    weights = np.full(layers, 1000) if weights is None else weights
    return LayerRows(high, low, high + a.T, low - last_in.T, weights, HIGH, LOW)


def interactions(layers: int, size: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed).normal(size, size, (layers, layers))
    pairs = (draw + draw.T) / 2
    np.fill_diagonal(pairs, 0)
    return pairs


def flat(layers: int, rows: int, seed: int) -> LayerRows:
    """Every layer equally critical."""
    pairs = np.full((layers, layers), 0.002)
    np.fill_diagonal(pairs, 0)
    return quadratic_rows(np.full(layers, 0.02), pairs, rows, seed)


def zones_of(rows: LayerRows, tolerance: float, together: set[int] | None = None) -> list[Zone]:
    """Zones with the layers' verdicts at a tolerance; without `together` all layers are safe together."""
    return zones(rows, layer_records(rows, tolerance), range(rows.layers) if together is None else together)


def profiles(layers: int, sparsity: np.ndarray) -> list[WeightProfile]:
    return [
        WeightProfile(f"m{layer}{kind}", layer, kind, size, 1.0, share, {}, 0.1 * layer, 5.0, 0.0, {LOW: 0.1 + 0.01 * layer})
        for layer in range(layers)
        for kind, size, share in (("a", 100, sparsity[layer]), ("b", 300, 0.0))
    ]


def attention_of(layers: int, base: str = "reference") -> list[AttentionLayer]:
    def m(value: float, unit: str = "0..1") -> Measured:
        return Measured(value, (value * 0.9, value * 1.1), unit, base, "fit", 20)

    drifted = (
        {} if base == "reference" else {"drift_cumulative": m(0.3 if base == f"uniform:{LOW}" else 0.1), "drift_noise": m(0.01)}
    )
    return [
        AttentionLayer(
            layer, base, m(0.3 + 0.02 * layer), m(1.0, "nats"), m(0.2), m(25.0, "%"), {}, {}, m(10.0 + layer, "%"), "", **drifted
        )
        for layer in range(layers)
    ]
