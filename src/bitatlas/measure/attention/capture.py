"""Captures the attention maps of a running model, one layer at a time, and checks which heads can be told apart.

While `capturing` is open, each decoder layer that runs hands over the hidden state it read and its attention map. The receiver keeps
numbers, never the map, so one layer's map of one batch is all that is ever in memory, however many sequences are read.

Only the eager attention of transformers computes maps; `eager` switches to it and back. The attention module is found by name or class
in any decoder layer; layers without one (state-space, linear attention) or whose output holds no map are passed over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitatlas.model.decoder import Decoder
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.layerwise import is_chain, record, rows_and_tokens, run_layer
from bitatlas.model.linear import shape_of

MAP_TOLERANCE = 0.02  # of what a query's weights add up to: bfloat16 keeps eight bits of each
ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")
OnMap = Callable[[int, Tensor, Tensor], None]  # layer, hidden [rows, tokens, width], map [rows, heads, queries, keys]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Make the model compute its attention maps within the block; the implementation it had comes back."""
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """Return the self-attention module of a decoder layer, or None."""
    children = dict(layer.named_children())
    for name in ATTENTION_NAMES:
        if name in children:
            return children[name]
    return next((child for child in children.values() if type(child).__name__.endswith("Attention")), None)


def map_in(output: Any, rows: int, tokens: int, sinks: bool = False) -> Tensor | None:
    """Return the attention map [rows, heads, queries, keys] in what an attention module returned for [rows, tokens, width], or None.

    `sinks`: the softmax has terms beside the keys', so a query's weights may add up to less than 1.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    maps = (part for part in parts if isinstance(part, Tensor) and part.dim() == 4 and _is_map(part, rows, tokens, sinks))
    return next(maps, None)


def _is_map(part: Tensor, rows: int, tokens: int, sinks: bool) -> bool:
    """Return whether it is the softmax of a causal attention: the state of a linear attention may have the same shape."""
    if part.shape[0] != rows or part.shape[2:] != (tokens, tokens):
        return False
    sums = part.float().sum(-1)
    ahead = part.triu(1).abs().amax()  # 0 where no query looks at a later key
    low, high = 0.0 if sinks else 1 - MAP_TOLERANCE, 1 + MAP_TOLERANCE
    return bool((part.amin() >= 0) & (ahead == 0) & (sums.amin() >= low) & (sums.amax() <= high))


def _has_sinks(attention: nn.Module) -> bool:
    """Return whether it has learned sinks, which take a part of every query's weight."""
    return any("sink" in name.rpartition(".")[2] for name, _ in attention.named_parameters())


def output_projection(layer: nn.Module, heads: int) -> nn.Module | None:
    """Return the module of a decoder layer that reads the outputs of its `heads` heads side by side, or None."""
    attention = attention_of(layer)
    for name, module in attention.named_modules() if attention is not None else ():
        if name.rpartition(".")[2] in OUTPUT_NAMES and isinstance(getattr(module, "weight", None), Tensor):
            return module if shape_of(module)[1] % heads == 0 else None
    return None


@contextmanager
def capturing(decoder: Decoder, on_map: OnMap) -> Iterator[None]:
    """Call `on_map` for each decoder layer that runs and computes a map within the block."""
    hooks = []
    for index, layer in enumerate(decoder.layers):
        attention = attention_of(layer)
        if attention is None:
            continue
        entered: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], entered: list[Tensor] = entered) -> None:
            entered[:] = [rows_and_tokens(decoder, args[0] if args else kwargs["hidden_states"])]

        def after(
            module: nn.Module,
            args: Any,
            output: Any,
            index: int = index,
            entered: list[Tensor] = entered,
            sinks: bool = _has_sinks(attention),
        ) -> None:
            maps = map_in(output, entered[0].shape[0], entered[0].shape[1], sinks) if entered else None
            if maps is not None:
                on_map(index, entered.pop(), maps)
            entered.clear()

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(attention.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run_captured(decoder: Decoder, input_ids: Tensor, on_map: OnMap) -> None:
    """Run one forward pass over `input_ids` [rows, tokens], without the logits, and hand each layer's map to `on_map`."""
    with capturing(decoder, on_map):
        decoder.model.base_model(input_ids=input_ids, use_cache=False)


# --- can heads be told apart? ------------------------------------------------------------------------------------------------

MIXED = "what a head's columns put out does not come from that head's attention map alone"


class _ZeroedHead(TorchFunctionMode):
    """Within the block, attention maps of `heads` heads have zeros in the place of one of them."""

    def __init__(self, heads: int, head: int):
        super().__init__()
        self.heads, self.head = heads, head

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and result.dim() == 4 and result.shape[1] == self.heads:
            result = result.clone()
            result[:, self.head] = 0
        return result


@torch.no_grad()
def heads_apart(decoder: Decoder, count: Mapping[int, int]) -> bool:
    """Return whether the output projection of the layers in `count` (layer -> heads) reads the heads side by side, each from its own map.

    Only then is a role that is read off a map the role of those columns, and only then can a head be removed by them. It is tried out
    in one layer of each class: a head's map is set to zero, and the columns that change must be that head's and no other's.
    Differential attention, where a head's output is the difference of two maps, fails it, and so do norms over all heads in front of
    the projection. False where it cannot be tried. Left out: whether a head could be told apart in another way.
    """
    if not is_chain(decoder):
        return False
    layers = decoder.layers
    tried = {(type(layers[layer]), heads): layer for layer, heads in sorted(count.items(), reverse=True)}
    with eager(decoder.model), StateCache(2**30) as shelf:
        recorded = record(decoder, [decoder.probe_ids()], shelf)
        for (_, heads), index in tried.items():
            module = output_projection(layers[index], heads)
            if module is None:
                return False

            with decoder.held(index):
                hidden = recorded.inputs.get((index, 0))
                whole, first, last = (
                    _read(layers[index], module, hidden, recorded.starts[0].call(index, recorded.shared_at(index, 0)), mode)
                    for mode in (contextlib.nullcontext(), _ZeroedHead(heads, 0), _ZeroedHead(heads, heads - 1))
                )
            for head, without in ((0, first), (heads - 1, last)):
                width = whole.shape[-1] // heads
                columns = slice(head * width, (head + 1) * width)
                moved = (without - whole).abs().flatten(0, -2).amax(0) > 0  # [inputs]
                silent = not moved[columns].any() and bool(whole[..., columns].any())  # a head may put out nothing at all
                if silent or moved.sum() > moved[columns].sum():
                    return False
    return True


def _read(
    layer: nn.Module, projection: nn.Module, hidden: Tensor, call: Any, mode: contextlib.AbstractContextManager[Any]
) -> Tensor:
    """Return what the output projection reads while a layer runs in `mode`: [..., inputs]."""
    seen: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        with mode:
            run_layer(layer, hidden, call)
    finally:
        hook.remove()
    return seen[-1]
