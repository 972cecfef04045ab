"""A plan written into a GGUF of the same model that was made elsewhere: same metadata, same names, our types.

So every architecture that llama.cpp's converter knows can be written, with a vocabulary of any kind. How the converter orders, joins and
splits weights is not written here: the rows of the file's tensors are looked for among those of the planned modules, bit for bit in the
file's own dtype. So rows that change places (for rotary embeddings), modules that are joined (q, k and v) and experts that are stacked are all
followed; a tensor that has none of the planned rows stays as it is.
Left out: weights whose columns were changed, and files in several parts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.export.blueprint import is_part
from bitatlas.export.gguf.header import (
    PLAN_KEY,
    QUANTIZATION_VERSION,
    TENSORS_KEY,
    WEIGHTS_KEY,
    file_type,
    fill_up,
    header_bytes,
    padded,
    type_number,
    write_header,
)
from bitatlas.export.packed import stored_of
from bitatlas.model.checkpoint import Checkpoint
from bitatlas.model.from_gguf import WHOLE, open_reader, types_of
from bitatlas.model.linear import is_transposed
from bitatlas.model.tensor_files import Reader, Sources
from bitatlas.quantize.ggml import Blocks, check_packages
from bitatlas.records import Module, Plan
from bitatlas.records.formats import FORMATS, LLAMA_CPP, stored_bytes
from bitatlas.records.plan import FileLayout, ModuleFile

OUTSIDE = -1  # the layer of what is in none
GIVEN_ANEW = (PLAN_KEY, WEIGHTS_KEY, TENSORS_KEY, "general.architecture", "general.file_type", "general.quantization_version")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rows:
    """Where the rows of a tensor come from, each array int64 [rows]."""

    modules: tuple[str, ...]
    owner: np.ndarray  # index into `modules`
    row: np.ndarray  # of that module


@dataclass(frozen=True)
class BaseFile:
    """A GGUF of the model. `rows`: tensor -> rows, of those that consist of planned ones."""

    file: Path
    reader: Any  # gguf.GGUFReader
    rows: Mapping[str, Rows]

    @property
    def architecture(self) -> str:
        return str(self.reader.fields["general.architecture"].contents())

    def pieces(self, module: str) -> list[int]:
        """Return how many of the module's rows are in each tensor that has any."""
        return [int((rows.owner == rows.modules.index(module)).sum()) for rows in self.rows.values() if module in rows.modules]


def base_of(model: str, given: str | os.PathLike[str] | None) -> Path | None:
    """Return the GGUF whose metadata a new one takes: the one that is given, or the model's own where it is an unquantized GGUF."""
    if given is not None:
        return Path(given)
    file = Path(model)
    return file if file.suffix == ".gguf" and file.is_file() and not set(types_of(file)) - set(WHOLE) else None


def with_base(checkpoint: Checkpoint, model: str, given: str | os.PathLike[str] | None) -> Checkpoint:
    """Return the checkpoint with what `followed` finds in the GGUF that a new one is made on; as it is where there is none (see `base_of`)."""
    file = base_of(model, given)
    return followed(open_base(file, checkpoint), checkpoint)[0] if file else checkpoint


def open_base(file: Path, checkpoint: Checkpoint) -> BaseFile:
    """Open a GGUF of the checkpoint's model and find the planned modules in it; UserError where it has none of them."""
    check_packages(f"--base-gguf {file}")
    reader, sources = open_reader(file), Sources(checkpoint.skeleton(), Reader(checkpoint.files))
    transposed = {name for name, module in checkpoint.meta_decoder().model.named_modules() if is_transposed(module)}
    quantized = Counter(tensor.tensor_type.name for tensor in reader.tensors if tensor.tensor_type.name not in (*WHOLE, "I32"))
    if quantized:
        (kind, count), *_ = quantized.most_common(1)
        raise UserError(f"--base-gguf {file}: {count} of its tensors are {kind}; give one in f16, bf16 or f32")
    by_layer: dict[int, list[Any]] = {}
    for tensor in reader.tensors:
        words = tensor.name.split(".")
        layer = int(words[1]) if words[0] == "blk" and words[1].isdigit() else OUTSIDE
        if len(tensor.shape) > 1:
            by_layer.setdefault(layer, []).append(tensor)
    modules: dict[int, list[Module]] = {}
    for module in checkpoint.modules:
        modules.setdefault(OUTSIDE if module.part else module.layer, []).append(module)
    rows: dict[str, Rows] = {}
    for layer, of_layer in modules.items():
        rows |= _find(by_layer.get(layer, []), of_layer, sources, transposed)
    if not rows:
        raise UserError(f"--base-gguf {file}: has none of the weights of {checkpoint.info.name}: it is of another model")
    return BaseFile(file, reader, rows)


