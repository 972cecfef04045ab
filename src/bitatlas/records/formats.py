"""The table of formats: how a weight is stored, and exactly how many bytes that takes.

A format is a value, not a class hierarchy: bits, group size, symmetric or not, and the widths of the scale and zero-point
that every group of consecutive inputs carries. Names say it all: `int2_g64` is 2 bits, groups of 64 inputs, asymmetric;
`int4_g32_sym` is symmetric (its zero-point is fixed at 2**(bits-1), so none is stored).

A group size need not divide a row: the last, short group is a group of its own, with its own scale.

Beside these stand formats that a runtime defines (`runtime`), under that runtime's own names: llama.cpp's `q4_k` and others. Their group
is llama.cpp's block, `bits` its codes, `scale_bits` everything else in the block, so the same arithmetic gives their exact bytes; the
block must divide the row (`sizes.check_rows`). Bytes and sizes of blocks: ggml-common.h; what was made for ternary weights is not
offered, nor is `iq1_m`, whose bytes llama.cpp's own functions do not always repeat.
`bf16`, `f16` and `f32` are a module that stays as it is (`dtype`), where the checkpoint has it so: a candidate like any other.

Left out: other codebook and floating-point formats (they come with their runtimes).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from bitatlas.errors import UserError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
KEPT = {"bf16": (16, "bfloat16"), "f16": (16, "float16"), "f32": (32, "float32")}  # formats of what stays as it is
LLAMA_CPP = "llama.cpp"
# `--formats gguf`: from the narrowest usable type to a nearly free one. By gptq q2_k and q3_k do less damage than iq2_s and iq3_s (docs/gguf.md).
GGUF_LADDER = ("iq2_xxs", "q2_k", "iq3_xxs", "q3_k", "iq4_xs", "q5_k", "q6_k", "q8_0")
# name: (code bits, weights a block, bytes a block, without a minimum)
LLAMA_CPP_BLOCKS = {
    "q4_0": (4, 32, 18, True),
    "q4_1": (4, 32, 20, False),
    "q5_0": (5, 32, 22, True),
    "q5_1": (5, 32, 24, False),
    "q8_0": (8, 32, 34, True),
    "iq4_nl": (4, 32, 18, True),
    "mxfp4": (4, 32, 17, True),
    "q2_k": (2, 256, 84, False),
    "q3_k": (3, 256, 110, True),
    "q4_k": (4, 256, 144, False),
    "q5_k": (5, 256, 176, False),
    "q6_k": (6, 256, 210, True),
    "iq1_s": (1, 256, 50, True),
    "iq2_xxs": (2, 256, 66, True),
    "iq2_xs": (2, 256, 74, True),
    "iq2_s": (2, 256, 82, True),
    "iq3_xxs": (3, 256, 98, True),
    "iq3_s": (3, 256, 110, True),
    "iq4_xs": (4, 256, 136, True),
}


@dataclass(frozen=True)
class Format:
    """How a weight is stored. `scale_bits` and `zero_bits` are per group."""

    bits: int
    group_size: int
    symmetric: bool = False
    scale_bits: int = 16
    zero_bits: int = 16
    runtime: str = ""  # that defines the format and alone can read it; "" for our integer formats
    own_name: str = ""  # what that runtime calls it
    dtype: str = ""  # of a weight that stays as it is; "": it is quantized

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 and not self.dtype:
            raise ValueError(f"bits: 1 to 8, got {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size: at least 1, got {self.group_size}")

    @property
    def name(self) -> str:
        return self.own_name or f"int{self.bits}_g{self.group_size}" + ("_sym" if self.symmetric else "")


def _table() -> dict[str, Format]:
    formats = [
        Format(bits, size, symmetric, zero_bits=0 if symmetric else 16)
        for bits in BITS
        for size in GROUP_SIZES
        for symmetric in (False, True)
    ]
    formats += [
        Format(bits, size, symmetric, 8 * size_bytes - bits * size, 0, LLAMA_CPP, name)
        for name, (bits, size, size_bytes, symmetric) in LLAMA_CPP_BLOCKS.items()
    ]
    formats += [Format(bits, 1, True, 0, 0, "", name, dtype) for name, (bits, dtype) in KEPT.items()]
    return {fmt.name: fmt for fmt in formats}


FORMATS: dict[str, Format] = _table()
INTEGER_FORMATS: dict[str, Format] = {name: fmt for name, fmt in FORMATS.items() if not fmt.runtime and not fmt.dtype}


def get_format(name: str) -> Format:
    """Return the format called `name`; UserError with the nearest valid name."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.0)[0]
    known = f"int{{{','.join(map(str, BITS))}}}_g{{{','.join(map(str, GROUP_SIZES))}}}[_sym]"
    raise UserError(
        f"--formats: unknown format {name!r}; nearest is {near!r} (valid: {known}; of llama.cpp: {', '.join(LLAMA_CPP_BLOCKS)}; as it is: {', '.join(KEPT)})"
    )


def takes(fmt: Format, in_features: int) -> bool:
    """Return whether a row of `in_features` inputs can be stored in this format."""
    return not fmt.runtime or in_features % fmt.group_size == 0


def group_count(shape: tuple[int, int], group_size: int) -> int:
    """Return the number of groups of a weight [out, in]: each row is cut into ceil(in / group_size) groups."""
    out_features, in_features = shape
    return out_features * math.ceil(in_features / group_size)


def stored_bytes(shape: tuple[int, int], fmt: Format) -> int:
    """Return the exact bytes of one weight [out, in]: codes (padded to a whole byte a module), scales and zero-points."""
    out_features, in_features = shape
    codes = math.ceil(out_features * in_features * fmt.bits / 8)
    extra = math.ceil(group_count(shape, fmt.group_size) * (fmt.scale_bits + fmt.zero_bits) / 8)
    return codes + extra


def by_width(names: list[str] | tuple[str, ...]) -> list[str]:
    """Return format names from the narrowest to the widest (by bits, then by what a weight really costs)."""
    return sorted(names, key=lambda name: (get_format(name).bits, stored_bytes((1, 4096), get_format(name))))
