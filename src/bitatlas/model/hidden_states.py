"""Hidden states that wait for their turn: in memory up to a limit, in files beyond it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

PREFIX = ".states-"  # of the folders


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left in `folder`, which nobody else uses now."""
    for leftover in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


class StateCache:
    """Tensors by key. `memory_bytes`: what may stay in memory; `folder`: where a temporary folder for the rest is made (None: the system's).
    `host`: in the host's memory, wherever they come from.

    What is taken out of a file comes back bit for bit, on the device that it came from. Use it as a context: the files go at its end.
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None, host: bool = False):
        self.memory_bytes = memory_bytes
        self._parent = folder
        self._host = host
        self._device: dict[Hashable, torch.device] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # goes with this object, or with the process
        self._tensors: dict[Hashable, Tensor] = {}  # in memory
        self._paths: dict[Hashable, Path] = {}  # in files
        self._used = 0
        self._files = 0

    def __enter__(self) -> StateCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tensors or key in self._paths

    @property
    def spilled(self) -> int:
        """The number of tensors that lie in files."""
        return len(self._paths)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep `tensor`; what was there under this key is gone."""
        self._drop(key)
        self._device[key] = tensor.device
        if self._used + tensor.nbytes <= self.memory_bytes:
            self._tensors[key] = tensor.cpu() if self._host else tensor
            self._used += tensor.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=self._parent, ignore_cleanup_errors=True)
        self._files += 1
        file = Path(self._folder.name) / f"{self._files}.pt"
        torch.save(tensor.clone(), file)  # a view's whole storage would be written
        self._paths[key] = file

    def get(self, key: Hashable) -> Tensor:
        """Return the tensor under `key`, on the device that it came from."""
        if key in self._tensors:
            return self._tensors[key].to(self._device[key])
        return torch.load(self._paths[key], map_location=self._device[key], weights_only=True)

    def _drop(self, key: Hashable) -> None:
        if key in self._tensors:
            self._used -= self._tensors.pop(key).nbytes
        if key in self._paths:
            self._paths.pop(key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything, and remove the files."""
        self._tensors.clear()
        self._paths.clear()
        self._used = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
