"""Open a checkpoint: what it is, its decoder layers, the linear modules that can be quantized, and whether its weights are whole.

Everything that can be known without reading weights is read first, from the config and the safetensors headers, so that a wrong
folder or an impossible budget is refused at once. The model's skeleton is built on torch's meta device, which costs no memory.

Any causal language model of transformers will do: decoder layers are the largest list of equal blocks that hold linear modules.
Left out: pickle weights, remote code, and checkpoints that are quantized already.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

from bitatlas.errors import UserError
from bitatlas.model.decoder import (
    Decoder,
    context_length,
    decoder_of,
    find_layers,
    layers_at,
    memory_shape,
    vocabulary_size,
)
from bitatlas.model.folder import find_folder, read_config, sha256_of, weight_files
from bitatlas.model.from_gguf import origin_text
from bitatlas.model.linear import split_experts
from bitatlas.model.modules import Calls, calls_of, linear_modules, outer_modules, shared_modules
from bitatlas.model.streaming import open_stream, without_weights
from bitatlas.model.tensor_files import Reader, Sources, Target, read_header, reason_of, targets_of
from bitatlas.records import ModelInfo, Module
from bitatlas.records.sizes import inner, kept_bytes

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# what no quantized checkpoint can do without, where it has it
WEIGHTS = (".weight", ".qweight", ".weight_packed", ".weight_scale")
# what a quantized module has instead of its weight, or beside it
PACKED = (".qweight", ".weight_packed", ".q_weight", ".trellis", ".SCB")
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
    loaded: frozenset[str] = frozenset()  # tensors of the files that transformers does not pass over
    outer: tuple[Module, ...] = ()  # outside the decoder layers: those that a plan may quantize, too
    split: bool = True  # experts that the model holds in one tensor are linear modules of their own (see `linear`)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return vocabulary_size(self.config)

    def planning(self, outer: Iterable[Module]) -> Checkpoint:
        """Return the checkpoint with some of its outer modules among those that are planned."""
        return replace(self, modules=[*inner(self.modules), *outer])

    def leaving(self, modules: Iterable[Module]) -> Checkpoint:
        """Return the checkpoint with some modules of its layers no longer among those that are planned, but with what stays as it is."""
        left = list(modules)
        names, weights = {module.name for module in left}, sum(module.weights for module in left)
        info = replace(
            self.info,
            quantizable_weights=self.info.quantizable_weights - weights,
            other_bytes=self.info.other_bytes + sum(kept_bytes(module, self.info.dtype) for module in left),
            other_numbers=None if self.info.other_numbers is None else self.info.other_numbers + weights,
        )
        return replace(self, modules=[module for module in self.modules if module.name not in names], info=info)

    def load_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """Return the model in evaluation mode; UserError where its weights and its config do not belong together."""
        model, report = _load(self.folder, str(self.folder), self.config, dtype)
        _check_loaded(report, str(self.folder))
        self._check_unexpected(sorted(report["unexpected_keys"]))
        self.check_unchanged()
        return decoder_of(_placed(self._with_experts(model), device), self.layers_path)

    def stream_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """Return the model in evaluation mode with its decoder layers on disk (see `streaming`); UserError where that cannot be."""
        with without_weights():
            model = skeleton_of(self.config, str(self.folder), "cpu")
        with quiet_transformers():
            sources = Sources(self.skeleton(), Reader(self.files))
            self._with_experts(model)
            stream = open_stream(model, self.layers_path, sources, device, dtype, self.check_unchanged)
        return decoder_of(model, self.layers_path, stream)

    def check_unchanged(self) -> None:
        """Refuse, with UserError, a weights file that is no longer the one that was hashed: what is read now is something else.

        Only a file that was touched is hashed again.
        """
        now = [_stamp(file) for file in self.files]
        changed = [file for file, stamp, before in zip(self.files, now, self.stamps, strict=True) if stamp != before]
        if changed and not (all(file.is_file() for file in self.files) and sha256_of(self.files) == self.info.weights_sha256):
            raise UserError(f"{changed[0]}: the file changed while it was in use; start again once it is whole")
        self.stamps[:] = now

    def skeleton(self) -> nn.Module:
        """Return the model without its weights, as transformers builds it, on torch's meta device."""
        return skeleton_of(self.config, str(self.folder))

    def meta_decoder(self) -> Decoder:
        """Return the decoder of a model without its weights, on torch's meta device."""
        return decoder_of(self._with_experts(self.skeleton()), self.layers_path)

    def _with_experts(self, model: Any) -> Any:
        """Return the model with its experts one by one, where it can be run so."""
        if self.split:
            split_experts(model)
        return model

    def _check_unexpected(self, keys: list[str]) -> None:
        """Refuse, with UserError, tensors that transformers passed over, unless they are harmless buffers, or weights that the config has no place for."""
        layers = self.info.layers + int(getattr(self.config.get_text_config(), "num_nextn_predict_layers", None) or 0)
        linear = {module.name for module in self.modules}
        above, _, last = self.layers_path.rpartition(".")  # checkpoints of the bare base model leave out what is above
        inside = re.compile(rf"(?:{re.escape(above)}\.)?{re.escape(last)}\.(\d+)\.(.+)\.[^.]+")
        for key in keys:
            match = inside.fullmatch(key)
            if match and int(match[1]) >= layers:
                raise UserError(f"{self.folder}: the weights hold {key}, but the config says {self.info.layers} layers")
            if match and f"{self.layers_path}.{match[1]}.{match[2]}" in linear:
                raise UserError(f"{self.folder}: the weights hold {key}, which the config has no place for")

    def load_tokenizer(self) -> Any:
        """Return the checkpoint's tokenizer; UserError where there is none."""
        return load_tokenizer(self.folder)


