"""Two files that do equally well, on documents of unequal length and difficulty: how often is one called better?"""

from __future__ import annotations

import numpy as np

from bitatlas.stats.ranking import compare_pairs, sign_flip_p
from simulations import Simulation


def _sums(seed: int, documents: int, files: int) -> dict[str, np.ndarray]:
    """Return summed divergences [documents] of files that are interchangeable, by name."""
    rng = np.random.default_rng(seed)
    shared = rng.lognormal(0, 0.8, documents) * rng.integers(60, 256, documents)
    return {str(name): shared * rng.lognormal(0, 0.3, documents) for name in range(files)}


def _two(documents: int) -> Simulation:
    def wrong(seed: int) -> bool:
        first, second = _sums(seed, documents, 2).values()
        return sign_flip_p(second - first, seed) < 0.05

    return Simulation("of two files, one does less damage", f"equal ones, {documents} documents", wrong)


def _any_of_eight(seed: int) -> bool:
    return any(adjusted < 0.05 for _, adjusted in compare_pairs(_sums(seed, 24, 8), seed).values())


SIMULATIONS = [
    _two(12),
    _two(64),
    Simulation("a file of eight has a better rank than another", "eight equal ones, 24 documents", _any_of_eight),
]
