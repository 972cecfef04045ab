"""A checkpoint's folder, before anything is built from it: where it is, its config, its weight files and their headers.

Everything here reads a few kilobytes; a folder that cannot be used is refused in one line, whatever a library raises about it.
Left out: pickle weights, code that comes with a checkpoint, encoders and encoder-decoders, and (except for comparisons) checkpoints that are quantized already.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from bitatlas.errors import UserError
from bitatlas.model.from_gguf import folder_of
from bitatlas.model.tensor_files import LONGEST_REASON, reason_of
from bitatlas.records.text import byte_size

HUB_FILES = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*",
]  # fmt: skip
NOT_HUB_FILES = ["*/*", "consolidated*", "*.fp16.safetensors"]  # copies of the weights in other layouts
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
RANK_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # one process's part of each tensor
ADAPTER_FILE = "adapter_config.json"
PICKLE_FILE = "pytorch_model.bin"
KNOWN_MODELS = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}  # model type -> architecture
KNOWN_ARCHITECTURES = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(), *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".xz", ".bz2")
GGUF_HINT = (
    "{}: give it itself, if its weights are f16, bf16, f32 or q8_0; else the checkpoint folder or hub name that it was made from"
)
LONGEST_NAME = 100  # of a weights file; what a file system takes is a little more than 250 bytes
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "*processor_config.json", "chat_template*", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip


def find_folder(name: str, revision: str | None) -> Path:
    """Return the local folder `name`, or the hub's own cache of the files of a hub name; UserError where there is neither."""
    if not name.strip():
        raise UserError("the model's name is empty: give a checkpoint folder, or a hub name like owner/model")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody/model
        raise UserError(f"{name}: no such checkpoint folder ({reason_of(error)})") from None
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError) as error:  # longer than a name may be, a null byte
        raise UserError(f"{name[:LONGEST_REASON]!r}: no such checkpoint folder ({reason_of(error)})") from None
    if exists and path.suffix.lower() == ".gguf":
        return folder_of(path)
    if exists:
        raise UserError(f"{name}: {_file_hint(path)}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{name}: no such checkpoint folder (give a folder in Hugging Face layout, or a hub name like owner/model)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=NOT_HUB_FILES))
    except Exception as error:  # the hub client raises many kinds; each means that the model cannot be had
        raise UserError(f"{name}: no such folder, and the hub did not give it ({reason_of(error)})") from None


def _file_hint(file: Path) -> str:
    """Return what a file is that was given instead of a checkpoint's folder, and what to give."""
    ending = file.suffix.lower()
    if ending == ".safetensors":
        return "is one file of weights; give the folder that holds it together with config.json and the tokenizer"
    if ending in PICKLES:
        return _pickle_hint(str(file.absolute().parent))
    if ending == ".json":
        return f"is a file; give the folder that it lies in, {file.absolute().parent}"
    if ending in ARCHIVES:
        return "is an archive; unpack it and give the folder"
    return "is a file; give a checkpoint folder in Hugging Face layout, or a hub name like owner/model"


def read_config(folder: Path, name: str, quantized: bool = False) -> Any:
    """Return the transformers config; UserError where it is unusable, of another kind of model, or quantized and not `quantized`."""
    if (folder / ADAPTER_FILE).is_file():
        raise UserError(
            f"{name}: {ADAPTER_FILE} makes this an adapter, which is not measured as it is; merge it into its base model first "
            "(peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), and the tokenizer's "
            f"save_pretrained(NEW)), or for the base alone take {ADAPTER_FILE} out of the folder"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no config.json, so not a checkpoint in Hugging Face layout{_layout_hint(folder)}")
    _refuse_code(folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.get_text_config()
    except Exception as error:  # each model type validates its fields in its own way
        raise UserError(f"{name}: config.json cannot be used ({reason_of(error)})") from None
    _refuse_other_models(config, name)
    settings = getattr(config, "quantization_config", None)
    if isinstance(getattr(config, "quantization", None), dict):
        raise UserError(f"{name}: is quantized already, in MLX's layout; give the unquantized checkpoint that it was made from")
    if settings and not quantized:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        by = f", by {method}" if isinstance(method, str) else ""
        raise UserError(f"{name}: is quantized already{by}; give the unquantized checkpoint that it was made from")
    if getattr(config, "transformers_weights", None):
        raise UserError(
            f"{name}: config.json names its weights (transformers_weights); call that file {WEIGHTS_FILE} and take the line out"
        )
    return config


def _refuse_code(folder: Path, name: str) -> None:
    """Refuse what a config may ask transformers to run: Python files beside it, or attention code from the hub."""
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
    """Refuse all but decoder-only language models: the architecture's own name decides, since encoders have causal heads too."""
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or not all(isinstance(architecture, str) for architecture in architectures):
        raise UserError(f"{name}: config.json cannot be used (architectures is not a list of names)")
    causal = any(a in KNOWN_ARCHITECTURES or a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    known = config.model_type in KNOWN_MODELS
    if getattr(config, "is_encoder_decoder", False) or not known or (architectures and not causal):
        what = architectures[0] if architectures else config.model_type
        raise UserError(
            f"{name}: {what} is not a decoder-only causal language model (expected an architecture ending in ForCausalLM, "
            "or one that reads images and text and writes text)"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a checkpoint's weights are: those that transformers loads, in its order, and no other in the folder.

    `model.safetensors` goes before an index; of an index all tensors of the shards that it names count, wherever it places them, a later
    shard's before an earlier one's. Hash, sizes, loading, streaming and copying all use this list.
    UserError where there are none, a shard is missing, or the index is damaged.
    Source: transformers 5.24, `_get_resolved_checkpoint_files`.
    """
    ranks = sorted(path.name for path in folder.glob("shard-*.safetensors") if RANK_FILE.fullmatch(path.name))
    if ranks:
        raise UserError(
            f"{folder}: {ranks[0]} is one process's part of a distributed checkpoint; save it whole (save_pretrained)"
        )
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{folder}: no safetensors weights{_layout_hint(folder)}")
    files = _indexed(index)
    if not files:
        raise UserError(f"{folder}: no safetensors weights ({INDEX_FILE} names none)")
    strange = [file.name for file in files if file.suffix != ".safetensors"]
    if strange:
        raise UserError(f"{index}: names {strange[0]}, which is not a safetensors file")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: weights file {missing[0]} is missing ({len(missing)} of {len(files)} shards)")
    if not isinstance(json.loads(index.read_text(encoding="utf-8")).get("metadata"), dict):
        raise UserError(f'{index}: not a readable index (transformers needs an entry "metadata": {{}} in it)')
    return files


def _layout_hint(folder: Path) -> str:
    """Return what a folder without transformers' safetensors weights, or without a config, holds instead."""
    if (folder / PICKLE_FILE).is_file() or (folder / f"{PICKLE_FILE}.index.json").is_file():
        return f"; {PICKLE_FILE} {_pickle_hint(str(folder))}"
    if (folder / WEIGHTS_FILE).is_symlink():
        return f"; {WEIGHTS_FILE} is a link to a file that is not there"
    names = sorted(path.name for path in folder.glob("*") if path.is_file())
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        shown = f"{others[0]} is" if len(others) == 1 else f"{others[0]} and {len(others) - 1} more are"
        return f"; {shown} not what transformers loads: it takes {WEIGHTS_FILE}, or the shards that {INDEX_FILE} names"
    packed = next((name for name in names if name.lower().endswith(".gguf")), None)
    if packed:
        return "; " + GGUF_HINT.format(f"{packed} is a GGUF file")
    pickles = [name for name in names if name.endswith(PICKLES)]
    return f"; {pickles[0]} {_pickle_hint(str(folder))}" if pickles else ""


def _pickle_hint(folder: str) -> str:
    """Return why pickle is not read, and how transformers writes the model anew."""
    return (
        "is pickle, which can run code as it is read: if you trust it, transformers writes the model anew, as safetensors: "
        f'AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("NEW_FOLDER"), and the same with AutoTokenizer'
    )


def _indexed(index: Path) -> list[Path]:
    """Return the shards that an index file names, all of them beside it."""
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


def sha256_of(files: list[Path]) -> str:
    """Return the SHA-256 of all bytes of the files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    """Return the bytes that can still be written below `folder`'s nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# --- the folder that a command writes ----------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Refuse, with UserError, `out` unless it can become a folder: new, or empty, in a folder that is there."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: is not a folder; give a new one")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: exists and is not empty; choose another folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")


def check_free_space(out: Path, needed_bytes: int) -> None:
    """Refuse, with UserError, `out` on a disk that is too full."""
    free = free_bytes(out.absolute().parent)
    if free < needed_bytes:
        raise UserError(f"--out {out}: only {byte_size(free)} free on that disk; {byte_size(needed_bytes)} are needed")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, which becomes `out` if the block ends well and goes away if it does not."""
    folder = out.absolute().parent / f".{out.absolute().name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def companion_files(folder: Path) -> list[Path]:
    """Return what else belongs to a model: tokenizer, processor (of a model that also sees), generation config, chat template, licence."""
    files = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return sorted(files - set(weight_files(folder)))
