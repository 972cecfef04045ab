"""Simulations of known truth: how often does a sentence say what is not so?

Each module here holds `SIMULATIONS`, one entry a sentence (or interval) of the report: a world in which the sentence is false, or the
value that its interval should cover, and a function of a seed that draws such a world, runs the package's own code on it and says
whether the sentence was printed (or the interval missed). `benchmarks/statements.py` counts them and writes the table of `docs/words.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Simulation:
    """`wrong(seed)`: in the world drawn with `seed`, is the sentence printed although it is false (or the true value outside its interval)?"""

    sentence: str  # the claim, as the report prints it
    truth: str  # what the simulated world is like, in a few words
    wrong: Callable[[int], bool]
    nominal: float = 0.05  # share of wrong calls that is promised at most


@dataclass(frozen=True)
class Rate:
    """How often a simulation went wrong."""

    wrong: int
    runs: int
    nominal: float

    @property
    def rate(self) -> float:
        return self.wrong / self.runs

    @property
    def limit(self) -> float:
        """The promised rate and two standard errors of a rate that is just that."""
        return self.nominal + 2 * math.sqrt(self.nominal * (1 - self.nominal) / self.runs)

    @property
    def kept(self) -> bool:
        return self.rate <= self.limit


def rate_of(simulation: Simulation, runs: int, first_seed: int = 0) -> Rate:
    """Return how often `simulation` goes wrong in worlds `first_seed`, `first_seed + 1`, ..."""
    return Rate(sum(simulation.wrong(first_seed + run) for run in range(runs)), runs, simulation.nominal)
