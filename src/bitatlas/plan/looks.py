"""Compare a plan with its rivals on as few test rows as decide it: all of them on a few rows, those that are still open on more.

Looks: 8 rows, a third of them, all; in a seeded order that takes one row of every block before a second of any, since rows stand in the order
of their text. A rival stops where its paired difference, plan minus rival, is decided, and of the random plans that are still open the three
of least damage alone go on to all rows. Rivals that are measured on all rows whatever they do (uniform widths: people read their numbers) have one look.

A word may be said at any look, so each look has its own share of the error rate (Bonferroni; repeated confidence intervals): an early one
a twenty-fifth, the last all the rest. A rival that is no worse than the plan is so said to be beaten in at most 2.5 % of cases, and a
difference's interval, at the level of the look at which it stopped, holds at all looks at once.
Intervals of differences are t-intervals of a mean over blocks: where few rows are looked at a percentile interval is too short, and far out
in its tails no resample is left. They keep the rate for heavy tails that are alike on both sides. Where the plan alone does rare but great
damage they do not, as no interval of few rows does; the small share of early looks keeps that error near what all rows have (docs/method.md).
Stopping for "worse" takes the level that is corrected for the number of rivals, because the word does.

Sources: Jennison & Turnbull 1989 (repeated confidence intervals); Wald 1943 (sequential sampling); Bonferroni.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.plan.baselines import RANDOM
from bitatlas.records import Measured
from bitatlas.stats.bootstrap import Blocks, Floats, block_count, measured, t_interval

UNIT = "nats/token"
PLAN = "plan"
LEVEL = 0.05
FIRST_ROWS = 8  # of the first look; later ones are multiples of it, as measured batches are
EARLY_SHARE = 0.04  # of the error rate, that each look before the last may spend
RANDOM_TO_ALL = 3  # random plans that go on to all rows

MeasureSome = Callable[[Sequence[str], list[int]], Mapping[str, ArrayLike]]  # (names, indices of test rows) -> damage [indices]


class Comparison(NamedTuple):
    """One baseline beside the plan."""

    name: str
    damage: Measured
    difference: Measured  # plan minus baseline, on the rows that the baseline was measured on
    worse: bool  # the plan is, at a level that is corrected for the number of baselines
    same: bool  # the baseline happens to be the plan

    @property
    def relation(self) -> str:
        return relation(self.difference)


def relation(difference: Measured) -> str:
    """Return "beats", "ties with" (the interval holds 0, or there is none) or "loses to", for plan minus baseline."""
    if difference.ci95 is None or difference.ci95[0] <= 0 <= difference.ci95[1]:
        return "ties with"
    return "beats" if difference.mean < 0 else "loses to"


def compare_on_all(plan: ArrayLike, others: Mapping[str, ArrayLike], seed: int = 0, blocks: Blocks = None) -> list[Comparison]:
    """Compare rivals that were measured on all test rows at once. plan: [rows]; others: name -> [rows], nats/token; blocks: [rows]."""
    return compare_in_looks(plan, others, (), lambda names, rows: {}, seed, blocks)


def compare_in_looks(
    plan: ArrayLike,
    whole: Mapping[str, ArrayLike],
    names: Sequence[str],
    measure: MeasureSome,
    seed: int = 0,
    blocks: Blocks = None,
) -> list[Comparison]:
    """Compare the rivals `whole`, on all test rows, and then `names`, which are measured as far as it takes to decide them.

    plan: damage on all test rows [rows], nats/token; whole: name -> [rows]; blocks: [rows]. `measure` is asked for rows that the names
    were not measured on before.
    """
    rows = np.asarray(plan, dtype=np.float64)
    same = sum(np.array_equal(values, rows) for values in whole.values())
    comparing = _Comparing(rows, seed, blocks, max(1, len(whole) + len(names) - same))
    every = list(range(len(rows)))
    compared = {
        name: comparing.compare(name, np.asarray(values, dtype=np.float64), every, LEVEL) for name, values in whole.items()
    }
    damage = {name: np.zeros(len(rows)) for name in names}
    order, looks, start = look_order(len(rows), blocks, seed), look_sizes(len(rows)), 0
    still_open = list(names)
    for stop, rate in zip(looks, error_rates(len(looks)), strict=True):
        new, so_far = sorted(order[start:stop]), sorted(order[:stop])
        for name, values in (measure(still_open, new) if still_open else {}).items():
            damage[name][new] = values
        for name in still_open:
            compared[name] = comparing.compare(name, damage[name][so_far], so_far, rate)
        still_open, start = _still_open([compared[name] for name in still_open], before_last=stop == looks[-2:][0]), stop
    return [compared[name] for name in (*whole, *names)]


def look_sizes(rows: int) -> list[int]:
    """Return how many of the test rows each look has: 8, a third (in eights) and all of them, none more than half of all but the last."""
    third = FIRST_ROWS * -(-rows // (3 * FIRST_ROWS))
    return [*sorted({size for size in (FIRST_ROWS, third) if 2 * size <= rows}), rows]


def error_rates(looks: int) -> list[float]:
    """Return the two-sided error rate of each look; their sum is `LEVEL`."""
    early = [EARLY_SHARE * LEVEL] * (looks - 1)
    return [*early, LEVEL - sum(early)]


def look_order(rows: int, blocks: Blocks, seed: int) -> list[int]:
    """Return the test rows in the order in which looks take them: at random, but one of every block before a second of any."""
    drawn = np.random.default_rng(seed).permutation(rows).tolist()
    seen: dict[int, int] = {}  # block -> rows of it so far
    turn = {}
    for row in drawn:
        block = row if blocks is None else blocks[row]
        turn[row] = seen[block] = seen.get(block, 0) + 1
    return sorted(drawn, key=turn.__getitem__)


def _still_open(compared: Sequence[Comparison], before_last: bool) -> list[str]:
    """Return the undecided. Before the last look, of the random plans those that did least damage alone, so far as more are open."""
    undecided = [rival for rival in compared if rival.relation != "beats" and not rival.worse]
    random = sorted((rival for rival in undecided if rival.name.startswith(RANDOM)), key=lambda rival: rival.damage.mean)
    dropped = random[RANDOM_TO_ALL:] if before_last else []
    return [rival.name for rival in undecided if rival not in dropped]


class _Comparing(NamedTuple):
    """The plan's damage on all test rows [rows], and what its comparisons share."""

    plan: Floats
    seed: int
    blocks: Blocks
    rivals: int  # how many there are

    def compare(self, name: str, values: Floats, rows: Sequence[int], rate: float) -> Comparison:
        """Compare with a rival's damage on some test rows. values: [rows]; rate: two-sided error rate of the difference's interval."""
        blocks = None if self.blocks is None else [self.blocks[row] for row in rows]
        difference = self.plan[list(rows)] - values
        low, high = t_interval(difference, 1 - rate, blocks)
        corrected, _ = t_interval(difference, 1 - rate / self.rivals, blocks)
        mean = float(difference[0] + (difference - difference[0]).mean())
        ends = (float(low), float(high)) if np.isfinite(low) else None
        return Comparison(
            name,
            measured(values, UNIT, name, "test", self.seed, blocks),
            Measured(mean, ends, UNIT, PLAN, "test", len(rows), block_count(blocks)),
            bool(corrected > 0),
            len(rows) == len(self.plan) and not difference.any(),
        )
