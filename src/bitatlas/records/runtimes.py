"""Which formats each runtime can hold: the report's table of runtimes (no torch), and how an exporter states its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from bitatlas.records import Module, Plan
from bitatlas.records.formats import BITS, FORMATS, GROUP_SIZES, LLAMA_CPP, Format, takes
from bitatlas.records.sizes import EMBEDDING_AND_HEAD, unlike_experts, unlike_partners


@dataclass(frozen=True)
class Runtime:
    """`holds`: whether it has a format; `model`: the command must be given the checkpoint; `whole`: groups must divide rows; `fused`: q/k/v alike.

    outside: parts outside the decoder layers that its files can hold in a format of their own; experts: widths in bits of the experts that are
    written for it, (): none are; alike: all experts of a layer have one format there.
    """

    holds: Callable[[Format], bool]
    model: bool = False
    whole: bool = True
    fused: bool = False
    outside: tuple[str, ...] = ()
    experts: tuple[int, ...] = ()
    alike: bool = False


def _integer(fmt: Format) -> bool:
    return not fmt.runtime


def _common(fmt: Format) -> bool:
    """Return whether a format has one of the widths that nearly all libraries know."""
    return _integer(fmt) and (fmt.bits in WIDTHS or bool(fmt.dtype))


WIDTHS = (2, 3, 4, 8)
EVERY_PART = ("embedding", "head", EMBEDDING_AND_HEAD, "other embedding")
RUNTIMES = {
    "vllm": Runtime(lambda fmt: _common(fmt) and fmt.symmetric, model=True, fused=True, experts=(4, 8), alike=True),
    "mlx": Runtime(_integer, model=True, outside=EVERY_PART),
    "torchao": Runtime(_common),
    "llm-compressor": Runtime(_common),
    "gptqmodel": Runtime(_common),
    "autoround": Runtime(lambda fmt: _common(fmt) and (fmt.bits < 8 or fmt.symmetric)),
    "exllamav3": Runtime(_common, whole=False),
    LLAMA_CPP: Runtime(
        lambda fmt: fmt.runtime == LLAMA_CPP, model=True, whole=False, outside=EVERY_PART, experts=tuple(range(1, 9))
    ),
}
# What a survey may be for. transformers 5.24 does not load a packed embedding (it initializes `Embedding.weight`, which is not there then), so neither
# a head that is tied to one; "bitatlas" is `load_packed`, which opens the same folder with everything packed.
MADE_FOR = {
    "transformers": Runtime(_integer, model=True, whole=False, outside=("head",), experts=BITS),
    "bitatlas": Runtime(_integer, model=True, whole=False, outside=EVERY_PART, experts=BITS),
    **RUNTIMES,
}


# What stands for a type of llama.cpp in rows that its blocks of 256 do not divide: of the types with blocks of 32 the nearest in bytes, but none below
# iq4_nl. llama-quantize itself takes larger ones for q4_k (q5_0), q5_k (q5_1) and q6_k (q8_0); its recipes have those (`plan.recipes`).
NARROWER = ("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "q2_k", "q3_k", "q4_k")
FALLBACKS = dict.fromkeys(NARROWER, "iq4_nl") | {"q5_k": "q5_0", "q6_k": "q5_1"}


def nearest_held(name: str, width: int, runtime: str) -> str:
    """Return the format that a row of `width` has in a runtime's file where others have `name`; `name` itself where nothing else would do."""
    fmt = FORMATS[name]
    if fmt.dtype:
        return name
    if fmt.runtime:
        held = FALLBACKS.get(name, name)
        return name if takes(fmt, width) or not takes(FORMATS[held], width) else held
    if runtime in RUNTIMES and RUNTIMES[runtime].whole and width % fmt.group_size:
        dividing = [size for size in GROUP_SIZES if width % size == 0 and size < fmt.group_size]
        return replace(fmt, group_size=max(dividing)).name if dividing else name
    return name


def fits(runtime: Runtime, plan: Plan, modules: list[Module]) -> bool:
    """Return whether a runtime has all formats of a plan, for the rows of these modules."""
    formats = {name: plan.formats[of_module] for name, of_module in plan.modules.items()}
    used = [(module, fmt) for module in modules if (fmt := formats.get(module.name)) and not fmt.dtype]
    if not used or not all(runtime.holds(fmt) and (not m.part or m.part in runtime.outside) for m, fmt in used):
        return False
    experts = [(module, fmt) for module, fmt in used if module.expert is not None]
    if any(fmt.bits not in runtime.experts and not fmt.dtype for _, fmt in experts) or (
        runtime.alike and unlike_experts(plan, modules)
    ):
        return False
    if runtime.whole and any(module.shape[1] % fmt.group_size for module, fmt in used):
        return False
    return not runtime.fused or unlike_partners(plan) is None


class Holds(Protocol):
    """What a runtime can hold."""

    def fits(self, fmt: Format) -> bool:
        """Return whether the runtime can hold `fmt`."""
        ...

    def nearest(self, fmt: Format) -> str:
        """Return the name of the held format that is nearest to `fmt`."""
        ...


@dataclass(frozen=True)
class Integers:
    """Group-wise integer formats: every combination of these, but for the pairs of bits and symmetry in `but`."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = (32, 64, 128)
    symmetric: tuple[bool, ...] = (False, True)
    but: tuple[tuple[int, bool], ...] = ()

    def fits(self, fmt: Format) -> bool:
        if getattr(fmt, "runtime", "") or (fmt.bits, fmt.symmetric) in self.but:  # runtime: a format that one alone has
            return False
        return fmt.bits in self.bits and fmt.group_size in self.group_sizes and fmt.symmetric in self.symmetric

    def nearest(self, fmt: Format) -> str:
        """Return the nearest by width (the wider of two), then symmetry, then group size (the smaller of two)."""
        held = [other for other in FORMATS.values() if self.fits(other)]

        def distance(other: Format) -> tuple[float, ...]:
            wide = abs(other.bits - fmt.bits)
            size = abs(math.log2(other.group_size / max(1, fmt.group_size)))
            return (wide, -other.bits, other.symmetric != fmt.symmetric, size, other.group_size)

        return min(held, key=distance).name
