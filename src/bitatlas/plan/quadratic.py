"""One format per unit under a budget, with interactions: minimise first . z + z' Q z, at most `radius` units away from a centre.

The knapsack optimum of the diagonal is the start (`knapsack`, proven); then tabu search over single changes and pairs of changes, so
that room given up by one unit can be used by another in the same step. Every step takes the best allowed move, improving or not;
a unit that moved stays for a while. All moves are priced at once: with
field[u, f] = first + Q_ff + 2 sum_v Q[uf, v c_v], a change costs a difference of two entries, a pair adds one entry of Q.
Pairs are looked for among the changes that are most promising at the present price of cost.

The lower bound: for PSD Q the objective is convex, so its tangent at any point lies below it, and the tangent's least value over
the relaxed knapsack bounds every plan. The point comes from Frank-Wolfe steps. The bound ignores the trust
region, and stays valid: `gap` is the distance to the best of *all* plans.

Left out: an exact solver (branch and bound); on up to 12 units the tests compare with brute force.
Sources: Glover 1989 (tabu search); Frank & Wolfe 1956; CLADO (arXiv 2307.05657) solves the same problem as an integer QP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitatlas.errors import UserError
from bitatlas.plan.knapsack import Floats, Ints, solve_knapsack, total_cost

Move = tuple[float, list[tuple[int, int]]]  # damage added; (unit, its new format) once or twice

PAIRED = 100  # changes that are tried in pairs, at most: 100 x 100 pairs a step
STEPS = 400  # of one search, at most
PATIENCE = 60  # steps without a better plan
TENURE = 6  # steps a moved unit stays as it is, at least
RESTARTS = 8  # from a shaken best plan, on problems small enough to afford it
RESTART_SIZE = 4000  # units x formats x restarts
SHAKEN = 0.3  # of the units
BOUND_STEPS = 60
BISECTIONS = 60


@dataclass(frozen=True)
class Quadratic:
    """damage = first . z + z' matrix z, nats/token; z is one-hot by unit, flattened [units * formats]."""

    first: Floats  # [units, formats]
    matrix: Floats  # [units * formats, units * formats], symmetric, positive semidefinite

    def value(self, choice: Ints) -> float:
        """Return the predicted change of damage of a whole choice [units], nats/token."""
        units, formats = self.first.shape
        index = np.arange(units) * formats + choice
        return float(self.first.ravel()[index].sum() + self.matrix[np.ix_(index, index)].sum())


@dataclass(frozen=True)
class QuadraticSolution:
    """`value` is what was made small; no plan within the budget is below `bound`; gap = value - bound. nats/token"""

    choice: Ints  # [units]
    value: float
    bound: float
    gap: float


