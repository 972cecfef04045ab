"""What a budget allows, in whole bits and bytes, and whether it is possible at all: asked before anything slow runs.

Every kind of budget becomes the same thing: an integer cost per unit and format, and an integer limit that a plan must not
exceed by one. `KINDS` is that table; a budget by device memory is one by size with less room (`memory.py` says how much less).
Average code bits price the codes alone, so two formats of the same width cost the same there; their bytes differ.
Left out: leaving single modules unquantized as an option (a unit always gets one of the candidate formats).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bitatlas.errors import UserError
from bitatlas.plan.memory import beside_weights
from bitatlas.records import Budget, ModelInfo, Module
from bitatlas.records.formats import Format, get_format, stored_bytes
from bitatlas.records.sizes import RANGE_DIGITS, Unit, parse_size, rounded_up, show_bytes, units_of
from bitatlas.records.text import given

Ints = NDArray[np.int64]

EXACT_DIGITS = 20  # significant digits that show a number as it was given
MEASURED = {"max_damage": "--max-damage", "protect": "--protect"}  # kinds whose size is sought, not given


@dataclass(frozen=True)
class Costs:
    """A budget in whole numbers: choose one format per unit so that the sum of `cost` is at most `limit`."""

    cost: Ints  # [units, formats]
    limit: int | None  # None: the budget is a damage, and `cost` is what is to be made small
    what: str  # "bits" or "bytes"


@dataclass(frozen=True)
class Kind:
    """How one kind of budget is counted. `worth` turns a summed cost into the number the user gave, `allows` goes back."""

    flag: str
    what: str  # what `cost` counts: "bits" or "bytes"
    cost: Callable[[Module, Format], int]
    worth: Callable[[int, int, int], Fraction]  # (summed cost, weights, other bytes) -> value
    allows: Callable[[Fraction, int, int], Fraction]  # (value, weights, other bytes) -> summed cost
    show: Callable[[Fraction, int], str]  # (value, significant digits) -> text that can be typed again, rounded up


# --- sizes as people write them ----------------------------------------------------------------------------------------


# --- the kinds of budget -----------------------------------------------------------------------------------------------

KINDS: dict[str, Kind] = {
    "code_bits": Kind(
        flag="--code-bits",
        what="bits",
        cost=lambda module, fmt: module.weights * fmt.bits,
        worth=lambda cost, weights, other: Fraction(cost, weights),
        allows=lambda value, weights, other: value * weights,
        show=rounded_up,
    ),
    "stored_bits": Kind(
        flag="--stored-bits",
        what="bytes",
        cost=lambda module, fmt: stored_bytes(module.shape, fmt),
        worth=lambda cost, weights, other: Fraction(8 * cost, weights),
        allows=lambda value, weights, other: value * weights / 8,
        show=rounded_up,
    ),
    "size": Kind(
        flag="--size",
        what="bytes",
        cost=lambda module, fmt: stored_bytes(module.shape, fmt),
        worth=lambda cost, weights, other: Fraction(cost + other),
        allows=lambda value, weights, other: value - other,
        show=show_bytes,
    ),
}
KINDS["vram"] = replace(KINDS["size"], flag="--vram")  # its other bytes hold the cache and the activations too


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"budget kind {name!r}: known are {', '.join(KINDS)} and max_damage")
    return KINDS[name]


def costs_of(budget: Budget, units: Sequence[Unit], formats: Sequence[str], info: ModelInfo) -> Costs:
    """The budget (`memory.settled`, where it has a workload) in whole numbers, cost: [units, formats].

    The limit is the largest sum whose value, as `size_of` prints it, is not above the budget's; it can be negative where
    the budget is impossible. A tolerated damage and a protected task have no limit: their costs are bytes.
    """
    if budget.kind in MEASURED:
        return Costs(_cost_table(KINDS["size"], units, formats), None, KINDS["size"].what)
    kind = _kind(budget.kind)
    weights = sum(unit.weights for unit in units)
    other = info.other_bytes + beside_weights(budget)
    limit = math.floor(kind.allows(Fraction(budget.value), weights, other))
    # 2.9 as a float is a little below 29/10: the printed average of one more bit may still be 2.9
    if float(kind.worth(limit + 1, weights, other)) <= budget.value:
        limit += 1
    return Costs(_cost_table(kind, units, formats), limit, kind.what)


def _cost_table(kind: Kind, units: Sequence[Unit], formats: Sequence[str]) -> Ints:
    table = [get_format(name) for name in formats]
    costs = [[sum(kind.cost(module, fmt) for module in unit.modules) for fmt in table] for unit in units]
    return np.array(costs, dtype=np.int64).reshape(len(units), len(table))  # [units, formats]


def size_range(
    kind: str, modules: Sequence[Module], formats: Sequence[str], info: ModelInfo, beside: int = 0
) -> tuple[float, float]:
    """(least, most) that these formats can give, in the unit of the budget's kind: bits a weight, or bytes with `beside` of them."""
    counted, units = _kind(kind), units_of(modules)
    least, most = _extremes(_cost_table(counted, units, formats))
    weights, other = sum(unit.weights for unit in units), info.other_bytes + beside
    return float(counted.worth(least, weights, other)), float(counted.worth(most, weights, other))


