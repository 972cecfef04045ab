"""Words on task scores: above, at and below chance, falls, no loss."""

from __future__ import annotations

import numpy as np

from bitatlas.stats.paired import compare_all
from simulations import Simulation

ITEMS, CHANCE = 200, 0.25
PRECISIONS = ("reference", "uniform:int4_g64", "uniform:int2_g64", "plan")


def verdicts(shares: tuple[float, ...], flips: float, seed: int) -> list[str]:
    """Verdicts of one task's pairs with the reference, and words of its scores. shares: right at each precision; `flips`: of the items, drawn anew."""
    rng = np.random.default_rng(seed)
    hard = rng.random(ITEMS)
    right = {
        name: np.where(rng.random(ITEMS) < flips, rng.random(ITEMS), hard) < share
        for name, share in zip(PRECISIONS, shares, strict=True)
    }
    scores, pairs = compare_all({"t": right}, {"t": CHANCE})
    words = ["above chance" for score in scores if score.above_chance] + [
        "below chance" for score in scores if score.below_chance
    ]
    return [pair.verdict for pair in pairs if pair.first == "reference"] + words


def says(shares: tuple[float, ...], flips: float, word: str, seed: int) -> bool:
    return any(verdict.startswith(word) for verdict in verdicts(shares, flips, seed))


SIMULATIONS = [
    Simulation("… is above chance", "four precisions that guess", lambda seed: says((CHANCE,) * 4, 0.5, "above chance", seed)),
    Simulation("below chance", "four precisions that guess", lambda seed: says((CHANCE,) * 4, 0.5, "below chance", seed)),
    Simulation("falls", "four precisions that are equally good", lambda seed: says((0.7,) * 4, 0.3, "falls", seed)),
    Simulation(
        "no loss within 2 points",
        "every precision loses 2 points",
        lambda seed: says((0.9, 0.88, 0.88, 0.88), 0.02, "no loss", seed),
    ),
]
