"""Is what an attention's output projection reads put together of the heads, side by side, each from its own map?

Only then is a role that is read off a map the role of those columns, and only then can a head be removed by them. It is tried out: a
head's map is set to zero, and the columns that change must be that head's and no other's. Differential attention, where a head's
output is the difference of two maps, fails it, and so do norms over all heads in front of the projection.
Left out: whether a head could be told apart in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitatlas.measure.attention.capture import eager, output_projection
from bitatlas.model.checkpoint import decoder_layers, probe_ids
from bitatlas.model.hidden_states import Shelf
from bitatlas.model.layerwise import is_chain, record, run_layer
from bitatlas.model.streaming import held

MIXED = "what a head's columns put out does not come from that head's attention map alone"


class _Without(TorchFunctionMode):
    """Within the block, attention maps of `heads` heads have zeros in the place of one of them."""

    def __init__(self, heads: int, head: int):
        super().__init__()
        self.heads, self.head = heads, head

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and found.dim() == 4 and found.shape[1] == self.heads:
            found = found.clone()
            found[:, self.head] = 0
        return found


@torch.no_grad()
def heads_apart(model: Any, count: Mapping[int, int]) -> bool:
    """Are all heads of the layers in `count` (layer -> heads) apart? One layer of each class is tried. False where it cannot be."""
    if not is_chain(model):
        return False
    layers = decoder_layers(model)
    tried = {(type(layers[layer]), heads): layer for layer, heads in sorted(count.items(), reverse=True)}
    with eager(model), Shelf(2**30) as shelf:
        recorded = record(model, [probe_ids(model)], shelf)
        for (_, heads), index in tried.items():
            module = output_projection(layers[index], heads)
            if module is None:
                return False

            def read(without: int | None, index: int = index, heads: int = heads, module: nn.Module = module) -> Tensor:
                start = recorded.starts[0]
                with held(model, index):
                    return _read(layers[index], module, recorded.inputs.get((index, 0)), start.call(index, recorded.shared_at(index, 0)),
                                 None if without is None else _Without(heads, without))  # fmt: skip

            whole = read(None)
            for head in {0, heads - 1}:
                width = whole.shape[-1] // heads
                columns = slice(head * width, (head + 1) * width)
                moved = (read(head) - whole).abs().flatten(0, -2).amax(0) > 0  # [inputs]
                silent = not moved[columns].any() and bool(whole[..., columns].any())  # a head may put out nothing at all
                if silent or moved.sum() > moved[columns].sum():
                    return False
    return True


def _read(layer: nn.Module, projection: nn.Module, hidden: Tensor, call: Any, mode: _Without | None) -> Tensor:
    """What the output projection reads while a layer runs: [..., inputs]."""
    seen: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        if mode is None:
            run_layer(layer, hidden, call)
        else:
            with mode:
                run_layer(layer, hidden, call)
    finally:
        hook.remove()
    return seen[-1]
