"""What transformers makes of the tensors in a checkpoint's files: which parameter or buffer of the model each of them becomes, if any.

Names in files differ from the model's: with or without the base model's prefix, old names of the same thing, experts stored one by one.
transformers follows all of that by rules of its own; they are asked here, so that loading and streaming take the same tensors.
Source: transformers 5.24, `core_model_loading`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A parameter or buffer by its name in the model. `whole`: the tensor is all of it, as it is."""

    name: str
    whole: bool


def targets_of(model: Any, keys: Iterable[str]) -> dict[str, Target]:
    """Tensor -> what it becomes in `model` (a skeleton will do). Tensors that are passed over are left out."""
    renamings, converters, rename = _rules(model)
    wanted, prefix = model.state_dict(), model.base_model_prefix
    targets = {}
    for key in keys:
        name, pattern = rename(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name in wanted:
            targets[key] = Target(name, pattern is None)
    return targets


def _rules(model: Any) -> tuple[list[Any], list[Any], Any]:
    """(renamings, converters, the function that applies them); of another version of transformers the prefix alone."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return [], [], _with_prefix
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)], rename_source_key


def _with_prefix(key: str, renamings: Any, converters: Any, prefix: str, wanted: dict[str, Any]) -> tuple[str, None]:
    candidates = (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}")
    return next((name for name in candidates if name in wanted), key), None
