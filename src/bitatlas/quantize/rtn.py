"""Round to nearest, group-wise, with the clipping range that gives the least squared error.

For every group the range [min, max] (asymmetric, widened to include 0 so that the zero-point is a code) or [-max|w|, max|w|]
(symmetric) is shrunk in 20 steps from 1 down to 0.525; the step with the smallest sum of squared errors wins. The scale is rounded
to float16 *before* the codes are chosen, because float16 is what gets stored; a range that needs a larger scale than float16 has is
clipped to what the largest reaches. No data is needed.

`grid` is the search alone, with an optional weight for every input's squared error: gptq starts from it.

Errors are counted in steps of the scale, e = clamp(round(w / s), -z, top - z) - w / s, and summed input after input. Compiled by numba,
the search reads each weight once and tries all steps while it is in a register; plain torch, on other devices than a CPU, reads it once a
step and gives the same bits.

Left out: separate shrinking of the two ends, and any use of input statistics (that is what gptq is for).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.quantize.codes import LARGEST_SCALE, SMALLEST_SCALE, Codes, by_input, compile_loops, grouped
from bitatlas.records.formats import Format

STEPS = 20
ROUNDING = np.float32(1.5 * 2**23)  # added and taken away: a float32 below 2**22 becomes the nearest whole number
LANES = 24  # the steps, filled up to whole vectors of a processor's instructions
SEARCHED = 2**16  # weights at a time on a CPU: what the search reads and writes stays in its cache
SEARCHED_ELSEWHERE = 2**24


def quantize(weight: Tensor, fmt: Format) -> Codes:
    """Return the codes of `weight` [out, in]; the last group of a row may be short."""
    weight = weight.detach().float()
    return on_grid(weight, *grid(weight, fmt), fmt)


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Codes:
    """Round `weight` float32 [out, in] to the nearest codes of a grid (scale and zero-point [out, groups])."""
    scales, zeros = (by_input(values, fmt.group_size, weight.shape[1]) for values in (scale, zero))
    codes = (weight / scales).round_().add_(zeros).clamp_(0, _top(fmt)).to(torch.uint8)
    return Codes(codes, scale.half(), zero.to(torch.uint8), fmt.group_size)


def grid(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return scale and zero-point, float32 [out, groups] each, of every group's best clipping step; see `grids`."""
    return grids(weight, fmt, [importance])[0]


def grids(weight: Tensor, fmt: Format, importances: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """Return every group's best clipping step for each of one or two `importances`: scale and zero-point, float32 [out, groups] each.

    weight: float32 [out, in]. An importance [in] is what an input's squared error counts; for None all count the same. Both are
    searched in one pass over the weights. A scale is a float16's value.
    """
    size, top = fmt.group_size, _top(fmt)
    ones = torch.ones(weight.shape[1], device=weight.device)
    counts = torch.stack([ones if importance is None else importance.float() for importance in importances])
    on_cpu = weight.device.type == "cpu"
    search = (_compiled() if on_cpu else None) or _search
    rows = max(1, (SEARCHED if on_cpu else SEARCHED_ELSEWHERE) // max(1, weight.shape[1]))
    results = []
    for block in weight.contiguous().split(rows):
        scales, zeros = _candidates(block, fmt)  # [steps, out, groups]
        best = search(block, counts, scales, zeros, size, top)  # [importances, out, groups]
        results.append((scales.gather(0, best), zeros.gather(0, best)))
    scale, zero = (torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
    return list(zip(scale, zero, strict=True))


def _candidates(weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of every clipping step, float32 [steps, out, groups]."""
    parts = grouped(weight, fmt.group_size)
    low = torch.cat([part.amin(-1) for part in parts], dim=1).clamp(max=0)  # [out, groups]
    high = torch.cat([part.amax(-1) for part in parts], dim=1).clamp(min=0)
    if fmt.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    keep = 1 - 0.5 * torch.arange(STEPS, device=weight.device)[:, None, None] / STEPS
    scale = ((high - low) * keep / _top(fmt)).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    if fmt.symmetric:
        return scale, torch.full_like(scale, 2.0 ** (fmt.bits - 1))
    return scale, (-low * keep / scale).round().clamp(0, _top(fmt))


def _search(weight: Tensor, counts: Tensor, scales: Tensor, zeros: Tensor, size: int, top: int) -> Tensor:
    """Return the step of the least squared error of every group, int64 [importances, out, groups]; the first of equals.

    counts: [importances, in], one or two; scales, zeros: [steps, out, groups].
    """
    inverse, low, high, square = (
        part.movedim(-1, 1).contiguous() for part in (1 / scales, -zeros, top - zeros, scales.square())
    )  # [steps, groups, out]
    columns = weight.T.contiguous()  # [in, out]
    error = inverse.new_zeros(len(counts), *inverse.shape)
    for first in range(min(size, len(columns))):  # one input of every group at a time
        inputs = columns[first::size]  # [groups, out]: a short group has no input at the last places
        groups = len(inputs)
        ratio = inputs * inverse[:, :groups]
        off = ratio.round().clamp_(low[:, :groups], high[:, :groups]).sub_(ratio).square_()
        for index, count in enumerate(counts):
            error[index, :, :groups] += off * count[first::size, None]
    # Squares of huge weights are infinite: the first step.
    return (error * square).nan_to_num(torch.inf).argmin(1).transpose(1, 2).contiguous()


@cache
def _compiled() -> Callable[..., Tensor] | None:
    """Compile the search as one pass over the weights, in 2 s; None where that cannot be (see `compile_loops`)."""

    def search(weight: Any, counts: Any, inverse: Any, low: Any, high: Any, square: Any, size: int, best: Any) -> None:
        errors, others = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        ratios, least, most = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for row in range(weight.shape[0]):
            for group in range(best.shape[2]):
                errors[:], others[:] = 0, 0
                for step in range(STEPS):
                    ratios[step] = inverse[row, group, step]
                    least[step], most[step] = low[row, group, step], high[row, group, step]
                for column in range(group * size, min(weight.shape[1], (group + 1) * size)):
                    value, count, other = weight[row, column], counts[0, column], counts[1, column]
                    for step in range(LANES):  # becomes vector instructions; each step's sum keeps the order of the inputs
                        ratio = value * ratios[step]
                        nearest = (ratio + ROUNDING) - ROUNDING
                        nearest = least[step] if nearest < least[step] else nearest
                        nearest = most[step] if nearest > most[step] else nearest
                        off = (nearest - ratio) * (nearest - ratio)
                        errors[step] += off * count
                        others[step] += off * other
                for index, sums in enumerate((errors, others)):
                    smallest, best[index, row, group] = np.float32(np.inf), 0
                    for step in range(STEPS):
                        if sums[step] * square[row, group, step] < smallest:
                            smallest, best[index, row, group] = sums[step] * square[row, group, step], step

    kernel = compile_loops(search)
    if kernel is None:
        return None

    def compiled(weight: Tensor, counts: Tensor, scales: Tensor, zeros: Tensor, size: int, top: int) -> Tensor:
        last = [part.movedim(0, -1).contiguous().numpy() for part in (1 / scales, -zeros, top - zeros, scales.square())]
        best = torch.empty((2, *scales.shape[1:]), dtype=torch.int64)
        kernel(weight.numpy(), counts[[0, -1]].numpy(), *last, size, best.numpy())
        return best[: len(counts)]

    return compiled


def _top(fmt: Format) -> int:
    """The greatest code."""
    return 2**fmt.bits - 1
