"""Safetensors files written as a stream: every size is known before the first tensor is, so nothing is held back.

Tensors come in any order and go to their place in the file. Headers are written last: before that the files begin with zeros and
nothing reads them. Left out: appending to files that exist, and several processes.
Source: the safetensors format (8 bytes of header length, JSON header, tensors without holes).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SHARD_BYTES = 5 * 10**9
ALIGNMENT = 8  # of where the tensors begin, as the library itself writes them
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor that will come. `dtype` is the file format's name for it, like "I32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def width(self) -> int:
        """Bytes of one element; 8 for an empty tensor."""
        count = 1
        for length in self.shape:
            count *= length
        return self.size_bytes // count if count else 8


@dataclass(frozen=True)
class Shard:
    """One file: its header, and where in the file each tensor goes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    sizes: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(self.sizes.values())


def cut(entries: Sequence[Entry], limit: int = SHARD_BYTES) -> list[Shard]:
    """Files of about `limit` bytes each, in the order of `entries`; a tensor larger than that has a file of its own."""
    parts: list[list[Entry]] = [[]]
    room = limit
    for entry in entries:
        if parts[-1] and entry.size_bytes > room:
            parts.append([])
            room = limit
        parts[-1].append(entry)
        room -= entry.size_bytes
    names = (
        ["model.safetensors"]
        if len(parts) == 1
        else [f"model-{k:05}-of-{len(parts):05}.safetensors" for k in range(1, len(parts) + 1)]
    )
    return [_shard(name, part) for name, part in zip(names, parts, strict=True)]


def _shard(name: str, entries: Iterable[Entry]) -> Shard:
    """Wide elements come first, so that every tensor lies at a multiple of its element's width."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, ends = 0, {}
    for entry in sorted(entries, key=lambda entry: (-entry.width, entry.name)):
        ends[entry.name] = (at, entry.size_bytes)
        at += entry.size_bytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at - entry.size_bytes, at]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Shard(
        name,
        header,
        {key: len(header) + start for key, (start, _) in ends.items()},
        {key: size for key, (_, size) in ends.items()},
    )


class Writer:
    """`with Writer(folder, shards) as writer:` then `write` every tensor's bytes, in any order, in pieces if they are large."""

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self.folder, self.shards = folder, list(shards)
        self._files: dict[str, BinaryIO] = {}
        self._missing = {name: size for shard in shards for name, size in shard.sizes.items()}
        self._home = {name: shard for shard in shards for name in shard.offsets}

    def __enter__(self) -> Writer:
        for shard in self.shards:
            self._files[shard.name] = (self.folder / shard.name).open("wb")
        return self

    def write(self, name: str, data: bytes) -> None:
        """The next bytes of tensor `name`."""
        shard, left = self._home[name], self._missing[name]
        if len(data) > left:
            raise ValueError(f"{name}: {len(data) - left} bytes too many")
        file = self._files[shard.name]
        file.seek(shard.offsets[name] + shard.sizes[name] - left)
        file.write(data)
        self._missing[name] = left - len(data)

    def __exit__(self, kind: object, *_: object) -> None:
        """Headers, only if all went well and every tensor is there."""
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()

    def _finish(self) -> None:
        short = [name for name, left in self._missing.items() if left]
        if short:
            raise ValueError(f"{short[0]}: {self._missing[short[0]]} bytes are missing")
        for shard in self.shards:
            file = self._files[shard.name]
            file.seek(0)
            file.write(shard.header)
            file.flush()
            os.fsync(file.fileno())
        if len(self.shards) > 1:
            (self.folder / INDEX).write_text(index_text(self.shards), encoding="utf-8")


def index_text(shards: Sequence[Shard]) -> str:
    """The index of several files."""
    places = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(size for shard in shards for size in shard.sizes.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=1) + "\n"
