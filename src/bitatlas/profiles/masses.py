"""Attention mass on chosen cells of a batch's maps: one sparse product reads every role, every random draw and every head at once.

Which cells count is the same for all layers, so the matrix is made once a batch. A dense mask for each statistic would hold
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
        rows, tokens = shape
        width = rows * tokens * tokens
        none = np.zeros(0, dtype=np.int64)
        cell = np.concatenate([none, *(row * tokens**2 + queries * tokens + keys for row, queries, keys in cells)])
        statistic = np.repeat(np.arange(len(cells)), [len(keys) for _, _, keys in cells])
        values = torch.from_numpy(np.asarray(weights, dtype=np.float32)[statistic])
        index = torch.from_numpy(np.stack([statistic, cell]))
        size = (len(cells), width)
        # in order of statistics, which is all that a product asks for: a sort and a search for equal cells would cost as much as it does
        self.matrix = torch.sparse_coo_tensor(index, values, size, is_coalesced=True, check_invariants=False)

    def read(self, maps: Tensor) -> Floats:
        """maps: [rows, heads, queries, keys] -> float64 [statistics, heads]."""
        if maps.device.type not in ("cpu", "cuda"):
            maps = maps.cpu()  # elsewhere sparse products are not implemented
        self.matrix = self.matrix.to(maps.device)
        by_cell = maps.float().permute(0, 2, 3, 1).reshape(-1, maps.shape[1])  # [rows * queries * keys, heads]
        return torch.sparse.mm(self.matrix, by_cell).double().cpu().numpy()
