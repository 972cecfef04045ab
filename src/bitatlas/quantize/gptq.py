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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.model.decoder import Decoder
from bitatlas.quantize import rtn
from bitatlas.quantize.codes import SMALLEST_SCALE, Codes
from bitatlas.quantize.hessian import input_moments, precise
from bitatlas.records.formats import Format

DAMPING = 0.01  # of the mean diagonal; the paper's
LEAF = 16  # columns that are rounded one after the other before their errors go into a matrix product


@dataclass(frozen=True)
class Factor:
    """The order in which inputs are rounded, and how the errors of some reach those after them. H is damped, moment is not."""

    moment: Tensor  # float64 [in, in]: the mean of x xᵀ
    damped: Tensor  # float32 [in, in]: H
    order: Tensor  # int64 [in]
    pull: Tensor  # float32 [in, in], upper triangular: R_kj / R_jj, k and j counted in `order`
    importance: Tensor  # float32 [in]: R_jj², what a squared error at an input costs that the later ones cannot make up for


def quantize(
    decoder: Decoder, modules: Sequence[str], formats: Sequence[Format], rows: Tensor | None
) -> Iterator[tuple[str, list[Codes]]]:
    """Every module in every format, fitted on `rows` int64 [rows, tokens]; UserError without them."""
    if rows is None or not len(rows):
        raise UserError("--quantizer gptq fits the codes to rows of text: give a text with --tokens")
    return _quantize(decoder, modules, formats, rows)


@torch.no_grad()
def _quantize(
    decoder: Decoder, modules: Sequence[str], formats: Sequence[Format], rows: Tensor
) -> Iterator[tuple[str, list[Codes]]]:
    for names, moment in input_moments(decoder, modules, rows):
        factor = factorize(moment)
        for name in names:
            weight = decoder.weight(name)
            # Where float64 had to go elsewhere, the codes are found there too.
            found = [fit(weight.to(moment.device).float(), fmt, factor) for fmt in formats]
            yield name, [codes.to(weight.device) for codes in found]


def factorize(moment: Tensor, act_order: bool = True) -> Factor:
    """The factor of `moment` float64 [in, in], damped; an input that is always 0 comes last and is rounded to nearest."""
    diagonal = moment.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(moment), device=moment.device)
    damped = moment.clone()
    damped.diagonal().add_(DAMPING * float(diagonal.mean()) or 1.0)
    # Upper triangular R with R Rᵀ = H: the lower factor of the matrix turned round, turned back.
    upper = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    importance = torch.empty_like(diagonal)
    importance[order] = upper.diagonal().square()
    return Factor(moment, damped.float(), order, (upper / upper.diagonal()).float(), importance.float())


def fit(weight: Tensor, fmt: Format, factor: Factor) -> Codes:
    """Codes of `weight` float32 [out, in]: every output row's best candidate."""
    grids = [rtn.grid(weight, fmt, counts) for counts in (None, factor.damped.diagonal(), factor.importance)]
    count = len(grids)
    scale, zero = (torch.cat(parts) for parts in zip(*grids, strict=True))
    rows = round_inputs(weight.repeat(count, 1), scale, zero, fmt, factor)
    best = _refitted(weight, _best(rows, count), fmt, factor)
    again = _refitted(weight, round_inputs(weight, best.scale, best.zero, fmt, factor), fmt, factor)
    best = _best(_Rows(*map(torch.cat, zip(best, again, strict=True))), 2)
    # Sums of huge weights overflow float32; whatever codes such rows get, they are the same every time and rtn's are there.
    found = Codes(best.codes.nan_to_num(0).to(torch.uint8), best.scale.half(), best.zero.to(torch.uint8), fmt.group_size)
    return _no_worse(found, rtn.on_grid(weight, *grids[0], fmt), weight, factor.moment)


class _Rows(NamedTuple):
    """Output rows with their codes, all float32."""

    codes: Tensor  # [out, in], whole numbers
    scale: Tensor  # [out, groups]
    zero: Tensor  # [out, groups]
    cost: Tensor  # [out]: e H eᵀ


