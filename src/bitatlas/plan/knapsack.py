"""Choose one format per unit: the multiple-choice knapsack, solved to a proven optimum in whole numbers.

Why not a general solver: `scipy.optimize.milp` (HiGHS) compares with absolute tolerances of 1e-6. On random instances of 8 units
and 3 formats with damages from 1e-7 to 10 it missed the optimum in 61 of 300 (all right once scaled by hand), on closely tied
ones it overran the budget and took over a minute. Here damages and costs are integers (damages to one part in about 2**60 of their sum),
so a sum is either within the limit or not, and ties are ties.

How: the Lagrangian relaxation gives a lower bound for every partial plan, and rounding it gives a first plan. Then a dynamic
programme over the units keeps the partial plans (states) that no other one dominates and whose bound is not above the best
known plan. When no state had to be dropped for room, the best is the optimum. Otherwise the smallest bound among the dropped
ones is a lower bound all the same: the gap is reported, never assumed.

Ties: of the plans of least damage the one of least cost; of those the first in lexicographic order of `choice`, that is the
narrower format (lower column) for the earlier unit.

Left out: interactions between units and trust regions (`plan.refine`).
Sources: Kellerer, Pferschy & Pisinger, Knapsack Problems (2004), chapter 11; Dudzinski & Walukiewicz 1987 (bounds and dominance).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitatlas.errors import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

WIDTHS = (64, 2048, 32768)  # states kept per unit: the narrow passes are only there to find a good plan quickly
STATES_IN_ALL = 3_000_000  # units x states of one pass: bounds its time (seconds) and its memory (12 MB)
DAMAGE_BITS = 60  # sums of the integer damages stay below 2**60
ROUND_OFF = 1e-12  # of the magnitudes in a bound: many times the float error, so that nothing is dropped by rounding


@dataclass(frozen=True)
class KnapsackSolution:
    """`value` is what was made small; no assignment is below `bound`; `gap` = value - bound, 0.0 where the optimum is proven."""

    choice: Ints  # [units], column of the format
    value: float
    bound: float
    gap: float


@dataclass(frozen=True)
class _Problem:
    """Least sum of `value` with the sum of `weight` at most `limit`. Both are at least 0, with 0 in every row."""

    value: Ints  # [units, formats]
    weight: Ints  # [units, formats]
    limit: int


def solve_knapsack(damage: NDArray, cost: NDArray, limit: int) -> KnapsackSolution:
    """Return the assignment of least total damage whose cost is at most `limit`, never above it by one.

    damage: [units, formats], finite, may be negative, any unit (nats/token); cost: [units, formats], whole numbers.
    Raises UserError where nothing is that small, ValueError for wrong shapes or numbers that are not finite.
    """
    damage, cost = _checked(damage, cost)
    least = int(cost.min(axis=1).sum())
    if least > limit:
        raise UserError(f"the budget of {limit} is below {least}, the least that these formats give")
    whole, shift = _whole(damage)
    problem = _Problem(whole - whole.min(axis=1, keepdims=True), cost - cost.min(axis=1, keepdims=True), limit - least)
    choice, bound = _solve(problem)
    value = math.fsum(_picked(damage, choice))
    if bound is None:
        return KnapsackSolution(choice, value, value, 0.0)
    lowest = min(value, math.ldexp(bound + int(whole.min(axis=1).sum()), -shift))
    return KnapsackSolution(choice, value, lowest, value - lowest)


def total_cost(cost: NDArray, choice: Ints | Sequence[int]) -> int:
    """Return what a choice costs in all. cost: [units, formats], choice: [units]."""
    return int(_picked(cost, choice).sum())


# --- whole numbers -----------------------------------------------------------------------------------------------------


def _checked(damage: NDArray, cost: NDArray) -> tuple[Floats, Ints]:
    damage, cost = np.asarray(damage, dtype=np.float64), np.asarray(cost)
    if damage.ndim != 2 or damage.shape != cost.shape or damage.shape[0] == 0 or damage.shape[1] == 0:
        raise ValueError(f"damage and cost: the same shape [units, formats], got {damage.shape} and {cost.shape}")
    if not np.issubdtype(cost.dtype, np.integer):
        raise ValueError("cost: whole numbers")
    if not np.isfinite(damage).all():
        raise ValueError("damage: all must be finite")
    if np.abs(cost).max(axis=1).astype(object).sum() >= 2**DAMAGE_BITS:
        raise ValueError(f"cost: sums must stay below 2**{DAMAGE_BITS}")
    return damage, cost.astype(np.int64)


def _whole(damage: Floats) -> tuple[Ints, int]:
    """Return damage times 2**shift, rounded: the finest power of two at which no sum overflows. A power of two changes no digit."""
    largest = float(np.abs(damage).max(axis=1).sum())
    shift = DAMAGE_BITS - 1 - math.frexp(largest)[1] if largest > 0 else 0
    return np.rint(np.ldexp(damage, shift)).astype(np.int64), shift


def _picked(table: NDArray, choice: Ints | Sequence[int]) -> NDArray:
    return table[np.arange(len(table)), choice]  # [units]


# --- the search --------------------------------------------------------------------------------------------------------


def _solve(problem: _Problem) -> tuple[Ints, float | None]:
    """Return (choice [units], lower bound on the value; None: the choice is proven optimal)."""
    best = _least_each(problem.value, problem.weight)
    if total_cost(problem.weight, best) <= problem.limit:
        return best, None
    price, low, high = _multiplier(problem)
    best = _rounded(problem, low, high)
    bound = 0.0
    for width in WIDTHS:
        known = total_cost(problem.value, best)
        width = max(WIDTHS[1], min(width, STATES_IN_ALL // len(best))) if width > WIDTHS[1] else width
        choice, dropped = _programme(problem, price, known, width)
        if choice is not None and total_cost(problem.value, choice) <= known:  # as good: first by the rule for ties
            best = choice
        if dropped is None:
            return best, None
        bound = dropped
    return best, bound


def _least_each(first: NDArray, second: NDArray) -> Ints:
    """Return per unit the column of least `first`, among equals of least `second`, among equals the lowest. [units]"""
    tied = first == first.min(axis=1, keepdims=True)
    worst = second.max(axis=1, keepdims=True) + 1
    return np.where(tied, second, worst).argmin(axis=1)


def _multiplier(problem: _Problem) -> tuple[float, Ints, Ints]:
    """Return the price of weight at which the relaxation is tightest, and the two plans on either side of the limit there.

    Secant steps on the lower hull of all (weight, value) sums: each step finds the plan lowest in the direction of the line
    through the present two, until there is none below it.
    """
    value, weight = problem.value, problem.weight
    fits, over = _least_each(weight, value), _least_each(value, weight)
    while True:
        value_low, weight_low = (total_cost(table, fits) for table in (value, weight))
        value_high, weight_high = (total_cost(table, over) for table in (value, weight))
        price = (value_low - value_high) / (weight_high - weight_low)
        between = (value + price * weight).argmin(axis=1)
        new_value, new_weight = (total_cost(table, between) for table in (value, weight))
        line = value_low + price * weight_low
        if new_value + price * new_weight >= line * (1 - ROUND_OFF) or not weight_low < new_weight < weight_high:
            return price, fits, over
        if new_weight <= problem.limit:
            fits = between
        else:
            over = between


def _rounded(problem: _Problem, fits: Ints, over: Ints) -> Ints:
    """Return a good plan: from `fits` towards `over`, largest steps first, then whatever still fits. [units]"""
    units = np.arange(len(fits))
    choice = fits.copy()
    slack = problem.limit - total_cost(problem.weight, choice)
    steps = problem.weight[units, over] - problem.weight[units, fits]
    for unit in np.argsort(-steps, kind="stable"):
        if problem.value[unit, over[unit]] < problem.value[unit, fits[unit]] and steps[unit] <= slack:
            choice[unit], slack = over[unit], slack - int(steps[unit])
    for unit in units:
        extra = problem.weight[unit] - problem.weight[unit, choice[unit]]
        column = np.where(extra <= slack, problem.value[unit], problem.value[unit].max() + 1).argmin()
        if problem.value[unit, column] < problem.value[unit, choice[unit]]:
            choice[unit], slack = column, slack - int(extra[column])
    return choice


def _programme(problem: _Problem, price: float, known: int, width: int) -> tuple[Ints | None, float | None]:
    """Make one pass over the units with at most `width` states.

    Returns (best choice [units], None where no state is left; least bound among the states dropped for room, None where none was). States are in order of weight, so their values fall.
    """
    formats = problem.value.shape[1]
    # what the units still to come add at least, relaxed: [units + 1]
    least = (problem.value + price * problem.weight).min(axis=1)
    ahead = np.append(np.cumsum(least[::-1])[::-1], 0.0) - price * problem.limit
    margin = ROUND_OFF * (known + price * problem.limit + float(least.sum()))
    value, weight, order = (np.zeros(1, dtype=np.int64) for _ in range(3))  # [states]; order: lexicographic rank
    history, dropped = [], None
    for unit in range(len(problem.value)):
        new_value = (value[:, None] + problem.value[unit]).ravel()  # [states * formats]
        new_weight = (weight[:, None] + problem.weight[unit]).ravel()
        new_order = (order[:, None] * formats + np.arange(formats)).ravel()
        bound = new_value + price * new_weight + ahead[unit + 1]
        keep = np.flatnonzero((new_weight <= problem.limit) & (bound <= known + margin))
        keep = _undominated(keep, new_weight, new_value, new_order)
        if len(keep) > width:
            keep, lowest = _for_room(keep, bound[keep], width)
            dropped = lowest if dropped is None else min(dropped, lowest)
        if not len(keep):
            return None, dropped
        value, weight, order = new_value[keep], new_weight[keep], np.argsort(np.argsort(new_order[keep]))
        history.append(keep.astype(np.int32))
    state, choice = len(value) - 1, np.zeros(len(history), dtype=np.int64)
    for unit in range(len(history) - 1, -1, -1):
        state, choice[unit] = divmod(int(history[unit][state]), formats)
    return choice, dropped


def _undominated(keep: Ints, weight: Ints, value: Ints, order: Ints) -> Ints:
    """Return the states (indices `keep`) that are not matched by a lighter and better one, by weight; of equal ones the first by `order`."""
    ranked = keep[np.lexsort((order[keep], value[keep], weight[keep]))]
    values = value[ranked]
    lowest = np.minimum.accumulate(values)
    return ranked[np.append(True, values[1:] < lowest[:-1])[: len(ranked)]]


def _for_room(keep: Ints, bound: Floats, width: int) -> tuple[Ints, float]:
    """Choose half the room for the least bounds, half spread over the weights: closely tied bounds must not crowd out either end."""
    chosen = np.zeros(len(keep), dtype=bool)
    chosen[np.argsort(bound, kind="stable")[: width // 2]] = True
    chosen[np.linspace(0, len(keep) - 1, width // 2).astype(np.int64)] = True
    return keep[chosen], float(bound[~chosen].min())
