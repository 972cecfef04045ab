"""Peers' rules for choosing widths, re-implemented in plain numbers: scores and costs in, a choice out.

Every rule gets the room that the budget leaves above "everything low", in whole bits, and stays within it. Costs are code bits; scales and
zero-points cost the same in both formats. What the rules leave unspent stays unspent, as it would be with their authors' tools.
No code of the originals is used; the sources below were read for what they do.

Sources: mlx-lm `quant/dynamic_quant.py` (estimate_threshold); exllamav3 `conversion/optimize_model.py` (optimize).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MLX_TOLERANCE = 1e-3  # of the range of sensitivities, at which mlx-lm's bisection stops
WORSE_EXPONENT = 0.69  # exllamav3 damps what a group gains to this power; what it loses counts in full
EXL_SCALE = 1e10  # exllamav3's factor; it only keeps its ratios readable


@dataclass(frozen=True)
class Threshold:
    """raised: [units]. `overran`: mlx-lm's own threshold costs more than the room, and the tighter end of its bracket was taken."""

    raised: Bools
    overran: bool


def mlx_threshold(sensitivity: Floats, extra: Ints, room: int) -> Threshold:
    """mlx-lm's rule: raise every unit whose sensitivity is above one threshold, found by bisection for the target size.

    sensitivity: [units], any unit; extra: [units], bits that raising costs. The bisection ends with the middle of its last bracket,
    which may lie on the wrong side of the target; then the end that was seen to fit is taken instead, and `overran` says so.
    """
    low, high = float(sensitivity.min()), float(sensitivity.max())  # above `high` nothing is raised, so `high` always fits
    tolerance = MLX_TOLERANCE * (high - low)
    while high - low > tolerance:
        middle = (low + high) / 2
        if int(extra[sensitivity > middle].sum()) > room:
            low = middle
        else:
            high = middle
    raised = sensitivity > (low + high) / 2
    if int(extra[raised].sum()) > room:
        return Threshold(sensitivity > high, True)
    return Threshold(raised, False)


def exllamav3_greedy(change: Floats, extra: Ints, room: int) -> Ints:
    """exllamav3's rule: from everything low, again and again the step of best KL change a bit, as long as it leaves room.

    change: [groups, levels], the measured change of KL (nats/token, negative is better) of a group at each higher level, alone in the low model;
    extra: [groups, levels], its bits above the low one. Returns [groups], 0 for low, 1.. for the levels. A step must cost less than the
    room (not equal), and a gain counts as its 0.69th power.
    """
    weighed = np.where(change > 0, change, -(np.abs(change) ** WORSE_EXPONENT))
    weighed = np.concatenate([np.zeros((len(change), 1)), weighed], axis=1)  # level 0: the low model itself
    costs = np.concatenate([np.zeros((len(extra), 1), dtype=np.int64), extra], axis=1)
    level: Ints = np.zeros(len(change), dtype=np.int64)
    while True:
        best, best_rate = None, 0.0
        for group in range(len(change)):
            now = level[group]
            for higher in range(now + 1, costs.shape[1]):
                cost = int(costs[group, higher] - costs[group, now])
                rate = EXL_SCALE * (weighed[group, higher] - weighed[group, now]) / (cost + 1)
                if rate < best_rate and room > cost:
                    best, best_rate = (group, higher, cost), rate
        if best is None:
            return level
        group, higher, cost = best
        level[group], room = higher, room - cost


def greedy_per_bit(gain: Floats, extra: Ints, room: int) -> Bools:
    """Raise units in the order of gain a bit, passing over what no longer fits. gain, extra: [units] -> [units]

    Units that gain nothing stay low; ties go to the earlier unit.
    """
    raised = np.zeros(len(gain), dtype=bool)
    for unit in np.argsort(-gain / extra, kind="stable"):
        if gain[unit] > 0 and extra[unit] <= room:
            raised[unit], room = True, room - int(extra[unit])
    return raised


def exllamav3_groups(names: Sequence[str]) -> list[list[int]]:
    """Indices of modules that exllamav3 raises together at its default level: k and v, gate and up; all others alone, in order."""
    together = {"k_proj": "kv", "v_proj": "kv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        parent, _, last = name.rpartition(".")
        groups.setdefault(f"{parent}.{together.get(last, last)}", []).append(index)
    return list(groups.values())
