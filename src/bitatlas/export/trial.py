"""A packed checkpoint, opened as anybody would open it, and tried before its folder gets its name.

A folder can be written whole and still be of no use: transformers may find no place for a tensor and fill in random numbers, or fail
while it loads. So the finished folder is loaded and run on a few tokens, beside the reference model with the plan's weights in it; the
logits must be the same. One model after the other is held, in float32. Where memory is too short for that, transformers still matches
every tensor to its place, on the meta device, and the note says what was left out.

What transformers does not load by itself (`OURS`: packed embeddings, experts in several formats, transposed layers) is unpacked by
compressed-tensors first, weight by weight, and given to transformers as a plain checkpoint (`load_packed`). It then takes the memory of one.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitatlas.errors import UserError
from bitatlas.measure.machine import available_bytes
from bitatlas.model.checkpoint import Checkpoint, load_tokenizer, open_model, quiet_transformers, skeleton_of
from bitatlas.model.folder import read_config, weight_files
from bitatlas.model.linear import is_transposed, oriented, split_experts
from bitatlas.model.streaming import release_free_memory
from bitatlas.model.tensor_files import Reader, natural, reason_of, rules_of
from bitatlas.quantize.bank import bank_of_plan
from bitatlas.records import Plan
from bitatlas.records.text import byte_size

OURS = "bitatlas.load_packed"  # the format that a config names where transformers alone does not load it: what else reads it stops there
PACK_QUANTIZED = "pack-quantized"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
TOKENS = 64  # that the folder is tried on: enough for nearly every expert of a mixture
TOLERANCE = 1e-4  # of the largest logit; the same weights give 0, or 1e-6 where sums are taken in another order
HELD = 1.25  # bytes in memory while a model is loaded and run, by those of its float32 weights


@torch.no_grad()
def open_packed(folder: Path, device: str) -> tuple[Any, Any]:
    """Open the packed checkpoint, unpacked (its first pass does that), and its tokenizer, without the package's own log."""
    with _silent():
        if _format_of(read_config(folder, str(folder), quantized=True)) == OURS:
            return load_packed(folder, device), load_tokenizer(folder)
        model, tokenizer = open_model(str(folder), device)
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return model, tokenizer


def _format_of(config: Any) -> str:
    quantization = getattr(config, "quantization_config", None)
    return str(quantization.get("format", "")) if isinstance(quantization, dict) else ""


