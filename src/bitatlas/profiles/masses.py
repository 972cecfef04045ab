"""Attention mass on chosen cells of a batch's maps: the cells of all roles and random draws are gathered together, head by head.

Which cells count is the same for all layers, so their places are found once a batch. A dense mask for each statistic would hold
statistics x queries x keys numbers; this holds only the cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Cells = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # row, and queries and keys of equal length


class Masses:
    """Statistic i of `read` is weights[i] x the attention on cells[i], which are all different."""

    def __init__(self, shape: tuple[int, int], cells: Sequence[Cells], weights: Sequence[float]):
        """shape: (rows, tokens) of the batch."""
        self.rows, self.tokens = shape
        lengths = np.array([len(keys) for _, _, keys in cells], dtype=np.int64)
        none = np.zeros(0, dtype=np.int64)
        self.row = torch.from_numpy(np.repeat(np.array([row for row, _, _ in cells], dtype=np.int64), lengths))
        self.place = torch.from_numpy(np.concatenate([none, *(queries * self.tokens + keys for _, queries, keys in cells)]))
        self.weights = np.asarray(weights, dtype=np.float64)
        self.filled = np.flatnonzero(lengths)  # statistics with any cell
        self.starts = (np.cumsum(lengths) - lengths)[self.filled]

    def read(self, maps: Tensor) -> Floats:
        """maps: [rows, heads, queries, keys] -> float64 [statistics, heads]."""
        heads, size = maps.shape[1], self.tokens**2
        found = np.zeros((len(self.weights), heads))
        if len(self.filled):
            flat = maps.reshape(-1)
            cells = (self.row * (heads * size) + self.place).to(maps.device)  # in the first head
            for head in range(heads):
                values = flat.take(cells).float().cpu().numpy()
                found[self.filled, head] = np.add.reduceat(values, self.starts, dtype=np.float64)
                cells += size
        return found * self.weights[:, None]