def open_checkpoint(name: str, revision: str | None = None, fuse: bool = True, each_expert: bool = False) -> Checkpoint:
    """Open a local folder or a hub name without reading its weights (only headers, and the bytes once for their hash).

    fuse, each_expert: which modules are a unit (see `modules`).
    """
    folder = find_folder(name, revision)
    config = read_config(folder, name)
    files = weight_files(folder)
    stamps = [_stamp(file) for file in files]
    reader = Reader(files)
    model = skeleton_of(config, name)
    layers_path = find_layers(model, name)
    targets = targets_of(model, reader)
    _check_stored(model, reader, targets, name)
    calls, split = _calls(config, name, layers_path)
    if split:
        split_experts(model)
    modules, left_out = _plannable(name, model, layers_path, fuse, each_expert, calls)
    modules = _with_sizes(modules, reader, targets)
    layers, dtype = len(layers_at(model, layers_path)), _main_dtype(modules, reader, targets)
    with quiet_transformers():
        memory = memory_shape(model, modules, layers)
    total = sum(map(reader.size_bytes, reader))
    weights = sum(module.weights for module in modules)
    info = ModelInfo(
        name=Path(name).stem if Path(name).suffix == ".gguf" else Path(name).name if Path(name).is_dir() else name,
        revision=revision,
        weights_sha256=sha256_of(files),
        architecture=(getattr(config, "architectures", None) or [config.model_type])[0],
        layers=layers,
        heads=int(getattr(config.get_text_config(), "num_attention_heads", 0) or 0),
        context=context_length(config),
        dtype=dtype,
        quantizable_weights=weights,
        other_bytes=total - sum(kept_bytes(module, dtype) for module in modules),
        total_bytes=total,
        memory=memory,
        other_numbers=sum(math.prod(reader.shape(key)) for key in reader) - weights,
    )
    notes = _notes(model, layers_path, modules, left_out)
    if origin := origin_text(folder):
        notes = [origin, *notes]
    outer = _with_sizes(outer_modules(model, layers_path), reader, targets)
    return Checkpoint(folder, config, info, modules, layers_path, files, stamps, notes, frozenset(targets), tuple(outer), split)


def _calls(config: Any, name: str, layers_path: str) -> tuple[Calls, bool]:
    """Return how the model's linear modules are used, and whether it runs with its experts one by one."""
    results = []
    for split in (True, False):
        with without_weights():
            probe = skeleton_of(config, name, "cpu")
        if split:
            split_experts(probe)
        names = [module.name for module in linear_modules(probe, layers_path, False)]
        with quiet_transformers():
            results.append(calls_of(probe, layers_path, names))
        if results[-1].ran:
            return results[-1], split
    return results[0], True


