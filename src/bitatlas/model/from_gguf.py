"""A GGUF as a checkpoint: transformers reads it, and a folder in Hugging Face layout is kept in the user's cache.

Of f32, f16, bf16 and q8_0 files, which hold a model (nearly) as it was; what was quantized further would be quantized twice, and is refused.
Left out: files in several parts, and architectures that transformers does not read from a GGUF.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bitatlas.errors import UserError
from bitatlas.model.tensor_files import reason_of

WHOLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READABLE = (*WHOLE, "Q8_0")
NOTE_FILE = "from_gguf.json"  # in the folder: what the file held
VERSION = 1  # of how it is read: raised whenever the folder changes


def cache_folder() -> Path:
    """Return the folder in which bitatlas keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitatlas"


def folder_of(file: Path) -> Path:
    """Return the folder in Hugging Face layout of a GGUF, made now if it is missing; UserError where it cannot be read."""
    stat = file.stat()
    key = hashlib.sha256(f"{VERSION} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / key / file.stem
    if not (folder / NOTE_FILE).is_file():
        _make(file, folder)
    return folder


def open_reader(file: Path) -> Any:
    """Return a `gguf.GGUFReader`; UserError for a file that is no whole GGUF, or without the package."""
    if find_spec("gguf") is None:
        raise UserError(f"{file}: needs gguf, not here yet: pip install 'bitatlas[gguf]'")
    from gguf import GGUFReader

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return GGUFReader(file)
    except Exception as error:  # numpy and struct raise many kinds on a damaged file
        raise UserError(f"{file}: not a whole GGUF ({reason_of(error)})") from None


def types_of(file: Path) -> Counter[str]:
    """Return how many matrices of a GGUF have which type; UserError for a file that is none."""
    return Counter(tensor.tensor_type.name for tensor in open_reader(file).tensors if len(tensor.shape) > 1)


def origin_text(folder: Path) -> str:
    """Return a line on the GGUF that a folder was made of; "" for any other folder."""
    file = folder / NOTE_FILE
    if not file.is_file():
        return ""
    types = json.loads(file.read_text(encoding="utf-8"))["types"]
    return f"read from a GGUF, whose matrices are {', '.join(f'{count} {kind}' for kind, count in types.items())}" + (
        ": it was quantized before, and damage is counted from what it holds" if set(types) - set(WHOLE) else ""
    )


def _make(file: Path, folder: Path) -> None:
    types = types_of(file)
    wrong = {kind: count for kind, count in types.items() if kind not in READABLE}
    if wrong:
        kind, count = max(wrong.items(), key=lambda entry: entry[1])
        raise UserError(
            f"{file}: {count} of its matrices are {kind}, and would be quantized twice: give the GGUF in f16, bf16, f32 or q8_0, "
            "or the checkpoint folder or hub name that it was made from"
        )
    dtype = next((WHOLE[kind] for kind, _ in types.most_common() if kind in WHOLE), torch.float32)
    if "Q8_0" in types:
        dtype = torch.bfloat16
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model, tokenizer = load_gguf(file, dtype)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    (beside / NOTE_FILE).write_text(json.dumps({"file": file.name, "types": dict(types.most_common())}) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def load_gguf(file: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a GGUF of any type, dequantized by transformers; UserError where it cannot read it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **_dequantized())
    except Exception as error:  # transformers raises many kinds for what it cannot read
        raise UserError(f"{file}: transformers cannot read this GGUF ({reason_of(error)})") from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = file.stem
    return model, tokenizer


def _dequantized() -> dict[str, object]:
    """Return what some releases of transformers need to be told so that weights are read as numbers."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
