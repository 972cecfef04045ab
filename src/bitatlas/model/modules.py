"""Which modules of a model a plan may quantize: the linear ones of its decoder layers, experts one by one, and embeddings and head.

Left out: routers, weights that several modules share, and modules that do more with their weight than to multiply by it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.model.decoder import FRONT, layers_at, text_path
from bitatlas.model.linear import ExpertLinear, fused_of, is_linear, shape_of
from bitatlas.records import Module
from bitatlas.records.sizes import EMBEDDING_AND_HEAD, FUSED

SMALL_SHARE = 1e-3  # of all weights: what is outside the layers and has less is left as it is


def linear_modules(
    model: nn.Module, layers_path: str, fuse: bool, left_out: Collection[str] = (), each_expert: bool = False
) -> list[Module]:
    """Return every linear module of the decoder layers, in the model's order, but for routers, weights that several modules share, and `left_out`.

    A layer's experts of one kind are one unit, or with `each_expert` every one by itself.
    """
    modules: list[Module] = []
    experts = _expert_counts(getattr(model, "config", None))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for index, layer in enumerate(layers_at(model, layers_path)):
        named = [
            (path, m) for path, m in layer.named_modules()
            if is_linear(m) and not is_router(path, shape_of(m)[0], experts) and uses[id(m.weight)] == 1
            and f"{layers_path}.{index}.{path}" not in left_out
        ]  # fmt: skip
        kinds = _kinds([path for path, _ in named])
        for path, module in named:
            inside = f"{layers_path}.{index}."
            of_all, expert = _of_all_experts(path, module)
            unit = inside + (path if each_expert else of_all)
            parent, _, last = unit.rpartition(".")
            unit = f"{parent}.{FUSED[last]}" if fuse and last in FUSED else unit
            modules.append(Module(inside + path, index, kinds[path], shape_of(module), unit, expert=expert))
    return modules


def _of_all_experts(path: str, module: nn.Module) -> tuple[str, int | None]:
    """Return (the path without the number of the expert that a linear module is, or is a part of; the number), of all others (path, None)."""
    if isinstance(module, ExpertLinear):
        return fused_of(path)
    match = re.search(r"experts\.(\d+)\.", path)
    return (path[: match.start(1)] + path[match.end() :], int(match[1])) if match else (path, None)


def outer_modules(model: nn.Module, layers_path: str) -> list[Module]:
    """Return what holds most of the weights outside the decoder layers: embeddings in front of them, and the head, if its weight is its own.

    A module's `layer` is the first stage at which its weight is used (see `decoder`). Left out: small ones, and parts that see or hear.
    """
    path = text_path(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    least = SMALL_SHARE * sum(p.numel() for p in model.parameters())
    modules, weights = [], set[int]()
    for name, module in model.named_modules():
        is_embedding = isinstance(module, nn.Embedding) and name.startswith(path)
        if name.startswith(f"{layers_path}.") or not (is_embedding or (module is head and is_linear(module))):
            continue
        weight = module.weight
        if id(weight) in weights or weight.dim() != 2 or weight.numel() < least:
            continue
        weights.add(id(weight))
        stage = FRONT if is_embedding else len(layers_at(model, layers_path))
        tied = head is not None and head.weight is weight
        part = (
            "head" if not is_embedding
            else EMBEDDING_AND_HEAD if tied
            else "embedding" if module is model.get_input_embeddings()  # type: ignore[operator]
            else "other embedding"
        )  # fmt: skip
        modules.append(Module(name, stage, name.rpartition(".")[2], shape_of(module), name, part=part))
    return modules


def is_router(path: str, outputs: int, experts: Collection[int]) -> bool:
    """Return whether a linear module routes: the scores of experts, one number that weighs an expert, the index of keys to look at.

    Such choices have no gradient, and they are a few weights that every runtime keeps. An MLP's `gate_proj` is no router.
    experts: numbers of experts in the config.
    """
    words = path.split(".")
    if outputs == 1 or any("router" in word or "indexer" in word for word in words):
        return True
    return any(word == "gate" or word.endswith("_gate") for word in words) and (
        outputs in experts or ("gate" in words and not experts)
    )


def _expert_counts(config: Any) -> set[int]:
    """Return every number in the config whose name speaks of experts."""
    content = config.get_text_config().to_dict() if config is not None else {}
    values = [*content.items(), *(item for part in content.values() if isinstance(part, dict) for item in part.items())]
    return {value for name, value in values if "expert" in str(name) and type(value) is int}


def _kinds(paths: list[str]) -> dict[str, str]:
    """Return a short name for what each module is: its last word, with the word before it where that is ambiguous (GPT-2's two c_proj)."""
    plain = {path: re.sub(r"\.\d+(?=\.|$)", "", path) for path in paths}
    shared = Counter(word.rpartition(".")[2] for word in set(plain.values()))
    return {
        path: word.rpartition(".")[2] if shared[word.rpartition(".")[2]] == 1 else ".".join(word.split(".")[-2:])
        for path, word in plain.items()
    }


def shared_modules(model: nn.Module, layers_path: str) -> list[Module]:
    """Return the linear modules of the decoder layers whose weight is that of others, too."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = []
    for index, layer in enumerate(layers_at(model, layers_path)):
        for path, module in layer.named_modules():
            if is_linear(module) and uses[id(module.weight)] > 1:
                name = f"{layers_path}.{index}.{path}"
                modules.append(Module(name, index, path.rpartition(".")[2], shape_of(module), name))
    return modules


# --- calls -----------------------------------------------------------------------------------------------------------------

# Which linear modules of a model do their work when they are called, so that a quantized weight can be measured and packed.
#
# Some families have linear modules that only hold a weight: the module around them reads it and multiplies for itself (mamba's `dt_proj`), or
# nothing reads it (keys and values of layers that use those of others). What is done to modules as they are called (gradients, input
# moments, packed weights) passes such a weight by.
#
# A skeleton is asked, without any weight: every parameter is one number seen through the parameter's shape, every linear module answers
# with a constant and tells that it was called, and a few tokens go through. No product is computed and
# no memory is taken. An expert that no token came to is known by the others of its kind.

TOKENS = 5  # that go through, of two rows


@dataclass(frozen=True)
class Calls:
    """Names of linear modules. `uncalled` is empty where the model could not be run (`ran`)."""

    uncalled: frozenset[str]  # their weight is read by others, or by nobody
    nonlinear: frozenset[
        str
    ]  # more is done with their weight than to multiply (groups of inputs, each with a part of the weight)
    ran: bool = True


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
        return Calls(frozenset(), nonlinear, ran=False)
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
