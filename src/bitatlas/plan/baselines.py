"""Plans that anybody would make, each at most as large as the budget: what a measured plan has to beat.

One width everywhere; the first layers wide and the rest narrow; the last layers wide; whole layers wide in the order of their
criticality, as one would read it off the report; and 20 random plans. All but the uniform one use the room to the last unit that
fits, so that a measured plan does not win by being larger. A uniform width that is no candidate may fit better than any candidate
(3 bits between 2 and 4): `outside_uniform` names it, because a plan that loses to it should not be recommended.
Left out: plans from weight statistics (they are profiles, and need measuring of their own).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bitatlas.errors import UserError
from bitatlas.plan.budget import costs_of
from bitatlas.plan.knapsack import Ints, total_cost
from bitatlas.records import Budget, ModelInfo, Module
from bitatlas.records.formats import FORMATS, Format, by_width, get_format, takes
from bitatlas.records.sizes import Unit, inner

RANDOM_PLANS = 20
UNIFORM, FIRST_HIGH, LAST_HIGH, RANDOM = "uniform", "first layers high", "last layers high", "random"
CRITICAL_HIGH = "most critical layers high"


def most_critical_first(modules: Sequence[Module], damage: NDArray) -> list[int]:
    """Return the layers, that with the most damage for its weights first. damage: [layers]"""
    modules = inner(modules)
    weights = np.bincount([module.layer for module in modules], [module.weights for module in modules])
    return [int(layer) for layer in np.argsort(-damage / weights, kind="stable")]


def baselines(
    units: Sequence[Unit],
    cost: Ints,
    limit: int,
    seed: int = 0,
    formats: Sequence[str] | None = None,
    most_critical: Sequence[int] = (),
    random: int = RANDOM_PLANS,
) -> list[tuple[str, Ints]]:
    """Return (name, choice [units]) of every baseline, the same for the same seed.

    cost: [units, formats] in whole numbers, `limit` the largest allowed sum. With `formats` the uniform one is named after its
    format. "First", "last" and "most critical" (layers in order, the most critical first) use the cheapest and the dearest format
    alone, the `random` random plans use all.
    Raises UserError where not even the cheapest format everywhere fits, ValueError for a wrong shape.
    """
    cost = np.asarray(cost)
    if cost.ndim != 2 or len(cost) != len(units) or not len(units):
        raise ValueError(f"cost: [units, formats] with {len(units)} units, got {cost.shape}")
    outside = np.array([bool(unit.part) for unit in units])
    totals = cost[~outside].sum(axis=0)
    low, high = int(totals.argmin()), len(totals) - 1 - int(totals[::-1].argmax())
    least = int(cost.min(axis=1).sum())
    if least > limit:
        raise UserError(f"the budget of {limit} is below {least}, the cheapest format everywhere")
    beside = _outside_column(cost[outside], limit - int(totals[low]))
    # one width in the layers comes first, then what is left for the others
    fitting = np.flatnonzero(totals + int(cost[outside].min(axis=1).sum()) <= limit)
    widest = int(fitting[totals[fitting] == totals[fitting].max()][-1])
    beside_widest = _outside_column(cost[outside], limit - int(totals[widest]))
    layers = sorted({unit.layer for unit in inner_units(units)})
    start = np.where(outside, beside, low)

    def layers_high(order: Iterable[int]) -> Ints:
        return _layers_high(units, cost, limit, start, high, order)

    plans = [
        (UNIFORM if formats is None else f"{UNIFORM} {formats[widest]}", np.where(outside, beside_widest, widest)),
        (FIRST_HIGH, layers_high(layers)),
        (LAST_HIGH, layers_high(layers[::-1])),
    ]
    if most_critical:
        plans.append((CRITICAL_HIGH, layers_high(most_critical)))
    for number in range(1, random + 1):
        generator = np.random.default_rng([seed, number])
        plans.append((f"{RANDOM} {number}", _random(cost, limit, low, generator)))
    return plans


def outside_uniform(budget: Budget, units: Sequence[Unit], formats: Sequence[str], info: ModelInfo, limit: int) -> str | None:
    """Return the dearest format outside `formats`, of a candidate's runtime, group size and symmetry, that fits everywhere and costs more than every
    candidate that does; None where there is none."""
    cost = costs_of(budget, units, formats, info).cost
    limit -= int(cost[[bool(unit.part) for unit in units], -1].sum())
    units = inner_units(units)
    kinds = {_kind(get_format(name)) for name in formats}
    widths = {module.shape[1] for unit in units for module in unit.modules}
    others = [
        name
        for name, fmt in FORMATS.items()
        if name not in formats and _kind(fmt) in kinds and all(takes(fmt, width) for width in widths)
    ]
    names = by_width([*formats, *others])
    totals = costs_of(budget, units, names, info).cost.sum(axis=0)
    fitting = [(int(total), name) for name, total in zip(names, totals, strict=True) if total <= limit]
    best = max((total for total, _ in fitting), default=0)
    dearest = [name for total, name in fitting if total == best]
    return None if not dearest or set(dearest) & set(formats) else dearest[0]


def _kind(fmt: Format) -> tuple[str, int, bool]:
    return fmt.runtime, fmt.group_size, fmt.symmetric


def inner_units(units: Sequence[Unit]) -> list[Unit]:
    """Return the units that are in decoder layers."""
    return [unit for unit in units if not unit.part]


def _outside_column(cost: Ints, limit: int) -> int:
    """Return the widest column that all units outside the layers can have within `limit`; the narrowest where none can. cost: [units, formats]"""
    fitting = np.flatnonzero(cost.sum(axis=0) <= limit)
    return int(fitting[-1]) if len(fitting) else 0


def _layers_high(units: Sequence[Unit], cost: Ints, limit: int, start: Ints, high: int, layers: Iterable[int]) -> Ints:
    """Return whole layers raised from `start` in the order of `layers` while they fit; in the first that does not, the largest units that fit."""
    choice = start.astype(np.int64)
    extra = cost[:, high] - cost[np.arange(len(units)), start]
    slack = limit - total_cost(cost, choice)
    for layer in layers:
        members = [index for index, unit in enumerate(units) if unit.layer == layer]
        whole = int(extra[members].sum()) <= slack
        for index in sorted(members, key=lambda index: -extra[index]):
            if extra[index] <= slack:
                choice[index], slack = high, slack - int(extra[index])
        if not whole:
            break
    return choice


def _random(cost: Ints, limit: int, low: int, generator: np.random.Generator) -> Ints:
    """Return a random plan: units in random order get a random format among those that still fit; then, in another order, the dearest that fits."""
    units, formats = cost.shape
    choice: Ints = np.full(units, low, dtype=np.int64)
    slack = limit - int(cost[:, low].sum())
    draws: Ints = np.asarray(generator.integers(formats, size=units))
    for last in (False, True):
        for unit in generator.permutation(np.arange(units)).tolist():
            extra = cost[unit, :] - cost[unit, choice[unit]]  # [formats]
            column = int(np.where(extra <= slack, extra, -1).argmax()) if last else int(draws[unit])
            if extra[column] <= slack and (not last or extra[column] > 0):
                choice[unit], slack = column, slack - int(extra[column])
    return choice
