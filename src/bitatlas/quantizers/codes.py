"""What a quantizer returns: integer codes with a scale and a zero-point for every group of consecutive inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """weight[o, i] = (codes[o, i] - zero[o, i // group_size]) * scale[o, i // group_size].

    A format counts 16 bits for a zero-point, so a quantizer may give it as a whole number (uint8, a code) or as a float16.
    """

    codes: Tensor  # uint8 [out, in]
    scale: Tensor  # float16 [out, groups]
    zero: Tensor  # uint8 or float16 [out, groups]
    group_size: int

    def to(self, device: torch.device) -> Codes:
        return Codes(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.group_size)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that these codes stand for, [out, in]."""
        width = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(self.group_size, dim=1)[:, :width]
        zero = self.zero.float().repeat_interleave(self.group_size, dim=1)[:, :width]
        return ((self.codes.float() - zero) * scale).to(dtype)
