"""Round to nearest, group-wise, with the clipping range that gives the least squared error.

For every group the range [min, max] (asymmetric, widened to include 0 so that the zero-point is a code) or [-max|w|, max|w|]
(symmetric) is shrunk in 20 steps from 1 down to 0.525; the step with the smallest sum of squared errors wins. The scale is rounded
to float16 *before* the codes are chosen, because float16 is what gets stored; a range that needs a larger scale than float16 has is
clipped to what the largest reaches. No data is needed.

`grid` is the search alone, with an optional weight for every input's squared error: gptq starts from it.

Left out: separate shrinking of the two ends, and any use of input statistics (that is what gptq is for).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitatlas.quantize.codes import LARGEST_SCALE, SMALLEST_SCALE, Codes
from bitatlas.records.formats import Format

STEPS = 20
SEARCHED = 2**18  # weights at a time: what 20 steps over them read and write stays in a processor's cache


def quantize(weight: Tensor, fmt: Format) -> Codes:
    """Codes of `weight` [out, in]; the last group of a row may be short."""
    weight = weight.detach().float()
    return on_grid(weight, *grid(weight, fmt), fmt)


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Codes:
    """`weight` float32 [out, in] rounded to the nearest codes of a grid (scale and zero-point [out, groups])."""
    codes = [_encode(part, scale[:, at], zero[:, at], _top(fmt)).flatten(1) for part, at in _groups(weight, fmt.group_size)]
    return Codes(torch.cat(codes, dim=1).to(torch.uint8), scale.half(), zero.to(torch.uint8), fmt.group_size)


def grid(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero-point, float32 [out, groups] each, of the best clipping step of every group of `weight` [out, in], float32.

    `importance` [in]: what an input's squared error counts; without it all count the same. The scale is a float16's value.
    """
    rows = max(1, SEARCHED // max(1, weight.shape[1]))
    found = [_grid(part, fmt, importance) for part in weight.split(rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _grid(weight: Tensor, fmt: Format, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = []
    for groups, at in _groups(weight, fmt.group_size):
        counts = None if importance is None else _groups_like(importance, groups, at, fmt.group_size)
        parts.append(_search(groups, fmt, counts))
    return torch.cat([scale for scale, _ in parts], dim=1), torch.cat([zero for _, zero in parts], dim=1)


def _groups(weight: Tensor, size: int) -> list[tuple[Tensor, slice]]:
    """The whole groups [out, groups, size] and the short one [out, 1, rest], each with its place among the groups."""
    count = weight.shape[1] // size
    whole, rest = weight[:, : count * size], weight[:, count * size :]
    parts = [(whole.reshape(len(weight), count, size), slice(0, count)), (rest.unsqueeze(1), slice(count, count + 1))]
    return [(groups, at) for groups, at in parts if groups.numel()]


def _groups_like(importance: Tensor, groups: Tensor, at: slice, size: int) -> Tensor:
    """`importance` [in] -> [groups, size] of the inputs that `groups` holds."""
    start = at.start * size
    return importance[start : start + groups.shape[1] * groups.shape[2]].reshape(groups.shape[1:])


def _search(groups: Tensor, fmt: Format, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """groups [out, groups, size] -> scale and zero-point of the clipping step with the least squared error, group by group."""
    top = _top(fmt)
    low = groups.amin(-1).clamp(max=0)  # [out, groups]
    high = groups.amax(-1).clamp(min=0)
    if fmt.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    for step in range(STEPS):
        keep = 1 - 0.5 * step / STEPS
        scale = ((high - low) * keep / top).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        zero = torch.full_like(low, 2.0 ** (fmt.bits - 1)) if fmt.symmetric else (-low * keep / scale).round().clamp(0, top)
        squares = (_decode(_encode(groups, scale, zero, top), scale, zero) - groups).square()
        error = (squares if importance is None else squares * importance).sum(-1)
        better = (error < best) if step else torch.ones_like(best, dtype=torch.bool)  # squares of huge weights are infinite
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _top(fmt: Format) -> int:
    """The greatest code."""
    return 2**fmt.bits - 1


def _encode(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return ((groups / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top)


def _decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
