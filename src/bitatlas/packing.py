"""Codes of 1 to 8 bits as a stream of bytes: little-endian, no padding but at the very end.

Eight codes of b bits are exactly b bytes, so eight are combined into one 64-bit word and its lowest b bytes kept. This is the form in
which `bank` stores codes, and its length is what `formats.stored_bytes` counts; runtimes have their own layouts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
