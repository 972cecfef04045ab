"""Half-quadratic quantization through its authors' package, `hqq` (`pip install 'bitatlas[hqq]'`). No data is needed.

The package takes every group's scale from its range and moves the zero-point, which need not be a whole number, so that few weights
have a large error (the p = 0.7 norm of the errors, which minds outliers less than their squares). Groups run along the inputs
(`axis=1`), as in every format here; the short group at the end of a row is a call of its own.

The codes are the package's, the scale and zero-point its own rounded to float16, as its runtimes keep them. Left out: symmetric
formats, since a zero-point that is free is what the method is about.
Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023); hqq 0.2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitatlas.quantize.codes import LARGEST_SCALE, SMALLEST_SCALE, Codes
from bitatlas.records.formats import Format


def quantize(weight: Tensor, fmt: Format) -> Codes:
    """Return codes of `weight` [out, in], zero-points float16; the last group of a row may be short."""
    whole = weight.shape[1] // fmt.group_size * fmt.group_size
    pieces = [piece for piece in (weight[:, :whole], weight[:, whole:]) if piece.numel()]
    parts = [_quantize(piece.detach().float(), fmt.bits, min(fmt.group_size, piece.shape[1])) for piece in pieces]
    codes, scale, zero = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    # A group far from 0 beside its range has a zero-point beyond float16: the nearest that can be stored.
    stored = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half(), zero.clamp(-LARGEST_SCALE, LARGEST_SCALE).half()
    return Codes(codes.to(torch.uint8), *stored, fmt.group_size)


def _quantize(weight: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the package's codes [out, in], scale and zero-point [out, groups] of `weight` [out, in], whole groups of `size`."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=size, axis=1, optimize=True, bitpack=False, device=str(weight.device)
    )
    shape = (len(weight), -1)
    # Copies: the package works in inference mode, whose tensors nothing can be learned through.
    scale, zero = (meta[part].reshape(shape).clone().float() for part in ("scale", "zero"))
    return _within_float16(weight, codes.reshape(weight.shape).clone(), scale, zero, 2**bits - 1)


def _within_float16(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Replace, where a group's range needs a larger scale than float16 has: by the largest, and the codes nearest on that grid."""
    fits = scale <= LARGEST_SCALE  # [out, groups]; false for what overflowed on the way
    held = torch.where(fits, scale, LARGEST_SCALE)
    zero = torch.where(fits, zero, (zero / held * scale).nan_to_num(0).clamp(-LARGEST_SCALE, LARGEST_SCALE))
    groups = weight.reshape(*scale.shape, -1)
    nearest = (groups / held[..., None] + zero[..., None]).round().clamp(0, top)
    return torch.where(fits[..., None], codes.reshape(groups.shape), nearest).reshape(weight.shape), held, zero
