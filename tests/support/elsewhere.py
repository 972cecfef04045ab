"""A second device without a second device: tensors that say they are on `ELSEWHERE` and refuse to meet one that is not.

The numbers lie in ordinary memory, so everything can be computed; what would fail on an accelerator fails here: an operation on tensors of
both devices (numbers without dimensions are let through, as torch does), and `.numpy()` of one that was not moved. Two things together see every
operation of torch: the tensors' own class, and a mode for what makes tensors out of nothing. `Elsewhere.reads` counts how often a
number was waited for (`.item()`, `bool`, `.cpu()`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("lazy:0")
READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")


class Moved(Tensor):
    """A tensor that says it is on `ELSEWHERE`. `numbers`: the ordinary one."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Moved:
        moved = Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype, device=ELSEWHERE
        )  # fmt: skip
        moved.numbers = numbers
        return moved

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    @property  # a parameter's storage is exchanged where weights are swapped
    def data(self) -> Tensor:  # type: ignore[override]
        return Moved(self.numbers.detach())

    @data.setter
    def data(self, value: Moved) -> None:
        self.numbers = value.numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """The block in which `ELSEWHERE` exists."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        back = kwargs.get("device") == torch.device("cpu") and any(isinstance(a, Moved) for a in args)
        self.reads += str(func) in READS or back
        return run(func, args, kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the ordinary tensors inside; RuntimeError where tensors of both devices meet."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    moved = any(isinstance(tensor, Moved) for tensor in tensors)
    device = kwargs.get("device")
    copies = "copy" in str(func)  # of tensors from one device to the other
    if moved and not copies and any(not isinstance(tensor, Moved) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"{func}: tensors on {ELSEWHERE} and on the CPU")
    inner = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
    result = func(*tree_map(ordinary, args), **tree_map(ordinary, inner))
    if "copy_" in str(func) or (func.__name__.split(".")[0].endswith("_") and not func.__name__.startswith("__")):
        return args[0]  # in place: where it is, it stays
    there = torch.device(device).type == ELSEWHERE.type if device is not None else moved
    return tree_map(lambda value: Moved(value) if there and isinstance(value, Tensor) else value, result)


def ordinary(value: Any) -> Any:
    """Return the ordinary tensor inside."""
    return value.numbers if isinstance(value, Moved) else value
