"""GPTQ: each input's rounding error is made up for by the inputs that are rounded after it, so that the *output* changes least.

With H the mean of x xᵀ over the fit rows (plus 1 % of its mean diagonal, without which directions that hardly occur would be
given any weight), an output row with error e = w - ŵ costs e H eᵀ. Write H = R Rᵀ with R upper triangular: the cost is ‖e R‖²,
whose term j holds the errors up to input j alone. So input j is rounded to the code nearest to w_j + Σ_{k<j} e_k R_kj / R_jj,
the point where term j vanishes. This is GPTQ's update, without the inverse of H, and one Cholesky factor serves every module with
this input, every format and every candidate.

The inputs with the largest H_jj come first (*act-order*), while the groups stay runs of consecutive inputs: each group's scale and
zero-point are fixed beforehand (*static groups*). Rows of W do not depend on each other, so each takes the best of three grids, found
by rtn's clipping search with every squared error counted the same, times H_jj, or times R_jj². Then its scales are refitted to the
codes, group after group in closed form, and the codes chosen once more. Where rtn's codes still cost less on the fit rows, they are
taken: no output row is worse than with rtn. On a small trained model the three grids took the damage of 2 bits from 0.64 nats/token
to 0.56, refitting to 0.47 and the second choice to 0.46; rtn's is 2.07. A third choice gained nothing.

Source: Frantar et al., arXiv 2210.17323; its form as nearest-plane rounding: Chen et al., arXiv 2507.18553. Written anew. Left out:
inputs as the quantized layers before would give them, since one bank serves plans that differ in those layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.model.decoder import Decoder
from bitatlas.quantize import rtn
from bitatlas.quantize.codes import SMALLEST_SCALE, Codes, by_input, compile_loops
from bitatlas.quantize.hessian import to_float64
from bitatlas.quantize.moments import InputMoments, module_moments
from bitatlas.records.formats import Format

DAMPING = 0.01  # of the mean diagonal; the paper's
LEAF_ROWS = 256  # output rows that a compiled leaf rounds together
LEAF = 16  # columns that are rounded one after the other before their errors go into a matrix product


@dataclass(frozen=True)
class CholeskyFactor:
    """The order in which inputs are rounded, and how the errors of some feed back into those after them."""

    hessian: Tensor  # float64 [in, in]: the mean of x xᵀ, not damped
    damped: Tensor  # float32 [in, in]: H
    order: Tensor  # int64 [in]
    feedback: Tensor  # float32 [in, in], upper triangular: R_kj / R_jj, k and j counted in `order`
    importance: Tensor  # float32 [in]: R_jj², what a squared error at an input costs that the later ones cannot make up for


def quantize(
    decoder: Decoder, modules: Sequence[str], formats: Sequence[Format], rows: Tensor | None
) -> Iterator[tuple[str, list[Codes]]]:
    """Yield every module in every format, fitted on `rows` int64 [rows, tokens]; UserError without them."""
    if rows is None or not len(rows):
        raise UserError("--quantizer gptq fits the codes to rows of text: give a text with --tokens")
    return _quantize(decoder, modules, formats, rows)


def _quantize(
    decoder: Decoder, modules: Sequence[str], formats: Sequence[Format], rows: Tensor
) -> Iterator[tuple[str, list[Codes]]]:
    wanted = set(modules)
    for moments in module_moments(decoder, modules, rows):
        yield from ((name, codes) for name, codes in fit_moments(decoder, moments, formats) if name in wanted)


@torch.no_grad()
def fit_moments(decoder: Decoder, moments: InputMoments, formats: Sequence[Format]) -> Iterator[tuple[str, list[Codes]]]:
    """Yield the modules of one input in every format, fitted to its moments."""
    factor = factorize(moments.hessian)
    for name in moments.names:
        weight = decoder.weight(name)
        # Where float64 had to go elsewhere, the codes are chosen there too.
        codes = [fit(weight.to(factor.hessian.device).float(), fmt, factor) for fmt in formats]
        yield name, [of_format.to(weight.device) for of_format in codes]


def factorize(hessian: Tensor, act_order: bool = True) -> CholeskyFactor:
    """Return the factor of `hessian` float64 [in, in], damped; an input that is always 0 comes last and is rounded to nearest."""
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian), device=hessian.device)
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * float(diagonal.mean()) or 1.0)
    # Upper triangular R with R Rᵀ = H: the lower factor of the matrix turned round, turned back.
    upper = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    importance = torch.empty_like(diagonal)
    importance[order] = upper.diagonal().square()
    return CholeskyFactor(hessian, damped.float(), order, (upper / upper.diagonal()).float(), importance.float())


def fit(weight: Tensor, fmt: Format, factor: CholeskyFactor) -> Codes:
    """Return codes of `weight` float32 [out, in]: every output row's best candidate."""
    grids = [rtn.grid(weight, fmt, counts) for counts in (None, factor.damped.diagonal(), factor.importance)]
    count = len(grids)
    scale, zero = (torch.cat(parts) for parts in zip(*grids, strict=True))
    candidates = round_inputs(weight.repeat(count, 1), scale, zero, fmt, factor)
    best = _refit_scales(weight, _best(candidates, count), fmt, factor)
    again = _refit_scales(weight, round_inputs(weight, best.scale, best.zero, fmt, factor), fmt, factor)
    best = _best(_Candidates(*map(torch.cat, zip(best, again, strict=True))), 2)
    # Sums of huge weights overflow float32; whatever codes such rows get, they are the same every time and rtn's are there.
    codes = Codes(best.codes.nan_to_num(0).to(torch.uint8), best.scale.half(), best.zero.to(torch.uint8), fmt.group_size)
    return _no_worse(codes, rtn.on_grid(weight, *grids[0], fmt), weight, factor.hessian)


