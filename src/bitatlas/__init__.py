"""bitatlas: what low-bit weights do to a language model, measured, planned and verified.

The public names are `survey`, `Atlas`, `Plan`, `apply`, `load_packed`, `verify`, `compare`, `Comparison` (see docs/python.md). Nothing heavy is
imported before one of them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitatlas.api import Atlas, Comparison, Plan, apply, compare, load_packed, survey, verify

__version__ = "0.1.0"
__all__ = ["Atlas", "Comparison", "Plan", "__version__", "apply", "compare", "load_packed", "survey", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bitatlas import api

    globals()[name] = getattr(api, name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
