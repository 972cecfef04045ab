"""Profiles the weights of one module: sparsity, tails, and how far each format moves them.

*Sparsity* is the share of weights with |w| below 1 % of the module's standard deviation; the curve over thresholds is recorded, since
that one threshold is a convention. Kurtosis, the largest weight and the share beyond 6 standard deviations tell about outliers
(6 is the threshold of LLM.int8(), arXiv:2208.07339). These describe; they do not set bits.

One module at a time, in blocks: memory does not grow with the weight. Counts are exact, moments are summed in float64.
Left out: structure (dead rows and columns) and activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.records import Module, WeightProfile

SPARSITY_THRESHOLD = 0.01  # standard deviations
THRESHOLDS = (0.001, 0.003, SPARSITY_THRESHOLD, 0.03, 0.1)  # of the curve, standard deviations
OUTLIER_THRESHOLD = 6.0  # standard deviations
BLOCK_WEIGHTS = 2**20  # in memory as float64 at a time


def weight_profile(module: Module, weight: Tensor, quantized: Mapping[str, Tensor]) -> WeightProfile:
    """Return the profile of one module. weight: [out, in]; quantized: format name -> dequantized weight [out, in].

    A constant weight has no scale: its kurtosis and outlier ratio are 0, and its sparsity is the share of exact zeros.
    Raises UserError where the weight, or what a quantizer made of it, holds NaN or infinity; ValueError where a shape is wrong.
    """
    _check(module, weight, quantized)
    total = weight.numel()
    mean = sum(float(block.sum()) for block in _blocks(weight)) / total
    square = fourth = largest = 0.0
    for block in _blocks(weight):
        largest = max(largest, float(block.abs().max()))
        deviation = (block - mean).square_()
        square += float(deviation.sum())
        fourth += float(deviation.square_().sum())
    std = math.sqrt(square / total)
    if std <= largest * 1e-12:  # rounding of the mean, not spread
        std = 0.0
    below, beyond = _counts(weight, std)
    return WeightProfile(
        module=module.name,
        layer=module.layer,
        kind=module.kind,
        weights=total,
        std=std,
        sparsity=below[SPARSITY_THRESHOLD] / total,
        sparsity_curve={f"{threshold:g}": count / total for threshold, count in below.items()},
        kurtosis=fourth / total / std**4 - 3 if std else 0.0,
        outlier_ratio=largest / std if std else 0.0,
        outlier_share=beyond / total,
        relative_error={name: _relative_error(weight, other) for name, other in quantized.items()},
    )


def _check(module: Module, weight: Tensor, quantized: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a wrong shape, UserError for NaN or infinity."""
    for name, tensor in {"": weight, **quantized}.items():
        what = f"{module.name} as {name}" if name else module.name
        if tuple(tensor.shape) != module.shape:
            raise ValueError(f"{what}: shape {tuple(tensor.shape)}, expected {module.shape}")
        bad = sum(int((~torch.isfinite(rows)).sum()) for rows in _row_blocks(tensor))
        if bad:
            raise UserError(f"{what} holds {bad} NaN or infinite weights; it cannot be profiled (check the checkpoint's files)")


def _row_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield blocks of whole rows [rows, in], about `BLOCK_WEIGHTS` weights each, in the tensor's own dtype."""
    return iter(tensor.detach().split(max(1, BLOCK_WEIGHTS // tensor.shape[1])))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the row blocks as float64 copies, which may be overwritten."""
    return (rows.to("cpu", torch.float64, copy=True) for rows in _row_blocks(tensor))


def _counts(weight: Tensor, std: float) -> tuple[dict[float, int], int]:
    """Count the weights below each threshold of the curve, and beyond the outlier threshold."""
    below = dict.fromkeys(THRESHOLDS, 0)
    beyond = 0
    for block in _blocks(weight):
        size = block.abs_()
        for threshold in THRESHOLDS:
            small = size < threshold * std if std else size == 0
            below[threshold] += int(small.sum())
        beyond += int((size > OUTLIER_THRESHOLD * std).sum()) if std else 0
    return below, beyond


def _relative_error(weight: Tensor, other: Tensor) -> float:
    """Return ||W - Q||^2 / ||W||^2; of an all-zero weight the plain squared error, which is 0 unless a quantizer is broken."""
    error = norm = 0.0
    for rows, moved in zip(_blocks(weight), _blocks(other), strict=True):
        error += float((rows - moved).square_().sum())
        norm += float(rows.square_().sum())
    return error / norm if norm else error
