"""Weights that are stored as pickle, read once and only where that was asked for, and written as safetensors.

Pickle is a program that rebuilds objects, and reading a hostile one runs what it says. torch's restricted reader (`weights_only`) takes
tensors and plain containers alone; that is what is used here, so a file that needs more is refused. What comes out is an ordinary
checkpoint folder, with the same tensors byte for byte and the hashes of the files that they came from, and from there on nothing of
bitatlas reads pickle. Tensors that the model ties and the file shares are stored once.
Left out: files that hold more than a flat table of tensors (optimizer states, whole modules), and code of the checkpoint's own.
Source: PyTorch's notes on `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from bitatlas.checkpoint import sha256_of, skeleton_of
from bitatlas.errors import UserError
from bitatlas.export.place import belongings, beside, check_room
from bitatlas.export.shards import Entry, Writer, cut
from bitatlas.files import write_text
from bitatlas.folder import find_folder, has_safetensors, pickle_files, read_config, reason_of
from bitatlas.reader import DTYPES

CONVERTED = "safetensors"  # in a run's folder: holds the converted checkpoint, under its own name
STORY = "converted.json"  # in the converted checkpoint: what it was made of
SCHEMA = "bitatlas.converted/1"
SMALL_BYTES = 2**20  # room for headers and small files
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items() if not word.startswith("F8")}  # of plain checkpoints


def as_safetensors(name: str, revision: str | None, out: Path) -> str:
    """`name` itself where it has safetensors weights; else a converted copy in `out`, made now or found whole from before."""
    folder = find_folder(name, revision, pickle=True)
    files = [] if has_safetensors(folder) else pickle_files(folder)
    if not files:
        return name  # `open_checkpoint` says what is wrong, if anything is
    config = read_config(folder, name)
    place = out / CONVERTED / (folder.name if Path(name).is_dir() else name.rpartition("/")[2])
    hashes = {file.name: sha256_of([file]) for file in files}
    if _story(place).get("sha256") == hashes:
        return str(place)
    tensors = _read(files, skeleton_of(config, name))
    entries = [Entry(key, DTYPE_WORDS[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for key, t in tensors.items()]
    others = [folder / "config.json", *belongings(folder)]
    place.parent.mkdir(parents=True, exist_ok=True)
    check_room(place, sum(e.size_bytes for e in entries) + sum(file.stat().st_size for file in others) + SMALL_BYTES)
    shutil.rmtree(place, ignore_errors=True)
    with beside(place) as new:
        with Writer(new, cut(entries)) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if {file.name: sha256_of([file]) for file in files} != hashes:
            raise UserError(f"{folder}: the pickle weights changed while they were read; start again once they are whole")
        for file in others:
            shutil.copyfile(file, new / file.name)
        write_text(new / STORY, json.dumps({"schema": SCHEMA, "sha256": hashes}, indent=1) + "\n")
    return str(place)


def notes_of(folder: Path) -> list[str]:
    """What the report says of a checkpoint that was converted; nothing of any other."""
    hashes = _story(folder).get("sha256", {})
    told = ", ".join(f"{name} (SHA-256 {value})" for name, value in hashes.items())
    return [f"the weights were read from pickle and converted to safetensors, the same bytes: {told}"] if told else []


def _story(folder: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads((folder / STORY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(content, dict) and content.get("schema") == SCHEMA and isinstance(content.get("sha256"), dict)
    return content if known else {}


def _read(files: list[Path], skeleton: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all files, on the CPU; those of the new zip layout stay on disk until they are used."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # damaged files raise whatever their bytes lead to
            raise UserError(
                f"{file}: not a plain table of tensors, so it is not read ({reason_of(error).partition('. ')[0]})"
            ) from None
        tensors |= _plain_tensors(content, file)
    every = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in skeleton.named_parameters()}
    first = {_memory(tensor) for key, tensor in tensors.items() if key not in tied}
    return {key: tensor for key, tensor in tensors.items() if key not in tied or _memory(tensor) not in first}


def _plain_tensors(content: object, file: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: not a table of tensors, so it is not read")
    for key, value in content.items():
        if (
            not isinstance(key, str)
            or not isinstance(value, Tensor)
            or value.layout != torch.strided
            or value.dtype not in DTYPE_WORDS
        ):
            raise UserError(f"{file}: {str(key)[:80]!r} is not a plain tensor, so the file is not read")
    return content


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