def _plannable(
    name: str, model: nn.Module, layers_path: str, fuse: bool, each_expert: bool, calls: Calls
) -> tuple[list[Module], list[tuple[str, list[Module]]]]:
    """Return the modules that a plan is made of, and those that it leaves out, by reason; UserError where there are none."""
    every = linear_modules(model, layers_path, fuse)
    modules = linear_modules(model, layers_path, fuse, calls.uncalled | calls.nonlinear, each_expert)
    if not modules:
        raise UserError(
            f"{name}: no linear module of its decoder layers is called in a forward pass, so there is nothing to quantize"
        )
    uncalled, nonlinear = (
        [module for module in every if module.name in names] for names in (calls.uncalled, calls.nonlinear - calls.uncalled)
    )
    listed = {module.name for module in every}
    shared = [module for module in shared_modules(model, layers_path) if module.name not in listed]
    return modules, [
        ("since the module is never called (its weight is read by others, or not used)", uncalled),
        ("since the module does more with its weight than to multiply by it", nonlinear),
        ("since several layers share the weight", shared),
    ]


def _check_stored(model: nn.Module, reader: Reader, targets: dict[str, Target], name: str) -> None:
    """Refuse, with UserError and from the headers alone, weights that are not this model's, or not a plain checkpoint's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole: dict[str, str] = {}
    for key, target in targets.items():
        parameter = parameters.get(target.name)
        if parameter is None:  # a buffer
            continue
        if reader.dtype(key) not in DTYPE_NAMES:
            raise UserError(
                f"{name}: {key} is stored as {reader.dtype(key)}; bitatlas needs float32, float16 or bfloat16 weights, "
                "so give the checkpoint before it was quantized or cast"
            )
        if target.whole and whole.setdefault(target.name, key) != key:
            raise UserError(f"{name}: {whole[target.name]} and {key} are both the model's {target.name}; one of them must go")
        if target.whole and reader.shape(key) != tuple(parameter.shape):
            raise UserError(f"{name}: {key} has shape {reader.shape(key)}, but the config says {tuple(parameter.shape)}")
    absent = set(parameters) - {target.name for target in targets.values()}
    packed = [key for path in sorted(absent) for suffix in PACKED if (key := path.removesuffix(".weight") + suffix) in reader]
    if packed:
        raise UserError(f"{name}: {packed[0]} is packed, so the checkpoint is quantized already; give the unquantized one")


def _with_sizes(modules: list[Module], reader: Reader, targets: dict[str, Target]) -> list[Module]:
    """Return the modules with the bytes of their weights in the files, where these lie there one by one."""
    sizes = {target.name: reader.size_bytes(key) for key, target in targets.items() if target.whole}
    return [replace(module, size_bytes=sizes.get(f"{module.name}.weight")) for module in modules]


def _main_dtype(modules: list[Module], reader: Reader, targets: dict[str, Target]) -> str:
    """Return the dtype of most linear weights, by bytes; of most tensors where these lie in the files in another form."""
    linear = {module.parameter for module in modules}
    by_dtype: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}  # linear weights, other tensors
    for key in reader:
        if reader.dtype(key) in DTYPE_NAMES:
            by_dtype[key in targets and targets[key].name in linear][reader.dtype(key)] += reader.size_bytes(key)
    counted = by_dtype[True] or by_dtype[False]
    return DTYPE_NAMES[counted.most_common(1)[0][0]] if counted else "float32"


def open_model(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """Return (model, tokenizer) of any causal checkpoint that transformers loads, quantized ones included, for comparisons alone."""
    folder = find_folder(name, None)
    config = read_config(folder, name, quantized=True)
    for file in weight_files(folder):
        read_header(file)
    model, report = _load(folder, name, config, torch.float32)
    if getattr(config, "quantization_config", None):  # a quantized layer makes and drops other tensors as it is loaded
        report["missing_keys"] = [key for key in report["missing_keys"] if key.endswith(WEIGHTS)]
    _check_loaded(report, name)
    tokenizer = load_tokenizer(folder, name)
    return _placed(model, device), tokenizer


def load_tokenizer(folder: Path, name: str = "") -> Any:
    """Return the tokenizer of a folder; UserError where there is none. `name`: what the folder is called."""
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{name or folder}: no usable tokenizer ({reason_of(error)})") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings of transformers within the block: what matters in them is checked and told in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(folder: Path, name: str, config: Any, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model, and what transformers reports of the loading; shapes that differ are in the report, not raised."""
    try:
        with quiet_transformers():
            return auto_class(config).from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )  # type: ignore[return-value]  # fmt: skip
    except Exception as error:  # each model type and each quantizer fails in its own way
        raise UserError(f"{name}: transformers cannot load it ({reason_of(error)})") from None


