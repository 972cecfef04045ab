"""Prices: what each unit in each format costs by itself to second order, from one pass forwards and one backwards for all (see `quantize.moments`).

On trained models with good codes they rank true swaps, and add up but for a common factor; which factor, and where they mislead, has to be
measured (`plan.search`). Journaled by module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from bitatlas.data.rows import rows_sha256
from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.workers import Progress
from bitatlas.records import Module
from bitatlas.records.journal import content_key


def price_modules(
    meter: DamageMeter, modules: Sequence[Module], formats: Sequence[str], rows: Tensor, progress: Progress | None = None
) -> dict[str, list[float]]:
    """Return module -> price of each format, nats/token; codes that are missing are made in the same pass. rows: int64 [rows, tokens]"""
    base = ("price", meter.identity, rows_sha256(rows), list(formats))
    keys = {module.name: content_key(*base, module.name) for module in modules}
    prices = {name: meter.journal.get(key) for name, key in keys.items()}
    missing = [name for name, value in prices.items() if value is None]
    for name, value in meter.bank.prices(missing, formats, rows) if missing else ():
        meter.journal.put(keys[name], "price", value)
        prices[name] = value
        if progress:
            progress(sum(value is not None for value in prices.values()), len(prices))
    return prices  # type: ignore[return-value]


def price_units(
    meter: DamageMeter, modules: Sequence[Module], formats: Sequence[str], rows: Tensor, progress: Progress | None = None
) -> np.ndarray:
    """Return the sum of its modules' prices for every unit: float64 [units, formats], nats/token."""
    prices = price_modules(meter, modules, formats, rows, progress)
    units: dict[str, np.ndarray] = {}
    for module in modules:
        units[module.unit] = units.get(module.unit, np.zeros(len(formats))) + prices[module.name]
    return np.stack(list(units.values()))
