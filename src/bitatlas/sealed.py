"""Safetensors files that carry a hash of what they hold, so that a byte that changed on the disk is found and not computed with.

The format itself has no checksum: a changed byte in a tensor is another number and nothing else. The SHA-256 of names, dtypes, shapes
and bytes stands in the file's metadata, with the file's own name in it, so that one file is not taken for another.
Left out: protection against someone who means to change it, who would change the hash too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from bitatlas.files import write_bytes

SEAL = "sha256"


def save_sealed(tensors: Mapping[str, Tensor], file: Path, name: str) -> None:
    """Write `tensors` to `file`, beside first, then renamed; OSError where the disk does not take them."""
    # A file that a power cut empties fails its seal and is made again, so it need not be waited for.
    write_bytes(file, save(dict(tensors), metadata={SEAL: _seal(tensors, name)}), sync=False)


def load_sealed(file: Path, name: str) -> dict[str, Tensor]:
    """What was saved under `name`; ValueError or the library's own error where the file holds anything else."""
    with safe_open(file, framework="pt") as reader:
        tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (safe_open is not a dict)
        seal = (reader.metadata() or {}).get(SEAL)
    if seal != _seal(tensors, name):
        raise ValueError(f"{file}: holds something else than was written")
    return tensors


def _seal(tensors: Mapping[str, Tensor], name: str) -> str:
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
