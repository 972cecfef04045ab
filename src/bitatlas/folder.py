"""A checkpoint's folder, before anything is built from it: where it is, its config, its weight files and their headers.

Everything here reads a few kilobytes; a folder that cannot be used is refused in one line, whatever a library raises about it.
Left out: pickle weights, code that comes with a checkpoint, encoders and encoder-decoders, and (except for comparisons) checkpoints that are quantized already.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitatlas.errors import UserError

HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "NOTICE*",
]
LONGEST_NAME = 100  # of a weights file; what a file system takes is a little more than 250 bytes
LONGEST_REASON = 200  # characters of a library's message that are repeated


def reason_of(error: BaseException) -> str:
    """What a library said, on one line."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def find_folder(name: str, revision: str | None) -> Path:
    """The local folder `name`, or a hub name's files in the hub's own cache; UserError where there is neither."""
    if not name.strip():
        raise UserError("the model's name is empty: give a checkpoint folder, or a hub name like owner/model")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody/model
        raise UserError(f"{name}: no such checkpoint folder ({reason_of(error)})") from None
    if path.is_dir():
        return path
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists()
    if looks_like_path:
        raise UserError(
            f"{name}: no such checkpoint folder (give a folder in Hugging Face layout, or a hub name like owner/model)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds; each means that the model cannot be had
        raise UserError(f"{name}: no such folder, and the hub did not give it ({reason_of(error)})") from None


def read_config(folder: Path, name: str, quantized: bool = False) -> Any:
    """The transformers config; UserError where it is unusable, of another kind of model, or quantized and not `quantized`."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no config.json, so not a checkpoint in Hugging Face layout")
    _refuse_code(folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.get_text_config()
    except Exception as error:  # each model type validates its fields in its own way
        raise UserError(f"{name}: config.json cannot be used ({reason_of(error)})") from None
    _refuse_other_models(config, name)
    if getattr(config, "quantization_config", None) and not quantized:
        raise UserError(f"{name}: is quantized already; give the unquantized checkpoint")
    return config


def _refuse_code(folder: Path, name: str) -> None:
    """What a config may ask transformers to run: Python files beside it, or attention code from the hub."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong
    if not isinstance(content, dict):
        return
    if content.get("auto_map") and content.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{name}: needs Python code of its own (auto_map in config.json), and no code that comes with a model is run; "
            "give a checkpoint of a model type that transformers itself has"
        )
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if "/" in str(content.get(key)):
            raise UserError(f"{name}: config.json asks for code from the hub ({key}), which is not run; take that line out")


def _refuse_other_models(config: Any, name: str) -> None:
    """Only decoder-only language models: the architecture's own name decides, since encoders have causal heads too."""
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or not all(isinstance(architecture, str) for architecture in architectures):
        raise UserError(f"{name}: config.json cannot be used (architectures is not a list of names)")
    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if getattr(config, "is_encoder_decoder", False) or not known or (architectures and not causal):
        what = architectures[0] if architectures else config.model_type
        raise UserError(
            f"{name}: {what} is not a decoder-only causal language model (expected an architecture ending in ForCausalLM)"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, in a fixed order; UserError where there are none or a shard is missing."""
    index = folder / "model.safetensors.index.json"
    files = _indexed(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: weights file {missing[0]} is missing ({len(missing)} of {len(files)} shards)")
    if not files:
        raise UserError(f"{folder}: no safetensors weights{_pickle_hint(folder)}")
    return files


def _pickle_hint(folder: Path) -> str:
    files = sorted(file for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if not files:
        return ""
    return (
        f"; {files[0].name} is pickle, which can run code as it is read: if you trust it, transformers writes the model anew, as safetensors: "
        f'AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("NEW_FOLDER"), and the same with AutoTokenizer'
    )


def _indexed(index: Path) -> list[Path]:
    """The shards that an index file names, all of them beside it."""
    try:
        values = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a readable index ({reason_of(error)})") from None
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        raise UserError(f"{index}: not a readable index ({wrong[0]!r} is not a file name)")
    names = sorted(set(values))
    outside = [name for name in names if Path(name).name != name or len(name) > LONGEST_NAME]
    if outside:
        raise UserError(f"{index}: names a file outside the folder: {outside[0][:LONGEST_REASON]}")
    return [index.parent / name for name in names]


def read_header(file: Path) -> dict[str, Any]:
    """The safetensors header, after checking that the file is as long as the header says."""
    size = file.stat().st_size
    try:
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
    return header


def _end(key: str, entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(entry["dtype"], str)):
        raise ValueError(f"the entry of {key} is not a dtype and two offsets")
    return end
