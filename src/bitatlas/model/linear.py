"""Linear modules: what is one, which way round its weight lies, and experts that a model holds in one tensor.

`nn.Linear` keeps its weight as [out, in], GPT-2's `Conv1D` as [in, out]. Everything else here speaks of [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: object) -> bool:
    """Return whether `module` multiplies its input by a weight matrix."""
    return isinstance(module, nn.Linear | Conv1D | ExpertLinear)


def is_transposed(module: object) -> bool:
    """Return whether a linear module keeps its weight as [in, out]."""
    return module.transposed if isinstance(module, ExpertLinear) else isinstance(module, Conv1D)


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


# --- experts ------------------------------------------------------------------------------------------------------------
#
# transformers keeps the experts of a layer as `gate_up_proj` [experts, 2 * inner, hidden] and `down_proj` [experts, hidden, inner] (GPT-OSS
# and Llama 4 the other way round). `split_experts` puts a list of `ExpertLinear` in such a tensor's place, each with a view of it, so nothing
# is copied. The layer's own forward stays: where it takes an expert's weight and multiplies, torch hands the product to the expert's module
# (`__torch_function__`), which is called like any linear module, hooks included.
#
# Left out: fused kernels, which want one tensor (`eager` is set); families whose forward does more with the tensor than to multiply by it.
# Source: transformers 5.24, `integrations/moe.py`; torch, "Extending PyTorch".

TRANSPOSED = ("Llama4TextExperts",)  # classes that keep [experts, in, out] without saying so


class ExpertLinear(nn.Module):
    """One expert's part of a fused tensor: `weight` is [out, in], or [in, out] where the tensor lies so."""

    def __init__(self, weight: nn.Parameter, transposed: bool):
        super().__init__()
        self.weight = weight
        self.transposed = transposed

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight if self.transposed else nn.functional.linear(inputs, self.weight)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiply by an expert: `x @ expert`, or `linear(x, expert)`."""
        inputs, expert, *rest = args
        is_matmul = function in (torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if not isinstance(expert, ExpertLinear) or kwargs or rest or not (is_matmul or function is nn.functional.linear):
            return NotImplemented
        return expert(inputs) if expert.transposed == is_matmul else NotImplemented


class ExpertList(nn.ModuleList):
    """The experts in the place of the tensor that they were: `list[expert]` and `bmm` are what families do with it."""

    def __init__(self, fused: Tensor, transposed: bool):
        super().__init__(ExpertLinear(nn.Parameter(part, requires_grad=False), transposed) for part in fused)
        self.shape, self.transposed = fused.shape, transposed

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(int(index))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiply [experts, tokens, in] by all experts; tokens that are 0, which an expert was not given, stay 0."""
        inputs, experts, *rest = args
        if function is not torch.bmm or rest or kwargs or not experts.transposed:
            return NotImplemented
        results = []
        for expert, of_expert in zip(experts, inputs, strict=True):
            rows = of_expert.any(1).nonzero()[:, 0]
            result = of_expert.new_zeros(len(of_expert), experts.shape[2])
            results.append(result.index_copy(0, rows, expert(of_expert[rows])) if len(rows) else result)
        return torch.stack(results)


def split_experts(model: Any) -> None:
    """Replace every fused tensor of experts by a list of modules, which share its memory."""
    owners = [module for module in model.modules() if type(module).__name__.endswith("Experts") and _fused_names(module)]
    for owner in owners:
        transposed = bool(getattr(owner, "is_transposed", type(owner).__name__ in TRANSPOSED))
        for name in _fused_names(owner):
            fused = owner._parameters.pop(name)
            setattr(owner, name, ExpertList(fused.detach(), transposed))
    if owners:
        model.set_experts_implementation("eager")


def _fused_names(module: nn.Module) -> list[str]:
    """Return the names of the tensors [experts, ., .] that a module holds itself."""
    return [name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() == 3]


def fused_of(name: str) -> tuple[str, int]:
    """Return (the fused tensor's name, the expert's number) of the module `name`, an `ExpertLinear`."""
    fused, _, number = name.rpartition(".")
    return fused, int(number)
