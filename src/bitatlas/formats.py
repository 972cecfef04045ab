"""The table of formats: how a weight is stored, and exactly how many bytes that takes.

A format is a value, not a class hierarchy: bits, group size, symmetric or not, and the widths of the scale and zero-point
that every group of consecutive inputs carries. Names say it all: `int2_g64` is 2 bits, groups of 64 inputs, asymmetric;
`int4_g32_sym` is symmetric (its zero-point is fixed at 2**(bits-1), so none is stored).

A group size need not divide a row: the last, short group is a group of its own, with its own scale.
Left out: codebook and floating-point formats, and llama.cpp's K-quants (they come with their runtimes).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from bitatlas.errors import UserError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Format:
    """How a weight is stored. `scale_bits` and `zero_bits` are per group."""

    bits: int
    group_size: int
    symmetric: bool = False
    scale_bits: int = 16
    zero_bits: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits: 1 to 8, got {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size: at least 1, got {self.group_size}")

    @property
    def name(self) -> str:
        return f"int{self.bits}_g{self.group_size}" + ("_sym" if self.symmetric else "")


def _table() -> dict[str, Format]:
    formats = [
        Format(bits, size, symmetric, zero_bits=0 if symmetric else 16)
        for bits in BITS
        for size in GROUP_SIZES
        for symmetric in (False, True)
    ]
    return {fmt.name: fmt for fmt in formats}


FORMATS: dict[str, Format] = _table()


def get_format(name: str) -> Format:
    """The format called `name`; raises UserError with the nearest valid name."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.0)[0]
    known = f"int{{{','.join(map(str, BITS))}}}_g{{{','.join(map(str, GROUP_SIZES))}}}[_sym]"
    raise UserError(f"--formats: unknown format {name!r}; nearest is {near!r} (valid: {known})")


def group_count(shape: tuple[int, int], group_size: int) -> int:
    """Groups of a weight [out, in]: each row is cut into ceil(in / group_size) groups."""
    out_features, in_features = shape
    return out_features * math.ceil(in_features / group_size)


def stored_bytes(shape: tuple[int, int], fmt: Format) -> int:
    """Exact bytes of one weight [out, in]: codes (padded to a whole byte a module), scales and zero-points."""
    out_features, in_features = shape
    codes = math.ceil(out_features * in_features * fmt.bits / 8)
    extra = math.ceil(group_count(shape, fmt.group_size) * (fmt.scale_bits + fmt.zero_bits) / 8)
    return codes + extra


def by_width(names: list[str] | tuple[str, ...]) -> list[str]:
    """Format names from the narrowest to the widest (by bits, then by what a weight really costs)."""
    return sorted(names, key=lambda name: (get_format(name).bits, stored_bytes((1, 4096), get_format(name))))
