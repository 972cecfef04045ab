"""Sentences are rarely said where they are false: every simulation of `benchmarks/simulations`, in a few worlds each.

`make bench` counts hundreds of worlds and writes the table of `docs/words.md`; here a rate far above its promise is found.
"""

from __future__ import annotations

import time

import pytest
from scipy import stats

from simulations import Simulation, rate_of
from statements import all_simulations, table

SECONDS = 0.3  # of the processor a simulation
FEWEST, MOST = 12, 100  # worlds
FAR = 1e-4  # a rate that keeps its promise is called too high so rarely


@pytest.mark.parametrize("simulation", [one for _, _, one in all_simulations()], ids=lambda one: f"{one.sentence} | {one.truth}")
def test_a_sentence_is_rarely_wrong(simulation: Simulation) -> None:
    started = time.process_time()
    first = simulation.wrong(0)
    each = max(time.process_time() - started, 1e-4)  # the first call pays for what is kept, so the count errs towards few
    runs = int(min(MOST, max(FEWEST, SECONDS / each)))
    rate = rate_of(simulation, runs - 1, first_seed=1)
    most = stats.binom.isf(FAR, runs, simulation.nominal)
    assert first + rate.wrong <= most, f"{first + rate.wrong} of {runs} worlds, at most {most} where the promise is kept"


def test_a_rate_above_its_promise_is_seen() -> None:
    often = rate_of(Simulation("s", "t", lambda seed: seed % 10 == 0), 500)
    assert (often.wrong, often.rate, often.kept) == (50, 0.1, False)
    seldom = rate_of(Simulation("s", "t", lambda seed: seed % 20 == 0), 500)
    assert seldom.kept
    assert "| s | t | 5.0 % of 500 | 5 % |" in table([(Simulation("s", "t", lambda seed: False), seldom)])