def _extremes(cost: Ints) -> tuple[int, int]:
    return int(cost.min(axis=1).sum()), int(cost.max(axis=1).sum())


def check_budget(budget: Budget, modules: Sequence[Module], formats: Sequence[str], info: ModelInfo) -> None:
    """Refuse a budget that no plan can meet, or that every plan meets: UserError naming the flag and the possible range.

    A tolerated damage is only checked for being a positive number: what is possible must be measured.
    """
    flag = MEASURED.get(budget.kind) or _kind(budget.kind).flag
    if not formats:
        raise UserError("--formats: at least one format is needed")
    if not math.isfinite(budget.value) or budget.value <= 0:
        raise UserError(f"{flag} {given(budget.value)} must be a positive number")
    if budget.kind in MEASURED:
        return
    kind, units = KINDS[budget.kind], units_of(modules)
    if not units:
        raise UserError("the checkpoint has no linear weights that can be quantized")
    cost, weights = _cost_table(kind, units, formats), sum(unit.weights for unit in units)
    ends = _extremes(cost)
    beside = beside_weights(budget)
    least, most = (kind.worth(total, weights, info.other_bytes + beside) for total in ends)
    shown_least, shown_most = (kind.show(value, RANGE_DIGITS) for value in (least, most))
    possible = f"possible: {shown_least} to {shown_most}" if least < most else f"possible: {shown_least}"
    asked = f"{flag} {budget_text(budget)}"
    if budget.value < float(least):
        who = _named(cost.sum(axis=0), ends[0], formats)
        load = budget.workload
        alone = f"; the cache of {load.context} tokens and the activations alone take {show_bytes(beside)}" if load else ""
        raise UserError(f"{asked} is below {shown_least}, the least that {who}{alone}; {possible}")
    if Fraction(budget.value) > max(most, _typed(kind, shown_most)):
        who = _named(cost.sum(axis=0), ends[1], formats)
        raise UserError(f"{asked} is above {shown_most}, the most that {who}; {possible}")


def _named(totals: Ints, total: int, formats: Sequence[str]) -> str:
    """The one format that reaches `total` everywhere, where there is one."""
    reached = [name for name, own in zip(formats, totals, strict=True) if own == total]
    return f"{reached[0]} gives" if reached else "these formats give"


def _typed(kind: Kind, text: str) -> Fraction:
    return Fraction(parse_size(text)) if kind.show is show_bytes else Fraction(float(text))


def budget_text(budget: Budget) -> str:
    """The budget's value as it was given."""
    is_size = budget.kind in KINDS and KINDS[budget.kind].show is show_bytes
    return exact_bytes(math.floor(budget.value)) if is_size else given(budget.value)


def exact_bytes(whole: int) -> str:
    """A size with all its digits, in the unit that it may have been given in: 1.5GiB, 1.234567MB."""
    for name, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if whole >= size and 100 * whole % size == 0:
            return f"{given(whole / size)}{name}"
    return show_bytes(whole, EXACT_DIGITS)
