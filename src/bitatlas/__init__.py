"""bitatlas: what low-bit weights do to a language model, measured, planned and verified.

The public names are `survey`, `Atlas`, `Plan`, `apply`, `verify`, `compare` (see docs/python.md). Nothing heavy is imported before
one of them is asked for.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitatlas.api import Atlas, Plan, apply, compare, survey, verify

__version__ = "0.1.0"
__all__ = ["Atlas", "Plan", "__version__", "apply", "compare", "survey", "verify"]


class _Package(ModuleType):
    """Some functions are called like the file of their stage: importing that file must not put it in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bitatlas import api

    globals()[name] = getattr(api, name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package
