"""Open a checkpoint: what it is, its decoder layers, the linear modules that can be quantized, and whether its weights are whole.

Everything that can be known without reading weights is read first, from the config and the safetensors headers, so that a wrong
folder or an impossible budget is refused at once. The model's skeleton is built on torch's meta device, which costs no memory.

Any causal language model of transformers will do: decoder layers are the largest list of equal blocks that hold linear modules.
Left out: pickle weights, remote code, checkpoints that are quantized already, and experts fused into one 3-D tensor, which stay
as they are (a note says so).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
    FRONT,
    Decoder,
    context_length,
    decoder_of,
    find_layers,
    layers_at,
    memory_shape,
    text_path,
    vocabulary_size,
)
from bitatlas.model.folder import find_folder, read_config, sha256_of, weight_files
from bitatlas.model.linear import is_linear, shape_of
from bitatlas.model.streaming import open_stream, without_weights
from bitatlas.model.tensor_files import Reader, Target, read_header, reason_of, targets_of
from bitatlas.records import ModelInfo, Module
from bitatlas.records.sizes import EMBEDDING_AND_HEAD, FUSED, inner, kept_bytes

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# what no quantized checkpoint can do without, where it has it
WEIGHTS = (".weight", ".qweight", ".weight_packed", ".weight_scale")
# what a quantized module has instead of its weight, or beside it
PACKED = (".qweight", ".weight_packed", ".q_weight", ".trellis", ".SCB")
SMALL_SHARE = 1e-3  # of all weights: what is outside the layers and has less is left as it is
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

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return vocabulary_size(self.config)

    def planning(self, outer: Iterable[Module]) -> Checkpoint:
        """Return the checkpoint with some of its outer modules among those that are planned."""
        return replace(self, modules=[*inner(self.modules), *outer])

    def load_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """Return the model in evaluation mode; UserError where its weights and its config do not belong together."""
        model, report = _load(self.folder, str(self.folder), self.config, dtype)
        _check_loaded(report, str(self.folder))
        self._check_unexpected(sorted(report["unexpected_keys"]))
        self.check_unchanged()
        return decoder_of(_placed(model, device), self.layers_path)

    def stream_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """Return the model in evaluation mode with its decoder layers on disk (see `streaming`); UserError where that cannot be."""
        with without_weights():
            model = skeleton_of(self.config, str(self.folder), "cpu")
        with quiet_transformers():
            stream = open_stream(model, self.layers_path, Reader(self.files), device, dtype, self.check_unchanged)
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
        """Return the model without its weights, on torch's meta device."""
        return skeleton_of(self.config, str(self.folder))

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
        return _load_tokenizer(self.folder, str(self.folder))


