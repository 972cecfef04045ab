"""Open a checkpoint: what it is, its decoder layers, the linear modules that can be quantized, and whether its weights are whole.

Everything that can be known without reading weights is read first, from the config and the safetensors headers, so that a wrong
folder or an impossible budget is refused at once. The model's skeleton is built on torch's meta device, which costs no memory.

Any causal language model of transformers will do: decoder layers are the largest list of equal blocks that hold linear modules.
Left out: pickle weights, remote code, checkpoints that are quantized already, and experts fused into one 3-D tensor, which stay
as they are (a note says so).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from bitatlas.errors import UserError
from bitatlas.folder import find_folder, read_config, read_header, reason_of, weight_files
from bitatlas.planning.budget import FUSED
from bitatlas.planning.memory import dtype_bytes
from bitatlas.reader import Reader
from bitatlas.records import ModelInfo, Module
from bitatlas.shape import memory_shape
from bitatlas.streaming import open_stream, without_weights
from bitatlas.workload import MemoryShape

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROUTERS = ("gate", "router")  # of mixtures of experts: a few weights that choose the way, kept by every runtime
WEIGHTS = (
    ".weight",
    ".qweight",
    ".weight_packed",
    ".weight_scale",
)  # what no quantized checkpoint can do without, where it has it
FOUND = "bitatlas_layers"  # attribute of a model: the path of its decoder layers
CAUSAL_TOKENS = 8  # of the text on which `check_causal` looks for a model that reads ahead
CAUSAL_TOLERANCE = 1e-4  # of the largest logit
logging.disable_progress_bar()  # loading a local file; our own progress is enough


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `layers_path` names the list of decoder layers in the model."""

    folder: Path
    config: Any
    info: ModelInfo
    modules: list[Module]
    layers_path: str
    files: list[Path]
    stamps: list[tuple[int, ...]]  # of each file, from before it was hashed
    notes: list[str] = field(default_factory=list)

    def load_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model in evaluation mode; UserError where its weights and its config do not belong together."""
        model, report = _load(self.folder, str(self.folder), dtype)
        _check_loaded(report, str(self.folder))
        self._check_unexpected(sorted(report["unexpected_keys"]))
        self.check_unchanged()
        return _placed(model, device)

    def stream_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model in evaluation mode with its decoder layers on disk (see `streaming`); UserError where that cannot be."""
        with without_weights():
            model = skeleton_of(self.config, str(self.folder), "cpu")
        return open_stream(model, self.layers_path, Reader(self.files), device, dtype, self.check_unchanged)

    def check_unchanged(self) -> None:
        """UserError where a weights file is no longer the one that was hashed: what is read now is something else.

        Only a file that was touched is hashed again.
        """
        now = [_stamp(file) for file in self.files]
        changed = [file for file, stamp, before in zip(self.files, now, self.stamps, strict=True) if stamp != before]
        if changed and not (all(file.is_file() for file in self.files) and sha256_of(self.files) == self.info.weights_sha256):
            raise UserError(f"{changed[0]}: the file changed while it was in use; start again once it is whole")
        self.stamps[:] = now

    def skeleton(self) -> nn.Module:
        """The model without its weights, on torch's meta device."""
        return skeleton_of(self.config, str(self.folder))

    def _check_unexpected(self, keys: list[str]) -> None:
        """Tensors that transformers passed over: harmless buffers, or weights that the config has no place for."""
        layers = self.info.layers + int(getattr(self.config.get_text_config(), "num_nextn_predict_layers", None) or 0)
        linear = {module.name for module in self.modules}
        above, _, last = self.layers_path.rpartition(".")  # checkpoints of the bare base model leave out what is above
        inside = re.compile(rf"(?:{re.escape(above)}\.)?{re.escape(last)}\.(\d+)\.(.+)\.[^.]+")
        for key in keys:
            found = inside.fullmatch(key)
            if found and int(found[1]) >= layers:
                raise UserError(f"{self.folder}: the weights hold {key}, but the config says {self.info.layers} layers")
            if found and f"{self.layers_path}.{found[1]}.{found[2]}" in linear:
                raise UserError(f"{self.folder}: the weights hold {key}, which the config has no place for")

    def load_tokenizer(self) -> Any:
        try:
            with _quiet():
                return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(f"{self.folder}: no usable tokenizer ({reason_of(error)})") from None


