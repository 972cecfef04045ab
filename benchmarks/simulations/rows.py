"""Rows of one text depend on each other: do intervals over them cover? With the package's own way of dealing rows out and its own blocks."""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

from bitatlas.data.rows import deal
from bitatlas.stats.bootstrap import measured
from simulations import Simulation

COUNTS = (24, 24, 64)  # fit, select and test rows
ROW = 192  # tokens
AUTOCORRELATION = 0.5  # of neighbouring rows
COVERS = "mean over rows [95 % interval]"


def misses(values: np.ndarray, document: np.ndarray, truth: float, seed: int) -> bool:
    """Deal the rows out, and look whether the interval over the test rows misses the truth. values, document: [rows]."""
    dealt = deal(document, ROW, COUNTS, seed)
    assert dealt is not None
    test, blocks = dealt.rows[2], dealt.blocks[2].tolist()
    record = measured(values[test], "nats/token", "reference", "test", seed, blocks)
    return record.ci95 is None or not record.ci95[0] <= truth <= record.ci95[1]


def long_text(rows: int, seed: int) -> bool:
    """One document whose neighbouring rows are alike; the truth is the mean of what would be written on."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(rows)
    noise[0] /= np.sqrt(1 - AUTOCORRELATION**2)
    values = 1 + 0.3 * lfilter([1.0], [1.0, -AUTOCORRELATION], noise)
    return misses(values, np.zeros(rows, dtype=np.int64), 1.0, seed)


def documents(sizes: np.ndarray, seed: int) -> bool:
    """Documents that differ; a row varies as much within its document as documents do. The truth is the mean over all such documents."""
    rng = np.random.default_rng(seed)
    document = np.repeat(np.arange(len(sizes)), sizes)
    values = 1 + 0.3 * (rng.standard_normal(len(sizes))[document] + rng.standard_normal(len(document)))
    return misses(values, document, 1.0, seed)


SIMULATIONS = [
    Simulation(COVERS, "one long text, neighbouring rows correlated by 0.5", lambda seed: long_text(1200, seed), 0.07),
    Simulation(COVERS, "a text just long enough, the same", lambda seed: long_text(200, seed), 0.07),
    Simulation(COVERS, "40 documents of 6 rows that differ", lambda seed: documents(np.full(40, 6), seed), 0.07),
    Simulation(
        COVERS,
        "documents of 1 to 12 rows that differ",
        lambda seed: documents(np.random.default_rng(seed).integers(1, 13, 60), seed),
        0.07,
    ),
]
