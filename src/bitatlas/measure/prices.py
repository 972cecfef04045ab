"""Prices: the damage that each unit in each format does by itself, to second order, from one pass forwards and one backwards for all of them.

With δ_t the gradient of drawn labels' log-probability at a module's output and x_t its input, a change ΔW of its weight does the damage
½ mean_t (δ_tᵀ ΔW x_t)² at the reference, in nats/token. On a trained model these rank what swaps truly do, and add up; rows must not be those
that codes were fitted to, where quantized models do a fraction of the damage that they do elsewhere.

Modules of a unit are changed together, so what they do at a token is added up before it is squared. Left out: what changes at different tokens do
together, and what units do together; both are small where damage is. Journaled by layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bitatlas.data.rows import rows_sha256
from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.workers import Progress
from bitatlas.model.gradients import ModuleCall, layer_calls
from bitatlas.model.layerwise import split_rows
from bitatlas.quantize.bank import Bank
from bitatlas.records import Module
from bitatlas.records.journal import content_key


def price_units(
    meter: DamageMeter,
    modules: Sequence[Module],
    formats: Sequence[str],
    rows: Tensor,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return the price of every unit in every format: float64 [units, formats], nats/token. rows: int64 [rows, tokens], not those of a fit."""
    layers: dict[int, list[Module]] = defaultdict(list)
    for module in modules:
        layers[module.layer].append(module)
    base = ("price", meter.identity, rows_sha256(rows), list(formats), seed)
    keys = {layer: content_key(*base, [[m.name, m.unit] for m in inside]) for layer, inside in layers.items()}
    prices = {layer: meter.journal.get(key) for layer, key in keys.items()}
    missing = {layer: inside for layer, inside in layers.items() if prices[layer] is None}
    for layer, value in _price_layers(meter, missing, formats, rows, seed) if missing else ():
        meter.journal.put(keys[layer], "price", value)
        prices[layer] = value
        if progress:
            progress(sum(known is not None for known in prices.values()), len(prices))
    by_unit = {unit: price for layer in layers for unit, price in prices[layer].items()}  # type: ignore[union-attr]
    return np.array([by_unit[unit] for unit in dict.fromkeys(module.unit for module in modules)])


def _price_layers(
    meter: DamageMeter, layers: dict[int, list[Module]], formats: Sequence[str], rows: Tensor, seed: int
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Yield (layer, unit -> price of each format), from the last layer to the first."""
    names = {layer: [module.name for module in inside] for layer, inside in layers.items()}
    batches = [batch.to(meter.decoder.device) for batch in split_rows(meter.decoder, rows)]
    sums: dict[str, Tensor] = {}  # unit -> float64 [formats], of squares
    changes: dict[str, Tensor] = {}
    with meter.budget.shelf() as states:
        for layer, calls, is_last in layer_calls(meter.decoder, names, batches, states, seed):
            if not changes:
                changes = {m.name: changes_of(meter.bank, m.name, m.formats(formats)) for m in layers[layer]}
            _add_squares(sums, calls, {module.name: module.unit for module in layers[layer]}, changes)
            if is_last:
                none = torch.zeros(len(formats))
                units = dict.fromkeys(module.unit for module in layers[layer])
                yield layer, {unit: (sums.get(unit, none).cpu() / (2 * rows.numel())).tolist() for unit in units}
                sums, changes = {}, {}


def _add_squares(sums: dict[str, Tensor], calls: Sequence[ModuleCall], units: dict[str, str], changes: dict[str, Tensor]) -> None:
    """Add what the units do at each token of one batch, squared."""
    scores: dict[tuple[str, int], Tensor] = {}  # (unit, tokens) -> [formats, tokens]: modules of a unit may see other tokens
    for call in calls:
        inputs, gradient = (part.reshape(-1, part.shape[-1]) for part in (call.inputs, call.gradient))
        if call.name in units and len(inputs):
            score = torch.stack([((inputs @ change.T) * gradient).sum(1) for change in changes[call.name]])
            key = units[call.name], len(inputs)
            scores[key] = scores[key] + score if key in scores else score
    for (unit, _), score in scores.items():
        squares = score.double().square().sum(1)
        sums[unit] = sums[unit] + squares if unit in sums else squares


def changes_of(bank: Bank, name: str, formats: Sequence[str]) -> Tensor:
    """Return the change of a module's weight in every format, [formats, out, in]."""
    reference = bank.reference(name)
    return torch.stack([bank.weights({name: fmt})[name] - reference for fmt in formats])