def round_inputs(weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format, factor: Factor) -> _Rows:
    """The codes of `weight` [out, in] on a fixed grid (scale and zero-point [out, groups]), chosen input after input."""
    group = (torch.arange(weight.shape[1], device=weight.device) // fmt.group_size)[factor.order]
    columns = _Columns(weight[:, factor.order].T, scale[:, group].T, zero[:, group].T, 2**fmt.bits - 1, factor.pull)
    columns.round_range(0, weight.shape[1])
    codes = torch.empty_like(weight)
    codes[:, factor.order] = columns.codes.T
    cost = columns.missed.square().T @ factor.importance[factor.order]
    return _Rows(codes, scale, zero, cost)


class _Columns:
    """Rounding in place, transposed [in, out] so that one input's weights lie together, and in the factor's order."""

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, top: int, pull: Tensor):
        self.weight = weight.contiguous()
        self.target = self.weight.clone()
        self.scale, self.zero, self.top, self.pull = scale.contiguous(), zero.contiguous(), top, pull
        self.codes = torch.empty_like(self.weight)
        self.error = torch.empty_like(self.weight)  # w - ŵ
        self.missed = torch.empty_like(self.weight)  # target - ŵ

    def round_range(self, start: int, end: int) -> None:
        """Round inputs start..end, whose targets hold the errors of all inputs before `start`.

        Halving makes nearly all of the work products of large matrices, whatever the sizes of caches.
        """
        if end - start <= LEAF:
            for column in range(start, end):
                self._round(start, column)
            return
        middle = (start + end) // 2
        self.round_range(start, middle)
        self.target[middle:end].addmm_(self.pull[start:middle, middle:end].T, self.error[start:middle])
        self.round_range(middle, end)

    def _round(self, start: int, column: int) -> None:
        target, scale, zero = self.target[column], self.scale[column], self.zero[column]
        if column > start:
            target.addmv_(self.error[start:column].T, self.pull[start:column, column])
        codes = torch.add(zero, (target / scale).round_(), out=self.codes[column]).clamp_(0, self.top)
        nearest = (codes - zero).mul_(scale)
        torch.sub(self.weight[column], nearest, out=self.error[column])
        torch.sub(target, nearest, out=self.missed[column])


def _refitted(weight: Tensor, rows: _Rows, fmt: Format, factor: Factor) -> _Rows:
    """Scales that cost less with the same codes: group after group, each the float16 nearest to the minimum of its parabola."""
    width, size = weight.shape[1], fmt.group_size
    scale, cost = rows.scale.clone(), rows.cost.clone()
    steps = rows.codes - rows.zero.repeat_interleave(size, dim=1)[:, :width]  # ŵ = steps * scale
    slope = (weight - steps * scale.repeat_interleave(size, dim=1)[:, :width]) @ factor.damped  # e H
    for group in range(scale.shape[1]):
        own = slice(group * size, min(width, (group + 1) * size))
        step, old = steps[:, own], scale[:, group]
        square = ((step @ factor.damped[own, own]) * step).sum(1)
        along = (step * slope[:, own]).sum(1)
        new = (old + along / square).half().float()
        gain = (new - old) * (2 * along - (new - old) * square)
        better = (gain > 0) & (new >= SMALLEST_SCALE) & new.isfinite()  # false for 0 / 0, a group of zeros
        change = torch.where(better, new - old, 0)
        scale[:, group] += change
        cost -= torch.where(better, gain, 0)
        slope[:, own.stop :] -= (step * change.unsqueeze(1)) @ factor.damped[own, own.stop :]
    return _Rows(rows.codes, scale, rows.zero, cost)


def _best(rows: _Rows, count: int) -> _Rows:
    """`count` candidates stacked [count * out, ...] -> for every output row the one that costs least [out, ...]."""
    out = len(rows.cost) // count
    pick = rows.cost.nan_to_num(torch.inf).view(count, out).argmin(0) * out + torch.arange(out, device=rows.cost.device)
    return _Rows(*(part[pick] for part in rows))


def _no_worse(found: Codes, other: Codes, weight: Tensor, moment: Tensor) -> Codes:
    """`found`, with `other`'s rows where theirs have the smaller output error on the tokens that `moment` was taken from."""
    ours, theirs = (precise(codes.weight()) - precise(weight) for codes in (found, other))
    # a H aᵀ - b H bᵀ = (a - b) H (a + b)ᵀ: one product, and no difference of two large numbers
    worse = (((ours - theirs) @ moment) * (ours + theirs)).sum(1, keepdim=True) > 0
    codes, scale, zero = (torch.where(worse, getattr(other, part), getattr(found, part)) for part in ("codes", "scale", "zero"))
    return Codes(codes, scale, zero, found.group_size)
