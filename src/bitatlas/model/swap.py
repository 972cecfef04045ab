"""Change weights of a loaded model for the length of a `with` block; what was there comes back, bit for bit.

The parameter's storage is exchanged, not copied into: swapping costs no memory traffic, and restoring cannot round. Of a model
whose layers are read when they run (see `streaming`), the new weights are looked up when their layer is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitatlas.model.streaming import stream_of


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of module `name` as [out, in], a view whichever way round it is stored (of a streamed model, a copy)."""
    stream = stream_of(model)
    if stream is not None:
        return stream.weight(name)
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of module `name`; nothing is read."""
    module = model.get_submodule(name)
    first, second = module.weight.shape  # type: ignore[union-attr, misc]
    return (second, first) if isinstance(module, Conv1D) else (first, second)


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, module `name` has weight `weights[name]` [out, in]. Nests; restores on any exit.

    Raises ValueError where a shape does not fit, before anything is changed (of a streamed model, when the layer is read).
    """
    stream = stream_of(model)
    if stream is not None:
        with stream.swapped(weights):
            yield
        return
    parameters: dict[str, nn.Parameter] = {}
    new: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module = model.get_submodule(name)
        parameter = module.weight
        assert isinstance(parameter, nn.Parameter)
        stored = weight.T if isinstance(module, Conv1D) else weight
        if stored.shape != parameter.shape:
            raise ValueError(f"{name}: weight of shape {tuple(weight.shape)} does not fit")
        parameters[name] = parameter
        new[name] = stored.to(device=parameter.device, dtype=parameter.dtype)
    old = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = new[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = old[name]
