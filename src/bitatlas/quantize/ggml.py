"""llama.cpp's own formats, quantized and dequantized by the package libgguf, a build of llama.cpp's row functions. No data is needed.

The blocks are those that `llama-quantize` writes for the same weight in float32 and the same type, and what is measured is what llama.cpp
computes with. Block sizes and the bytes of blocks are compared with our table of formats when a type is first used, so that a package
with other types is refused and not misread.
Left out: importance matrices, and the types that need one; devices other than the CPU.
Source: libgguf 0.2 (Apache-2.0).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.records.formats import FORMATS, Format

PACKAGE = "libgguf"
WRITING = ("gguf", PACKAGE)  # the file format, and what makes its blocks
TOGETHER = 2**22  # weights at a time


@dataclass(frozen=True)
class Blocks:
    """A weight in llama.cpp's blocks, byte for byte as a GGUF holds it; llama.cpp's own functions say what they stand for."""

    blocks: Tensor  # uint8 [out, bytes of a row]
    own_name: str  # "q4_k"

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        return self.blocks.numel()

    def to(self, device: torch.device) -> Blocks:
        """Return the blocks where they are: they are read on the CPU."""
        return self

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in] that llama.cpp computes with: float32 in the library, then `dtype`."""
        number, fmt = _type(self.own_name), FORMATS[self.own_name]
        source = self.blocks.to("cpu").contiguous()
        width = source.shape[1] // _block_bytes(fmt) * fmt.group_size
        weight = torch.empty(len(source), width)
        rows = max(1, TOGETHER // max(1, width))
        for blocks, values in zip(source.split(rows), weight.split(rows), strict=True):
            if blocks.numel():
                _library().dequantize_rows_into_raw(number, blocks.numpy(), values.numpy(), len(blocks), width)
        return weight.to(dtype)


def check_packages(what: str, packages: tuple[str, ...] = WRITING) -> None:
    """Raise UserError naming the extra where one of its packages is not here."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what}: needs {' and '.join(missing)}, not here yet: pip install 'bitatlas[gguf]'")


def quantize(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Blocks:
    """Return blocks of `weight` [out, in], as llama-quantize makes them of float32. ValueError for rows of part blocks.

    importance: float32 [in], what an input's squared error counts, as an importance matrix has it; types that need one get ones without.
    """
    out, width = weight.shape
    number = _type(fmt.own_name)
    if width % fmt.group_size:
        raise ValueError(f"rows of {width} are no whole blocks of {fmt.group_size} ({fmt.own_name})")
    source = weight.detach().to(device="cpu", dtype=torch.float32).contiguous()
    blocks = torch.empty(out, width // fmt.group_size * _block_bytes(fmt), dtype=torch.uint8)
    if importance is None and _library().quantize_requires_imatrix(number):
        importance = torch.ones(width)
    if blocks.numel():
        counts = None if importance is None else importance.detach().float().cpu().contiguous().numpy()
        written = _library().quantize_rows_into_raw(number, source.numpy(), blocks.numpy(), out, width, counts)
        assert written == blocks.numel()
    return Blocks(blocks, fmt.own_name)


def type_number(own_name: str) -> int:
    """Return llama.cpp's number of a type: "q4_k" -> 12, "f16" -> 1."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[own_name.upper()])


def _block_bytes(fmt: Format) -> int:
    return (fmt.bits * fmt.group_size + fmt.scale_bits) // 8


@cache
def _type(own_name: str) -> int:
    """Return a type's number; UserError where the package's block is another than our table's."""
    library, fmt = _library(), FORMATS[own_name]
    number = int(library.GGMLQuantizationType[own_name.upper()])
    actual = (library.GGML_QUANT_SIZES[library.GGMLQuantizationType(number)][0], library.type_size(number))
    expected = (fmt.group_size, _block_bytes(fmt))
    if actual != expected:
        raise UserError(f"this {PACKAGE}'s {own_name} has blocks of {actual}, not {expected} (weights, bytes)")
    return number


@cache
def _library() -> Any:
    check_packages("llama.cpp's formats", (PACKAGE,))
    import libgguf

    return libgguf