def _check_loaded(report: dict[str, Any], name: str) -> None:
    """Refuse, with UserError, missing tensors and those of another shape: transformers would fill them with random numbers."""
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{name}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
    if report["mismatched_keys"]:
        key, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{name}: {key} has shape {tuple(stored)}, but the config says {tuple(wanted)}")


def _placed(model: PreTrainedModel, device: str) -> PreTrainedModel:
    _without_rescaling(model)
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def _without_rescaling(model: nn.Module) -> None:
    """Keep RWKV from halving weights in place when it first runs, and hidden states between layers: the function is equal without."""
    config: Any = model.config
    if getattr(config, "rescale_every", None):
        config.rescale_every = 0


@torch.no_grad()
def check_causal(decoder: Decoder, name: str) -> None:
    """Refuse, with UserError, a model in which a changed last token changes the logits before it: an encoder with a causal head, for one."""
    model, ids = decoder.model, decoder.probe_ids().repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % decoder.vocabulary
    try:
        with quiet_transformers():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # [2, tokens - 1, vocabulary]
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each family misses in its own way what is not text
        raise UserError(f"{name}: {type(model).__name__} cannot be run on text alone ({reason_of(error)})") from None
    if (logits[0] - logits[1]).abs().max() > CAUSAL_TOLERANCE * logits.abs().max():
        raise UserError(f"{name}: {type(model).__name__} reads ahead, so it is not a causal language model")


def auto_class(config: Any) -> Any:
    """Return what transformers opens a config with: as a causal language model, or, where it has none of this kind, with its eyes and ears."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def skeleton_of(config: Any, name: str, device: str = "meta") -> nn.Module:
    """Return the model of a config without its weights, on torch's meta device; another `device` is for its buffers (see `streaming`)."""
    try:
        with torch.device(device), quiet_transformers():
            model = auto_class(config).from_config(config, trust_remote_code=False)
            _without_rescaling(model)
            return model  # type: ignore[no-any-return]
    except Exception as error:  # each model type fails in its own way on numbers that make no sense
        raise UserError(f"{name}: transformers cannot build this model ({reason_of(error)})") from None


def _notes(model: nn.Module, layers_path: str, modules: list[Module], left_out: Sequence[tuple[str, list[Module]]]) -> list[str]:
    """Return lines on what the plan does not cover. left_out: reasons, and the linear modules left out for them."""
    covered = sum(module.weights for module in modules)
    matrices = sum(p.numel() for p in model.get_submodule(layers_path).parameters() if p.dim() > 1)
    notes = []
    if covered < 0.99 * matrices:
        notes.append(
            f"the plan covers {covered / matrices:.0%} of the layers' matrix weights: the others are not in linear modules of their own "
            "(convolutions, for one), or are named below, and keep their dtype"
        )
    notes += [f"{_in_layers(group, layers_path)}: not quantized, {reason}" for reason, group in left_out if group]
    return notes


def _in_layers(modules: list[Module], layers_path: str) -> str:
    """Return modules by their names, those of several layers together: model.layers.{0,1,2}.mixer.dt_proj"""
    layers: dict[str, list[str]] = {}
    for module in modules:
        layer, _, rest = module.name.removeprefix(f"{layers_path}.").partition(".")
        layers.setdefault(rest, []).append(layer)
    return ", ".join(f"{layers_path}.{{{','.join(of_rest)}}}.{rest}" for rest, of_rest in layers.items())


def _stamp(file: Path) -> tuple[int, ...]:
    """Return what a write changes, the times in ns; nothing for a file that is gone. The second time cannot be set by anyone."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_finite(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> None:
    """Read every weight that the model takes once, one at a time; UserError naming the first tensor that holds NaN or infinity."""
    reader = Reader(checkpoint.files)
    for done, name in enumerate(reader, start=1):
        if name not in checkpoint.loaded or reader.dtype(name) not in DTYPE_NAMES:
            continue
        tensor = reader.read(name)
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{checkpoint.info.name}: {name} holds {bad} NaN or infinite weights; nothing can be measured on it")
        if progress:
            progress(done, len(reader))