def _find(tensors: Sequence[Any], modules: Sequence[Module], sources: Sources, transposed: set[str]) -> dict[str, Rows]:
    """Return tensor -> rows, of the tensors of one layer that consist of rows of `modules`. transposed: modules whose parameter is [in, out]"""
    found: dict[str, Rows] = {}
    for dtype in {tensor.tensor_type.name for tensor in tensors} & set(WHOLE):
        known = {}
        for module in modules:
            weight = _stored(module, sources).to(WHOLE[dtype])
            known[module.name] = module.shape[1], _keys(weight.T if module.name in transposed else weight)
        for tensor in (tensor for tensor in tensors if tensor.tensor_type.name == dtype):
            width = int(tensor.shape[0])
            keys = _keys(_values(tensor).view(WHOLE[dtype]).reshape(-1, width))
            rows = _owners(keys, {name: of_module for name, (its_width, of_module) in known.items() if its_width == width})
            if rows is not None:
                found[tensor.name] = rows
    return found


def _stored(module: Module, sources: Sources) -> Tensor:
    """Return a module's weight as its parameter keeps it, of an expert its part."""
    if not is_part(module):
        return sources.read(module.parameter)
    assert module.expert is not None
    return sources.read_expert(module.parameter, module.expert)


def _values(tensor: Any) -> Tensor:
    """Return a GGUF tensor's bytes."""
    return torch.from_numpy(np.array(tensor.data).view(np.uint8).reshape(-1))


def _keys(rows: Tensor) -> np.ndarray:
    """Return a number for each row [rows, width] of 16 or 32 bits: uint64 [rows], alike for rows that are alike bit for bit."""
    words = rows.contiguous().view(torch.int32 if rows.dtype == torch.float32 else torch.int16).numpy()
    words = words.view(np.uint32 if rows.dtype == torch.float32 else np.uint16)
    factors = np.random.default_rng(0).integers(1, 2**63, size=words.shape[1], dtype=np.uint64) | np.uint64(1)
    keys = np.empty(len(words), np.uint64)
    for start in range(0, len(words), 1024):
        keys[start : start + 1024] = (words[start : start + 1024].astype(np.uint64) * factors).sum(1)  # modulo 2**64
    return keys


def _owners(keys: np.ndarray, known: Mapping[str, np.ndarray]) -> Rows | None:
    """Return where rows come from; None where some come from no module. keys: uint64 [rows]; known: module -> uint64 [rows]"""
    owner, row = np.full(len(keys), -1), np.zeros(len(keys), np.int64)
    counts = {name: int(np.isin(keys, of_module).sum()) for name, of_module in known.items()}
    modules = tuple(sorted((name for name, count in counts.items() if count), key=lambda name: -counts[name]))
    for index, name in enumerate(modules):
        order = np.argsort(known[name], kind="stable")
        places = np.searchsorted(known[name], keys, sorter=order).clip(max=len(order) - 1)
        hits = (known[name][order[places]] == keys) & (owner < 0)
        owner[hits], row[hits] = index, order[places][hits]
    if not len(keys) or (owner < 0).any():
        return None
    used = [index for index in range(len(modules)) if (owner == index).any()]
    return Rows(tuple(modules[index] for index in used), np.searchsorted(used, owner), row)


# --- before there is a plan --------------------------------------------------------------------------------------------


def followed(base: BaseFile, checkpoint: Checkpoint) -> tuple[Checkpoint, list[Module]]:
    """Return the checkpoint with sizes as in the file, modules of one tensor in one unit, and the modules that cannot be followed, left out."""
    lost = [module for module in checkpoint.modules if sum(base.pieces(module.name)) < module.shape[0]]
    checkpoint = checkpoint.leaving(lost)
    units = {module.name: module.unit for module in checkpoint.modules}
    for rows in base.rows.values():
        joined = {units[name] for name in rows.modules if name in units}
        if len(joined) > 1:
            first = min(joined)
            units = {name: first if unit in joined else unit for name, unit in units.items()}
    names = {module.name for module in checkpoint.modules}
    tensors = {tensor.name: tensor for tensor in base.reader.tensors}
    ours = {name for name, rows in base.rows.items() if set(rows.modules) <= names}
    header = header_bytes(checkpoint.modules, lambda path, text: _start(path, base, checkpoint, {}, text))
    other = header + sum(padded(int(tensor.n_bytes)) for name, tensor in tensors.items() if name not in ours)
    modules = []
    for module in checkpoint.modules:
        pieces = base.pieces(module.name)
        dtype = next(WHOLE[tensors[name].tensor_type.name] for name, rows in base.rows.items() if module.name in rows.modules)
        kept = sum(padded(count * module.shape[1] * dtype.itemsize) for count in pieces)
        file_of = ModuleFile(tuple((0, count) for count in pieces), kept)
        modules.append(replace(module, unit=units[module.name], file=file_of))
    info = replace(checkpoint.info, file=FileLayout(LLAMA_CPP, "gguf", other, 0, 0, 0))
    return replace(checkpoint, modules=modules, info=info), lost


