"""GPTQ: each input's rounding error is made up for by the inputs that are rounded after it, so that the *output* changes least.

With H the mean of x xᵀ over the fit rows (plus 1 % of its mean diagonal, without which directions that hardly occur would be
given any weight), an output row with error e = w - ŵ costs e H eᵀ. Write H = R Rᵀ with R upper triangular: the cost is ‖e R‖²,
whose term j holds the errors up to input j alone. So input j is rounded to the code nearest to w_j + Σ_{k<j} e_k R_kj / R_jj,
the point where term j vanishes. This is GPTQ's update, without the inverse of H, and one Cholesky factor serves every module with
this input, every format and every candidate.

The inputs with the largest H_jj come first (*act-order*), while the groups stay runs of consecutive inputs: each group's scale and
zero-point are fixed beforehand (*static groups*), by rtn's clipping search with squared errors times R_jj². The points that were
rounded then hold the errors of the inputs before them; the same search over *them* gives a second grid. Rows of W do not depend on
each other, so each takes the cheaper of the two. Its scales are refitted to the codes, together, and the codes chosen once more.
Where rtn's codes still cost less on the fit rows, they are taken: no output row is worse than with rtn.

Compiled by numba or in plain torch, on other devices than a CPU, sums are taken in another order: codes at a tie may differ.

Source: Frantar et al., arXiv 2210.17323; its form as nearest-plane rounding: Chen et al., arXiv 2507.18553. Written anew. Left out:
inputs as the quantized layers before would give them, since one bank serves plans that differ in those layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.model.decoder import Decoder
from bitatlas.quantize import compensate, rtn
from bitatlas.quantize.codes import LARGEST_SCALE, SMALLEST_SCALE, Codes, compile_loops, joined
from bitatlas.quantize.ggml import Blocks
from bitatlas.quantize.moments import damped, module_moments, to_float64, upper_factor
from bitatlas.records.formats import Format

LEAF = 32  # columns that are rounded one after the other before their errors go into a matrix product
LEAF_ROWS = 256  # output rows that a compiled loop takes together
REFIT_ROWS = 512  # output rows whose products stay in a cache
MOST_ROWS = 2**15  # output rows that are fitted in one go
SWEEPS = 3  # over a row's scales
LAST = 8  # an eighth of the inputs is enough to tell that nearly all of rtn's rows cost more
CLOSE = 1e-3  # relative: more than float32 sums are off by


@dataclass(frozen=True)
class CholeskyFactor:
    """The order in which inputs are rounded, and how the errors of some feed back into those after them."""

    hessian: Tensor  # float64 [in, in]: the mean of x xᵀ, not damped
    damped: Tensor  # float32 [in, in]: H
    damping: float  # added to the diagonal
    order: Tensor  # int64 [in]
    feedback: Tensor  # float32 [in, in], upper triangular: R_kj / R_jj, k and j counted in `order`
    last: Tensor  # float32 [in, in / LAST]: the last columns of R, their rows in the inputs' own order
    importance: Tensor  # float32 [in]: R_jj², what a squared error at an input costs that the later ones cannot make up for


def quantize(
    decoder: Decoder, formats: Mapping[str, Sequence[Format]], rows: Tensor | None
) -> Iterator[tuple[str, Sequence[Codes | Blocks]]]:
    """Yield every module in its formats, fitted on `rows` int64 [rows, tokens]; UserError without them. formats: module -> formats"""
    if rows is None or not len(rows):
        raise UserError("--quantizer gptq fits the codes to rows of text: give a text with --tokens")
    return _quantize(decoder, formats, rows)


def _quantize(
    decoder: Decoder, formats: Mapping[str, Sequence[Format]], rows: Tensor
) -> Iterator[tuple[str, Sequence[Codes | Blocks]]]:
    in_blocks = any(fmt.runtime for of_module in formats.values() for fmt in of_module)
    for moments in module_moments(decoder, list(formats), rows):
        fit_module = _fit_blocks(moments.hessian) if in_blocks else _fit_integers(moments.hessian)
        for name in (name for name in moments.names if name in formats):
            yield name, fit_module(decoder.weight(name), formats[name])


def _fit_blocks(hessian: Tensor) -> Callable[[Tensor, Sequence[Format]], list[Blocks]]:
    upper = compensate.factorize(hessian)
    return lambda weight, formats: compensate.fit_all(weight, formats, upper)


def _fit_integers(hessian: Tensor) -> Callable[[Tensor, Sequence[Format]], list[Codes]]:
    factor = factorize(hessian)

    def fit_module(weight: Tensor, formats: Sequence[Format]) -> list[Codes]:
        # Where float64 had to go elsewhere, the codes are chosen there too.
        codes = _fit_rows(weight.to(factor.hessian.device).float(), formats, factor)
        return [of_format.to(weight.device) for of_format in codes]

    return fit_module


def _fit_rows(weight: Tensor, formats: Sequence[Format], factor: CholeskyFactor) -> list[Codes]:
    """Return what `fit_all` does, a vocabulary's rows a part at a time: each takes about forty bytes while it is fitted."""
    if len(weight) <= MOST_ROWS:
        return fit_all(weight, formats, factor)
    parts = [fit_all(part, formats, factor) for part in weight.split(MOST_ROWS // 4)]
    return [joined(of_format) for of_format in zip(*parts, strict=True)]


def factorize(hessian: Tensor, act_order: bool = True) -> CholeskyFactor:
    """Return the factor of `hessian` float64 [in, in], damped; an input that is always 0 comes last and is rounded to nearest."""
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian), device=hessian.device)
    matrix, damping = damped(hessian)
    upper = upper_factor(matrix[order][:, order])
    importance = torch.empty_like(diagonal)
    importance[order] = upper.diagonal().square()
    feedback = (upper / upper.diagonal()).float()
    last = torch.empty_like(upper[:, -max(1, len(upper) // LAST) :])
    last[order] = upper[:, -last.shape[1] :]
    return CholeskyFactor(hessian, matrix.float(), damping, order, feedback, last.float(), importance.float())


def fit(weight: Tensor, fmt: Format, factor: CholeskyFactor) -> Codes:
    """Return codes of `weight` float32 [out, in]; see `fit_all`."""
    return fit_all(weight, [fmt], factor)[0]


def fit_all(weight: Tensor, formats: Sequence[Format], factor: CholeskyFactor) -> list[Codes]:
    """Return codes of `weight` float32 [out, in] in every format, those that one format alone would get."""
    weight_t = weight.T.contiguous()
    inputs = _Inputs(weight_t, weight_t[factor.order], factor.damped @ weight_t)
    return [_fit(weight, inputs, fmt, factor) for fmt in formats]


class _Inputs(NamedTuple):
    """A weight as rounding reads it: one input's weights lie together. Float32 [in, out] each."""

    weight: Tensor
    ordered: Tensor  # in the factor's order
    products: Tensor  # H Wᵀ


def _fit(weight: Tensor, inputs: _Inputs, fmt: Format, factor: CholeskyFactor) -> Codes:
    grids = rtn.grids(weight, fmt, [None, factor.importance])
    scale, zero = (part.T.contiguous() for part in grids[1])
    first, points = _round(inputs.ordered, scale, zero, fmt, factor)
    # The best grid of the points that were rounded, which hold the errors of the inputs before
    scale, zero = (part.T.contiguous() for part in rtn.grid(points.T.contiguous(), fmt, factor.importance))
    best = _refit(inputs, _better(first, _round(inputs.ordered, scale, zero, fmt, factor)[0]), fmt, factor)
    best = _better(best, _round(inputs.ordered, best.scale, best.zero, fmt, factor)[0])
    # Sums of huge weights overflow float32; whatever codes such rows get, they are the same every time and rtn's are there.
    codes = (best.steps + _by_input(best.zero, fmt.group_size, len(best.steps))).nan_to_num_(0).to(torch.uint8)
    fitted = Codes(
        codes.T.contiguous(), best.scale.T.half().contiguous(), best.zero.T.to(torch.uint8).contiguous(), fmt.group_size
    )
    return _no_worse(fitted, best, rtn.on_grid(weight, *grids[0], fmt), weight, factor)


class _Rows(NamedTuple):
    """Codes of output rows, transposed, and what they cost, all float32."""

    steps: Tensor  # [in, out]: code - zero
    scale: Tensor  # [groups, out]
    zero: Tensor  # [groups, out]
    cost: Tensor  # [out]: e H eᵀ


def _better(rows: _Rows, other: _Rows) -> _Rows:
    """Return the cheaper of two for every output row."""
    worse = other.cost < rows.cost.nan_to_num(torch.inf)
    return _Rows(*(torch.where(worse, b, a) for a, b in zip(rows, other, strict=True)))


def _by_input(values: Tensor, size: int, width: int) -> Tensor:
    """Return what each input's group has, [in, out]. values: [groups, out]"""
    return values.repeat_interleave(size, 0)[:width]


def _round(weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format, factor: CholeskyFactor) -> tuple[_Rows, Tensor]:
    """Return the codes of `weight` [in, out], in the factor's order, on a fixed grid, and the points that were rounded [in, out]."""
    rounder = _Rounder(weight, scale, zero, fmt, factor)
    rounder.round_range(0, len(weight))
    return _Rows(rounder.steps, scale, zero, rounder.cost), rounder.target[factor.order.argsort()]


class _Rounder:
    """Rounds all inputs, transposed [in, out] so that one input's weights lie together, and in the factor's order."""

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format, factor: CholeskyFactor):
        self.weight, self.target = weight, weight.clone()
        self.scale, self.inverse = scale, 1 / scale
        self.low, self.high = -zero, 2**fmt.bits - 1 - zero
        self.order, self.group, self.feedback = factor.order, factor.order // fmt.group_size, factor.feedback
        self.importance = factor.importance[factor.order]
        self.steps = torch.empty_like(weight)  # in the inputs' own order
        self.error = torch.empty_like(weight)  # w - ŵ
        self.cost = torch.zeros_like(weight[0])
        self.compiled = _compiled_leaf() if weight.device.type == "cpu" else None

    def round_range(self, start: int, end: int) -> None:
        """Round inputs start..end, whose targets hold the errors of all inputs before `start`.

        Halving makes nearly all of the work products of large matrices, whatever the sizes of caches.
        """
        if end - start <= LEAF:
            self._round_leaf(start, end)
            return
        middle = (start + end) // 2
        self.round_range(start, middle)
        self.target[middle:end].addmm_(self.feedback[start:middle, middle:end].T, self.error[start:middle])
        self.round_range(middle, end)

    def _round_leaf(self, start: int, end: int) -> None:
        if self.compiled:
            per_input = (self.order, self.group, self.importance, self.feedback)
            grid = (self.scale, self.inverse, self.low, self.high)
            rows = (self.weight, self.target, self.steps, self.error, self.cost)
            arrays = (tuple(array.numpy() for array in part) for part in (per_input, grid, rows))
            self.compiled(*arrays, start, end)
            return
        groups, order = self.group[start:end], self.order[start:end]
        scale, inverse, low, high = (part[groups] for part in (self.scale, self.inverse, self.low, self.high))  # [leaf, out]
        steps = torch.empty_like(scale)
        for index, column in enumerate(range(start, end)):
            target = self.target[column]
            if index:
                target.addmv_(self.error[start:column].T, self.feedback[start:column, column])
            step = torch.clamp((target * inverse[index]).round_(), low[index], high[index], out=steps[index])
            nearest = step * scale[index]
            torch.sub(self.weight[column], nearest, out=self.error[column])
            self.cost.add_((target - nearest).square_().mul_(self.importance[column]))
        self.steps[order] = steps


@cache
def _compiled_leaf() -> Callable[..., None] | None:
    """Compile the rounding of a leaf's inputs as one loop over its output rows; None where that cannot be (see `compile_loops`)."""

    def leaf(per_input: Any, grid: Any, rows: Any, start: int, end: int) -> None:
        order, groups, importance, feedback = per_input
        scale, inverse, low, high = grid
        weight, target, steps, error, cost = rows
        # Output rows whose numbers stay in a near cache; slices of one axis, because loops over them become vector instructions.
        for first in range(0, target.shape[1], LEAF_ROWS):
            last = min(first + LEAF_ROWS, target.shape[1])
            for column in range(start, end):
                group, count = groups[column], importance[column]
                to = target[column, first:last]
                for before in range(start, column):
                    factor, errors = feedback[before, column], error[before, first:last]
                    for row in range(last - first):
                        to[row] += factor * errors[row]
                scales, inverses, least, most = (
                    scale[group, first:last],
                    inverse[group, first:last],
                    low[group, first:last],
                    high[group, first:last],
                )
                weights, step_to, error_to, cost_to = (
                    weight[column, first:last],
                    steps[order[column], first:last],
                    error[column, first:last],
                    cost[first:last],
                )
                for row in range(last - first):
                    step = np.rint(to[row] * inverses[row])
                    step = least[row] if step < least[row] else step
                    step = most[row] if step > most[row] else step
                    nearest = step * scales[row]
                    step_to[row], error_to[row] = step, weights[row] - nearest
                    cost_to[row] += (to[row] - nearest) * (to[row] - nearest) * count

    return compile_loops(leaf)


def _refit(inputs: _Inputs, rows: _Rows, fmt: Format, factor: CholeskyFactor) -> _Rows:
    """Choose scales that cost less with the same codes.

    The cost is a parabola in a row's scales: with t_g the steps of group g and nothing elsewhere, its curvature is A_gh = t_g H t_hᵀ.
    One scale after the other moves to the float16 nearest to its minimum, SWEEPS times round.
    """
    curvature, along = _parabola(inputs, rows.steps, fmt.group_size, factor.damped)
    slope = along - (curvature * rows.scale).sum(1)  # [groups, out]: t_g H eᵀ
    scale, cost = rows.scale.clone(), rows.cost.clone()
    compiled = _compiled_descent() if scale.device.type == "cpu" else None
    if compiled:
        compiled(*(array.numpy() for array in (curvature, slope, scale, cost)))
        return _Rows(rows.steps, scale, rows.zero, cost)
    for group in SWEEPS * list(range(len(scale))):
        square = curvature[group, group]
        change = (scale[group] + slope[group] / square).half().float() - scale[group]
        gain = change * (2 * slope[group] - change * square)
        new = scale[group] + change
        better = (gain > 0) & (new >= SMALLEST_SCALE) & (new <= LARGEST_SCALE)  # false for 0 / 0, a group of zeros
        change = torch.where(better, change, 0)
        scale[group] += change
        cost -= torch.where(better, gain, 0)
        slope -= curvature[group] * change
    return _Rows(rows.steps, scale, rows.zero, cost)


def _parabola(inputs: _Inputs, steps: Tensor, size: int, damped: Tensor) -> tuple[Tensor, Tensor]:
    """Return t_g H t_hᵀ [groups, groups, out] and t_g H wᵀ [groups, out]."""
    width, out = steps.shape
    groups = -(-width // size)
    curvature = steps.new_empty(groups, groups, out)
    for first in range(0, out, REFIT_ROWS):  # output rows
        rows = slice(first, first + REFIT_ROWS)
        part = steps[:, rows].contiguous()
        for group in range(groups):
            start = group * size
            product = damped[start:, start : start + size] @ part[start : start + size]  # H t_gᵀ, of the groups from here on
            curvature[group, group:, rows] = _sum_groups(product.mul_(part[start:]), size)
            curvature[group + 1 :, group, rows] = curvature[group, group + 1 :, rows]
    return curvature, _sum_groups(inputs.products * steps, size)


def _sum_groups(values: Tensor, size: int) -> Tensor:
    """Return the sum over every group's inputs, [groups, out]. values: [in, out]"""
    whole = len(values) // size * size
    sums = values[:whole].unflatten(0, (-1, size)).sum(1) if whole else values[:0]
    return torch.cat([sums, values[whole:].sum(0, keepdim=True)]) if whole < len(values) else sums


@cache
def _compiled_descent() -> Callable[..., None] | None:
    """Compile the descent of `_refit`, in place; None where that cannot be (see `compile_loops`)."""

    def descent(curvature: Any, slope: Any, scale: Any, cost: Any) -> None:
        groups, out = scale.shape
        changes = np.empty(LEAF_ROWS, np.float32)
        smallest, largest, normal = np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE), np.float32(2.0**-14)
        split, shift = np.float32(2**13 + 1), np.float32(0.75)
        for first in range(0, out, LEAF_ROWS):
            last = min(first + LEAF_ROWS, out)
            for _ in range(SWEEPS):
                for group in range(groups):
                    squares, slopes = curvature[group, group, first:last], slope[group, first:last]
                    scales, costs = scale[group, first:last], cost[first:last]
                    for row in range(last - first):
                        minimum = scales[row] + slopes[row] / squares[row]
                        # To float16: the upper 11 bits, or a multiple of 2**-24 below the smallest normal number.
                        high = minimum * split
                        new = high - (high - minimum) if minimum >= normal else (minimum + shift) - shift
                        change = new - scales[row]
                        gain = change * (np.float32(2) * slopes[row] - change * squares[row])
                        better = (gain > 0) & (new >= smallest) & (new <= largest)  # false for 0 / 0, a group of zeros
                        changes[row] = change if better else np.float32(0)
                        scales[row] = new if better else scales[row]
                        costs[row] -= gain if better else np.float32(0)
                    for other in range(groups):
                        slopes, products = slope[other, first:last], curvature[group, other, first:last]
                        for row in range(last - first):
                            slopes[row] -= products[row] * changes[row]

    return compile_loops(descent)


def _no_worse(codes: Codes, rows: _Rows, other: Codes, weight: Tensor, factor: CholeskyFactor) -> Codes:
    """Return `codes`, with `other`'s rows where theirs have the smaller output error on the tokens that the factor was taken from.

    An error costs ‖e R‖², so the terms of the inputs that are rounded last, less the damping, are the least that `other` costs. They
    are most of it and already exceed what nearly all rows of `codes` cost. The rest is compared in float64.
    """
    theirs = other.weight().sub_(weight)
    terms = theirs @ factor.last  # [out, last inputs]
    least = terms.square_().sum(1) - factor.damping * theirs.square().sum(1)
    close = (~(least > rows.cost * (1 + CLOSE))).nonzero().flatten()
    ours = to_float64(codes.rows(close).weight() - weight[close])
    theirs = to_float64(theirs[close])
    # a H aᵀ - b H bᵀ = (a - b) H (a + b)ᵀ: one product, and no difference of two large numbers
    worse = close[(((ours - theirs) @ factor.hessian) * (ours + theirs)).sum(1) > 0]
    for part in ("codes", "scale", "zero"):
        getattr(codes, part)[worse] = getattr(other, part)[worse]
    return codes