def solve_quadratic(
    problem: Quadratic,
    cost: NDArray,
    limit: int,
    centre: NDArray | None = None,
    radius: int | None = None,
    bounded: bool = True,
) -> QuadraticSolution:
    """Return the plan of least predicted damage within `limit`, and with `radius` at most that many units away from `centre`.

    cost: [units, formats], whole numbers. `centre` [units] must itself fit the budget. Deterministic; never above the limit by one.
    The bound is valid for a positive semidefinite matrix; without `bounded` it is -inf.
    Raises UserError where nothing is that small, ValueError for a centre that is not.
    """
    cost = np.asarray(cost, dtype=np.int64)
    units, formats = problem.first.shape
    linear = problem.first + np.diag(problem.matrix).reshape(units, formats)
    if centre is not None and total_cost(cost, centre) > limit:
        raise ValueError("centre: does not fit the budget")
    if int(cost.min(axis=1).sum()) > limit:
        raise UserError(f"the budget of {limit} is below {cost.min(axis=1).sum()}, the least that these formats give")
    starts = [solve_knapsack(linear, cost, limit).choice]
    if centre is not None:
        starts.append(np.asarray(centre, dtype=np.int64))
        if radius is not None:
            starts = [start for start in starts if (start != centre).sum() <= radius]
    search = _Search(problem, cost, limit, centre, radius)
    plans = [search.run(start) for start in starts]
    generator = np.random.default_rng(units)
    for _ in range(min(RESTARTS, RESTART_SIZE // (units * formats))):
        plans.append(search.run(search.shaken(min(plans, key=problem.value), generator)))
    choice = min(plans, key=lambda plan: (problem.value(plan), total_cost(cost, plan), tuple(plan)))
    value = problem.value(choice)
    bound = min(value, lower_bound(problem, cost, limit)) if bounded else -np.inf
    return QuadraticSolution(choice, value, bound, value - bound)


# --- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moves:
    """Single changes of a plan, flat [changes]: which unit goes to which format, what that adds to damage, cost and distance."""

    unit: Ints
    format: Ints
    damage: Floats
    cost: Ints
    distance: Ints


class _Search:
    """Tabu search from a plan; the same start gives the same end."""

    def __init__(self, problem: Quadratic, cost: Ints, limit: int, centre: NDArray | None, radius: int | None):
        self.problem, self.cost, self.limit = problem, cost, limit
        self.units, self.formats = problem.first.shape
        self.centre = np.full(self.units, -1) if centre is None or radius is None else np.asarray(centre)
        self.radius = self.units if radius is None else radius
        self.tenure = TENURE + min(self.units // 10, 10)

    def run(self, start: Ints) -> Ints:
        """Return the best plan on the way from `start`."""
        choice, best = start.copy(), start.copy()
        field = _field(self.problem, choice)
        value = lowest = self.problem.value(choice)
        free_at = np.zeros(self.units, dtype=np.int64)
        last = 0
        for step in range(1, STEPS + 1):
            move = self._best_move(choice, field, free_at <= step, lowest - value)
            if move is None or step - last > PATIENCE:
                break
            for unit, new in move[1]:
                self._shift(field, unit, int(choice[unit]), new)
                choice[unit] = new
                free_at[unit] = step + self.tenure
            value += move[0]
            if value < lowest - 1e-12 * max(1.0, abs(lowest)):
                best, lowest, last = choice.copy(), value, step
        return best

    def shaken(self, choice: Ints, generator: np.random.Generator) -> Ints:
        """Return `choice` with some units set to random formats, as far as budget and distance allow."""
        plan = choice.copy()
        for unit in generator.permutation(self.units)[: max(2, round(SHAKEN * self.units))].tolist():
            old, plan[unit] = plan[unit], generator.integers(self.formats)
            if self._distance(plan) > self.radius or total_cost(self.cost, plan) > self.limit:
                plan[unit] = old
        return plan

    def _distance(self, choice: Ints) -> int:
        return int((choice != self.centre).sum()) if (self.centre >= 0).all() else 0

    def _shift(self, field: Floats, unit: int, old: int, new: int) -> None:
        row = unit * self.formats
        field += 2 * (self.problem.matrix[row + new] - self.problem.matrix[row + old]).reshape(field.shape)

    def _best_move(self, choice: Ints, field: Floats, free: NDArray[np.bool_], aspired: float) -> Move | None:
        """Return the move that adds least; units that are not free only where the result is the best so far."""
        moves = _moves(self.problem, self.cost, choice, field, self.centre)
        slack = self.limit - total_cost(self.cost, choice)
        reach = self.radius - self._distance(choice)
        return min(self._offers(choice, moves, slack, reach, free, aspired), key=lambda move: move[0], default=None)

    def _offers(
        self, choice: Ints, moves: Moves, slack: int, reach: int, free: NDArray[np.bool_], aspired: float
    ) -> Iterator[Move]:
        """Yield the best single change and the best pair."""
        allowed = (moves.cost <= slack) & (moves.distance <= reach)
        allowed &= free[moves.unit] | (moves.damage < aspired - 1e-12)
        if allowed.any():
            best = int(np.where(allowed, moves.damage, np.inf).argmin())
            yield float(moves.damage[best]), [(int(moves.unit[best]), int(moves.format[best]))]
        index = promising(moves, slack)
        unit, damage, cost, distance = (part[index] for part in (moves.unit, moves.damage, moves.cost, moves.distance))
        added = np.add.outer(damage, damage) + _together(self.problem, choice, moves, index)
        fits = (np.add.outer(cost, cost) <= slack) & (np.add.outer(distance, distance) <= reach)
        fits &= np.not_equal.outer(unit, unit)
        fits &= np.logical_and.outer(free[unit], free[unit]) | (added < aspired - 1e-12)
        if fits.any():
            i, j = divmod(int(np.where(fits, added, np.inf).argmin()), len(index))
            yield float(added[i, j]), [(int(moves.unit[k]), int(moves.format[k])) for k in index[[i, j]]]


# --- moves -------------------------------------------------------------------------------------------------------------


def _field(problem: Quadratic, choice: Ints) -> Floats:
    """Return 2 sum_v Q[uf, v c_v], its own unit included. [units, formats]"""
    units, formats = problem.first.shape
    return 2 * problem.matrix[np.arange(units) * formats + choice].sum(axis=0).reshape(units, formats)


def _moves(problem: Quadratic, cost: Ints, choice: Ints, field: Floats, centre: Ints) -> Moves:
    """Return all single changes of `choice`; distances are from `centre`."""
    units, formats = problem.first.shape
    every = np.arange(units)
    itself = problem.matrix.reshape(units, formats, units, formats)[every, :, every, choice]  # [units, formats]: Q[uf, u c_u]
    whole = problem.first + np.diag(problem.matrix).reshape(units, formats) + field - 2 * itself
    added = whole - whole[every, choice][:, None]
    unit, fmt = np.nonzero(np.arange(formats) != choice[:, None])
    distance = (fmt != centre[unit]).astype(np.int64) - (choice[unit] != centre[unit])
    return Moves(unit, fmt, added[unit, fmt], cost[unit, fmt] - cost[unit, choice[unit]], distance)


def single_changes(problem: Quadratic, cost: Ints, choice: Ints) -> Moves:
    """Return all single changes of `choice`, with what each adds."""
    return _moves(problem, cost, choice, _field(problem, choice), choice)


def _together(problem: Quadratic, choice: Ints, moves: Moves, index: Ints) -> Floats:
    """Return what two changes add beyond their sum. index: of changes -> [index, index]"""
    formats = problem.first.shape[1]
    new = moves.unit[index] * formats + moves.format[index]
    old = moves.unit[index] * formats + choice[moves.unit[index]]
    rows = problem.matrix[new] - problem.matrix[old]
    return 2 * (rows[:, new] - rows[:, old])


def promising(moves: Moves, slack: int) -> Ints:
    """Return the indices of the changes that are worth trying in pairs: least damage at the price of cost that the changes themselves set."""
    if len(moves.unit) <= PAIRED:
        return np.arange(len(moves.unit))
    saving = (moves.cost < 0) & (moves.damage > 0)
    price = float(np.min(moves.damage[saving] / -moves.cost[saving])) if saving.any() and slack < moves.cost.max() else 0.0
    chosen = []
    for side in (moves.cost > 0, moves.cost <= 0):
        index = np.flatnonzero(side)
        chosen.append(index[np.argsort((moves.damage + price * moves.cost)[index], kind="stable")[: PAIRED // 2]])
    return np.sort(np.concatenate(chosen))


def recentred(problem: Quadratic, choice: Ints) -> Quadratic:
    """Return the model with its values relative to `choice` [units]: each change adds `first` + its diagonal, pairs interact beyond."""
    units, formats = problem.first.shape
    old = np.repeat(np.arange(units) * formats + choice, formats)  # the entry that each change leaves
    half = problem.matrix - problem.matrix[old]
    matrix = half - half[:, old]
    moves = single_changes(problem, np.zeros((units, formats), dtype=np.int64), choice)
    added = np.zeros((units, formats))
    added[moves.unit, moves.format] = moves.damage
    return Quadratic(added - np.diag(matrix).reshape(units, formats), matrix)


def nearest_plans(problem: Quadratic, cost: Ints, limit: int, choice: Ints, count: int) -> list[Ints]:
    """Return the `count` plans one change or one pair of changes from `choice`, within `limit`, that are predicted best, best first."""
    moves = single_changes(problem, cost, choice)
    slack = limit - total_cost(cost, choice)
    index = promising(moves, slack)
    unit, damage, extra = moves.unit[index], moves.damage[index], moves.cost[index]
    pairs = np.add.outer(damage, damage) + _together(problem, choice, moves, index)
    pairs[(np.add.outer(extra, extra) > slack) | np.equal.outer(unit, unit) | np.tri(len(index), dtype=bool)] = np.inf
    added = np.concatenate([np.where(extra <= slack, damage, np.inf), pairs.ravel()])
    plans = []
    for best in np.argsort(added, kind="stable")[:count]:
        if np.isfinite(added[best]):
            plan = choice.copy()
            for k in index[[best]] if best < len(index) else index[list(divmod(int(best) - len(index), len(index)))]:
                plan[moves.unit[k]] = moves.format[k]
            plans.append(plan)
    return plans


# --- the bound ---------------------------------------------------------------------------------------------------------


def lower_bound(problem: Quadratic, cost: Ints, limit: int) -> float:
    """Return a number that no plan within the budget is below (without a trust region). nats/token"""
    units, formats = problem.first.shape

    def push(shares: Floats) -> Floats:
        """Return the matrix times shares [units * formats], few of which are not 0."""
        some = np.flatnonzero(shares)
        return shares[some] @ problem.matrix[some]

    linear = problem.first.ravel()
    z = relaxed_knapsack(linear.reshape(units, formats), cost, limit).ravel()
    pushed = push(z)
    best = -np.inf
    for _ in range(BOUND_STEPS):
        gradient = linear + 2 * pushed
        corner = relaxed_knapsack(gradient.reshape(units, formats), cost, limit).ravel()
        best = max(best, float(gradient @ corner - z @ pushed))
        step, more = corner - z, push(corner) - pushed
        curved = float(step @ more)
        slope = float(gradient @ step)
        if slope >= 0:
            break
        share = min(1.0, -slope / (2 * curved)) if curved > 0 else 1.0
        z, pushed = z + share * step, pushed + share * more
    return best - 1e-9 * max(1.0, abs(best))


def relaxed_knapsack(damage: Floats, cost: Ints, limit: int) -> Floats:
    """Return shares [units, formats] of least damage at a mean cost within `limit`: two plans at the right price of cost, mixed."""

    def cheapest_at(price: float) -> Ints:
        return (damage + price * cost).argmin(axis=1)

    one_hot, over = np.eye(damage.shape[1]), cheapest_at(0.0)
    if total_cost(cost, over) <= limit:
        return one_hot[over]
    low, high = 0.0, float(np.ptp(damage) + 1e-300)  # one unit of cost is dearer than any damage: the cheapest plan
    fits = np.where(cost == cost.min(axis=1, keepdims=True), damage, np.inf).argmin(axis=1)
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        choice = cheapest_at(price)
        if total_cost(cost, choice) <= limit:
            high, fits = price, choice
        else:
            low, over = price, choice
    low_cost, high_cost = total_cost(cost, fits), total_cost(cost, over)
    share = (limit - low_cost) / (high_cost - low_cost) if high_cost > low_cost else 0.0
    return (1 - share) * one_hot[fits] + share * one_hot[over]


# --- interpolated models ---------------------------------------------------------------------------------------------------
#
# Quadratic models between the two uniform bases, from the two screens of single changes: where a search starts, and what guides it.
#
# Around the widest formats damage is nearly quadratic, but low-bit plans are far from there; around the narrowest, interactions are
# several times too strong. The mean of the two screens (the Shapley value of a quadratic damage) is the best additive table, and has no
# interactions at all. So take a share k of the quadratic model at the wide end, and 1 - k of the additive table:
#
#     lin = (1 - k) mean + k wide,    damage = damage(widest) + sum_u lin[u, c_u] + 2 k sum_{u<v} T[u c_u, v c_v]
#
# On five searches over three trained checkpoints one of k = 1/4, 1/2, 3/4 gave a start as good as, or up to 7 % better than, the best additive plan;
# the pure models (k = 1 at the wide end, and either variant at the narrow end) gave much worse ones. All are measured, none is trusted.
# Left out: third-order terms, which would need measured pairs.

SHARES = (0.25, 0.5, 0.75)  # k


@dataclass(frozen=True)
class InterpolatedModel:
    """Added damage of single changes at both bases, 0 where nothing changes, and half the curvature at the wide one. nats/token"""

    wide: Floats  # [units, formats], around the last format everywhere
    narrow: Floats  # [units, formats], around the first format everywhere
    together: Floats  # [units * formats, units * formats], around the last format; symmetric, positive semidefinite

    def at(self, share: float) -> Quadratic:
        """Return the model of that share k; its values are relative to the widest formats."""
        mean = (self.wide + self.narrow - self.narrow[:, -1:]) / 2
        linear = (1 - share) * mean + share * self.wide
        matrix = share * self.together
        return Quadratic(linear - np.diag(matrix).reshape(linear.shape), matrix)
