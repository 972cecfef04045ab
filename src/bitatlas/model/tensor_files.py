"""Safetensors files: written as a stream, read one tensor at a time, and what transformers makes of the tensors in them.

Many checkpoints store what their model holds under other names or in other pieces: experts one by one, q, k and v in one matrix.
transformers renames, merges and splits them while it loads (`Conversion`), and what is read here follows it.

Every size is known before the first tensor is written, so nothing is held back: tensors come in any order and go to their offset in the
file. Headers are written last: before that the files begin with zeros and nothing reads them.
The safetensors library maps whole files, and every page that was looked at then counts as memory of this process, so a model that is read
once layer by layer is, under a limit, as large as a model that is loaded. Plain reads leave nothing behind.
Left out: appending to files that exist, and several processes.
Sources: the safetensors format (8 bytes of header length, JSON header, tensors without holes); transformers 5.24, `core_model_loading`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from bitatlas.errors import UserError

SHARD_BYTES = 5 * 10**9
ALIGNMENT = 8  # of where the tensors begin, as the library itself writes them
MOST_PADDING = 2**24  # bytes; the library takes headers of up to 100 MB
INDEX = "model.safetensors.index.json"
LONGEST_REASON = 200  # characters of a library's message that are repeated
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


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
        count = math.prod(self.shape)
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


def padded(shards: Sequence[Shard], total: int) -> list[Shard]:
    """Return the files with spaces behind the first header, so that they have `total` bytes together; as they are where that is less, or far more."""
    first, *rest = shards
    more = total - sum(shard.size_bytes for shard in shards)
    if not 0 < more <= MOST_PADDING or more % ALIGNMENT:
        return list(shards)
    text = first.header[8:] + b" " * more
    offsets = {name: offset + more for name, offset in first.offsets.items()}
    return [Shard(first.name, struct.pack("<Q", len(text)) + text, offsets, first.sizes), *rest]


def split_shards(entries: Sequence[Entry], limit: int = SHARD_BYTES) -> list[Shard]:
    """Return files of about `limit` bytes each, in the order of `entries`; a tensor larger than that has a file of its own."""
    parts: list[list[Entry]] = [[]]
    room = limit
    for entry in entries:
        if parts[-1] and entry.size_bytes > room:
            parts.append([])
            room = limit
        parts[-1].append(entry)
        room -= entry.size_bytes
    if len(parts) == 1:
        return [_shard("model.safetensors", entries)]
    return [_shard(f"model-{k:05}-of-{len(parts):05}.safetensors", part) for k, part in enumerate(parts, start=1)]


def _shard(name: str, entries: Iterable[Entry]) -> Shard:
    """Return a file of `entries`. Wide elements come first, so that every tensor lies at a multiple of its element's width."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, starts, sizes = 0, {}, {}
    for entry in sorted(entries, key=lambda entry: (-entry.width, entry.name)):
        starts[entry.name], sizes[entry.name] = end, entry.size_bytes
        end += entry.size_bytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [starts[entry.name], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Shard(name, header, {key: len(header) + start for key, start in starts.items()}, sizes)


class Writer:
    """`with Writer(folder, shards) as writer:` then `write` every tensor's bytes, in any order, in pieces if they are large."""

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self.folder, self.shards = folder, list(shards)
        self._files: dict[str, BinaryIO] = {}
        self._missing = {name: size for shard in shards for name, size in shard.sizes.items()}
        self._shard_of = {name: shard for shard in shards for name in shard.offsets}

    def __enter__(self) -> Writer:
        for shard in self.shards:
            self._files[shard.name] = (self.folder / shard.name).open("wb")
        return self

    def write(self, name: str, data: bytes) -> None:
        """Write the next bytes of tensor `name`."""
        shard, left = self._shard_of[name], self._missing[name]
        if len(data) > left:
            raise ValueError(f"{name}: {len(data) - left} bytes too many")
        file = self._files[shard.name]
        file.seek(shard.offsets[name] + shard.sizes[name] - left)
        file.write(data)
        self._missing[name] = left - len(data)

    def __exit__(self, kind: object, *_: object) -> None:
        """Write the headers, only if all went well and every tensor is there."""
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
            files = {name: shard.name for name, shard in sorted(self._shard_of.items())}
            total = sum(size for shard in self.shards for size in shard.sizes.values())
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1)
            (self.folder / INDEX).write_text(index + "\n", encoding="utf-8")