def load_packed(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Open a folder that `apply` wrote as a model of transformers, its weights unpacked; UserError where it is none.

    Any plan's: with packed embeddings, experts in several formats, GPT-2's transposed layers. In memory it is a plain checkpoint in `dtype`.
    """
    config = read_config(folder, str(folder), quantized=True)
    if _format_of(config) not in (OURS, PACK_QUANTIZED):
        raise UserError(f"{folder}: is no packed checkpoint, which bitatlas apply writes")
    if _format_of(config) == PACK_QUANTIZED:
        return _in_use(_in_float32(open_packed(folder, device)[0]), dtype)
    groups = config.quantization_config["config_groups"]
    del config.quantization_config
    skeleton = skeleton_of(config, str(folder))
    state = _unpacked(Reader(weight_files(folder)), groups, skeleton)
    try:
        with _silent():
            model, report = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # each model type fails in its own way
        raise UserError(f"{folder}: transformers cannot load what was unpacked ({reason_of(error)})") from None
    if report["missing_keys"]:
        raise UserError(f"{folder}: the weights lack {sorted(report['missing_keys'])[0]}")
    return _in_use(model.to(device), dtype)


def _in_float32(model: Any) -> Any:
    """Return the model with its experts in float32: transformers unpacks them in float16, whatever the model's dtype."""
    for parameter in model.parameters():
        if parameter.dim() == 3 and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    return model


def _in_use(model: Any, dtype: torch.dtype) -> Any:
    return model.to(dtype).eval().requires_grad_(False)


def _unpacked(reader: Reader, groups: Mapping[str, Any], skeleton: Any) -> dict[str, Tensor]:
    """Return the tensors of a plain checkpoint, by the names that the files have, of experts that one tensor holds by that tensor's."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(PACK_QUANTIZED)
    weights: dict[str, Tensor] = {}
    for group in groups.values():
        scheme = QuantizationScheme.model_validate({**group, "format": PACK_QUANTIZED})
        for stem in group["targets"]:
            names = [name for suffix in SUFFIXES if (name := f"{stem}.{suffix}") in reader]
            packed = {name.rpartition(".")[2]: reader.read(name) for name in names}
            packed["weight_scale"] = packed["weight_scale"].float()  # the products are of its dtype
            weights[stem] = compressor.decompress(packed, scheme)["weight"]
    packed_names = {f"{stem}.{suffix}" for stem in weights for suffix in SUFFIXES}
    state = {name: reader.read(name) for name in reader if name not in packed_names}
    return state | _as_stored(weights, skeleton)


def _as_stored(weights: dict[str, Tensor], skeleton: Any) -> dict[str, Tensor]:
    """Return weights [out, in] as checkpoints keep them: GPT-2's the other way round, experts of one tensor in one. weights: by the stem of a name."""
    rules, wanted, shapes = rules_of(skeleton), dict.fromkeys(skeleton.state_dict(), True), skeleton.state_dict()
    split_experts(skeleton)
    kinds, experts, state = dict(skeleton.named_modules()), dict[str, list[Tensor]](), dict[str, Tensor]()
    for stem in sorted(weights, key=natural):
        fused, _, number = stem.rpartition(".")
        keys = [key for key in (f"{fused}.weight", fused) if number.isdigit() and rules.target(key, wanted)[0] in wanted]
        if keys and len(shapes[rules.target(keys[0], wanted)[0]].shape) == 3:
            experts.setdefault(keys[0], []).append(weights[stem])
            continue
        module = kinds.get(rules.target(f"{stem}.weight", wanted)[0].removesuffix(".weight"))
        state[f"{stem}.weight"] = weights[stem].T.contiguous() if is_transposed(module) else weights[stem]
    for key, of_experts in experts.items():
        owner = kinds[rules.target(key, wanted)[0]]
        state[key] = torch.stack([weight.T if owner.transposed else weight for weight in of_experts])
    return state


def check_folder(
    folder: Path,
    plan: Plan,
    plan_file: Path,
    checkpoint: Checkpoint,
    dtypes: Mapping[str, torch.dtype],
    unused: Collection[str],
    beyond: bool = False,
) -> str:
    """Load and run `folder`; return a line about it. UserError where transformers does not load it, or it computes something else than the plan.

    `dtypes`: of the weights that the model holds in another one than float32. `unused`: tensors that the model passes over. `beyond`: `load_packed`
    opens it, not transformers alone.
    """
    skeleton = checkpoint.skeleton()
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = disk + int(4 * HELD * weights)
    free = available_bytes("cpu") - psutil.Process().memory_info().rss
    named = named_class(checkpoint.config)
    kinds: list[Any] = [named] if named is type(skeleton) else [kind for kind in (named, AutoModelForCausalLM) if kind]
    if needed > free:
        for kind in [] if beyond else kinds:
            _load(kind, folder, "meta", unused)
        return (
            f"not run before it was named: that needs {byte_size(needed)} of memory, {byte_size(free)} are free. "
            f"{'' if beyond else 'transformers has a place for every tensor; '}bitatlas verify measures it where there is more"
        )
    expected = _expected(checkpoint, plan, plan_file, dtypes)
    release_free_memory()
    largest, difference = float(expected.abs().max()), 0.0
    for kind in [None] if beyond else kinds:
        model = _in_float32(_load(kind, folder, "cpu", unused).eval()) if kind else load_packed(folder)
        if kind and kind is not kinds[-1] and not _takes_text(model, checkpoint):
            continue
        difference = max(difference, float((_logits(model, checkpoint) - expected).abs().max().nan_to_num(torch.inf)))
        del model
        release_free_memory()
    if not difference <= TOLERANCE * largest:
        raise _refused(
            f"it computes something else: logits differ by {difference:.3g} from the plan's, the largest of which is {largest:.3g}"
        )
    how = "opened by load_packed" if beyond else "loaded in transformers"
    return f"{how} and run: logits differ by at most {difference:.2g} from the plan's (the largest is {largest:.3g})"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    from loguru import logger

    logger.disable("compressed_tensors")
    try:
        with contextlib.redirect_stderr(io.StringIO()), quiet_transformers():
            yield
    finally:
        logger.enable("compressed_tensors")


def _refused(reason: str) -> UserError:
    return UserError(f"nothing was written: the packed checkpoint was tried, and {reason}")


def named_class(config: Any) -> Any:
    """Return the model class that a config names, if transformers has it."""
    return getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)


