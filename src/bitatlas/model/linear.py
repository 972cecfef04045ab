"""Linear modules: what is one, and which way round its weight lies.

`nn.Linear` keeps its weight as [out, in], GPT-2's `Conv1D` as [in, out]. Everything else here speaks of [out, in].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: object) -> bool:
    """Return whether `module` multiplies its input by a weight matrix."""
    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: object) -> bool:
    """Return whether a linear module keeps its weight as [in, out]."""
    return isinstance(module, Conv1D)


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a view of `weight`: as [out, in] of what `module` keeps, or, the same the other way, as `module` keeps it of [out, in]."""
    return weight.T if is_transposed(module) else weight


def weight_of(module: nn.Module) -> Tensor:
    """Return a linear module's weight as [out, in], a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return oriented(module, weight.detach())


def shape_of(module: Any) -> tuple[int, int]:
    """Return (out, in) of a linear module; nothing is read."""
    first, second = module.weight.shape[:2]
    return (second, first) if is_transposed(module) else (first, second)
