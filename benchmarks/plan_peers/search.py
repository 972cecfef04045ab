"""Swap search on true KL for a stated number of seconds: about the best plan that these formats have, and no method anybody would run.

From the best plan that any method found, the first single change or exchange of two units (one raised, one lowered) that lowers the damage on
the fit rows is taken, and so on, until a whole round finds none or the time is over. Results depend on the machine's
speed where time ends it; the number of plans measured is kept beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Damage = Callable[[Ints], float]


@dataclass(frozen=True)
class Found:
    choice: Ints  # [units], 0 or 1
    damage: float  # nats/token, on the rows that were searched
    measured: int  # plans
    finished: bool  # a whole round found nothing better


def swap_search(start: Ints, extra: Ints, room: int, damage: Damage, seconds: float, seed: int = 0) -> Found:
    """First improvement over single and pair swaps. start: [units] of 0 and 1; extra: [units], bits of raising; room: bits above all low.

    Never above `room`. ValueError where the start is.
    """
    choice = start.copy()
    if int(extra[choice == 1].sum()) > room:
        raise ValueError("the search starts above the budget")
    end = time.monotonic() + seconds
    generator = np.random.default_rng(seed)
    best, measured, known = damage(choice), 1, {choice.tobytes()}
    while True:
        for candidate in neighbours(choice, extra, room, generator):
            if candidate.tobytes() in known:
                continue
            if time.monotonic() >= end:
                return Found(choice, best, measured, False)
            known.add(candidate.tobytes())
            value = damage(candidate)
            measured += 1
            if value < best:
                choice, best = candidate, value
                break
        else:
            return Found(choice, best, measured, True)


def neighbours(choice: Ints, extra: Ints, room: int, generator: np.random.Generator) -> Iterator[Ints]:
    """Every plan within `room` that one unit's change or an exchange of two reaches, in random order."""
    slack = room - int(extra[choice == 1].sum())
    low, high = np.flatnonzero(choice == 0).tolist(), np.flatnonzero(choice == 1).tolist()
    moves = [(up, -1) for up in low if extra[up] <= slack] + [(-1, down) for down in high]
    moves += [(up, down) for up in low for down in high if extra[up] - extra[down] <= slack]
    for index in generator.permutation(len(moves)):
        up, down = moves[index]
        candidate = choice.copy()
        if up >= 0:
            candidate[up] = 1
        if down >= 0:
            candidate[down] = 0
        yield candidate
