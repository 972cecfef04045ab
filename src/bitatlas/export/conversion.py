"""What transformers can load of a packed folder.

Of such a folder it renames, merges and splits tensors no more (a rule that takes `weight` then looks for packed experts), so what a rule
makes of several tensors is written as the model has it, and loads under the model's own names.

Two things that a packed folder must mind, which no header tells, are asked of transformers' own code:
- which weights a model type's initialization reads while it loads: a packed module has none by then (`unpackable`);
- which modules transformers exchanges for others in a quantized model: Llama 4's experts, one 3-D tensor, become linear modules
  (`exchanged`).
Left out: versions of transformers without these tables, where names are the model's own or lack the base model's prefix.
Source: transformers 5.24, `core_model_loading`, `conversion_mapping`, `quantizers/base.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from bitatlas.errors import UserError

METHOD = "compressed-tensors"


# --- what cannot be packed -----------------------------------------------------------------------------------------------


def unpackable(model: Any, names: Iterable[str]) -> list[str]:
    """Return those of the modules `names` whose weights the initialization of `model`, a skeleton, reads while transformers loads it.

    In a packed module there is no `weight` until the first pass, so such a folder does not load. The initialization is run as if all
    of them were packed; what it cannot do without is given back to it.
    """
    changed = {name: _take_weight(model.get_submodule(name), name) for name in names}
    result: list[str] = []
    try:
        for module in model.modules():
            while name := _read_early(model, module):
                changed.pop(name)()
                result.append(name)
    finally:
        for give_back in changed.values():
            give_back()
    return result


class _ReadEarlyError(AttributeError):
    """The weight of the module with this name was wanted. What asks whether there is one gets its answer and goes on."""


def _read_early(model: Any, module: nn.Module) -> str | None:
    """Return the module whose weight the initialization of `module` could not do without."""
    try:
        model._init_weights(module)
    except _ReadEarlyError as error:
        return str(error)
    except Exception:  # of tensors without data; the finished folder is loaded anyway
        return None
    return None


def _take_weight(module: nn.Module, name: str) -> Callable[[], None]:
    """Hide the `weight` of `module`; return what gives it back."""
    kind, parameters = type(module), dict(module._parameters)

    def missing(owner: nn.Module, attribute: str) -> Any:
        if attribute == "weight":
            raise _ReadEarlyError(name)
        return kind.__getattr__(owner, attribute)

    def give_back() -> None:
        module.__class__ = kind
        module._parameters.clear()
        module._parameters.update(parameters)

    del module._parameters["weight"]
    module.__class__ = type(kind.__name__, (kind,), {"__getattr__": missing})
    return give_back


# --- what is exchanged in a quantized model --------------------------------------------------------------------------------


def exchanged(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module that transformers puts something else in the place of as soon as a model is quantized."""
    table: dict[str, Any] = getattr(
        importlib.import_module("transformers.quantizers.base"), "MODULES_TO_PATCH_FOR_QUANTIZATION", {}
    )
    kinds = {kind for kind, entry in table.items() if METHOD in {getattr(m, "value", m) for m in entry["quantization_methods"]}}
    return {path: module for path, module in model.named_modules() if type(module).__name__ in kinds}


def pieces(module: nn.Module, path: str) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Return parameter of an exchanged module's successor -> the module's parameter that it is a piece of, and how it is cut out.

    Llama 4: `gate_up_proj` [experts, in, 2 * inner] and `down_proj` [experts, inner, out] become linear modules [out, in] an expert.
    """
    if type(module).__name__ != "Llama4TextExperts":
        raise UserError(
            f"{path}: in a packed model transformers has another module in this place, whose weights are not known here"
        )
    inner = module.down_proj.shape[1]  # type: ignore[union-attr, index]
    result: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for expert in range(len(module.down_proj)):  # type: ignore[arg-type]
        for part, source, columns in (
            ("gate_proj", "gate_up_proj", slice(0, inner)),
            ("up_proj", "gate_up_proj", slice(inner, None)),
            ("down_proj", "down_proj", slice(None)),
        ):
            result[f"{path}.{expert}.{part}.weight"] = (f"{path}.{source}", _cut(expert, columns))
    return result


def _cut(expert: int, columns: slice) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight[expert, :, columns].T.contiguous()
