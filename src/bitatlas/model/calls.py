"""Which linear modules of a model do their work when they are called, so that a quantized weight can be measured and packed.

Some families have linear modules that only hold a weight: the module around them reads it and multiplies for itself (mamba's `dt_proj`), or
nothing reads it (keys and values of layers that use those of others). What is done to modules as they are called (curvature, input
moments, packed weights) passes such a weight by.

A skeleton is asked, without any weight: every parameter is one number seen through the parameter's shape, every linear module answers
with a constant and tells that it was called, and a few tokens go through. No product is computed and
no memory is taken. An expert that no token came to is known by the others of its kind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.model.linear import shape_of

TOKENS = 5  # that go through, of two rows


@dataclass(frozen=True)
class Calls:
    """Names of linear modules. `uncalled` is empty where the model could not be run."""

    uncalled: frozenset[str]  # their weight is read by others, or by nobody
    nonlinear: frozenset[
        str
    ]  # more is done with their weight than to multiply (groups of inputs, each with a part of the weight)


@torch.no_grad()
def calls_of(model: Any, layers_path: str, names: list[str]) -> Calls:
    """Return how the linear modules `names` of `model` are used, a skeleton (see `streaming.without_weights`) that is of no use afterwards."""
    called: set[str] = set()
    _placeholders(model)
    modules = {name: model.get_submodule(name) for name in names}
    overridden = [n for n, m in modules.items() if isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward]
    nonlinear = frozenset(name for name in overridden if not _multiplies(modules[name]))
    model.set_experts_implementation("eager")  # fused kernels would need real weights
    _answering(model, {id(module): name for name, module in modules.items()}, called)
    try:
        model(input_ids=torch.ones(2, TOKENS, dtype=torch.int64), use_cache=False)
    except Exception:  # each family fails in its own way on numbers that mean nothing
        return Calls(frozenset(), nonlinear)
    kinds = {_of_experts(name, layers_path) for name in called}
    return Calls(frozenset(name for name in names if _of_experts(name, layers_path) not in kinds), nonlinear)


def _of_experts(name: str, layers_path: str) -> str:
    """Return a module's name without the numbers behind its layer's, which all experts of a layer share."""
    layer, _, rest = name.removeprefix(f"{layers_path}.").partition(".")
    return f"{layer}." + re.sub(r"\.\d+(?=\.|$)", "", rest)


def _multiplies(module: Any) -> bool:
    """Return whether a module with a forward of its own gives what nn.Linear would, on some inputs."""
    x = torch.rand(2, 3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight.dtype)
    try:
        result, expected = module(x), nn.functional.linear(x, module.weight, module.bias)
        return result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-2)
    except Exception:  # it wants its inputs in another form
        return False


def _placeholders(model: nn.Module) -> None:
    """Replace every parameter by one number seen through its shape."""
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in placeholders:
                number = torch.full((1,), 0.5).to(parameter.dtype)
                placeholders[id(parameter)] = nn.Parameter(number.expand(parameter.shape), requires_grad=False)
            module._parameters[name] = placeholders[id(parameter)]


def _answering(model: nn.Module, names: dict[int, str], called: set[str]) -> None:
    """Let every linear module answer with a constant from now on; `called` takes the names of those that `names` has by their id."""
    for module in list(model.modules()):
        # others may give more than a product (llama4's router)
        if type(module).forward is nn.Linear.forward or id(module) in names:
            module.forward = _answer(shape_of(module)[0], names.get(id(module), ""), called)  # type: ignore[method-assign]


def _answer(width: int, name: str, called: set[str]) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.add(name)
        return x.new_full((*x.shape[:-1], width), 0.5)

    return forward
