"""Safetensors files written as a stream: every size is known before the first tensor is, so nothing is held back.

Tensors come in any order and go to their place in the file. Headers are written last: before that the files begin with zeros and
nothing reads them. Left out: appending to files that exist, and several processes.
Source: the safetensors format (8 bytes of header length, JSON header, tensors without holes).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitatlas.errors import UserError

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


LONGEST_REASON = 200  # characters of a library's message that are repeated


def reason_of(error: BaseException) -> str:
    """What a library said, on one line."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def read_header(file: Path) -> dict[str, Any]:
    """The safetensors header, which the library takes too, of a file that is as long as the header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("header is longer than the file")
            header = json.loads(stream.read(length))
        ends = [_end(key, entry) for key, entry in header.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({reason_of(error)})") from None
    if size != expected:
        raise UserError(f"{file}: truncated or damaged: {size} bytes, its header says {expected}")
    try:
        with safe_open(file, framework="np"):
            return header
    except (SafetensorError, OSError) as error:  # holes, overlaps, a dtype that is not known, a shape of another size
        raise UserError(f"{file}: not a whole safetensors file ({reason_of(error)})") from None


def _end(key: str, entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(entry["dtype"], str)):
        raise ValueError(f"the entry of {key} is not a dtype and two offsets")
    return end


# --- reader ----------------------------------------------------------------------------------------------------------------

# Tensors of safetensors files, read one at a time and only their own bytes.
#
# The safetensors library maps whole files; every page that was ever looked at then counts as memory of this process, so a model that is
# read once layer by layer looks, and under a limit is, as large as a model that is loaded. Plain reads leave nothing behind.

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


# --- naming ----------------------------------------------------------------------------------------------------------------

# What transformers makes of the tensors in a checkpoint's files: which parameter or buffer of the model each of them becomes, if any.
#
# Names in files differ from the model's: with or without the base model's prefix, old names of the same thing, experts stored one by one.
# transformers follows all of that by rules of its own; they are asked here, so that loading and streaming take the same tensors.
# Source: transformers 5.24, `core_model_loading`.


@dataclass(frozen=True)
class Target:
    """A parameter or buffer by its name in the model. `whole`: the tensor is all of it, as it is."""

    name: str
    whole: bool


@dataclass(frozen=True)
class Rules:
    """transformers' own rules for one model. `rename(key, renamings, converters, prefix, wanted)` is its function that applies them."""

    renamings: list[Any]
    converters: list[Any]
    rename: Callable[..., tuple[str, str | None]]
    prefix: str

    @property
    def by_pattern(self) -> dict[str, Any]:
        return {pattern: converter for converter in self.converters for pattern in converter.source_patterns}

    def target(self, key: str, wanted: Mapping[str, Any]) -> tuple[str, str | None]:
        """(the model's name of what a tensor called `key` becomes, the pattern of the converter that makes it). `wanted`: the model's names."""
        name, pattern = self.rename(key, self.renamings, self.converters, self.prefix, wanted)
        return (key, None) if name not in wanted and key in wanted else (name, pattern)


def rules_of(model: Any) -> Rules:
    """By which transformers loads `model` (a skeleton will do); of a version without such a table, the base model's prefix alone."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return Rules([], [], _with_prefix, model.base_model_prefix)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return Rules(renamings, converters, rename_source_key, model.base_model_prefix)


def _with_prefix(key: str, renamings: Any, converters: Any, prefix: str, wanted: Mapping[str, Any]) -> tuple[str, None]:
    candidates = (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}")
    return next((name for name in candidates if name in wanted), key), None


def targets_of(model: Any, keys: Iterable[str]) -> dict[str, Target]:
    """Tensor -> what it becomes in `model` (a skeleton will do). Tensors that are passed over are left out."""
    rules, wanted, targets = rules_of(model), model.state_dict(), {}
    for key in keys:
        name, pattern = rules.target(key, wanted)
        if name in wanted:
            targets[key] = Target(name, pattern is None)
    return targets
