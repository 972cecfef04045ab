"""Attention maps of a running model, one layer at a time.

While `capturing` is open, each decoder layer that runs hands over the hidden state it read and its attention map. The receiver keeps
numbers, never the map, so one layer's map of one batch is all that is ever in memory, however many sequences are read.

Only the eager attention of transformers computes maps; `eager` switches to it and back. The attention module is found by name or class
in any decoder layer; layers without one (state-space, linear attention) or whose output holds no map are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
OnMap = Callable[[int, Tensor, Tensor], None]  # layer, hidden [rows, tokens, width], map [rows, heads, queries, keys]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Within the block the model computes its attention maps; the implementation it had comes back."""
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The self-attention module of a decoder layer, or None."""
    children = dict(layer.named_children())
    for name in ATTENTION_NAMES:
        if name in children:
            return children[name]
    return next((child for child in children.values() if type(child).__name__.endswith("Attention")), None)


def map_in(output: Any) -> Tensor | None:
    """The attention map [rows, heads, queries, keys] in what an attention module returned, or None."""
    parts = output if isinstance(output, tuple) else (output,)
    maps = [part for part in parts if isinstance(part, Tensor) and part.dim() == 4 and part.shape[2] == part.shape[3]]
    return maps[0] if maps else None


@contextmanager
def capturing(layers: Iterable[nn.Module], on_map: OnMap) -> Iterator[None]:
    """Within the block `on_map` is called for each of the decoder `layers` that runs and computes a map."""
    hooks = []
    for index, layer in enumerate(layers):
        attention = attention_of(layer)
        if attention is None:
            continue
        entered: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], entered: list[Tensor] = entered) -> None:
            entered[:] = [args[0] if args else kwargs["hidden_states"]]

        def after(module: nn.Module, args: Any, output: Any, index: int = index, entered: list[Tensor] = entered) -> None:
            found = map_in(output)
            if found is not None:
                on_map(index, entered.pop(), found)
            entered.clear()

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(attention.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run_captured(model: Any, layers: Iterable[nn.Module], input_ids: Tensor, on_map: OnMap) -> None:
    """One forward pass over `input_ids` [rows, tokens], without the logits, each map of `layers` (the model's) handed to `on_map`."""
    with capturing(layers, on_map):
        model.base_model(input_ids=input_ids, use_cache=False)
