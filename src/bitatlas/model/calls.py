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
    """Names of linear modules. `idle` is empty where the model could not be run."""

    idle: frozenset[str]  # never called: their weight is read by others, or by nobody
    unlike: frozenset[
        str
    ]  # that do something else with their weight than to multiply (groups of inputs, each with a part of the weight)


@torch.no_grad()
def calls_of(model: Any, layers_path: str, names: list[str]) -> Calls:
    """How the linear modules `names` of `model` are used, a skeleton (see `streaming.without_weights`), which is of no other use after."""
    called: set[str] = set()
    _placeholders(model)
    own = [name for name in names if _own_forward(model.get_submodule(name))]
    unlike = frozenset(name for name in own if not _multiplies(model.get_submodule(name)))
    model.set_experts_implementation("eager")  # fused kernels would need real weights
    _answering(model, names, called)
    try:
        model(input_ids=torch.ones(2, TOKENS, dtype=torch.int64), use_cache=False)
    except Exception:  # each family fails in its own way on numbers that mean nothing
        return Calls(frozenset(), unlike)
    kinds = {_of_experts(name, layers_path) for name in called}
    idle = frozenset(name for name in names if _of_experts(name, layers_path) not in kinds)
    return Calls(idle, unlike)


def _of_experts(name: str, layers_path: str) -> str:
    """A module's name without the numbers behind its layer's: the same for all experts of a layer."""
    layer, _, rest = name.removeprefix(f"{layers_path}.").partition(".")
    return f"{layer}." + re.sub(r"\.\d+(?=\.|$)", "", rest)


def _own_forward(module: nn.Module) -> bool:
    """Does it multiply by itself, so that nothing that takes nn.Linear's place would do the same?"""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _multiplies(module: Any) -> bool:
    """Does a module with a forward of its own give what nn.Linear would, on some inputs?"""
    x = torch.rand(2, 3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight.dtype)
    try:
        given = module(x)
        return given.shape == (2, 3, module.out_features) and torch.allclose(
            given, nn.functional.linear(x, module.weight, module.bias), rtol=1e-2
        )
    except Exception:  # it wants its inputs in another form
        return False


def _placeholders(model: nn.Module) -> None:
    """Every parameter becomes one number seen through its shape."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                number = torch.full((1,), 0.5).to(parameter.dtype)
                made[id(parameter)] = nn.Parameter(number.expand(parameter.shape), requires_grad=False)
            module._parameters[name] = made[id(parameter)]


def _answering(model: nn.Module, names: list[str], called: set[str]) -> None:
    """Every linear module answers with a constant from now on; `called` takes the names of those of `names`."""
    wanted = {id(model.get_submodule(name)): name for name in names}
    for module in list(model.modules()):
        if (
            type(module).forward is nn.Linear.forward or id(module) in wanted
        ):  # others may give more than a product (llama4's router)
            name = wanted.get(id(module), "")
            module.forward = _answer(shape_of(module)[0], name, called)  # type: ignore[method-assign]


def _answer(width: int, name: str, called: set[str]) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.add(name)
        return x.new_full((*x.shape[:-1], width), 0.5)

    return forward