class _Candidates(NamedTuple):
    """Codes of output rows and what they cost, all float32."""

    codes: Tensor  # [out, in], whole numbers
    scale: Tensor  # [out, groups]
    zero: Tensor  # [out, groups]
    cost: Tensor  # [out]: e H eᵀ


def round_inputs(weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format, factor: CholeskyFactor) -> _Candidates:
    """Return the codes of `weight` [out, in] on a fixed grid (scale and zero-point [out, groups]), chosen input after input."""
    group = (torch.arange(weight.shape[1], device=weight.device) // fmt.group_size)[factor.order]
    # Transposed first: picking whole rows in the factor's order is a copy, picking columns is not.
    weight_t, scale_t, zero_t = (part.T.contiguous() for part in (weight, scale, zero))  # [in, out], [groups, out]
    columns = _ColumnRounder(weight_t[factor.order], scale_t[group], zero_t[group], 2**fmt.bits - 1, factor.feedback)
    columns.round_range(0, weight.shape[1])
    cost = factor.importance[factor.order] @ columns.residual.square_()
    return _Candidates(columns.codes[factor.order.argsort()].T.contiguous(), scale, zero, cost)


class _ColumnRounder:
    """Rounds in place, transposed [in, out] so that one input's weights lie together, and in the factor's order."""

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, top: int, feedback: Tensor):
        self.weight, self.target = weight, weight.clone()
        self.scale, self.zero, self.top, self.feedback = scale, zero, top, feedback
        self.codes = torch.empty_like(self.weight)
        self.error = torch.empty_like(self.weight)  # w - ŵ
        self.residual = torch.empty_like(self.weight)  # target - ŵ

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
        compiled = _compiled_leaf() if self.weight.device.type == "cpu" else None
        if compiled:
            arrays = (self.target, self.weight, self.scale, self.zero, self.codes, self.error, self.residual, self.feedback)
            compiled(tuple(array.numpy() for array in arrays), start, end, self.top)
            return
        for column in range(start, end):
            target, scale, zero = self.target[column], self.scale[column], self.zero[column]
            if column > start:
                target.addmv_(self.error[start:column].T, self.feedback[start:column, column])
            codes = torch.add(zero, (target / scale).round_(), out=self.codes[column]).clamp_(0, self.top)
            nearest = (codes - zero).mul_(scale)
            torch.sub(self.weight[column], nearest, out=self.error[column])
            torch.sub(target, nearest, out=self.residual[column])