def _load(kind: Any, folder: Path, device: str, unused: Collection[str]) -> Any:
    """Load the model of class `kind` in float32; UserError unless every tensor of the model is there, and every tensor but `unused` has a place in it."""
    try:
        with _silent():
            model, report = kind.from_pretrained(
                folder, dtype=torch.float32, device_map={"": device} if device == "meta" else None, local_files_only=True, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # each model type fails in its own way
        raise _refused(f"transformers does not load it ({reason_of(error)})") from None
    wrong = {
        "has no value for": sorted(report["missing_keys"]),
        "has no place for": sorted(set(report["unexpected_keys"]) - set(unused)),
        "has another shape for": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    for what, names in wrong.items():
        if names:
            raise _refused(f"transformers {what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return model


@torch.no_grad()
def _expected(checkpoint: Checkpoint, plan: Plan, plan_file: Path, dtypes: Mapping[str, torch.dtype]) -> Tensor:
    """Return logits [1, tokens, vocabulary] of the reference model with the bank's reconstruction in every planned module."""
    decoder = checkpoint.load_model()
    for name, format_name in plan.modules.items():
        weight = bank_of_plan(plan, plan_file, decoder, [name]).codes(name, format_name).weight()
        held = weight.to(dtypes.get(name, weight.dtype)).float()
        module = decoder.model.get_submodule(name)
        module.weight.data = oriented(module, held)  # of a head that is tied, too
    logits = _logits(decoder.model, checkpoint)
    if not bool(torch.isfinite(logits).all()):
        raise UserError("nothing was written: with the plan's weights the model's logits are not finite")
    return logits


def _takes_text(model: Any, checkpoint: Checkpoint) -> bool:
    """Tell whether a model runs on text alone: some that also see do not; their text part is run all the same."""
    try:
        _logits(model, checkpoint)
    except UserError:
        return False
    return True


@torch.no_grad()
def _logits(model: Any, checkpoint: Checkpoint) -> Tensor:
    try:
        with _silent():
            logits: Tensor = model(input_ids=_tokens(checkpoint), use_cache=False).logits
    except Exception as error:  # every model fails in its own way
        raise _refused(f"transformers cannot run {type(model).__name__} on text alone ({reason_of(error)})") from None
    return logits


def _tokens(checkpoint: Checkpoint) -> Tensor:
    """Return int64 [1, tokens], drawn among those that stand for text."""
    text = checkpoint.config.get_text_config()
    known = [vars(config) for config in (checkpoint.config, text)]
    special = {
        value
        for values in known
        for key, value in values.items()
        if key.endswith(("token_id", "token_index"))
        if isinstance(value, int)
    }
    plain = torch.tensor([token for token in range(checkpoint.vocabulary) if token not in special])
    drawn = torch.randint(len(plain), (1, min(TOKENS, checkpoint.info.context)), generator=torch.Generator().manual_seed(0))
    return plain[drawn]