# --- writing -----------------------------------------------------------------------------------------------------------


def kinds_of(base: BaseFile, plan: Plan) -> dict[str, str]:
    """Return tensor -> format, of those that the plan gives one; UserError where it gives two, or cannot be followed."""
    kinds: dict[str, str] = {}
    for name, rows in base.rows.items():
        formats = {module: plan.modules.get(module, "") for module in rows.modules}
        first = next(iter(formats.values()))
        if len(set(formats.values())) > 1:
            other = next(module for module, kind in formats.items() if kind != first)
            raise UserError(
                f"--base-gguf {base.file}: {name} holds {rows.modules[0]} and {other}, which the plan gives {first or 'no format'} and "
                f"{formats[other] or 'none'}: make the plan in a survey with --base-gguf"
            )
        if first and not FORMATS[first].dtype:
            kinds[name] = first
    for module, kind in plan.modules.items():
        if not FORMATS[kind].dtype and not any(module in rows.modules for name, rows in base.rows.items() if name in kinds):
            raise UserError(f"--base-gguf {base.file}: holds {module} in a form that is not followed here")
    return kinds


def tensor_bytes(tensor: Any, kind: str | None) -> int:
    """Return the bytes of a tensor in the new file."""
    width = int(tensor.shape[0])
    return int(tensor.n_bytes) if kind is None else stored_bytes((int(tensor.n_elements) // width, width), FORMATS[kind])


def _start(file: Path, base: BaseFile, checkpoint: Checkpoint, kinds: Mapping[str, str], text: str) -> Any:
    """Return a writer that has written everything but the tensors' data."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(file, base.architecture)
    for name, field in base.reader.fields.items():
        if name.startswith("GGUF.") or name in GIVEN_ANEW:
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    most = Counter(kinds.values()).most_common(1)
    writer.add_file_type(file_type(most[0][0] if most else "f32"))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_string(WEIGHTS_KEY, checkpoint.info.weights_sha256)
    writer.add_string(
        TENSORS_KEY, json.dumps({name: list(rows.modules) for name, rows in base.rows.items()}, separators=(",", ":"))
    )
    if text:
        writer.add_string(PLAN_KEY, text)
    for tensor in base.reader.tensors:
        kind = kinds.get(tensor.name)
        shape = tuple(int(count) for count in reversed(tensor.shape.tolist()))
        number = type_number(kind) if kind else tensor.tensor_type
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor_bytes(tensor, kind), raw_dtype=number)
    write_header(writer)
    return writer


def write_on_base(
    file: Path, base: BaseFile, checkpoint: Checkpoint, plan: Plan, plan_file: Path, progress: Progress
) -> dict[str, str]:
    """Write the plan's file beside, then rename it. Returns tensor -> format. The plan's bank lies perhaps beside `plan_file`."""
    kinds = kinds_of(base, plan)
    beside = file.with_name(f".{file.name}.partial")
    decoder, sources = checkpoint.meta_decoder(), Sources(checkpoint.skeleton(), Reader(checkpoint.files))
    modules = {module.name: module for module in checkpoint.modules}
    data = sum(padded(tensor_bytes(tensor, kinds.get(tensor.name))) for tensor in base.reader.tensors)
    try:
        writer = fill_up(plan, beside, data, lambda path, text: _start(path, base, checkpoint, kinds, text))
        for done, tensor in enumerate(base.reader.tensors, start=1):
            if tensor.name not in kinds:
                writer.write_tensor_data(np.array(tensor.data).view(np.uint8).reshape(-1))
            else:
                rows, blocks = base.rows[tensor.name], []
                for name in rows.modules:
                    stored = stored_of(plan, plan_file, decoder, name, _stored(modules[name], sources))
                    assert isinstance(stored, Blocks)
                    blocks.append(stored.blocks)
                starts = np.cumsum([0, *(len(of_module) for of_module in blocks)])
                index = torch.from_numpy(starts[rows.owner] + rows.row)
                writer.write_tensor_data(torch.cat(blocks)[index].numpy().reshape(-1))
            progress(done, len(base.reader.tensors))
        writer.close()
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    return kinds
