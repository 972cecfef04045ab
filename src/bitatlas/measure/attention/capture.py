"""Attention maps of a running model, one layer at a time.

While `capturing` is open, each decoder layer that runs hands over the hidden state it read and its attention map. The receiver keeps
numbers, never the map, so one layer's map of one batch is all that is ever in memory, however many sequences are read.

Only the eager attention of transformers computes maps; `eager` switches to it and back. The attention module is found by name or class
in any decoder layer; layers without one (state-space, linear attention) or whose output holds no map are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitatlas.model.checkpoint import decoder_layers
from bitatlas.model.layerwise import rows_and_tokens

MAP_TOLERANCE = 0.02  # of what a query's weights add up to: bfloat16 keeps eight bits of each
ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")
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


def map_in(output: Any, rows: int, tokens: int, sinks: bool = False) -> Tensor | None:
    """The attention map [rows, heads, queries, keys] in what an attention module returned for [rows, tokens, width], or None.

    `sinks`: the softmax has terms beside the keys', so a query's weights may add up to less than 1.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    maps = [part for part in parts if isinstance(part, Tensor) and part.dim() == 4 and _is_map(part, rows, tokens, sinks)]
    return maps[0] if maps else None


def _is_map(part: Tensor, rows: int, tokens: int, sinks: bool) -> bool:
    """Is it the softmax of a causal attention? The state of a linear attention may have the same shape."""
    if part.shape[0] != rows or part.shape[2:] != (tokens, tokens):
        return False
    sums = part.float().sum(-1)
    ahead = part.triu(1).abs().amax()  # 0 where no query looks at a later key
    low, high = 0.0 if sinks else 1 - MAP_TOLERANCE, 1 + MAP_TOLERANCE
    return bool((part.amin() >= 0) & (ahead == 0) & (sums.amin() >= low) & (sums.amax() <= high))


def _has_sinks(attention: nn.Module) -> bool:
    """Does it have learned sinks, which take a part of every query's weight?"""
    return any("sink" in name.rpartition(".")[2] for name, _ in attention.named_parameters())


def output_projection(layer: nn.Module, heads: int) -> nn.Module | None:
    """The module of a decoder layer that reads the outputs of its `heads` heads side by side, or None."""
    attention = attention_of(layer)
    for name, module in attention.named_modules() if attention is not None else ():
        if name.rpartition(".")[2] in OUTPUT_NAMES and isinstance(getattr(module, "weight", None), Tensor):
            return module if inputs_of(module) % heads == 0 else None
    return None


def inputs_of(module: nn.Module) -> int:
    """How many numbers a linear module reads."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]


@contextmanager
def capturing(model: Any, on_map: OnMap) -> Iterator[None]:
    """Within the block `on_map` is called for each decoder layer of `model` that runs and computes a map."""
    hooks = []
    for index, layer in enumerate(decoder_layers(model)):
        attention = attention_of(layer)
        if attention is None:
            continue
        entered: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], entered: list[Tensor] = entered) -> None:
            entered[:] = [rows_and_tokens(model, args[0] if args else kwargs["hidden_states"])]

        def after(
            module: nn.Module,
            args: Any,
            output: Any,
            index: int = index,
            entered: list[Tensor] = entered,
            sinks: bool = _has_sinks(attention),
        ) -> None:
            found = map_in(output, entered[0].shape[0], entered[0].shape[1], sinks) if entered else None
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
def run_captured(model: Any, input_ids: Tensor, on_map: OnMap) -> None:
    """One forward pass over `input_ids` [rows, tokens], without the logits, each layer's map handed to `on_map`."""
    with capturing(model, on_map):
        model.base_model(input_ids=input_ids, use_cache=False)
