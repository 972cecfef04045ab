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

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.quantize.codes import LARGEST_SCALE, SMALLEST_SCALE, Codes, by_input, compile_loops, grouped
from bitatlas.records.formats import Format

STEPS = 20
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
    """Return scale and zero-point, float32 [out, groups] each, of every group's best clipping step. weight: float32 [out, in].

    `importance` [in]: what an input's squared error counts; without it all count the same. The scale is a float16's value.
    """
    size, top = fmt.group_size, _top(fmt)
    counts = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    on_cpu = weight.device.type == "cpu"
    search = (_compiled() if on_cpu else None) or _search
    rows = max(1, (SEARCHED if on_cpu else SEARCHED_ELSEWHERE) // max(1, weight.shape[1]))
    found = []
    for block in weight.contiguous().split(rows):
        scales, zeros = _candidates(block, fmt)  # [steps, out, groups]
        best = search(block, counts.contiguous(), scales, zeros, size, top)[None]  # [1, out, groups]
        found.append((scales.gather(0, best)[0], zeros.gather(0, best)[0]))
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


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
    """Return the step of the least squared error of every group, int64 [out, groups]; the first of equals. scales: [steps, out, groups]."""
    inverse, low, high, square = (
        part.movedim(-1, 1).contiguous() for part in (1 / scales, -zeros, top - zeros, scales.square())
    )  # [steps, groups, out]
    error, columns = torch.zeros_like(inverse), weight.T.contiguous()  # [in, out]
    for first in range(min(size, len(columns))):  # one input of every group at a time
        inputs = columns[first::size]  # [groups, out]: a short group has no input at the last places
        groups = len(inputs)
        ratio = inputs * inverse[:, :groups]
        off = ratio.round().clamp_(low[:, :groups], high[:, :groups]).sub_(ratio)
        error[:, :groups] += off.square_().mul_(counts[first::size, None])
    return (error * square).nan_to_num(torch.inf).argmin(0).T.contiguous()  # squares of huge weights are infinite: the first step


@cache
def _compiled() -> Callable[..., Tensor] | None:
    """Compile the search as one pass over the weights, in 2 s; None where that cannot be (see `compile_loops`)."""

    def search(weight: Any, counts: Any, inverse: Any, low: Any, high: Any, square: Any, size: int, best: Any) -> None:
        error, ratios = np.empty(STEPS, np.float32), np.empty(STEPS, np.float32)
        least, most = np.empty(STEPS, np.float32), np.empty(STEPS, np.float32)
        for row in range(weight.shape[0]):
            for group in range(best.shape[1]):
                for step in range(STEPS):
                    error[step] = 0
                    ratios[step], least[step], most[step] = (
                        inverse[row, group, step],
                        low[row, group, step],
                        high[row, group, step],
                    )
                for column in range(group * size, min(weight.shape[1], (group + 1) * size)):
                    value, count = weight[row, column], counts[column]
                    for step in range(STEPS):  # becomes vector instructions; each step's sum keeps the order of the inputs
                        ratio = value * ratios[step]
                        nearest = np.rint(ratio)
                        nearest = least[step] if nearest < least[step] else nearest
                        nearest = most[step] if nearest > most[step] else nearest
                        off = nearest - ratio
                        error[step] += off * off * count
                smallest, best[row, group] = np.float32(np.inf), 0
                for step in range(STEPS):
                    if error[step] * square[row, group, step] < smallest:
                        smallest, best[row, group] = error[step] * square[row, group, step], step

    kernel = compile_loops(search)
    if kernel is None:
        return None

    def compiled(weight: Tensor, counts: Tensor, scales: Tensor, zeros: Tensor, size: int, top: int) -> Tensor:
        last = [part.movedim(0, -1).contiguous().numpy() for part in (1 / scales, -zeros, top - zeros, scales.square())]
        best = torch.empty(scales.shape[1:], dtype=torch.int64)
        kernel(weight.numpy(), counts.numpy(), *last, size, best.numpy())
        return best

    return compiled


def _top(fmt: Format) -> int:
    """The greatest code."""
    return 2**fmt.bits - 1
