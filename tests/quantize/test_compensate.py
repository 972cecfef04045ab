"""gptq in llama.cpp's blocks: its algebra against brute force, its layouts of codes, what it gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.records.formats import FORMATS, LLAMA_CPP_BLOCKS

pytest.importorskip("libgguf")
from bitatlas.quantize import compensate, ggml

SINGLE = [name for name in LLAMA_CPP_BLOCKS if not name.startswith(("iq1", "iq2", "iq3")) and name != "mxfp4"]


def correlated(width: int, tokens: int = 4000, seed: int = 0) -> torch.Tensor:
    """A second moment whose inputs go together. float64 [width, width]"""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (torch.eye(width) + mixing)
    return inputs.T @ inputs / tokens


def cost(blocks: ggml.Blocks, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (blocks.weight() - weight).double()
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("name", sorted(LLAMA_CPP_BLOCKS))
def test_which_types_have_codes_of_single_weights(name: str):
    layout = compensate.code_layout(FORMATS[name])
    assert (layout is not None) == (name in SINGLE)
    if layout is not None:
        assert len(layout.levels) == 2 ** FORMATS[name].bits and bool((layout.levels.diff() > 0).all())


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SINGLE), st.integers(0, 2**32))
def test_codes_that_are_written_are_read_back(name: str, seed: int):
    """By the package `gguf`, which knows the layouts by itself: on a grid of equal steps the values are affine in the codes of each scale."""
    gguf = pytest.importorskip("gguf")
    fmt, generator = FORMATS[name], torch.Generator().manual_seed(seed)
    layout = compensate.code_layout(fmt)
    assert layout is not None
    block = ggml.quantize(torch.randn(3, fmt.group_size, generator=generator), fmt)
    codes = torch.randint(len(layout.levels), (3, fmt.group_size), generator=generator)
    ends = [layout.read(block, torch.full_like(codes, end)) for end in (0, len(layout.levels) - 1)]
    theirs = gguf.quants.dequantize(layout.written(block.blocks, codes).numpy(), gguf.GGMLQuantizationType[name.upper()])
    expected = ends[0] + (ends[1] - ends[0]) * layout.levels[codes]
    size = float(torch.stack(ends).abs().max())
    assert np.allclose(theirs, expected.numpy(), atol=1e-5 * size)  # float32, in another order


@pytest.mark.parametrize("name", sorted(LLAMA_CPP_BLOCKS))
def test_it_costs_less_than_llama_cpps_own(name: str):
    """On the moment that it is fitted to, beside blocks whose importance is that moment's diagonal, as an importance matrix has it."""
    hessian, weight = correlated(768), torch.randn(32, 768, generator=torch.Generator().manual_seed(1))
    ours = compensate.fit_all(weight, [FORMATS[name]], compensate.factorize(hessian))[0]
    theirs = ggml.quantize(weight, FORMATS[name], hessian.diagonal().float())
    assert ours.blocks.shape == theirs.blocks.shape
    assert cost(ours, weight, hessian) < 0.9 * cost(theirs, weight, hessian)


def test_a_blocks_point_is_where_the_cost_of_the_errors_before_it_is_least():
    """Brute force: of all values of the inputs from a block on, those that make up best for given errors before it are found by least squares."""
    width, start = 96, 32
    hessian, generator = correlated(width, seed=2), torch.Generator().manual_seed(3)
    upper = compensate.factorize(hessian)
    error = torch.randn(4, start, generator=generator, dtype=torch.float64)  # w - ŵ
    damped = upper @ upper.T
    rest = slice(start, None)
    best = -torch.linalg.solve(damped[rest, rest], damped[rest, :start] @ error.T).T  # w - ŵ of all inputs behind, unconstrained
    here = slice(start, 2 * start)
    feedback = torch.linalg.solve_triangular(upper[here, here], upper[:start, here], upper=True, left=False)
    # ŵ - w at the point is the errors' feedback: that is what `fit` moves the weights by, and the best of all free values
    later = torch.linalg.solve_triangular(upper[rest, rest], upper[:start, rest], upper=True, left=False)
    assert torch.allclose(-error @ later, best, atol=1e-9)
    assert feedback.shape == (start, start)
    inner = upper[here, here]
    moved = torch.randn(
        4, start, generator=generator, dtype=torch.float64
    )  # a block's error about its point costs moved M movedᵀ
    schur = inner @ inner.T
    behind = slice(2 * start, None)
    conditional = damped[here, here] - damped[here, behind] @ torch.linalg.solve(damped[behind, behind], damped[behind, here])
    assert torch.allclose(schur, conditional, atol=1e-9)
    assert float(((moved @ schur) * moved).sum()) > 0


def test_without_correlation_it_is_nearest_rounding():
    """Errors of inputs that have nothing to do with each other cannot make up for each other: on llama.cpp's scales each code is the nearest."""
    weight, fmt = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)), FORMATS["q4_0"]
    blocks = compensate.fit_all(weight, [fmt], compensate.factorize(torch.eye(64, dtype=torch.float64)))[0]
    layout = compensate.code_layout(fmt)
    assert layout is not None
    half = blocks.blocks[:, :18]  # the first block of 32
    values = torch.stack([layout.read(ggml.Blocks(half, "q4_0"), torch.full((8, 32), code)) for code in range(16)])
    nearest = (values - weight[None, :, :32]).abs().min(0).values
    assert torch.allclose((blocks.weight()[:, :32] - weight[:, :32]).abs(), nearest, atol=1e-6)
