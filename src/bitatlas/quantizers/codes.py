"""What a quantizer returns: integer codes with a scale and a zero-point for every group of consecutive inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """weight[o, i] = (codes[o, i] - zero[o, i // group_size]) * scale[o, i // group_size]."""

    codes: Tensor  # uint8 [out, in]
    scale: Tensor  # float16 [out, groups]
    zero: Tensor  # uint8 [out, groups]
    group_size: int

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that these codes stand for, [out, in]."""
        width = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(self.group_size, dim=1)[:, :width]
        zero = self.zero.float().repeat_interleave(self.group_size, dim=1)[:, :width]
        return ((self.codes.float() - zero) * scale).to(dtype)
