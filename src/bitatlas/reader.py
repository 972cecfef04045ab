"""Tensors of safetensors files, read one at a time and only their own bytes.

The safetensors library maps whole files; every page that was ever looked at then counts as memory of this process, so a model that is
read once layer by layer looks, and under a limit is, as large as a model that is loaded. Plain reads leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.folder import read_header, reason_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    file: Path
    word: str  # the header's for the dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    length: int


class Reader:
    """The tensors of `files` by name."""

    def __init__(self, files: Sequence[Path]):
        self._places: dict[str, _Place] = {}
        for file in files:
            for key, entry in read_header(file).items():
                if key != "__metadata__":
                    self._places[key] = _place(file, entry)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """The header's word for it: "BF16"."""
        return self._places[name].word

    def size_bytes(self, name: str) -> int:
        return self._places[name].length

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored; UserError where the file cannot be read, or holds a dtype that is not read."""
        place = self._places[name]
        dtype = DTYPES.get(place.word)
        if dtype is None:
            raise UserError(f"{place.file}: {name} is stored as {place.word}, which is not read")
        if not place.length:
            return torch.empty(place.shape, dtype=dtype)
        try:
            with place.file.open("rb") as stream:
                stream.seek(place.start)
                data = np.fromfile(stream, dtype=np.uint8, count=place.length)
        except OSError as error:
            raise UserError(f"{place.file}: weights cannot be read ({reason_of(error)})") from None
        if len(data) != place.length:
            raise UserError(f"{place.file}: truncated while it was read")
        return torch.from_numpy(data).view(dtype).reshape(place.shape)


def _place(file: Path, entry: dict[str, Any]) -> _Place:
    start, end = entry["data_offsets"]
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return _Place(file, entry["dtype"], tuple(entry["shape"]), 8 + header + start, end - start)