@cache
def _compiled_leaf() -> Callable[..., None] | None:
    """Compile the rounding of a leaf's inputs as one loop over its output rows; None where that cannot be (see `compile_loops`)."""

    def leaf(arrays: Any, start: int, end: int, top: int) -> None:
        target, weight, scale, zero, codes, error, residual, feedback = arrays
        for first in range(0, target.shape[1], LEAF_ROWS):  # output rows whose numbers stay in the innermost cache
            last = min(first + LEAF_ROWS, target.shape[1])
            for column in range(start, end):
                for before in range(start, column):
                    factor = feedback[before, column]
                    for row in range(first, last):
                        target[column, row] += factor * error[before, row]
                for row in range(first, last):
                    code = np.rint(target[column, row] / scale[column, row]) + zero[column, row]
                    code = np.float32(0) if code < 0 else code
                    code = np.float32(top) if code > top else code
                    nearest = (code - zero[column, row]) * scale[column, row]
                    codes[column, row] = code
                    error[column, row] = weight[column, row] - nearest
                    residual[column, row] = target[column, row] - nearest

    return compile_loops(leaf)


def _refit_scales(weight: Tensor, rows: _Candidates, fmt: Format, factor: CholeskyFactor) -> _Candidates:
    """Choose scales that cost less with the same codes: group after group, the float16 nearest to the minimum of its parabola."""
    width, size = weight.shape[1], fmt.group_size
    scale, cost = rows.scale.clone(), rows.cost.clone()
    steps = rows.codes - by_input(rows.zero, size, width)  # ŵ = steps * scale
    slope = (weight - steps * by_input(scale, size, width)) @ factor.damped  # e H [out, in]
    for group in range(scale.shape[1]):
        inputs = slice(group * size, min(width, (group + 1) * size))
        step, old = steps[:, inputs], scale[:, group]  # [out, group size], [out]
        square = ((step @ factor.damped[inputs, inputs]) * step).sum(1)
        along = (step * slope[:, inputs]).sum(1)
        new = (old + along / square).half().float()
        gain = (new - old) * (2 * along - (new - old) * square)
        better = (gain > 0) & (new >= SMALLEST_SCALE) & new.isfinite()  # false for 0 / 0, a group of zeros
        change = torch.where(better, new - old, 0)
        scale[:, group] += change
        cost -= torch.where(better, gain, 0)
        slope[:, inputs.stop :] -= (step * change.unsqueeze(1)) @ factor.damped[inputs, inputs.stop :]
    return _Candidates(rows.codes, scale, rows.zero, cost)


def _best(rows: _Candidates, count: int) -> _Candidates:
    """Return for every output row the cheapest [out, ...] of `count` candidates, stacked [count * out, ...]."""
    out = len(rows.cost) // count
    pick = rows.cost.nan_to_num(torch.inf).view(count, out).argmin(0) * out + torch.arange(out, device=rows.cost.device)
    return _Candidates(*(part[pick] for part in rows))


def _no_worse(codes: Codes, other: Codes, weight: Tensor, hessian: Tensor) -> Codes:
    """Return `codes`, with `other`'s rows where theirs have the smaller output error on the tokens that `hessian` was taken from."""
    ours, theirs = (to_float64(of_rows.weight()) - to_float64(weight) for of_rows in (codes, other))
    # a H aᵀ - b H bᵀ = (a - b) H (a + b)ᵀ: one product, and no difference of two large numbers
    worse = (((ours - theirs) @ hessian) * (ours + theirs)).sum(1, keepdim=True) > 0
    code, scale, zero = (torch.where(worse, getattr(other, part), getattr(codes, part)) for part in ("codes", "scale", "zero"))
    return Codes(code, scale, zero, codes.group_size)
