"""Round to nearest, group-wise, with the clipping range that gives the least squared error.

For every group the range [min, max] (asymmetric, widened to include 0 so that the zero-point is a code) or [-max|w|, max|w|]
(symmetric) is shrunk in 20 steps from 1 down to 0.525; the step with the smallest sum of squared errors wins. The scale is rounded
to float16 *before* the codes are chosen, because float16 is what gets stored. No data is needed.

Left out: separate shrinking of the two ends, and any use of input statistics (that is what gptq is for).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitatlas.formats import Format
from bitatlas.quantizers.codes import Codes

STEPS = 20
SMALLEST_SCALE = 2.0**-24  # smallest positive float16


def quantize(weight: Tensor, fmt: Format) -> Codes:
    """Codes of `weight` [out, in]; the last group of a row may be short."""
    weight = weight.detach().float()
    whole = weight.shape[1] // fmt.group_size * fmt.group_size
    parts = []
    if whole:
        parts.append(_nearest(weight[:, :whole].reshape(len(weight), -1, fmt.group_size), fmt))
    if whole < weight.shape[1]:
        parts.append(_nearest(weight[:, whole:].unsqueeze(1), fmt))
    codes = torch.cat([part.codes for part in parts], dim=1)
    return Codes(
        codes,
        torch.cat([part.scale for part in parts], dim=1),
        torch.cat([part.zero for part in parts], dim=1),
        fmt.group_size,
    )


def _nearest(groups: Tensor, fmt: Format) -> Codes:
    """groups [out, groups, size] -> codes of the clipping step with the least squared error, chosen group by group."""
    top = 2**fmt.bits - 1
    low = groups.amin(-1).clamp(max=0)  # [out, groups]
    high = groups.amax(-1).clamp(min=0)
    if fmt.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    for step in range(STEPS):
        keep = 1 - 0.5 * step / STEPS
        scale = ((high - low) * keep / top).clamp(min=SMALLEST_SCALE).half().float()
        zero = torch.full_like(low, 2.0 ** (fmt.bits - 1)) if fmt.symmetric else (-low * keep / scale).round().clamp(0, top)
        error = (_decode(_encode(groups, scale, zero, top), scale, zero) - groups).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    codes = _encode(groups, best_scale, best_zero, top).to(torch.uint8).flatten(1)
    return Codes(codes, best_scale.half(), best_zero.to(torch.uint8), fmt.group_size)


def _encode(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return ((groups / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top)


def _decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
