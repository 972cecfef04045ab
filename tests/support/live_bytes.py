"""The bytes of tensors that are alive after every operation of torch, counted by storage: the oracle for the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: most bytes alive at once of tensors made while the mode is on; `there_before` are not counted."""

    def __init__(self, there_before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.before = list(there_before)  # held, so that no address is used twice
        self.known = {tensor.untyped_storage()._cdata for tensor in self.before}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue  # a sparse tensor has no storage but that of its indices and values
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out