def open_checkpoint(name: str, revision: str | None = None, fuse: bool = True) -> Checkpoint:
    """Open a local folder or a hub name without reading its weights (only headers, and the bytes once for their hash)."""
    folder = find_folder(name, revision)
    config = read_config(folder, name)
    files = weight_files(folder)
    stamps = [_stamp(file) for file in files]
    headers = [read_header(file) for file in files]
    model = skeleton_of(config, name)
    layers_path = find_layers(model, name)
    modules = linear_modules(model, layers_path, fuse)
    tensors = {key: entry for header in headers for key, entry in header.items() if key != "__metadata__"}
    layers = len(_layer_list(model, layers_path))
    with _quiet():
        memory = memory_shape(model, modules, layers)
    info = _describe(name, revision, config, files, tensors, modules, layers, memory)
    return Checkpoint(folder, config, info, modules, layers_path, files, stamps, _notes(model, layers_path, modules))


def open_model(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of any causal checkpoint that transformers loads, quantized ones included, for comparisons alone."""
    folder = find_folder(name, None)
    config = read_config(folder, name, quantized=True)
    for file in weight_files(folder):
        read_header(file)
    model, report = _load(folder, name, torch.float32)
    if getattr(config, "quantization_config", None):  # a quantized layer makes and drops other tensors as it is loaded
        report["missing_keys"] = [key for key in report["missing_keys"] if key.endswith(WEIGHTS)]
    _check_loaded(report, name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{name}: no usable tokenizer ({reason_of(error)})") from None
    return _placed(model, device), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of transformers: what matters in them is checked and told in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(folder: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers reports of the loading; shapes that differ are in the report, not raised."""
    try:
        with _quiet():
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )  # type: ignore[return-value]  # fmt: skip
    except Exception as error:  # each model type and each quantizer fails in its own way
        raise UserError(f"{name}: transformers cannot load it ({reason_of(error)})") from None


def _check_loaded(report: dict[str, Any], name: str) -> None:
    """UserError for tensors that are missing or of another shape: transformers would fill them with random numbers."""
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{name}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
    if report["mismatched_keys"]:
        key, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{name}: {key} has shape {tuple(stored)}, but the config says {tuple(wanted)}")


def _placed(model: PreTrainedModel, device: str) -> PreTrainedModel:
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """A few tokens to try a model on: int64 [1, tokens], on its device."""
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    ids = torch.randint(vocabulary, (1, CAUSAL_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """UserError where a changed last token changes the logits before it: an encoder with a causal head, for one."""
    ids = probe_ids(model).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    with _quiet():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # [2, tokens - 1, vocabulary]
    if (logits[0] - logits[1]).abs().max() > CAUSAL_TOLERANCE * logits.abs().max():
        raise UserError(f"{name}: {type(model).__name__} reads ahead, so it is not a causal language model")


def skeleton_of(config: Any, name: str, device: str = "meta") -> nn.Module:
    """The model of a config without its weights, on torch's meta device; another `device` is for its buffers (see `streaming`)."""
    try:
        with torch.device(device), _quiet():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each model type fails in its own way on numbers that make no sense
        raise UserError(f"{name}: transformers cannot build this model ({reason_of(error)})") from None


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
    memory: MemoryShape | str,
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
        weights_sha256=sha256_of(files),
        architecture=(getattr(config, "architectures", None) or [config.model_type])[0],
        layers=layers,
        heads=int(getattr(text, "num_attention_heads", 0) or 0),
        context=int(context),
        dtype=DTYPE_NAMES[dtype],
        quantizable_weights=weights,
        other_bytes=total - weights * dtype_bytes(DTYPE_NAMES[dtype]),
        total_bytes=total,
        memory=memory,
    )


def _stamp(file: Path) -> tuple[int, ...]:
    """What a write changes, the times in ns; nothing for a file that is gone. The second time cannot be set by anyone."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256_of(files: list[Path]) -> str:
    """Of all bytes of the files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def check_finite(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> None:
    """Read every weight once, one at a time; UserError naming the first tensor that holds NaN or infinity."""
    reader = Reader(checkpoint.files)
    for done, name in enumerate(reader, start=1):
        tensor = reader.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{checkpoint.info.name}: {name} holds {bad} NaN or infinite weights; nothing can be measured on it")
        if progress:
            progress(done, len(reader))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a loaded model, which are looked for once."""
    path = getattr(model, FOUND, None)
    if path is None:
        path = find_layers(model, type(model).__name__)
        setattr(model, FOUND, path)
    return _layer_list(model, path)


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
