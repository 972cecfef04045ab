"""Numbers and layers in sentences: as many digits as the interval supports, a real minus sign, runs of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bitatlas.records import Measured

MINUS = "−"
LEAST_SHOWN = 1e-6  # smaller values are written with an exponent


def number(value: float, decimals: int | None = None) -> str:
    """Three significant digits, or a fixed number of decimals; never "−0"."""
    if decimals is None:
        if 0 < abs(value) < LEAST_SHOWN:
            return f"{value:.1e}".replace("-", MINUS)
        decimals = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", MINUS)


def with_interval(measured: Measured, unit: bool = True) -> str:
    """`0.214 [0.199, 0.232] nats/token`; shares as percentages; two digits of the interval's width."""
    factor, sign = (100.0, "%") if measured.unit == "share" else (1.0, measured.unit)
    after = f" {sign}" if unit and sign not in ("ratio", "0..1") else ""
    if measured.ci95 is None:
        return f"{number(factor * measured.mean)}{after} (no interval)"
    low, high = (factor * end for end in measured.ci95)
    decimals = min(6, max(0, 1 - math.floor(math.log10(high - low)))) if high > low else 3
    return f"{number(factor * measured.mean, decimals)} [{number(low, decimals)}, {number(high, decimals)}]{after}"


def percent(share: float) -> str:
    """0.125 -> "12.5 %"; no decimals from 20 % on."""
    return f"{number(100 * share, 0 if share >= 0.2 or share == 0 else 1)} %"


def layer_runs(layers: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> "layers 0–2, 7"; [7] -> "layer 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
    return f"layer{'' if len(runs) == 1 and runs[0][0] == runs[0][1] else 's'} {text}"


def listed(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    found = list(parts)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else "none"
