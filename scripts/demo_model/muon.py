"""Muon in float32, all matrices of one shape at once: what torch.optim.Muon does in bfloat16, matrix by matrix.

torch's own takes longer than the forward and backward pass together on a CPU without bfloat16 arithmetic.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; step size matched to AdamW's: arXiv:2502.16982.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For matrices alone. `lr` is comparable to AdamW's: an update's root mean square is about 0.2 `lr`."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon: takes matrices alone")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                self._step_of(same, group["lr"], group["weight_decay"])

    def _step_of(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        gradient = torch.stack([p.grad for p in matrices if p.grad is not None])
        state = self.state[matrices[0]]  # one for all of them
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalized(gradient.lerp(state["momentum"], MOMENTUM))
        scale = 0.2 * max(gradient.shape[1:]) ** 0.5
        for p, direction in zip(matrices, update, strict=True):
            p.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices [count, rows, columns], each with its singular values pushed towards 1 (to 0.7..1.2) by Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