# --- reading -----------------------------------------------------------------------------------------------------------


def reason_of(error: BaseException) -> str:
    """Return what a library said, on one line."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def read_header(file: Path) -> dict[str, Any]:
    """Return a file's safetensors header; UserError unless the library takes it too and the file is as long as it says."""
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


@dataclass(frozen=True)
class _Stored:
    file: Path
    dtype: str  # as the header names it
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    length: int


class Reader:
    """The tensors of `files` by name, each read alone."""

    def __init__(self, files: Sequence[Path]):
        self._tensors: dict[str, _Stored] = {}
        for file in files:
            header = read_header(file)
            with file.open("rb") as stream:
                data_start = 8 + int.from_bytes(stream.read(8), "little")
            for key, entry in header.items():
                if key != "__metadata__":
                    start, end = entry["data_offsets"]
                    self._tensors[key] = _Stored(file, entry["dtype"], tuple(entry["shape"]), data_start + start, end - start)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; nothing is read."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as the header names it: "BF16"."""
        return self._tensors[name].dtype

    def size_bytes(self, name: str) -> int:
        """Return the bytes of a tensor in its file; nothing is read."""
        return self._tensors[name].length

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return the tensor as it is stored, or the part `index` of its first axis alone.

        UserError where the file cannot be read, or holds a dtype that is not read.
        """
        stored = self._tensors[name]
        if index is not None:
            count, *rest = stored.shape
            stored = replace(
                stored, shape=tuple(rest), start=stored.start + index * (stored.length // count), length=stored.length // count
            )
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise UserError(f"{stored.file}: {name} is stored as {stored.dtype}, which is not read")
        if not stored.length:
            return torch.empty(stored.shape, dtype=dtype)
        try:
            with stored.file.open("rb") as stream:
                stream.seek(stored.start)
                data = np.fromfile(stream, dtype=np.uint8, count=stored.length)
        except OSError as error:
            raise UserError(f"{stored.file}: weights cannot be read ({reason_of(error)})") from None
        if len(data) != stored.length:
            raise UserError(f"{stored.file}: truncated while it was read")
        return torch.from_numpy(data).view(dtype).reshape(stored.shape)


# --- which parameter or buffer of the model each tensor becomes --------------------------------------------------------

# Names in files differ from the model's: with or without the base model's prefix, old names, experts stored one by one. transformers
# follows all of that by rules of its own; they are asked here, so that loading and streaming take the same tensors.


@dataclass(frozen=True)
class Target:
    """A parameter or buffer by its name in the model. `whole`: the tensor is all of it, as it is."""

    name: str
    whole: bool


@dataclass(frozen=True)
class Rules:
    """transformers' own rules for one model, whose base model's parameters have `prefix`."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str

    @property
    def by_pattern(self) -> dict[str, Any]:
        return {pattern: converter for converter in self.converters for pattern in converter.source_patterns}

    def target(self, key: str, wanted: dict[str, Any]) -> tuple[str, str | None]:
        """Return (the model's name of what tensor `key` becomes, the pattern of the converter that makes it). `wanted`: the model's names."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, wanted)
        return (key, None) if name not in wanted and key in wanted else (name, pattern)


def rules_of(model: Any) -> Rules:
    """Return the rules by which transformers loads `model` (a skeleton will do)."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return Rules(renamings, converters, model.base_model_prefix)


def targets_of(model: Any, keys: Iterable[str]) -> dict[str, Target]:
    """Return tensor -> what it becomes in `model` (a skeleton will do). Tensors that are passed over are left out."""
    rules, wanted, targets = rules_of(model), model.state_dict(), {}
    for key in keys:
        name, pattern = rules.target(key, wanted)
        if name in wanted:
            targets[key] = Target(name, pattern is None)
    return targets


Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Origin:
    """What a parameter is made of. `keys`: of the checkpoint, by the pattern that took them; `rule`: None where one is only renamed."""

    first: str  # name in the model of the first parameter that the rule makes
    rule: Any
    keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]


