"""Statistics of attention maps [rows, heads, queries, keys]: entropy, sink mass, and how far quantized weights move them.

Before anything is measured, *sink keys* are taken out and what is left of each row is renormalized: most heads of trained models
rest on the first token when they have nothing to say (arXiv:2309.17453), which would hide where they look otherwise. The attention
that went there is reported as sink mass. Sink keys are the first token of a sequence and tokens with massive activations
(arXiv:2402.17762): see `massive_tokens`.

Which keys a query may see is read off the map itself, so causal masks, sliding windows and chunks need no case of their own.
Left out: maps of attention that is not a softmax over keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.measure.attention.capture import capturing
from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import Call, Shared, copy_shared, layer_inputs, rows_and_tokens, run_layer

LEAST_KEYS = 8  # a query with fewer keys left says little about how spread its attention is
LEAST_MASS = 1e-6  # attention left beside the sinks; below it the renormalized row would be rounding noise
MASSIVE_OVER_MEDIAN = 100.0  # largest |activation| of a token / median |activation| of its sequence
MASSIVE_OVER_TOKENS = (
    10.0  # largest |activation| of a token / that of the median token: features that are large at every token are not massive
)


def massive_tokens(hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return which tokens have massive activations. hidden: [rows, tokens, width], lengths: [rows] -> bool [rows, tokens].

    A token is massive where its largest |activation| is over 100 x the sequence's median |activation| and over 10 x the median
    token's largest. (Sun et al. use 1000 x and an absolute 100 on models of billions of weights; small models stay under both.)
    """
    size = hidden.detach().float().abs()  # [rows, tokens, width]
    peak = size.amax(-1)  # [rows, tokens]
    if lengths is not None:
        padding = torch.arange(size.shape[1], device=size.device) >= lengths[:, None]
        size = size.masked_fill(padding[..., None], math.nan)
        peak = peak.masked_fill(padding, math.nan)
    massive = peak > MASSIVE_OVER_TOKENS * peak.nanmedian(1, keepdim=True).values
    rows = massive.any(1)  # in most layers of most models none is left, and the large median need not be taken
    if rows.any():
        typical = size[rows].flatten(1).nanmedian(1, keepdim=True).values
        massive[rows] &= peak[rows] > MASSIVE_OVER_MEDIAN * typical
    return massive


class Sinks:
    """Sink keys of one batch of sequences while it moves up the layers: once massive, a token stays a sink."""

    def __init__(self, input_ids: Tensor, lengths: Tensor | None = None):
        """input_ids: [rows, tokens]; lengths: [rows], tokens that are not padding."""
        self.keys = torch.zeros_like(input_ids, dtype=torch.bool)
        self.keys[:, 0] = True
        self.lengths = lengths

    def at(self, hidden: Tensor) -> Tensor:
        """Return the sink keys, bool [rows, tokens], of the layer that reads `hidden` [rows, tokens, width]."""
        self.keys = self.keys | massive_tokens(hidden, self.lengths)
        return self.keys


def allowed_keys(maps: Tensor) -> Tensor:
    """Return the keys that each query may see: those with any weight in any row or head. [rows, heads, q, k] -> bool [q, k]."""
    return maps.amax((0, 1)) > 0


def count_keys(allowed: Tensor, sinks: Tensor) -> Tensor:
    """Return the number of keys left to each query without the sinks. allowed: [q, k], sinks: [rows, k] -> [rows, q]."""
    return (~sinks).float() @ allowed.float().T


