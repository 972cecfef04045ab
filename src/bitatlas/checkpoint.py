"""Open a checkpoint: what it is, its decoder layers, the linear modules that can be quantized, and whether its weights are whole.

Everything that can be known without reading weights is read first, from the config and the safetensors headers, so that a wrong
folder or an impossible budget is refused at once. The model's skeleton is built on torch's meta device, which costs no memory.

Any causal language model of transformers will do: decoder layers are the largest list of equal blocks that hold linear modules.
Left out: pickle weights, remote code, checkpoints that are quantized already, and experts fused into one 3-D tensor, which stay
as they are (a note says so).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from bitatlas.errors import UserError
from bitatlas.records import ModelInfo, Module

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
ROUTERS = ("gate", "router")  # of mixtures of experts: a few weights that choose the way, kept by every runtime
disable_progress_bar()  # loading a local file; our own progress is enough

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `layers_path` names the list of decoder layers in the model."""

    folder: Path
    config: Any
    info: ModelInfo
    modules: list[Module]
    layers_path: str
    files: list[Path]
    notes: list[str] = field(default_factory=list)

    def load_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model in evaluation mode; UserError where weights are missing."""
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )  # type: ignore[assignment]
        model, report = loaded
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise UserError(f"{self.folder}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
        model.to(device)  # type: ignore[arg-type]
        return model.eval().requires_grad_(False)

    def load_tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.folder}: no usable tokenizer ({_first_line(error)})") from None


def open_checkpoint(name: str, revision: str | None = None, fuse: bool = True) -> Checkpoint:
    """Open a local folder or a hub name without reading its weights (only headers, and the bytes once for their hash)."""
    folder = _folder(name, revision)
    config = _config(folder, name)
    files = weight_files(folder)
    headers = [_header(file) for file in files]
    model = _skeleton(config, name)
    layers_path = find_layers(model, name)
    modules = linear_modules(model, layers_path, fuse)
    tensors = {key: entry for header in headers for key, entry in header.items() if key != "__metadata__"}
    info = _describe(name, revision, config, files, tensors, modules, len(_layer_list(model, layers_path)))
    return Checkpoint(folder, config, info, modules, layers_path, files, _notes(model, layers_path, modules))


def open_model(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of any causal checkpoint that transformers loads, quantized ones included, for comparisons alone."""
    folder = _folder(name, None)
    _config(folder, name, quantized=True)
    for file in weight_files(folder):
        _header(file)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{name}: transformers cannot load it ({_first_line(error)})") from None
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _folder(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
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
        raise UserError(f"{name}: no such folder, and the hub did not give it ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _config(folder: Path, name: str, quantized: bool = False) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no config.json, so not a checkpoint in Hugging Face layout")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: config.json cannot be used ({_first_line(error)})") from None
    _refuse_other_models(config, name)
    if getattr(config, "quantization_config", None) and not quantized:
        raise UserError(f"{name}: is quantized already; give the unquantized checkpoint")
    return config


def _refuse_other_models(config: Any, name: str) -> None:
    """Only decoder-only language models: the architecture's own name decides, since encoders have causal heads too."""
    architectures = getattr(config, "architectures", None) or []
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
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: not a readable index ({_first_line(error)})") from None
        files = [folder / name for name in names]
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(f"{index}: names a file outside the folder: {outside[0]}")
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: weights file {missing[0]} is missing ({len(missing)} of {len(files)} shards)")
    if not files:
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        hint = f"; {pickles[0].name} is pickle, which is not read: convert it to safetensors" if pickles else ""
        raise UserError(f"{folder}: no safetensors weights{hint}")
    return files


def _header(file: Path) -> dict[str, Any]:
    """The safetensors header, after checking that the file is as long as the header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("header is longer than the file")
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({_first_line(error)})") from None
    if size != expected:
        raise UserError(f"{file}: truncated or damaged: {size} bytes, its header says {expected}")
    return header


def _skeleton(config: Any, name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"{name}: transformers cannot build this model ({_first_line(error)})") from None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def find_layers(model: nn.Module, name: str) -> str:
    """Path of the decoder layers: the outermost ModuleList of equal blocks with linear modules that holds most weights."""
    found: list[tuple[int, str]] = []
    lists: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(outer + ".") for outer in lists):
            continue
        lists.append(path)
        if len({type(block) for block in module}) == 1 and all(any(map(is_linear, block.modules())) for block in module):
            found.append((sum(p.numel() for p in module.parameters()), path))
    if not found:
        raise UserError(f"{name}: no decoder layers with linear modules were found, so there is nothing to quantize")
    return max(found)[1]


def linear_modules(model: nn.Module, layers_path: str, fuse: bool) -> list[Module]:
    """Every linear module of the decoder layers, in the model's order, routers excepted."""
    modules: list[Module] = []
    for index, layer in enumerate(_layer_list(model, layers_path)):
        named = [(path, m) for path, m in layer.named_modules() if is_linear(m) and path.rpartition(".")[2] not in ROUTERS]
        kinds = _kinds([path for path, _ in named])
        for path, module in named:
            name = f"{layers_path}.{index}.{path}"
            parent, _, last = name.rpartition(".")
            unit = f"{parent}.{FUSED[last]}" if fuse and last in FUSED else name
            modules.append(Module(name, index, kinds[path], _shape(module), unit))
    return modules


def _kinds(paths: list[str]) -> dict[str, str]:
    """A short name for what a module is: its last word, with the word before it where that is ambiguous (GPT-2's two c_proj)."""
    plain = {path: re.sub(r"\.\d+(?=\.|$)", "", path) for path in paths}
    shared = Counter(word.rpartition(".")[2] for word in set(plain.values()))
    return {
        path: word.rpartition(".")[2] if shared[word.rpartition(".")[2]] == 1 else ".".join(word.split(".")[-2:])
        for path, word in plain.items()
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    first, second = module.weight.shape  # type: ignore[union-attr, misc]
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def _notes(model: nn.Module, layers_path: str, modules: list[Module]) -> list[str]:
    covered = sum(module.weights for module in modules)
    matrices = sum(p.numel() for p in model.get_submodule(layers_path).parameters() if p.dim() > 1)
    if covered < 0.99 * matrices:
        return [
            f"{1 - covered / matrices:.0%} of the layers' matrix weights are not in linear modules (fused experts, convolutions) and keep their dtype"
        ]
    return []


def _describe(
    name: str,
    revision: str | None,
    config: Any,
    files: list[Path],
    tensors: dict[str, Any],
    modules: list[Module],
    layers: int,
) -> ModelInfo:
    by_dtype: Counter[str] = Counter()
    for entry in tensors.values():
        start, end = entry["data_offsets"]
        by_dtype[entry["dtype"]] += end - start
    dtype = by_dtype.most_common(1)[0][0] if by_dtype else "F32"
    if dtype not in DTYPE_NAMES:
        raise UserError(f"{name}: weights are stored as {dtype}; bitatlas needs float32, float16 or bfloat16")
    total = sum(by_dtype.values())
    weights = sum(module.weights for module in modules)
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
    return ModelInfo(
        name=Path(name).name if Path(name).is_dir() else name,
        revision=revision,
        weights_sha256=_sha256(files),
        architecture=(getattr(config, "architectures", None) or [config.model_type])[0],
        layers=layers,
        heads=int(getattr(text, "num_attention_heads", 0) or 0),
        context=int(context),
        dtype=DTYPE_NAMES[dtype],
        quantizable_weights=weights,
        other_bytes=total - weights * DTYPE_BYTES[dtype],
        total_bytes=total,
    )


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def check_finite(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> None:
    """Read every weight once, one at a time; UserError naming the first tensor that holds NaN or infinity."""
    for done, (total, name, tensor) in enumerate(_tensors(checkpoint.files), start=1):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{checkpoint.info.name}: {name} holds {bad} NaN or infinite weights; nothing can be measured on it")
        if progress:
            progress(done, total)


def _tensors(files: list[Path]) -> Iterator[tuple[int, str, torch.Tensor]]:
    try:
        readers = [safe_open(file, framework="pt") for file in files]
        total = sum(len(list(reader.keys())) for reader in readers)
        for reader in readers:
            for name in reader.keys():  # noqa: SIM118 (safe_open is not a dict)
                yield total, name, reader.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{files[0].parent}: weights cannot be read ({_first_line(error)})") from None


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a loaded model."""
    return _layer_list(model, find_layers(model, type(model).__name__))


def _layer_list(model: nn.Module, path: str) -> nn.ModuleList:
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written below `folder`'s nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