class Conversion:
    """The parameters and buffers of `model` that a checkpoint's tensors become, by their names in the model.

    `model` is a skeleton; `tensors`: of the checkpoint, on torch's meta device. UserError where a rule cannot be followed.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Tensor]):
        self._model, self._rules, self.kind = model, rules_of(model), type(model)
        state = model.state_dict()
        self._wanted = dict.fromkeys(state, True)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.origins: dict[str, Origin] = {}
        groups: dict[str, Origin] = {}
        for key in sorted(tensors, key=natural):
            name, pattern = self.target(key)
            if name in self._wanted:
                rule = self._rules.by_pattern[pattern] if pattern else None
                groups.setdefault(name, Origin(name, rule)).keys.setdefault(pattern or key, []).append(key)
        self.converted: dict[str, Tensor] = {}  # what rules make, on the meta device
        for origin in groups.values():
            results = self.convert(origin, lambda key: tensors[key]) if origin.rule else {}
            self.converted |= results
            self.origins |= dict.fromkeys(results or [origin.first], origin)

    def target(self, key: str, packed: Iterable[str] = ()) -> tuple[str, str | None]:
        """Return (the model's name of what a tensor called `key` becomes, the pattern of the rule that makes it). `packed`: more names."""
        more = dict.fromkeys(packed, True)
        return self._rules.target(key, {**self._wanted, **more} if more else self._wanted)

    def read_expert(self, name: str, expert: int, read: Callable[..., Tensor]) -> Tensor:
        """Return one expert's part of the fused parameter `name`; the others are not read, where the files allow it.

        `read`: a tensor of the checkpoint, with a second argument that part of its first axis.
        """
        origin = self.origins[name]
        if origin.rule is None:
            return read(origin.all_keys[0], expert)
        shape = self.shapes[name]
        if {len(keys) for keys in origin.keys.values()} == {shape[0]}:
            alone = replace(origin, keys={pattern: [keys[expert]] for pattern, keys in origin.keys.items()})
            part = self.convert(alone, read)[name]
            if part.shape == (1, *shape[1:]):
                return part[0]
        return self.read(name, read)[expert]

    def key(self, name: str) -> str | None:
        """Return the checkpoint's name of parameter `name`, where it is a tensor of its own there."""
        origin = self.origins.get(name)
        return origin.all_keys[0] if origin and origin.rule is None else None

    def read(self, name: str, read: Read) -> Tensor:
        """Return parameter `name` in the dtype that is stored. `read`: a tensor of the checkpoint."""
        origin = self.origins[name]
        return read(origin.all_keys[0]) if origin.rule is None else self.convert(origin, read)[name]

    def convert(self, origin: Origin, read: Read) -> dict[str, Tensor]:
        """Return what a rule makes of tensors, by the names of the parameters."""
        rule = copy.deepcopy(origin.rule)
        for pattern, keys in origin.keys.items():
            for key in keys:
                rule.add_tensor(origin.first, key, pattern, read(key))
        try:
            result = rule.convert(origin.first, model=self._model, config=self._model.config)
        except Exception as error:  # every operation fails in its own way
            raise UserError(
                f"{origin.all_keys[0]}: transformers makes {origin.first} of this tensor and others, which fails ({reason_of(error)})"
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


def natural(key: str) -> list[tuple[int, int, str]]:
    """Return a sort key with numbers in their order: expert 2 comes before expert 10, as transformers stacks them."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in key.split(".")]


class Sources:
    """Where in the files every parameter of `model`, a skeleton, comes from; experts of a fused one are read one by one."""

    def __init__(self, model: Any, reader: Reader):
        self.reader = reader
        tensors = {
            key: torch.empty(reader.shape(key), dtype=DTYPES[reader.dtype(key)], device="meta")
            for key in reader
            if reader.dtype(key) in DTYPES
        }
        self.conversion = Conversion(model, tensors)

    def __contains__(self, name: str) -> bool:
        """Return whether parameter `name` of the model is in the files, of an expert the fused one that it is a part of."""
        return name in self.conversion.origins

    def read(self, name: str) -> Tensor:
        """Return a parameter of the model as it is stored."""
        return self.conversion.read(name, self.reader.read)

    def read_expert(self, name: str, expert: int) -> Tensor:
        """Return one expert's part of the fused parameter `name`."""
        return self.conversion.read_expert(name, expert, self.reader.read)
