"""Run a decoder layer by layer, so that no layer is computed twice.

`trace` records one forward pass: what every layer returned and what it was called with besides the hidden state (masks,
positions, rotary tables). `resume` runs the model again from a given layer on: the layers in front of it hand out what they
returned before. The model's own forward does the rest, so the result is what a full pass gives, to the last bit, for every
architecture; `run_layer` runs one layer alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.checkpoint import decoder_layers

Call = tuple[tuple[Any, ...], dict[str, Any]]


LOGIT_BYTES = 2**26  # of one batch's float32 logits: a few such arrays are alive at a time


def batch_rows(row_length: int, vocabulary: int) -> int:
    """Rows in a batch: at most 16, and one batch's logits at most 64 MiB."""
    return max(1, min(16, LOGIT_BYTES // (4 * row_length * vocabulary)))


@dataclass
class Trace:
    """One forward pass. `embedded` [rows, tokens, width] goes into layer 0; `outputs[i]` is what layer i returned."""

    embedded: Tensor
    outputs: list[Any]
    calls: list[Call]
    logits: Tensor  # [rows, tokens, vocabulary]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a layer's output, which some architectures wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden state that a layer was called with, and the other arguments."""
    if args:
        return args[0], (args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


@torch.no_grad()
def trace(model: nn.Module, input_ids: Tensor, keep_outputs: bool = True) -> Trace:
    """One forward pass over `input_ids` [rows, tokens], recorded layer by layer (`keep_outputs=False`: the calls alone)."""
    first: list[Tensor] = []
    outputs: list[Any] = []
    calls: list[Call] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split(args, kwargs)
        if not calls:
            first.append(hidden)
        calls.append(call)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if keep_outputs:
            outputs.append(output)

    layers = decoder_layers(model)
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(first[0], outputs, calls, logits)


@torch.no_grad()
def run_layer(model: nn.Module, layer: int, hidden: Tensor, call: Call) -> Tensor:
    """The hidden state [rows, tokens, width] after one layer, called as it was in the trace."""
    args, kwargs = call
    return hidden_of(decoder_layers(model)[layer](hidden, *args, **kwargs))


@torch.no_grad()
def resume(model: nn.Module, input_ids: Tensor, layer: int, outputs: list[Any]) -> Tensor:
    """Logits [rows, tokens, vocabulary] of a pass that starts at `layer` from the recorded outputs of the layers before it."""
    with _standing_in(decoder_layers(model)[:layer], outputs):
        return model(input_ids=input_ids, use_cache=False).logits


@contextmanager
def _standing_in(layers: nn.ModuleList, outputs: list[Any]) -> Iterator[None]:
    """Within the block, each of `layers` returns its recorded output without computing anything."""
    try:
        for layer, output in zip(layers, outputs, strict=False):
            layer.forward = lambda *args, _output=output, **kwargs: _output
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
