"""llama.cpp's own formats, quantized and dequantized by llama.cpp's own library, as llama-cpp-python brings it along. No data is needed.

The blocks are those that `llama-quantize` writes for the same weight in float32 and the same type, and what is measured is what llama.cpp
computes with. Called through ctypes. Names, block sizes and the bytes of blocks are compared with our table of formats when a type is
first used, so that a library with other types is refused and not misread.
Left out: importance matrices, and the types that need one; devices other than the CPU.
Source: ggml.h of llama.cpp (ggml_quantize_chunk, ggml_get_type_traits).
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.records.formats import FORMATS, Format

PACKAGES = ("gguf", "llama_cpp")  # what the extra `gguf` installs: the file format, and the library
DEQUANTIZED_WEIGHTS = 2**22  # at a time


@dataclass(frozen=True)
class Blocks:
    """A weight in llama.cpp's blocks, byte for byte as a GGUF holds it; llama.cpp itself says what they stand for."""

    blocks: Tensor  # uint8 [out, bytes of a row]
    own_name: str  # "q4_k"

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        return self.blocks.numel()

    def to(self, device: torch.device) -> Blocks:
        """Return the blocks where they are: llama.cpp reads them on the CPU."""
        return self

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in] that llama.cpp computes with: float32 in the library, then `dtype`."""
        _, traits = _type(self.own_name)
        source = self.blocks.to("cpu").contiguous()
        out, row_bytes = source.shape
        width = row_bytes // traits.type_size * traits.blck_size
        weight = torch.empty(out, width)
        rows = max(1, DEQUANTIZED_WEIGHTS // max(1, width))
        for blocks, values in zip(source.split(rows), weight.split(rows), strict=True):
            if blocks.numel():
                traits.to_float(blocks.data_ptr(), values.data_ptr(), values.numel())
        return weight.to(dtype)


class _Traits(ctypes.Structure):
    """The start of `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def check_packages(what: str) -> None:
    """Raise UserError naming the extra where one of its packages is not here."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what}: needs {' and '.join(missing)}, not here yet: pip install 'bitatlas[gguf]'")


def quantize(weight: Tensor, fmt: Format) -> Blocks:
    """Return blocks of `weight` [out, in], as llama-quantize makes them of float32. ValueError for rows of part blocks."""
    out, width = weight.shape
    number, traits = _type(fmt.own_name)
    if width % traits.blck_size:
        raise ValueError(f"rows of {width} are no whole blocks of {traits.blck_size} ({fmt.own_name})")
    source = weight.detach().to(device="cpu", dtype=torch.float32).contiguous()
    blocks = torch.empty(out, width // traits.blck_size * traits.type_size, dtype=torch.uint8)
    if blocks.numel():
        written = _ggml().ggml_quantize_chunk(number, source.data_ptr(), blocks.data_ptr(), 0, out, width, None)
        assert written == blocks.numel()
    return Blocks(blocks, fmt.own_name)


def type_number(own_name: str) -> int:
    """Return llama.cpp's number of a type: "q4_k" -> 12, "f16" -> 1."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[own_name.upper()])


@cache
def _type(own_name: str) -> tuple[int, Any]:
    """Return a type's number and traits; UserError where the library's differ from our table's."""
    number = type_number(own_name)
    traits = _ggml().ggml_get_type_traits(number).contents
    fmt = FORMATS[own_name]
    actual = (traits.type_name.decode().lower(), traits.blck_size, 8 * traits.type_size)
    expected = (own_name, fmt.group_size, fmt.bits * fmt.group_size + fmt.scale_bits)
    if actual != expected:
        raise UserError(f"this llama.cpp's type {number} is {actual}, not {expected} (name, weights, bits a block)")
    return number, traits


@cache
def _ggml() -> Any:
    """Return the library, with the types of the two functions that are called."""
    check_packages("llama.cpp's formats")
    from llama_cpp import llama_cpp

    library = llama_cpp._lib  # its dependencies' symbols are found through it
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library
