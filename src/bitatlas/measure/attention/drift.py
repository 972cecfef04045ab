"""How far quantized weights move the attention maps: the reference, the changed model and a noise floor, in step, layer by layer.

Three Jensen-Shannon distances to the reference's map of the same layer and sequence (base 2, 0..1; sinks of the reference removed):
- *local*: this layer's weights changed, on the hidden state that the reference's layer read: what the layer itself does to its map;
- *cumulative*: all weights changed, on the changed model's own hidden state: what the map of the whole model becomes;
- *noise*: the reference weights, the whole model in the other precision (bfloat16 for a float32 model, float32 for a half-precision
  one): what nobody would call a change.

Each layer runs as often as there are maps to compare before the next one does, so that only one layer's maps live at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.measure.attention.capture import capturing
from bitatlas.measure.attention.maps import js_distance, mean_where, strip_sinks, usable_queries
from bitatlas.model.checkpoint import decoder_layers
from bitatlas.model.layerwise import Call, Shared, enter, forked, rows_and_tokens, run_layer
from bitatlas.model.streaming import held
from bitatlas.model.swap import swapped


@dataclass
class InStep:
    """One layer of one batch. Hidden states [rows, tokens, width] are what the layer read; maps [rows, heads, queries, keys]."""

    layer: int
    reference_hidden: Tensor
    changed_hidden: Tensor
    reference: Tensor
    local: Tensor
    cumulative: Tensor
    noise: Tensor


@torch.no_grad()
def in_step(
    model: Any, input_ids: Tensor, changed: Mapping[int, Mapping[str, Tensor]], on_step: Callable[[InStep], None]
) -> None:
    """Run the reference and the changed model side by side over `input_ids` [rows, tokens]; `on_step` gets each layer with a map.

    `model` holds the reference weights; changed: layer -> module name -> weight [out, in].
    """
    start = enter(model, input_ids)
    layers = decoder_layers(model)
    other = torch.float32 if start.hidden.dtype != torch.float32 else torch.bfloat16
    reference = moved = start.hidden
    rounded = start.hidden.to(other)
    found: list[Tensor] = []
    of_reference, of_moved, of_rounded = start.fresh(), start.fresh(), start.fresh()
    with capturing(model, partial(_keep, found)):
        for index, (layer, _) in enumerate(zip(layers, start.calls, strict=False)):
            found.clear()
            before = rows_and_tokens(model, reference), rows_and_tokens(model, moved)
            local = forked(of_reference)
            with held(model, index):
                following = run_layer(layer, reference, start.call(index, of_reference))
                with swapped(model, changed.get(index, {})):
                    run_layer(layer, reference, start.call(index, local))
                    moved = run_layer(layer, moved, start.call(index, of_moved))
                with in_dtype(layer, other):
                    rounded = run_layer(layer, rounded, _rounded_call(start.call(index, of_rounded), of_rounded, other))
            reference = following
            if len(found) == 4:
                on_step(InStep(index, *before, *found))


def _rounded_call(call: Call, shared: Shared, dtype: torch.dtype) -> Call:
    """The call with its tensors in `dtype`, but for what layers share: they write it in that dtype themselves."""
    own = {id(container) for container in shared.values()}
    args, kwargs = call
    return tuple(value if id(value) in own else to_dtype(value, dtype) for value in args), {
        name: value if id(value) in own else to_dtype(value, dtype) for name, value in kwargs.items()
    }


def _keep(found: list[Tensor], layer: int, hidden: Tensor, maps: Tensor) -> None:
    found.append(maps)


@contextmanager
def in_dtype(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the layer computes in `dtype`; its own tensors come back, not rounded copies."""
    tensors = [*layer.parameters(), *layer.buffers()]
    before = {tensor: tensor.data for tensor in tensors if tensor.is_floating_point()}
    try:
        for tensor, data in before.items():
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in before.items():
            tensor.data = data


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor in it (tuples, lists and dicts, nested) as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_dtype(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_dtype(part, dtype) for part in value)
    return value


def drifts(step: InStep, sinks: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Mean distance over heads and usable queries, by name ("local", "cumulative", "noise"): float64 [rows], NaN where none.

    sinks: bool [rows, keys] of the reference, keys: [rows, queries] left to each query.
    """
    reference, kept = strip_sinks(step.reference, sinks)
    usable = usable_queries(kept, keys)
    result = {}
    for name in ("local", "cumulative", "noise"):
        maps, left = strip_sinks(getattr(step, name), sinks)
        both = usable & usable_queries(left, keys)
        result[name] = mean_where(js_distance(reference, maps).flatten(1), both.flatten(1))  # over heads and queries
    return result
