"""What transformers makes of the tensors in a checkpoint's files: which parameter or buffer of the model each of them becomes, if any.

Names in files differ from the model's: with or without the base model's prefix, old names of the same thing, experts stored one by one.
transformers follows all of that by rules of its own; they are asked here, so that loading and streaming take the same tensors.
Source: transformers 5.24, `core_model_loading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A parameter or buffer by its name in the model. `whole`: the tensor is all of it, as it is."""

    name: str
    whole: bool


@dataclass(frozen=True)
class Rules:
    """transformers' own rules for one model. `rename(key, renamings, converters, prefix, wanted)` is its function that applies them."""

    renamings: list[Any]
    converters: list[Any]
    rename: Callable[..., tuple[str, str | None]]
    prefix: str

    @property
    def by_pattern(self) -> dict[str, Any]:
        return {pattern: converter for converter in self.converters for pattern in converter.source_patterns}

    def target(self, key: str, wanted: Mapping[str, Any]) -> tuple[str, str | None]:
        """(the model's name of what a tensor called `key` becomes, the pattern of the converter that makes it). `wanted`: the model's names."""
        name, pattern = self.rename(key, self.renamings, self.converters, self.prefix, wanted)
        return (key, None) if name not in wanted and key in wanted else (name, pattern)


def rules_of(model: Any) -> Rules:
    """By which transformers loads `model` (a skeleton will do); of a version without such a table, the base model's prefix alone."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return Rules([], [], _with_prefix, model.base_model_prefix)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return Rules(renamings, converters, rename_source_key, model.base_model_prefix)


def _with_prefix(key: str, renamings: Any, converters: Any, prefix: str, wanted: Mapping[str, Any]) -> tuple[str, None]:
    candidates = (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}")
    return next((name for name in candidates if name in wanted), key), None


def targets_of(model: Any, keys: Iterable[str]) -> dict[str, Target]:
    """Tensor -> what it becomes in `model` (a skeleton will do). Tensors that are passed over are left out."""
    rules, wanted, targets = rules_of(model), model.state_dict(), {}
    for key in keys:
        name, pattern = rules.target(key, wanted)
        if name in wanted:
            targets[key] = Target(name, pattern is None)
    return targets
