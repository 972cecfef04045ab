"""Quadratic models between the two ends, from the two screens of single changes: where a search starts, and what guides it.

Around the widest formats damage is nearly quadratic, but low-bit plans are far from there; around the narrowest, interactions are
several times too strong. The mean of the two screens (the Shapley value of a quadratic damage) is the best additive table, and has no
interactions at all. So take a share k of the quadratic model at the wide end, and 1 - k of the additive table:

    lin = (1 - k) mean + k wide,    damage = damage(widest) + sum_u lin[u, c_u] + 2 k sum_{u<v} T[u c_u, v c_v]

On five searches over three trained checkpoints one of k = 1/4, 1/2, 3/4 gave a start as good as, or up to 7 % better than, the best additive plan;
the pure models (k = 1 at the wide end, and either variant at the narrow end) gave much worse ones. All are measured, none is trusted.
Left out: third-order terms, which would need measured pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitatlas.planning.expansion import Floats, Quadratic

SHARES = (0.25, 0.5, 0.75)  # k


@dataclass(frozen=True)
class Ends:
    """Added damage of single changes at both ends, 0 where nothing changes, and half the curvature at the wide end. nats/token"""

    wide: Floats  # [units, formats], around the last format everywhere
    narrow: Floats  # [units, formats], around the first format everywhere
    together: Floats  # [units * formats, units * formats], around the last format; symmetric, positive semidefinite

    def model(self, share: float) -> Quadratic:
        """The model of that share; its values are relative to the widest formats."""
        mean = (self.wide + self.narrow - self.narrow[:, -1:]) / 2
        linear = (1 - share) * mean + share * self.wide
        matrix = share * self.together
        return Quadratic(linear - np.diag(matrix).reshape(linear.shape), matrix, 1.0)
