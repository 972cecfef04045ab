"""Is the plan worth having? Against every baseline of at most its size, on the same test rows.

The plan is refused when any baseline has the lower mean: uniform, first or last layers high, or the best one of the random
plans. That is strict on purpose (the best of 20 has luck on its side) and asks nothing of intervals; they say how sure each
comparison is. Rows are paired: both models read the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.evaluation.bootstrap import measured
from bitatlas.records import Measured
from bitatlas.words import interval, listed, number

UNIT = "nats/token"
PLAN = "plan"
RANDOM = "random"  # baselines whose names start so are told together


class PlanVerdict(NamedTuple):
    """`baselines`: (name, damage, plan minus baseline), in the given order. `winner`: "plan", or the baseline of least damage."""

    baselines: list[tuple[str, Measured, Measured]]
    recommended: bool
    winner: str
    text: str


def verdict_on_plan(plan: ArrayLike, others: Mapping[str, ArrayLike], split: str = "test", seed: int = 0) -> PlanVerdict:
    """plan: [rows] damage in nats/token; others: name -> [rows] of the same rows.

    Equal means count for the plan: a baseline that happens to be the same plan does not beat it.
    """
    own = np.asarray(plan, dtype=np.float64)
    rows = {name: np.asarray(values, dtype=np.float64) for name, values in others.items()}
    compared = [
        (name, measured(values, UNIT, name, split, seed), measured(own - values, UNIT, PLAN, split, seed))
        for name, values in rows.items()
    ]
    least = min(compared, key=lambda one: one[1].mean, default=None)
    better = least is not None and least[2].mean > 0
    winner = least[0] if better and least is not None else PLAN
    damage = measured(own, UNIT, PLAN, split, seed)
    return PlanVerdict(compared, not better, winner, _text(damage, compared, winner))


def relation(difference: Measured) -> str:
    """ "beats", "ties with" (the interval holds 0, or there is none) or "loses to", for plan minus baseline."""
    if difference.ci95 is None or difference.ci95[0] <= 0 <= difference.ci95[1]:
        return "ties with"
    return "beats" if difference.mean < 0 else "loses to"


def _text(damage: Measured, compared: list[tuple[str, Measured, Measured]], winner: str) -> str:
    rows = f"{damage.n} {damage.rows} rows"
    if winner != PLAN:
        name, own, difference = next(one for one in compared if one[0] == winner)
        sure = "" if relation(difference) == "loses to" else ", though the interval holds 0"
        return (
            f"{name}, no larger, does less damage on {rows}: {number(own.mean)} against {number(damage.mean)} {UNIT} "
            f"(plan minus {name}: {interval(difference)}{sure})"
        )
    if not compared:
        return f"{interval(damage, unit=True)} on {rows}; compared with nothing"
    said = []
    for word in ("beats", "ties with"):
        names = [
            f"{name} ({number(own.mean)})"
            for name, own, difference in compared
            if relation(difference) == word and not _is_random(name)
        ]
        said += [f"{word} {listed(names)}"] if names else []
    random = [(own, difference) for name, own, difference in compared if _is_random(name)]
    if random:
        beaten = sum(relation(difference) == "beats" for _, difference in random)
        least = min(own.mean for own, _ in random)
        said.append(f"beats {beaten} of {len(random)} random plans (the best of them {number(least)})")
    return f"{interval(damage, unit=True)} on {rows}; {'; '.join(said)}"


def _is_random(name: str) -> bool:
    return name.startswith(RANDOM)
