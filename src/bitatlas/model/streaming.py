"""Decoder layers whose weights are read when a layer runs and dropped behind it, so that a model needs the memory of one layer.

`open_stream` builds a model whose embeddings, norms and head are in memory while every parameter of the decoder layers is a placeholder:
one NaN, seen through the parameter's shape, so that whatever would use it unread shows at once. A layer's own forward is wrapped;
everything that calls it works as on a whole model. `held` keeps a layer for several calls. A swap (see `decoder`) is put beside the file's weights
and takes their place when a layer is read.

Experts that the model holds in one tensor are read one by one (see `linear`), whichever way they are stored.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.model.linear import ExpertLinear, fused_of, oriented
from bitatlas.model.tensor_files import Sources

Value = TypeVar("Value")


class LazyMapping(Mapping[str, Value]):
    """A mapping whose values are made anew whenever they are asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Value]):
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Stream:
    """Reads the decoder layers of `model`, whose parameters come from `sources`. `check` is called before a layer is read: are the files
    still the same?"""

    def __init__(self, model: nn.Module, layers_path: str, sources: Sources, check: Callable[[], None]):
        self.model = model
        self.sources = sources
        self.check = check
        self.reads = 0  # of layers, for those who count
        self._swaps: list[Mapping[str, Tensor]] = []
        self._depth: dict[int, int] = {}
        self._layer_of: dict[str, int] = {}
        layers = model.get_submodule(layers_path)
        assert isinstance(layers, nn.ModuleList)
        self._layers = layers
        self._parameters: list[list[tuple[str, nn.Parameter, bool]]] = []  # of a layer: module, parameter, is it the weight
        self._reads: dict[int, Callable[[], Tensor]] = {}  # of a placeholder, by its id
        weight = next(p for name, p in model.named_parameters() if not name.startswith(layers_path + "."))
        self._device, self._dtype = weight.device, weight.dtype
        for index, layer in enumerate(layers):
            self._prepare(index, layer, f"{layers_path}.{index}")

    def _prepare(self, index: int, layer: nn.Module, path: str) -> None:
        parameters = []
        for module_name, module in layer.named_modules(prefix=path):
            self._layer_of[module_name] = index
            for name, parameter in module.named_parameters(recurse=False):
                placeholder = nn.Parameter(self._placeholder(parameter.shape), requires_grad=False)
                module._parameters[name] = placeholder
                self._reads[id(placeholder)] = self._read_of(module, module_name, name)
                parameters.append((module_name, placeholder, name == "weight"))
        self._parameters.append(parameters)
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.held(index):
                return forward(*args, **kwargs)

        layer.forward = run

    def _read_of(self, module: nn.Module, path: str, name: str) -> Callable[[], Tensor]:
        """Return what reads a parameter of the module at `path`; UserError where the files do not have it."""
        fused, expert = fused_of(path) if isinstance(module, ExpertLinear) else (f"{path}.{name}", None)
        if fused not in self.sources:
            raise _missing(fused)
        return partial(self.sources.read, fused) if expert is None else partial(self.sources.read_expert, fused, expert)

    def _placeholder(self, shape: torch.Size) -> Tensor:
        return torch.full((1,), torch.nan, device=self._device, dtype=self._dtype).expand(shape)

    @contextmanager
    def held(self, layer: int) -> Iterator[None]:
        """Keep the layer's weights in memory within the block."""
        if not self._depth.get(layer):
            self.check()
            self.reads += 1
            for module, parameter, is_weight in self._parameters[layer]:
                parameter.data = self._current(module, parameter, is_weight)
        self._depth[layer] = self._depth.get(layer, 0) + 1
        try:
            yield
        finally:
            self._depth[layer] -= 1
            if not self._depth[layer]:
                for _, parameter, _ in self._parameters[layer]:
                    parameter.data = self._placeholder(parameter.shape)
                release_free_memory()

    def weight(self, module: str) -> Tensor:
        """Return the weight [out, in] that a linear module has now, swaps included."""
        owner = self.model.get_submodule(module)
        parameter = owner.weight
        assert isinstance(parameter, nn.Parameter)
        data = parameter.data if self._depth.get(self._layer_of[module]) else self._current(module, parameter, True)
        return oriented(owner, data)

    def stored(self, module: str) -> Tensor:
        """Return the checkpoint's weight [out, in] of a linear module."""
        owner = self.model.get_submodule(module)
        return oriented(owner, self._read(owner.weight))

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Give module `name` the weight `weights[name]` [out, in] within the block; it is looked up when its layer is read."""
        self._swaps.append(weights)
        before: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for layer in [layer for layer, depth in self._depth.items() if depth]:
                for module, parameter, is_weight in self._parameters[layer]:
                    if is_weight and module in weights:
                        new = self._current(module, parameter, True)
                        before.append((parameter, parameter.data))
                        parameter.data = new
            yield
        finally:
            self._swaps.pop()
            for parameter, data in reversed(before):
                parameter.data = data

    def _current(self, module: str, parameter: nn.Parameter, is_weight: bool) -> Tensor:
        swap = next((swap for swap in reversed(self._swaps) if module in swap), None) if is_weight else None
        if swap is None:
            return self._read(parameter)
        weight = swap[module]
        stored = oriented(self.model.get_submodule(module), weight)
        if stored.shape != parameter.shape:
            raise ValueError(f"{module}: weight of shape {tuple(weight.shape)} does not fit")
        return stored.to(self._device, self._dtype)

    def _read(self, parameter: Any) -> Tensor:
        return self._reads[id(parameter)]().to(self._device, self._dtype)


def open_stream(
    model: Any, layers_path: str, sources: Sources, device: str, dtype: torch.dtype, check: Callable[[], None]
) -> Stream:
    """Put what is outside the decoder layers of `model` (see `without_weights`) into memory, and return what reads the rest.

    UserError where a parameter is not in the files.
    """
    parameters, inside = dict(model.named_parameters(remove_duplicate=False)), f"{layers_path}."
    outside = [name for name in parameters if not name.startswith(inside)]
    for name in outside:
        if name in sources:
            owner, _, last = name.rpartition(".")
            tensor = sources.read(name).to(device, dtype)
            model.get_submodule(owner)._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    # as transformers does it in memory: a head that the config ties and the file stores otherwise stays the file's
    model.tie_weights(missing_keys={name for name in outside if name not in sources}, recompute_mapping=False)
    missing = [name for name, p in model.named_parameters() if p.is_meta and not name.startswith(inside)]
    if missing:
        raise _missing(missing[0])
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    stream = Stream(model, layers_path, sources, check)
    model.eval().requires_grad_(False)
    return stream


def _missing(name: str) -> UserError:
    return UserError(
        f"--memory: {name} is not in the weights files as transformers makes it, so they cannot be read layer by layer"
    )


@contextmanager
def without_weights() -> Iterator[None]:
    """Put every new parameter of the block on torch's meta device, while buffers (rotary tables, masks) are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


# --- glibc's allocator -------------------------------------------------------------------------------------------------

# A run that is promised to stay below some memory has to hand back what is free: by itself glibc learns to keep blocks of a layer's size, in
# pieces into which the next layer no longer fits. Other C libraries have their own ways.

MMAP_THRESHOLD = -3  # mallopt's number of it, in malloc.h
# Larger blocks are handed back at once. Below, making each anew would cost more time (a third of a run at 1 MiB) than keeping costs memory.
LARGE_BYTES = 2**25


def release_large_blocks() -> None:
    """Let large blocks go back to the system as soon as they are free, from now on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BYTES)


def release_free_memory() -> None:
    """Give what is free now back to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
