"""What transformers makes of a checkpoint's tensors as it loads them, and what it can load again from a packed folder.

Many checkpoints store what their model holds under other names or in other pieces: experts one by one, q, k and v in one matrix.
transformers renames, merges and splits them while it loads. Of a packed folder it does so no more (a rule that takes `weight` then looks
for packed experts), so what a rule makes of several tensors is written as the model has it, and loads under the model's own names.

Three things that a packed folder must mind, which no header tells, are asked of transformers' own code:
- which tensors become which parameters (`Conversion`);
- which weights a model type's initialization reads while it loads: a packed module has none by then (`unpackable`);
- which modules transformers exchanges for others in a quantized model: Llama 4's experts, one 3-D tensor, become linear modules
  (`exchanged`).
Left out: versions of transformers without these tables, where names are the model's own or lack the base model's prefix.
Source: transformers 5.24, `core_model_loading`, `conversion_mapping`, `quantizers/base.py`.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.model.tensor_files import reason_of, rules_of

METHOD = "compressed-tensors"
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Origin:
    """What a parameter is made of. `keys`: of the checkpoint, by the pattern that took them; `rule`: None where one is only renamed."""

    first: str  # name in the model of the first parameter that the rule makes
    rule: Any
    keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]


class Conversion:
    """The parameters and buffers of `model` that a checkpoint's tensors become, by their names in the model.

    `model` is a skeleton; `tensors`: of the checkpoint, on torch's meta device. UserError where a rule cannot be followed.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Tensor]):
        self._model, self._rules, self.kind = model, rules_of(model), type(model)
        self._wanted = dict.fromkeys(model.state_dict(), True)
        self.origins: dict[str, Origin] = {}
        groups: dict[str, Origin] = {}
        for key in sorted(tensors, key=_natural):
            name, pattern = self.target(key)
            if name in self._wanted:
                rule = self._rules.by_pattern[pattern] if pattern else None
                groups.setdefault(name, Origin(name, rule)).keys.setdefault(pattern or key, []).append(key)
        self.converted: dict[str, Tensor] = {}  # what rules make, on the meta device
        for origin in groups.values():
            results = self._convert(origin, lambda key: tensors[key]) if origin.rule else {}
            self.converted |= results
            self.origins |= dict.fromkeys(results or [origin.first], origin)

    def target(self, key: str, packed: Iterable[str] = ()) -> tuple[str, str | None]:
        """Return (the model's name of what a tensor called `key` becomes, the pattern of the rule that makes it). `packed`: more names."""
        return self._rules.target(key, {**self._wanted, **dict.fromkeys(packed, True)})

    def key(self, name: str) -> str | None:
        """Return the checkpoint's name of parameter `name`, where it is a tensor of its own there."""
        origin = self.origins.get(name)
        return origin.all_keys[0] if origin and origin.rule is None else None

    def read(self, name: str, read: Read) -> Tensor:
        """Return parameter `name` in the dtype that is stored. `read`: a tensor of the checkpoint."""
        origin = self.origins[name]
        return read(origin.all_keys[0]) if origin.rule is None else self._convert(origin, read)[name]

    def _convert(self, origin: Origin, read: Read) -> dict[str, Tensor]:
        rule = copy.deepcopy(origin.rule)
        for pattern, keys in origin.keys.items():
            for key in keys:
                rule.add_tensor(origin.first, key, pattern, read(key))
        try:
            result = rule.convert(origin.first, model=self._model, config=self._model.config)
        except Exception as error:  # every operation fails in its own way
            raise UserError(
                f"{origin.all_keys[0]}: transformers makes {origin.first} of this tensor and others, which fails ({reason_of(error)})"
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Return a sort key with numbers in their order: expert 2 comes before expert 10, as transformers stacks them."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in key.split(".")]


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
