"""Is the plan worth having? Against every baseline of at most its size, on the same test rows.

Three words. *Better*: the interval of the paired difference, plan minus baseline, lies below 0 for every baseline: uniform, first or last
layers high, each of the random plans. Each must be beaten, so the best of many needs no correction (an intersection-union test): a plan
that is no better than one of them is called better in at most 2.5 % of cases. *Worse*: for some baseline the interval lies above 0 at a
level that is corrected for their number. Else *no worse shown*: too close for so many rows. A plan is recommended where it is better, or,
where it is not worse, as the smallest of its equals. A baseline that happens to be the same plan is no rival.
Rows are paired: both models read the same ones.
Sources: intersection-union test: Berger 1982; Bonferroni.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.evaluation.bootstrap import Blocks, independent, measured, percentile_interval, resample_means
from bitatlas.records import Measured
from bitatlas.words import interval, listed, number, rows_of

UNIT = "nats/token"
PLAN = "plan"
RANDOM = "random"  # baselines whose names start so are told together
BETTER, NO_WORSE, WORSE = "better", "no worse shown", "worse"
LEVEL = 0.05
SMALLER = 0.01  # of an equal's bytes, that a plan saves at least to be recommended for its size

Compared = tuple[str, Measured, Measured]  # name, damage, plan minus baseline


class PlanVerdict(NamedTuple):
    """`baselines` in the given order. `standing`: one of the three words; `winner`: "plan", or the baseline of less and least damage."""

    baselines: list[Compared]
    standing: str
    recommended: bool
    winner: str
    text: str


def verdict_on_plan(
    plan: ArrayLike,
    others: Mapping[str, ArrayLike],
    split: str = "test",
    seed: int = 0,
    blocks: Blocks = None,
    sizes: Mapping[str, int] | None = None,
) -> PlanVerdict:
    """plan: [rows] damage in nats/token; others: name -> [rows] of the same rows; blocks: [rows]; sizes: bytes by name, "plan" among them."""
    ours = np.asarray(plan, dtype=np.float64)
    rows = {name: np.asarray(values, dtype=np.float64) for name, values in others.items()}
    compared = [
        (name, measured(values, UNIT, name, split, seed, blocks), measured(ours - values, UNIT, PLAN, split, seed, blocks))
        for name, values in rows.items()
    ]
    rivals = [one for one in compared if not np.array_equal(rows[one[0]], ours)]
    least = min(rivals, key=lambda one: one[1].mean, default=None)
    winner = least[0] if least is not None and least[2].mean > 0 else PLAN
    standing = _standing(ours, [rows[name] for name, *_ in rivals], rivals, seed, blocks)
    recommended = standing == BETTER or (standing == NO_WORSE and _smallest(rivals, sizes))
    damage = measured(ours, UNIT, PLAN, split, seed, blocks)
    text = _worse_text(damage, rivals, winner) if standing == WORSE else _text(damage, compared, rivals, standing, recommended)
    return PlanVerdict(compared, standing, recommended, winner, text)


def _standing(ours: np.ndarray, values: list[np.ndarray], rivals: list[Compared], seed: int, blocks: Blocks) -> str:
    if not rivals:
        return NO_WORSE
    if all(relation(difference) == "beats" for *_, difference in rivals):
        return BETTER
    resampled = resample_means(ours[:, None] - np.stack(values, axis=1), seed=seed, blocks=blocks)  # [resamples, rivals]
    low, _ = percentile_interval(resampled, independent(len(ours), blocks), 1 - LEVEL / len(rivals))
    return WORSE if (low > 0).any() else NO_WORSE


def _smallest(rivals: list[Compared], sizes: Mapping[str, int] | None) -> bool:
    """Whether the plan is smaller than every baseline that it is not shown to beat."""
    equals = [name for name, _, difference in rivals if relation(difference) != "beats"]
    return not equals or (sizes is not None and all(sizes[PLAN] <= (1 - SMALLER) * sizes[name] for name in equals))


def relation(difference: Measured) -> str:
    """ "beats", "ties with" (the interval holds 0, or there is none) or "loses to", for plan minus baseline."""
    if difference.ci95 is None or difference.ci95[0] <= 0 <= difference.ci95[1]:
        return "ties with"
    return "beats" if difference.mean < 0 else "loses to"


def _worse_text(damage: Measured, rivals: list[Compared], winner: str) -> str:
    losses = [one for one in rivals if relation(one[2]) == "loses to"] or rivals
    name, its, difference = next((one for one in losses if one[0] == winner), min(losses, key=lambda one: one[1].mean))
    return (
        f"{name}, no larger, does less damage on {rows_of(damage)}: {number(its.mean)} against {number(damage.mean)} {UNIT} "
        f"(plan minus {name}: {interval(difference)})"
    )


def _text(damage: Measured, compared: list[Compared], rivals: list[Compared], standing: str, recommended: bool) -> str:
    said = [f"{interval(damage, unit=True)} on {rows_of(damage)}"]
    equals = [one for one in rivals if relation(one[2]) != "beats"]
    if not compared:
        return f"{said[0]}; compared with nothing"
    if standing == BETTER:
        said.insert(0, f"{BETTER} than every plan of its size that was tried")
    elif equals:
        nearest = max(equals, key=lambda one: one[2].mean)
        more = f" and {len(equals) - 1} other{'s' if len(equals) > 2 else ''}" if len(equals) > 1 else ""
        said.insert(0, f"{NO_WORSE}, and no better, than {nearest[0]}{more} (plan minus {nearest[0]}: {interval(nearest[2])})")
    for word in ("beats", "ties with", "loses to"):
        names = [
            f"{name} ({number(its.mean)})"
            for name, its, difference in rivals
            if relation(difference) == word and not _is_random(name)
        ]
        said += [f"{word} {listed(names)}"] if names else []
    same = [name for name, *_ in compared if name not in {one[0] for one in rivals}]
    said += [f"the same plan as {listed(same)}"] if same else []
    random = [(its, difference) for name, its, difference in rivals if _is_random(name)]
    if random:
        beaten = sum(relation(difference) == "beats" for _, difference in random)
        least = min(its.mean for its, _ in random)
        said.append(f"beats {beaten} of {len(random)} random plans (the best of them {number(least)})")
    if standing == NO_WORSE and equals:
        said.append("recommended as the smallest of these" if recommended else "more rows (--rows) would tell")
    return "; ".join(said)


def _is_random(name: str) -> bool:
    return name.startswith(RANDOM)
