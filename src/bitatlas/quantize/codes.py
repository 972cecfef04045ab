"""Integer codes with a scale and a zero-point for every group of consecutive inputs, and how codes are packed into bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # smallest positive float16
LARGEST_SCALE = 65504.0  # largest float16
WORD_CODES = 8  # codes of b bits fill exactly b bytes: they are combined into one 64-bit word, whose lowest b bytes are stored


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
        """Bytes in memory, about."""
        return self.codes.numel()

    def to(self, device: torch.device) -> Codes:
        return Codes(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.group_size)

    def rows(self, index: Tensor) -> Codes:
        """Return the codes of the output rows `index`."""
        return Codes(self.codes[index], self.scale[index], self.zero[index], self.group_size)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that these codes stand for, [out, in]."""
        scale, zero = (by_input(values, self.group_size, self.codes.shape[1]) for values in (self.scale, self.zero))
        return self.codes.float().sub_(zero).mul_(scale).to(dtype)


@dataclass(frozen=True)
class Kept:
    """A weight that stays as it is, where codes would be."""

    values: Tensor  # [out, in]
    held_bytes: int = 0

    def to(self, device: torch.device) -> Kept:
        return Kept(self.values.to(device))

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, [out, in]."""
        return self.values.to(dtype)


def joined(parts: Sequence[Codes]) -> Codes:
    """Return the codes whose output rows are those of `parts`, one after the other."""
    codes, scale, zero = (torch.cat(tensors) for tensors in zip(*((p.codes, p.scale, p.zero) for p in parts), strict=True))
    return Codes(codes, scale, zero, parts[0].group_size)


def by_input(values: Tensor, size: int, width: int) -> Tensor:
    """Return what each input's group has, [out, in]. values: [out, groups]"""
    return values.unsqueeze(-1).expand(-1, -1, size).flatten(1)[:, :width]


def grouped(weight: Tensor, size: int) -> list[Tensor]:
    """Return views of `weight` [out, in]: its whole groups [out, groups, size], and the short one [out, 1, rest] where there is one."""
    whole = weight.shape[1] // size * size
    parts = (weight[:, :whole].unflatten(1, (-1, size)) if whole else weight[:, :0, None], weight[:, None, whole:])
    return [part for part in parts if part.numel()]


def compile_loops(function: Callable[..., None]) -> Callable[..., None] | None:
    """Compile loops over arrays by numba; None where numba has no build for this Python or processor."""
    if find_spec("numba") is None:
        return None
    import numba

    compiled: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` codes of `bits` bits."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 1 to 8 bits into a stream of bytes: little-endian, no padding but at the very end.

    codes: uint8 of any shape, each below 2**bits -> uint8 [ceil(codes * bits / 8)]. ValueError for a code that does not fit. This is
    the form in which `bank` stores codes, and its length is what `formats.stored_bytes` counts; runtimes have their own layouts.
    """
    _check(bits)
    flat = codes.flatten()
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"codes up to {int(flat.max())} do not fit {bits} bits")
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % WORD_CODES)).view(-1, WORD_CODES)  # [words, 8]
    words = (padded.long() << _shifts(bits, WORD_CODES)).sum(-1, keepdim=True)  # disjoint bits: the sum is their union
    stream = (words >> _shifts(8, bits)) & 0xFF  # [words, bits]
    return stream.to(torch.uint8).flatten()[: packed_bytes(flat.numel(), bits)]


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the codes that `pack` packed: uint8 of `shape`. ValueError where the length is not that of `shape`."""
    _check(bits)
    count = math.prod(shape)
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(f"{packed.numel()} bytes are not {count} codes of {bits} bits")
    stream = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)  # [words, bits]
    words = (stream.long() << _shifts(8, bits)).sum(-1, keepdim=True)
    codes = (words >> _shifts(bits, WORD_CODES)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten()[:count].view(shape)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: 1 to 8, got {bits}")


def _shifts(step: int, count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64) * step
