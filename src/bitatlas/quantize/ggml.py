"""llama.cpp's own library, as llama-cpp-python brings it along: quantize, dequantize, and say what a type is.

Called through ctypes. Names, block sizes and the bytes of blocks are compared with our table of formats when a type is first used, so
that a library with other types is refused and not misread.
Left out: importance matrices; devices other than the CPU.
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
TOGETHER = 2**22  # weights dequantized at a time


@dataclass(frozen=True)
class Blocks:
    """A weight in llama.cpp's blocks, byte for byte as a GGUF holds it; llama.cpp itself says what they stand for."""

    blocks: Tensor  # uint8 [out, bytes of a row]
    own_name: str  # "q4_k"

    @property
    def held_bytes(self) -> int:
        """In memory."""
        return self.blocks.numel()

    def to(self, device: torch.device) -> Blocks:
        """Where they are: llama.cpp reads them on the CPU."""
        return self

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that llama.cpp computes with."""
        return dequantize(self.blocks, self.own_name).to(dtype)


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


def has_library() -> bool:
    """Is llama-cpp-python here?"""
    return importlib.util.find_spec("llama_cpp") is not None


def check_packages(what: str) -> None:
    """UserError naming the extra where one of its packages is not here."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what}: needs {' and '.join(missing)}, not here yet: pip install 'bitatlas[gguf]'")


def quantize(weight: Tensor, own_name: str) -> Tensor:
    """`weight` [out, in] -> uint8 [out, bytes of a row], as llama-quantize makes it of float32. ValueError for rows of part blocks."""
    out, width = weight.shape
    number, traits = _type(own_name)
    if width % traits.blck_size:
        raise ValueError(f"rows of {width} are no whole blocks of {traits.blck_size} ({own_name})")
    source = weight.detach().to(device="cpu", dtype=torch.float32).contiguous()
    blocks = torch.empty(out, width // traits.blck_size * traits.type_size, dtype=torch.uint8)
    if blocks.numel():
        written = _ggml().ggml_quantize_chunk(number, source.data_ptr(), blocks.data_ptr(), 0, out, width, None)
        assert written == blocks.numel()
    return blocks


def dequantize(blocks: Tensor, own_name: str) -> Tensor:
    """uint8 [out, bytes of a row] -> float32 [out, in]: what llama.cpp reads the blocks as."""
    _, traits = _type(own_name)
    source = blocks.to("cpu").contiguous()
    out, row_bytes = source.shape
    width = row_bytes // traits.type_size * traits.blck_size
    weight = torch.empty(out, width)
    rows = max(1, TOGETHER // max(1, width))
    for some, into in zip(source.split(rows), weight.split(rows), strict=True):
        if some.numel():
            traits.to_float(some.data_ptr(), into.data_ptr(), into.numel())
    return weight


def type_number(own_name: str) -> int:
    """llama.cpp's number of a type: "q4_k" -> 12, "f16" -> 1."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[own_name.upper()])


@cache
def _type(own_name: str) -> tuple[int, Any]:
    number = type_number(own_name)
    traits = _ggml().ggml_get_type_traits(number).contents
    fmt = FORMATS[own_name]
    found = (traits.type_name.decode().lower(), traits.blck_size, 8 * traits.type_size)
    wanted = (own_name, fmt.group_size, fmt.bits * fmt.group_size + fmt.scale_bits)
    if found != wanted:
        raise UserError(f"this llama.cpp's type {number} is {found}, not {wanted} (name, weights, bits a block)")
    return number, traits


@cache
def _ggml() -> Any:
    """The library, with the types of the two functions that are called."""
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


# --- llamacpp --------------------------------------------------------------------------------------------------------------

# llama.cpp's own formats, quantized by llama.cpp's own library (`pip install 'bitatlas[gguf]'`). No data is needed.
#
# The blocks are those that `llama-quantize` writes for the same weight in float32 and the same type, and what is measured is what
# llama.cpp computes with. Left out: importance matrices, and the types that need one.


def quantize_weight(weight: Tensor, fmt: Format) -> Blocks:
    """Blocks of `weight` [out, in]; ValueError where a block does not divide the rows."""

    return Blocks(quantize(weight.detach().float(), fmt.own_name), fmt.own_name)
