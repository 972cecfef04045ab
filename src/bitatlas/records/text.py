"""Numbers, intervals and layers as text, alike in every sentence, table and chart.

Numbers carry as many decimals as their interval supports (two digits of its width), so nothing suggests more than was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from bitatlas.records import Measured, Plan, TaskScore

MINUS = "−"
NOT_MEASURED = "not measured"
ALIKE = "(in every resample)"  # in the place of an interval without width
# C0 but tab and newline, DEL, C1, and the marks that reorder a line's letters
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def number(value: float, decimals: int | None = None) -> str:
    """Return a number as text; without `decimals`, three significant digits. Thousands are grouped, minus is the real sign."""
    if decimals is None:
        decimals = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        if decimals > 6:
            return f"{value:.1e}".replace("-", MINUS)
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def given(value: float) -> str:
    """Return a number that somebody gave, with all its digits: 3, 2.9, 1.9999999."""
    if float(value).is_integer() and abs(value) < 2**53:
        return str(int(value))
    return f"{Decimal(repr(float(value))):f}" if 1e-12 < abs(value) < 1 else repr(float(value))


def decimals_of(low: float, high: float, least: int = 0) -> int:
    """Return the decimals that show two digits of an interval's width: 0.031 wide gives 3."""
    width = high - low
    if width <= 0:
        return least or 3
    return min(6, max(least, 1 - math.floor(math.log10(width))))


def duration(seconds: float) -> str:
    """Return seconds as people say them: "40 s", "12 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{number(seconds / 3600, 2)} h"


def percent(share: float, decimals: int = 1) -> str:
    """Return a share 0..1 as a percentage."""
    return number(100 * share, decimals) + "%"


def shown(m: Measured) -> tuple[float, tuple[float, float] | None, str]:
    """Return mean, interval and unit as they are printed: shares become percentages; 0..1 measures and ratios have no unit sign."""
    if m.unit == "share":
        return 100 * m.mean, (100 * m.ci95[0], 100 * m.ci95[1]) if m.ci95 else None, "%"
    return m.mean, m.ci95, "" if m.unit in ("0..1", "ratio") else m.unit


def interval(m: Measured | None, unit: bool = False) -> str:
    """Return `0.214 [0.199, 0.232]`, with the unit if asked for (percentages always); "no interval" is said where there is none."""
    if m is None:
        return NOT_MEASURED
    mean, ci95, sign = shown(m)
    after = "%" if sign == "%" else ""
    suffix = f" {sign}" if unit and sign and not after else ""
    if ci95 is None:
        return f"{number(mean)}{after} [no interval]{suffix}"
    decimals = decimals_of(*ci95, least=1 if sign in ("%", "points") else 0)
    low, high = (number(end, decimals) for end in ci95)
    if low == high == number(mean, decimals):
        return f"{low}{after}{suffix} {ALIKE}"
    return f"{number(mean, decimals)}{after} [{low}, {high}]{suffix}"


def rows_of(m: Measured) -> str:
    """Return `64 test rows`, or `64 test rows in 12 blocks` where blocks of rows were resampled."""
    kind = f"{m.rows} " if m.rows in ("fit", "select", "test") else ""
    blocks = "" if m.blocks is None else f" in {m.blocks} block{'' if m.blocks == 1 else 's'}"
    return f"{m.n:,} {kind}rows{blocks}"


def with_fewer_rows(name: str, damage: Measured, plan: Plan | None) -> str:
    """Return `random 3 (8 rows)`, the name of a plan beside `plan` with the rows of its damage where they are fewer than `plan`'s; else the name."""
    ours = plan.damage.measured if plan else None
    return f"{name} ({damage.n:,} rows)" if ours and damage.n < ours.n else name


def against_chance(score: TaskScore) -> str:
    """Return `above chance`, `below chance` or `at chance`."""
    return "above chance" if score.above_chance else "below chance" if score.below_chance else "at chance"


def byte_size(count: int) -> str:
    """Return bytes in the decimal unit that fits: 1.68 MB."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{number(value, 0 if units[0] == 'bytes' else None)} {units[0]}"


def given_size(count: int) -> str:
    """Return bytes that somebody gave in the decimal unit that fits, with all their digits: 1.50 MB, 1.234567 MB."""
    rounded, (_, unit) = byte_size(count), byte_size(count).split()
    power = ("bytes", "kB", "MB", "GB", "TB").index(unit)
    exact = f"{Decimal(count).scaleb(-3 * power):f}"
    exact = exact.rstrip("0").rstrip(".") if "." in exact else exact
    return rounded if Decimal(rounded.split()[0].replace(",", "")) == Decimal(exact) else f"{exact} {unit}"


def memory_text(plan: Plan) -> str:
    """Return what the plan's device memory is made of; "" where its budget is another."""
    load = plan.budget.workload
    if load is None:
        return ""
    parts = {"weights": plan.size.total_bytes, "KV cache": load.cache_bytes, "activations": load.activation_bytes}
    sequences = "1 sequence" if load.batch == 1 else f"{load.batch:,} sequences"
    return (
        f"Device memory {byte_size(sum(parts.values()))} of {given_size(int(plan.budget.value))}: "
        f"{', '.join(f'{name} {byte_size(count)}' for name, count in parts.items())} "
        f"({sequences} of {load.context:,} tokens, cache {load.cache_dtype}, activations {load.activation_dtype}, "
        f"passes of at most {load.chunk:,} tokens)"
    )


def protect_text(plan: Plan) -> str:
    """Return `demo_questions=5pp`, the protected tasks as they were asked for; "" where the budget is another."""
    return ", ".join(f"{task}={given(points)}pp" for task, points in (plan.budget.protect or {}).items())


def p_value(p: float | None, bound: bool = False) -> str:
    """Return `p` as text; below 0.0001, and where resampling cannot give a smaller one (`bound`), only the bound, rounded up."""
    if p is None:
        return ""
    if p < 1e-4:
        return "< 0.0001"
    decimals = 4 if p < 0.01 else 3 if p < 0.1 else 2
    return f"< {number(math.ceil(p * 10**decimals - 1e-6) / 10**decimals, decimals)}" if bound else number(p, decimals)


def p_is(p: float, bound: bool = False, letter: str = "p") -> str:
    """Return `p = 0.012`, or the bound."""
    text = p_value(p, bound)
    return f"{letter} {text}" if text.startswith("<") else f"{letter} = {text}"


def runs(layers: Iterable[int]) -> str:
    """Return layer numbers as runs: `0–3, 7`."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)


def named_layers(layers: Sequence[int]) -> str:
    """Return `layer 3` or `layers 0–3, 7`."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {runs(layers)}"


def listed(parts: Iterable[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`; `none` of nothing."""
    *first, last = [*parts] or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def visible(text: str) -> str:
    """Return text in which every character that a terminal would obey is its escape: an ESC becomes the four letters \\x1b."""
    return _STEERING.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)
