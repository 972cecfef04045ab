"""What a quantizer returns: integer codes with a scale and a zero-point for every group of consecutive inputs, or a runtime's own blocks.

Also how the bank keeps either: `to_tensors` and `from_tensors`, in exactly the bytes that `formats.stored_bytes` counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitatlas.records.formats import Format

SMALLEST_SCALE = 2.0**-24  # smallest positive float16
LARGEST_SCALE = 65504.0  # largest float16


@dataclass(frozen=True)
class Codes:
    """weight[o, i] = (codes[o, i] - zero[o, i // group_size]) * scale[o, i // group_size].

    A format counts 16 bits for a zero-point, so a quantizer may give it as a whole number (uint8, a code) or as a float16.
    """

    codes: Tensor  # uint8 [out, in]
    scale: Tensor  # float16 [out, groups]
    zero: Tensor  # uint8 or float16 [out, groups]
    group_size: int

    @property
    def held_bytes(self) -> int:
        """In memory, about."""
        return self.codes.numel()

    def to(self, device: torch.device) -> Codes:
        return Codes(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.group_size)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that these codes stand for, [out, in]."""
        width = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(self.group_size, dim=1)[:, :width]
        zero = self.zero.float().repeat_interleave(self.group_size, dim=1)[:, :width]
        return ((self.codes.float() - zero) * scale).to(dtype)


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
        from bitatlas.quantize.ggml import dequantize

        return dequantize(self.blocks, self.own_name).to(dtype)


def to_tensors(found: Codes | Blocks, fmt: Format) -> dict[str, Tensor]:
    """What a file holds, on the CPU."""
    if isinstance(found, Blocks):
        return {"blocks": found.blocks.cpu().contiguous()}
    tensors = {"codes": pack(found.codes.cpu(), fmt.bits), "scale": found.scale.cpu().contiguous()}
    if not fmt.symmetric:
        tensors["zero"] = found.zero.cpu().contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]) -> Codes | Blocks:
    """The inverse, for a weight [out, in]. KeyError, ValueError where the file is not one of this format and shape."""
    if fmt.runtime:
        wanted = (shape[0], shape[1] * (fmt.bits * fmt.group_size + fmt.scale_bits) // (8 * fmt.group_size))
        if tuple(tensors["blocks"].shape) != wanted:
            raise ValueError(f"blocks of shape {tuple(tensors['blocks'].shape)}, not {wanted}")
        return Blocks(tensors["blocks"], fmt.own_name)
    scale = tensors["scale"]
    zero = tensors["zero"] if "zero" in tensors else torch.full_like(scale, 2 ** (fmt.bits - 1), dtype=torch.uint8)
    return Codes(unpack(tensors["codes"], fmt.bits, shape), scale, zero, fmt.group_size)


# --- packing ---------------------------------------------------------------------------------------------------------------

# Codes of 1 to 8 bits as a stream of bytes: little-endian, no padding but at the very end.
#
# Eight codes of b bits are exactly b bytes, so eight are combined into one 64-bit word and its lowest b bytes kept. This is the form in
# which `bank` stores codes, and its length is what `formats.stored_bytes` counts; runtimes have their own layouts.

TOGETHER = 8  # codes of b bits fill b whole bytes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: uint8 of any shape, each below 2**bits -> uint8 [ceil(codes * bits / 8)]. ValueError for a code that does not fit."""
    _check(bits)
    flat = codes.flatten()
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"codes up to {int(flat.max())} do not fit {bits} bits")
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % TOGETHER)).view(-1, TOGETHER)
    words = (padded.long() << _shifts(bits, TOGETHER)).sum(-1, keepdim=True)  # disjoint bits: the sum is their union
    stream = (words >> _shifts(8, bits)) & 0xFF  # [words, bits]
    return stream.to(torch.uint8).flatten()[: packed_bytes(flat.numel(), bits)]


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: uint8 of `shape`. ValueError where the length is not that of `shape`."""
    _check(bits)
    count = math.prod(shape)
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(f"{packed.numel()} bytes are not {count} codes of {bits} bits")
    stream = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = (stream.long() << _shifts(8, bits)).sum(-1, keepdim=True)
    codes = (words >> _shifts(bits, TOGETHER)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten()[:count].view(shape)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: 1 to 8, got {bits}")


def _shifts(step: int, count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64) * step
