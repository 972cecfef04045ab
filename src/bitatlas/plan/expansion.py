"""Damage around a base to second order, for every unit and format at once: what `measure.curvature` measures, as numbers.

With z[u, f] = 1 where unit u leaves the base for format f, the damage of a plan is about

    damage(base) + first . z + z' Q z,    first = mean over rows of <grad KL(reference || base), dW>,
                                          Q = mean over rows n and label draws of s_n s_n' / (2 tokens),  s_n = <g_n, dW>

(g_n: gradient of one row's log-likelihood of labels drawn from the base model itself, so that Q is the Fisher matrix along the
dW's). Q holds all pairwise interactions, and is estimated from rows x draws samples: its rank is at most that, and its
off-diagonal is noisy. The off-diagonal is therefore shrunk towards 0 by the factor that leaves the least squared error on rows left out
(correlations, leave-one-row-out, in closed form); the result stays positive semidefinite, being a mixture of Q and its diagonal.

Sources: CLADO (arXiv 2307.05657, pairwise terms); Ledoit & Wolf 2004 (shrinking a covariance; here by leaving rows out).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitatlas.plan.knapsack import Floats, Ints


@dataclass(frozen=True)
class Expansion:
    """Per row, so that intervals and shrinkage come free. The base's own format has zeros."""

    first: Floats  # [rows, units, formats], nats/token
    scores: Floats  # [rows, draws, units, formats], nats a row
    tokens: int  # of a row


@dataclass(frozen=True)
class Quadratic:
    """damage = first . z + z' matrix z, nats/token; z is one-hot by unit, flattened [units * formats]."""

    first: Floats  # [units, formats]
    matrix: Floats  # [units * formats, units * formats], symmetric, positive semidefinite
    shrinkage: float = 1.0  # what the off-diagonal was multiplied with, 0..1

    def value(self, choice: Ints) -> float:
        """Return the predicted change of damage of a whole choice [units], nats/token."""
        units, formats = self.first.shape
        index = np.arange(units) * formats + choice
        return float(self.first.ravel()[index].sum() + self.matrix[np.ix_(index, index)].sum())


def quadratic_model(expansion: Expansion, shrinkage: float | None = None) -> Quadratic:
    """Return the quadratic model; `shrinkage` multiplies the off-diagonal, cross-validated where it is None."""
    rows, draws, units, formats = expansion.scores.shape
    scores = expansion.scores.reshape(rows, draws, units * formats)
    flat = scores.reshape(rows * draws, units * formats)
    matrix = flat.T @ flat / (2 * expansion.tokens * rows * draws)
    shrinkage = shrinkage_factor(scores) if shrinkage is None else shrinkage
    diagonal = np.diag(matrix).copy()
    matrix *= shrinkage
    np.fill_diagonal(matrix, diagonal)
    return Quadratic(expansion.first.mean(axis=0), matrix, shrinkage)


def shrinkage_factor(scores: Floats) -> float:
    """Return the factor on the off-diagonal correlations of least squared error on rows left out. scores: [rows, draws, n] -> 0..1.

    With P_n = one row's mean of s s' (off-diagonal, s in standard deviations), the best factor is S / |mean P|^2, where S is the
    mean of <P_n, P_m> over pairs of different rows: an unbiased estimate of |E P|^2.
    """
    rows, draws, _ = scores.shape
    if rows < 2:
        return 0.0
    spread = np.sqrt((scores**2).mean(axis=(0, 1)))
    scaled = scores / np.where(spread > 0, spread, 1.0)
    flat = scaled.reshape(rows * draws, -1)
    # <s s', t t'> without the diagonal = (s.t)^2 - sum_i s_i^2 t_i^2
    inner = (flat @ flat.T) ** 2 - (flat**2) @ (flat**2).T
    between = inner.reshape(rows, draws, rows, draws).sum(axis=(1, 3))  # [rows, rows]
    whole, within = float(between.sum()), float(np.trace(between))
    signal, total = (whole - within) / (rows * (rows - 1)), whole / rows**2
    return float(np.clip(signal / total, 0.0, 1.0)) if total > 0 else 0.0


# --- interpolated models ---------------------------------------------------------------------------------------------------
#
# Quadratic models between the two uniform bases, from the two screens of single changes: where a search starts, and what guides it.
#
# Around the widest formats damage is nearly quadratic, but low-bit plans are far from there; around the narrowest, interactions are
# several times too strong. The mean of the two screens (the Shapley value of a quadratic damage) is the best additive table, and has no
# interactions at all. So take a share k of the quadratic model at the wide end, and 1 - k of the additive table:
#
#     lin = (1 - k) mean + k wide,    damage = damage(widest) + sum_u lin[u, c_u] + 2 k sum_{u<v} T[u c_u, v c_v]
#
# On five searches over three trained checkpoints one of k = 1/4, 1/2, 3/4 gave a start as good as, or up to 7 % better than, the best additive plan;
# the pure models (k = 1 at the wide end, and either variant at the narrow end) gave much worse ones. All are measured, none is trusted.
# Left out: third-order terms, which would need measured pairs.

SHARES = (0.25, 0.5, 0.75)  # k


@dataclass(frozen=True)
class InterpolatedModel:
    """Added damage of single changes at both bases, 0 where nothing changes, and half the curvature at the wide one. nats/token"""

    wide: Floats  # [units, formats], around the last format everywhere
    narrow: Floats  # [units, formats], around the first format everywhere
    together: Floats  # [units * formats, units * formats], around the last format; symmetric, positive semidefinite

    def at(self, share: float) -> Quadratic:
        """Return the model of that share k; its values are relative to the widest formats."""
        mean = (self.wide + self.narrow - self.narrow[:, -1:]) / 2
        linear = (1 - share) * mean + share * self.wide
        matrix = share * self.together
        return Quadratic(linear - np.diag(matrix).reshape(linear.shape), matrix)