def strip_sinks(maps: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Take the sink keys out and renormalize. maps: [rows, heads, q, k], sinks: bool [rows, k] -> (maps, mass left [rows, heads, q]).

    Rows with less left than `LEAST_MASS` are all zero.
    """
    stripped = maps.detach().float() * (~sinks)[:, None, None, :]
    mass = stripped.sum(-1)
    scale = torch.where(mass > LEAST_MASS, 1 / mass.clamp_min(LEAST_MASS), 0.0)
    return stripped.mul_(scale[..., None]), mass


def usable_queries(mass: Tensor, keys: Tensor) -> Tensor:
    """Return the queries that count: with some mass beside the sinks and enough keys. mass: [rows, heads, q], keys: [rows, q] -> bool [rows, heads, q]."""
    return (mass > LEAST_MASS) & (keys >= LEAST_KEYS)[:, None, :]


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean over the last axis where `where` holds; NaN where nowhere. [..., q] -> float64 [...] on the CPU."""
    total = torch.where(where, values, 0.0).sum(-1).cpu().double()
    return total / where.sum(-1).cpu().double()


def entropy_nats(maps: Tensor) -> Tensor:
    """Return the entropy of each attention row. [..., q, k] -> [..., q], nats."""
    tiny = torch.finfo(maps.dtype).tiny  # 0 ln 0 is 0; `torch.special.entr` takes several times as long
    return -(maps.clamp_min(tiny).log_().mul_(maps)).sum(-1)


def spread(stripped: Tensor, mass: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (entropy 0..1, entropy in nats, sink mass 0..1), each float64 [rows, heads], means over queries with >= 8 keys.

    stripped: [rows, heads, q, k] and mass: [rows, heads, q] from `strip_sinks`, keys: [rows, q] from `count_keys`. Entropies are
    NaN where a head rests on the sinks wholly, sink mass where no query has 8 keys.
    """
    usable = usable_queries(mass, keys)
    nats = entropy_nats(stripped)
    share = (nats / keys.clamp_min(2).log()[:, None, :]).clamp_max(1.0)
    sink = (1 - mass).clamp(0.0, 1.0)
    enough = (keys >= LEAST_KEYS)[:, None, :].expand_as(sink)
    return mean_where(share, usable), mean_where(nats, usable), mean_where(sink, enough)


def js_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon distance (base 2, 0..1) of each attention row. Both [..., q, k], rows summing to 1 -> [..., q].

    With m the mean of both and d = (p - q) / (p + q), the divergence is sum m ((1 + d) ln(1 + d) + (1 - d) ln(1 - d)) / 2: no term is
    negative, so nearly equal rows lose no digits, as a difference of entropies would.
    """
    if first.dim() > 3:  # one row of a batch at a time stays in the processor's cache
        return torch.stack([js_distance(p, q) for p, q in zip(first, second, strict=True)])
    both = first + second
    edge = 1 - 1e-7  # keeps ln(0) out; exact to 1e-6
    d = (first - second).div_(both.clamp_min(torch.finfo(both.dtype).tiny)).clamp_(-edge, edge)
    terms = torch.log1p(d).mul_(1 + d)
    d.neg_()
    terms.addcmul_(torch.log1p(d), 1 + d)
    divergence = terms.mul_(both).sum(-1) / (4 * math.log(2))
    return divergence.clamp(0.0, 1.0).sqrt()


# --- drift: how far quantized weights move the maps ------------------------------------------------------------------------


@dataclass
class InStep:
    """One layer of one batch. Hidden states [rows, tokens, width] are what the layer read; maps [rows, heads, queries, keys].

    Beside the reference's map of the layer:
    - *local*: this layer's weights changed, on the hidden state that the reference's layer read: what the layer itself does to its map;
    - *cumulative*: all weights changed, on the changed model's own hidden state: what the map of the whole model becomes;
    - *noise*: the reference weights, the whole model in the other precision (bfloat16 for a float32 model, float32 for a
      half-precision one): what nobody would call a change.
    """

    layer: int
    reference_hidden: Tensor
    changed_hidden: Tensor
    reference: Tensor
    local: Tensor
    cumulative: Tensor
    noise: Tensor


@torch.no_grad()
def in_step(
    decoder: Decoder, input_ids: Tensor, changed: Mapping[int, Mapping[str, Tensor]], on_step: Callable[[InStep], None]
) -> None:
    """Run the reference and the changed model side by side over `input_ids` [rows, tokens]; `on_step` gets each layer with a map.

    Each layer runs as often as there are maps to compare before the next one does, so that only one layer's maps live at a time.
    The model holds the reference weights; changed: layer -> module name -> weight [out, in].
    """
    start = layer_inputs(decoder, input_ids)
    other = torch.float32 if start.hidden.dtype != torch.float32 else torch.bfloat16
    reference = moved = start.hidden
    rounded = start.hidden.to(other)
    maps: list[Tensor] = []  # of the layer that runs: reference, local, cumulative, noise
    of_reference, of_moved, of_rounded = start.fresh(), start.fresh(), start.fresh()
    with capturing(decoder, lambda layer, hidden, of_layer: maps.append(of_layer)):
        for index, (layer, _) in enumerate(zip(decoder.layers, start.calls, strict=False)):
            maps.clear()
            before = rows_and_tokens(decoder, reference), rows_and_tokens(decoder, moved)
            local = copy_shared(of_reference)
            with decoder.held(index):
                following = run_layer(layer, reference, start.call(index, of_reference))
                with decoder.swapped(changed.get(index, {})):
                    run_layer(layer, reference, start.call(index, local))
                    moved = run_layer(layer, moved, start.call(index, of_moved))
                with in_dtype(layer, other):
                    rounded = run_layer(layer, rounded, _rounded_call(start.call(index, of_rounded), of_rounded, other))
            reference = following
            if len(maps) == 4:
                on_step(InStep(index, *before, *maps))


def _rounded_call(call: Call, shared: Shared, dtype: torch.dtype) -> Call:
    """Return the call with its tensors in `dtype`, but for what layers share: they write it in that dtype themselves."""
    containers = {id(container) for container in shared.values()}
    args, kwargs = call

    def rounded(value: Any) -> Any:
        return value if id(value) in containers else to_dtype(value, dtype)

    return tuple(map(rounded, args)), {name: rounded(value) for name, value in kwargs.items()}


@contextmanager
def in_dtype(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Make the layer compute in `dtype` within the block; its own tensors come back, not rounded copies."""
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
    """Return `value` with every floating-point tensor in it (tuples, lists and dicts, nested) as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_dtype(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_dtype(part, dtype) for part in value)
    return value


def drifts(step: InStep, sinks: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Return the mean Jensen-Shannon distance to the reference's maps over heads and usable queries: name -> float64 [rows], NaN where none.

    Names are "local", "cumulative" and "noise". sinks: bool [rows, keys] of the reference, keys: [rows, queries] left to each query.
    """
    reference, mass = strip_sinks(step.reference, sinks)
    usable = usable_queries(mass, keys)
    result = {}
    for name in ("local", "cumulative", "noise"):
        maps, mass = strip_sinks(getattr(step, name), sinks)
        both = usable & usable_queries(mass, keys)
        result[name] = mean_where(js_distance(reference, maps).flatten(1), both.flatten(1))  # over heads and queries
    return result