def open_checkpoint(name: str, revision: str | None = None, fuse: bool = True) -> Checkpoint:
    """Open a local folder or a hub name without reading its weights (only headers, and the bytes once for their hash)."""
    folder = find_folder(name, revision)
    config = read_config(folder, name)
    files = weight_files(folder)
    stamps = [_stamp(file) for file in files]
    reader = Reader(files)
    model = skeleton_of(config, name)
    layers_path = find_layers(model, name)
    targets = targets_of(model, reader)
    _check_stored(model, reader, targets, name)
    modules, left_out = _plannable(config, name, model, layers_path, fuse)
    modules = _with_sizes(modules, reader, targets)
    layers, dtype = len(layers_at(model, layers_path)), _main_dtype(modules, reader, targets)
    with quiet_transformers():
        memory = memory_shape(model, modules, layers)
    total = sum(map(reader.size_bytes, reader))
    weights = sum(module.weights for module in modules)
    info = ModelInfo(
        name=Path(name).name if Path(name).is_dir() else name,
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
    outer = _with_sizes(outer_modules(model, layers_path), reader, targets)
    return Checkpoint(folder, config, info, modules, layers_path, files, stamps, notes, frozenset(targets), tuple(outer))


def _plannable(
    config: Any, name: str, model: nn.Module, layers_path: str, fuse: bool
) -> tuple[list[Module], list[tuple[str, list[Module]]]]:
    """Return the modules that a plan is made of, and those that it leaves out, by reason; UserError where there are none."""
    every = linear_modules(model, layers_path, fuse)
    with without_weights():
        probe = skeleton_of(config, name, "cpu")
    with quiet_transformers():
        calls = calls_of(probe, layers_path, [module.name for module in every])
    modules = linear_modules(model, layers_path, fuse, calls.uncalled | calls.nonlinear)
    if not modules:
        raise UserError(
            f"{name}: no linear module of its decoder layers is called in a forward pass, so there is nothing to quantize"
        )
    uncalled, nonlinear = (
        [module for module in every if module.name in names] for names in (calls.uncalled, calls.nonlinear - calls.uncalled)
    )
    listed = {module.name for module in every}
    shared = [module for module in _shared_modules(model, layers_path) if module.name not in listed]
    return modules, [
        ("since the module is never called (its weight is read by others, or not used)", uncalled),
        ("since the module does more with its weight than to multiply by it", nonlinear),
        ("since several layers share the weight", shared),
    ]


def _shared_modules(model: nn.Module, layers_path: str) -> list[Module]:
    """Return the linear modules of the decoder layers whose weight is that of others, too."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = []
    for index, layer in enumerate(layers_at(model, layers_path)):
        for path, module in layer.named_modules():
            if is_linear(module) and uses[id(module.weight)] > 1:
                name = f"{layers_path}.{index}.{path}"
                modules.append(Module(name, index, path.rpartition(".")[2], shape_of(module), name))
    return modules


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
    linear = {f"{module.name}.weight" for module in modules}
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
    tokenizer = _load_tokenizer(folder, name)
    return _placed(model, device), tokenizer


def _load_tokenizer(folder: Path, name: str) -> Any:
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{name}: no usable tokenizer ({reason_of(error)})") from None


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


def linear_modules(model: nn.Module, layers_path: str, fuse: bool, left_out: Collection[str] = ()) -> list[Module]:
    """Return every linear module of the decoder layers, in the model's order, but for routers, weights that several modules share, and `left_out`."""
    modules: list[Module] = []
    experts = _expert_counts(getattr(model, "config", None))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for index, layer in enumerate(layers_at(model, layers_path)):
        named = [
            (path, m) for path, m in layer.named_modules()
            if is_linear(m) and not is_router(path, shape_of(m)[0], experts) and uses[id(m.weight)] == 1
            and f"{layers_path}.{index}.{path}" not in left_out
        ]  # fmt: skip
        kinds = _kinds([path for path, _ in named])
        for path, module in named:
            name = f"{layers_path}.{index}.{path}"
            parent, _, last = name.rpartition(".")
            unit = f"{parent}.{FUSED[last]}" if fuse and last in FUSED else name
            modules.append(Module(name, index, kinds[path], shape_of(module), unit))
    return modules


def outer_modules(model: nn.Module, layers_path: str) -> list[Module]:
    """Return what holds most of the weights outside the decoder layers: embeddings in front of them, and the head, if its weight is its own.

    A module's `layer` is the first stage at which its weight is used (see `decoder`). Left out: small ones, and parts that see or hear.
    """
    path = text_path(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    least = SMALL_SHARE * sum(p.numel() for p in model.parameters())
    modules, weights = [], set[int]()
    for name, module in model.named_modules():
        is_embedding = isinstance(module, nn.Embedding) and name.startswith(path)
        if name.startswith(f"{layers_path}.") or not (is_embedding or (module is head and is_linear(module))):
            continue
        weight = module.weight
        if id(weight) in weights or weight.dim() != 2 or weight.numel() < least:
            continue
        weights.add(id(weight))
        stage = FRONT if is_embedding else len(layers_at(model, layers_path))
        tied = head is not None and head.weight is weight
        part = (
            "head" if not is_embedding
            else EMBEDDING_AND_HEAD if tied
            else "embedding" if module is model.get_input_embeddings()  # type: ignore[operator]
            else "other embedding"
        )  # fmt: skip
        modules.append(Module(name, stage, name.rpartition(".")[2], shape_of(module), name, part=part))
    return modules


def is_router(path: str, outputs: int, experts: Collection[int]) -> bool:
    """Return whether a linear module routes: the scores of experts, one number that weighs an expert, the index of keys to look at.

    Such choices have no gradient, and they are a few weights that every runtime keeps. An MLP's `gate_proj` is no router.
    experts: numbers of experts in the config.
    """
    words = path.split(".")
    if outputs == 1 or any("router" in word or "indexer" in word for word in words):
        return True
    return any(word == "gate" or word.endswith("_gate") for word in words) and (
        outputs in experts or ("gate" in words and not experts)
    )


def _expert_counts(config: Any) -> set[int]:
    """Return every number in the config whose name speaks of experts."""
    content = config.get_text_config().to_dict() if config is not None else {}
    values = [*content.items(), *(item for part in content.values() if isinstance(part, dict) for item in part.items())]
    return {value for name, value in values if "expert" in str(name) and type(value) is int}


def _kinds(paths: list[str]) -> dict[str, str]:
    """Return a short name for what each module is: its last word, with the word before it where that is ambiguous (GPT-2's two c_proj)."""
    plain = {path: re.sub(r"\.\d+(?=\.|$)", "", path) for path in paths}
    shared = Counter(word.rpartition(".")[2] for word in set(plain.values()))
    return {
        path: word.rpartition(".")[2] if shared[word.rpartition(".")[2]] == 1 else ".".join(word.split(".")[-2:])
        for path, word in plain.items()
    }


def _notes(model: nn.Module, layers_path: str, modules: list[Module], left_out: Sequence[tuple[str, list[Module]]]) -> list[str]:
    """Return lines on what the plan does not cover. left_out: reasons, and the linear modules left out for them."""
    covered = sum(module.weights for module in modules)
    matrices = sum(p.numel() for p in model.get_submodule(layers_path).parameters() if p.dim() > 1)
    notes = []
    if covered < 0.99 * matrices:
        notes.append(
            f"the plan covers {covered / matrices:.0%} of the layers' matrix weights: the others are not in linear modules of their own "
            "(fused experts, convolutions), or are named below, and keep their dtype"
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


# --- calls -----------------------------------------------------------------------------------------------------------------

# Which linear modules of a model do their work when they are called, so that a quantized weight can be measured and packed.
#
# Some families have linear modules that only hold a weight: the module around them reads it and multiplies for itself (mamba's `dt_proj`), or
# nothing reads it (keys and values of layers that use those of others). What is done to modules as they are called (gradients, input
# moments, packed weights) passes such a weight by.
#
# A skeleton is asked, without any weight: every parameter is one number seen through the parameter's shape, every linear module answers
# with a constant and tells that it was called, and a few tokens go through. No product is computed and
# no memory is taken. An expert that no token came to is known by the others of its kind.

TOKENS = 5  # that go through, of two rows


@dataclass(frozen=True)
class Calls:
    """Names of linear modules. `uncalled` is empty where the model could not be run."""

    uncalled: frozenset[str]  # their weight is read by others, or by nobody
    nonlinear: frozenset[
        str
    ]  # more is done with their weight than to multiply (groups of inputs, each with a part of the weight)


@torch.no_grad()
def calls_of(model: Any, layers_path: str, names: list[str]) -> Calls:
    """Return how the linear modules `names` of `model` are used, a skeleton (see `streaming.without_weights`) that is of no use afterwards."""
    called: set[str] = set()
    _placeholders(model)
    modules = {name: model.get_submodule(name) for name in names}
    overridden = [n for n, m in modules.items() if isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward]
    nonlinear = frozenset(name for name in overridden if not _multiplies(modules[name]))
    model.set_experts_implementation("eager")  # fused kernels would need real weights
    _answering(model, {id(module): name for name, module in modules.items()}, called)
    try:
        model(input_ids=torch.ones(2, TOKENS, dtype=torch.int64), use_cache=False)
    except Exception:  # each family fails in its own way on numbers that mean nothing
        return Calls(frozenset(), nonlinear)
    kinds = {_of_experts(name, layers_path) for name in called}
    return Calls(frozenset(name for name in names if _of_experts(name, layers_path) not in kinds), nonlinear)


def _of_experts(name: str, layers_path: str) -> str:
    """Return a module's name without the numbers behind its layer's, which all experts of a layer share."""
    layer, _, rest = name.removeprefix(f"{layers_path}.").partition(".")
    return f"{layer}." + re.sub(r"\.\d+(?=\.|$)", "", rest)


def _multiplies(module: Any) -> bool:
    """Return whether a module with a forward of its own gives what nn.Linear would, on some inputs."""
    x = torch.rand(2, 3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight.dtype)
    try:
        result, expected = module(x), nn.functional.linear(x, module.weight, module.bias)
        return result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-2)
    except Exception:  # it wants its inputs in another form
        return False


def _placeholders(model: nn.Module) -> None:
    """Replace every parameter by one number seen through its shape."""
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in placeholders:
                number = torch.full((1,), 0.5).to(parameter.dtype)
                placeholders[id(parameter)] = nn.Parameter(number.expand(parameter.shape), requires_grad=False)
            module._parameters[name] = placeholders[id(parameter)]


def _answering(model: nn.Module, names: dict[int, str], called: set[str]) -> None:
    """Let every linear module answer with a constant from now on; `called` takes the names of those that `names` has by their id."""
    for module in list(model.modules()):
        # others may give more than a product (llama4's router)
        if type(module).forward is nn.Linear.forward or id(module) in names:
            module.forward = _answer(shape_of(module)[0], names.get(id(module), ""), called)  # type: ignore[method-assign]


def _answer(width: int, name: str, called: set[str]) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.add(name)
        return x.new_full((*x.shape[:-1], width), 0.5)

    return forward
