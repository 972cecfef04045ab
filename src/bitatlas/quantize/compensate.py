"""gptq in llama.cpp's blocks: what llama.cpp makes of a block, its rounding errors made up for by the blocks and the codes after it.

Block after block along the inputs. With H = R Rᵀ as in `gptq`, inputs in their own order, the errors e of the inputs before a block B move its
weights to the point W_B + e R[<B, B] R_BB⁻¹, where the cost that they cause vanishes; what is left of a block's own error costs
e_B R_BB R_BBᵀ e_Bᵀ. So llama.cpp quantizes that point, with the diagonal of R_BB R_BBᵀ as its importance: it chooses the block's scales. Where
a type gives every weight a code of its own, the codes are then chosen one input after the other, errors feeding forward within the block,
too. Types whose codes stand for several weights together (iq1 to iq3) keep llama.cpp's own.

How a type lays codes out in a block is not written here: it is found by changing single bits of a block and reading it back.

Left out: scales that are refitted to the codes; other devices than the CPU, where llama.cpp's row functions are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from bitatlas.quantize import ggml
from bitatlas.quantize.ggml import Blocks
from bitatlas.quantize.moments import damped, upper_factor
from bitatlas.records.formats import Format

MOST_ROWS = 2**14  # output rows in one go


def factorize(hessian: Tensor) -> Tensor:
    """Return R of `hessian` float64 [in, in], damped: upper triangular, inputs in their own order."""
    return upper_factor(damped(hessian.cpu())[0])


def fit_all(weight: Tensor, formats: Sequence[Format], upper: Tensor) -> list[Blocks]:
    """Return blocks of `weight` [out, in] in every format. upper: R, see `factorize`."""
    weight = weight.detach().cpu().float()
    parts = [[fit(rows, fmt, upper) for fmt in formats] for rows in weight.split(MOST_ROWS)]
    return [Blocks(torch.cat([one.blocks for one in of_format]), of_format[0].own_name) for of_format in zip(*parts, strict=True)]


def fit(weight: Tensor, fmt: Format, upper: Tensor) -> Blocks:
    """Return blocks of `weight` float32 [out, in] in one format."""
    size, layout = fmt.group_size, code_layout(fmt)
    error = torch.zeros_like(weight)  # w - ŵ of the blocks that are done
    blocks = []
    for start in range(0, weight.shape[1], size):
        here = slice(start, start + size)
        inner, point = upper[here, here], weight[:, here]
        if start:
            feedback = torch.linalg.solve_triangular(inner, upper[:start, here], upper=True, left=False)
            point = point + error[:, :start] @ feedback.float()
        block = ggml.quantize(point, fmt, inner.square().sum(1).float())
        if layout is not None:
            block = Blocks(_with_feedback(block, point, inner, layout), fmt.own_name)
        error[:, here] = weight[:, here] - block.weight()
        blocks.append(block.blocks)
    return Blocks(torch.cat(blocks, 1), fmt.own_name)


def _with_feedback(block: Blocks, point: Tensor, inner: Tensor, layout: CodeLayout) -> Tensor:
    """Return the block's bytes [out, bytes] with codes that are chosen one input after the other on the scales that it has.

    point: [out, size]; inner: R_BB [size, size].
    """
    lowest, highest = (layout.read(block, torch.full(point.shape, end)).T.contiguous() for end in (0, len(layout.levels) - 1))
    span, point = highest - lowest, point.T.contiguous()  # [size, out]; the span is below 0 where a scale is
    inverse = torch.where(span == 0, 0, 1 / span)
    feedback, middles = (inner / inner.diagonal()).float(), layout.middles  # R_kj / R_jj
    codes, errors = torch.empty(point.shape, dtype=torch.int64), torch.zeros_like(point)
    for column in range(len(point)):
        target = point[column]
        if column:
            target = target + feedback[:column, column] @ errors[:column]
        codes[column] = torch.bucketize((target - lowest[column]).mul_(inverse[column]), middles)
        errors[column] = point[column] - lowest[column] - span[column] * layout.levels[codes[column]]
    return layout.written(block.blocks, codes.T)


# --- where codes stand in a block ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeLayout:
    """Codes of single weights in a type's block. A code counts from the least value to the greatest (of a block with positive scales)."""

    own_name: str
    byte: Tensor  # int64 [size, bits]: where each of a code's bits stands
    mask: Tensor  # uint8 [size, bits]
    others: Tensor  # uint8 [bytes]: the block's bits that are no code's
    patterns: Tensor  # int64 [codes, bits]: 0 or 1
    levels: Tensor  # float32 [codes]: the value, from 0 (the first code's) to 1 (the last one's)

    @property
    def middles(self) -> Tensor:
        return (self.levels[1:] + self.levels[:-1]) / 2

    def written(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """Return `blocks` uint8 [out, bytes] with other codes, int64 [out, size]."""
        bits = torch.zeros(blocks.shape, dtype=torch.int64)
        for index in range(self.byte.shape[1]):
            # disjoint bits: their sum is their union
            bits.index_add_(1, self.byte[:, index], self.patterns[codes, index] * self.mask[:, index])
        return (blocks & self.others) | bits.to(torch.uint8)

    def read(self, blocks: Blocks, codes: Tensor) -> Tensor:
        """Return what `blocks` would stand for with other codes, float32 [out, size]."""
        return Blocks(self.written(blocks.blocks, codes), self.own_name).weight()


@cache
def code_layout(fmt: Format) -> CodeLayout | None:
    """Return where a type keeps the codes of single weights; None for one whose codes stand for several weights together."""
    values = torch.randn(1, fmt.group_size, generator=torch.Generator().manual_seed(0))
    base = ggml.quantize(values, fmt, torch.ones(fmt.group_size)).blocks  # [1, bytes]
    bits = [(at, 1 << bit) for at in range(base.shape[1]) for bit in range(8)]
    flipped = base.repeat(len(bits), 1)
    for row, (at, flip) in enumerate(bits):
        flipped[row, at] ^= flip
    changed = Blocks(flipped, fmt.own_name).weight() != Blocks(base, fmt.own_name).weight()  # [bits, size]
    owners: list[list[tuple[int, int]]] = [[] for _ in range(fmt.group_size)]
    for row in (changed.sum(1) == 1).nonzero().flatten().tolist():
        owners[int(changed[row].nonzero())].append(bits[row])
    if any(len(of_weight) != fmt.bits for of_weight in owners):
        return None
    place, mask = (torch.tensor([[pair[part] for pair in of_weight] for of_weight in owners]) for part in (0, 1))
    others = (255 - torch.zeros(base.shape[1], dtype=torch.int64).index_add_(0, place.flatten(), mask.flatten())).to(torch.uint8)
    patterns = (torch.arange(2**fmt.bits)[:, None] >> torch.arange(fmt.bits)) & 1  # [codes, bits]
    unordered = CodeLayout(fmt.own_name, place, mask.to(torch.uint8), others, patterns, torch.zeros(2**fmt.bits))
    read = torch.stack(
        [unordered.read(Blocks(base, fmt.own_name), torch.full((1, fmt.group_size), code))[0] for code in range(2**fmt.bits)]
    )
    order = read[:, 0].argsort()  # [codes]
    read = read[order].double()
    levels = (read - read[0]) / (read[-1] - read[0])  # [codes, size]
    assert float((levels - levels[:, :1]).abs().max()) < 1e-5, fmt.own_name
    return replace(unordered, patterns=patterns[order], levels=levels[:, 0].float())
