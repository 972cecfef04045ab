"""Open a folder whose weights another tool quantized, as a model of transformers that computes in float32, so that it can be compared.

What a file's weights are is fixed by its layout, not by the kernels that run it, and most of these need a GPU. So the layouts that are used most are
unpacked here, weight by weight, and given to transformers as a plain checkpoint: GPTQ (and AutoRound's), AWQ's gemm, MLX, fp8, gpt-oss's mxfp4. What
else transformers loads by itself it does, with the tool's own package. In memory the model is then one of float32 weights; activations that a tool
rounds at run time (fp8's, for one) are not rounded, except where its package runs it.

Left out: compressed-tensors (see `export.trial`), EXL2 and EXL3, layouts made for one kernel (marlin, gemv), scales that are applied to activations.
Sources: auto_gptq 0.7.1 `qlinear_cuda_old`, gptqmodel 5.8 to 7.7 `utils/model.py`, auto-round 0.16.1 `qlinear_torch(_zp)`, autoawq 0.2.9
`packing_utils`, mlx 0.32 `mx.dequantize`, mlx_lm 0.32 `utils.load_model`, transformers 5.24 `finegrained_fp8`, `mxfp4`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_model, quiet_transformers, skeleton_of
from bitatlas.model.folder import read_config, weight_files
from bitatlas.model.linear import is_transposed
from bitatlas.model.tensor_files import Reader, reason_of, rules_of

WORD = 32  # bits
TOGETHER = 2**22  # codes at a time: unpacking takes eight bytes and more for each
OURS = "dequantized by bitatlas"
QUANTO_FILE = "quanto_qmap.json"
SIDECARS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt", QUANTO_FILE: "quanto"}
ALIASES = {"intel/auto-round": "auto-round", "auto_round": "auto-round"}
ELSEWHERE = {"exl2": "exllamav2", "exl3": "exllamav3"}  # method -> the only package that runs it
GPU_ALONE = ("eetq", "fp_quant", "higgs", "spqr", "fouroversix", "nvfp4")  # of those that transformers loads
PACKAGES = {  # method -> what is imported, what pip calls it
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "aqlm": ("aqlm", "aqlm[cpu]"),
    "vptq": ("vptq", "vptq"),
}
GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is missing in the zero-points that are stored
AUTOROUND_FORMATS = {
    "auto": 1, "auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0, "auto_round:gptq_v2": 0,
}  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns whose codes lie in a word one after the other
# gptqmodel adds and subtracts 1 in whole words, so a zero-point of 0 borrows of the next; before version 7 it was wrong about 3 bits, both ways
ONES = {2: (0x55555555,), 3: (0x24924924, 0x92492492, 0x49249249), 4: (0x11111111,), 8: (0x01010101,)}
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([FP4, -FP4])
MLX_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
MLX_SHIFTED = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
)  # mlx-lm keeps 1 + w where transformers keeps w
SHIFTED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
MLX_NEOX = (("model.h.", "gpt_neox.layers."), ("model.embed_out.", "embed_out."), ("model.", "gpt_neox."))
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class _Packed:
    """A folder's tensors and what its config says of them; `used`: those that were unpacked, or are no tensors of the model."""

    name: str
    reader: Reader
    settings: dict[str, Any]
    used: set[str] = field(default_factory=set)

    def stems(self, suffix: str) -> list[str]:
        return [key.removesuffix(suffix) for key in self.reader if key.endswith(suffix)]

    def take(self, key: str) -> Tensor:
        """Return a tensor that is unpacked; UserError where it is missing."""
        if key not in self.reader:
            raise UserError(f"{self.name}: the weights lack {key}")
        self.used.add(key)
        return self.reader.read(key)

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.name}: {why}")


# --- what a folder is ----------------------------------------------------------------------------------------------------


def quantization_of(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return (what quantized a folder, lower-cased, and its settings), "mlx" for MLX's own layout; None for a plain checkpoint."""
    content = _json(folder / "config.json")
    text = content.get("text_config")
    for part in (content, text if isinstance(text, dict) else {}):
        settings, mlx = part.get("quantization_config"), part.get("quantization")
        if isinstance(settings, dict) and isinstance(method := settings.get("quant_method"), str):
            return ALIASES.get(method.lower(), method.lower()), settings
        if isinstance(mlx, dict):
            return "mlx", mlx
        if isinstance(settings, dict) and settings:
            return ("bitsandbytes" if settings.get("load_in_8bit") or settings.get("load_in_4bit") else "unknown"), settings
    for file, usual in SIDECARS.items():
        if (folder / file).is_file():
            settings = _json(folder / file)
            return str(settings.get("quant_method") or usual).lower(), settings
    return None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@torch.no_grad()
def open_foreign(folder: Path, name: str, device: str = "cpu") -> tuple[Any, str]:
    """Return (a model in evaluation mode that computes in float32, how it is run: a short phrase).

    UserError where it cannot be opened; ValueError for a folder that is not opened here: a plain one, compressed-tensors.
    """
    method, settings = quantization_of(folder) or ("", {})
    if method in ("", "compressed-tensors"):
        raise ValueError(f"{name}: {method or 'no quantization'} is not opened by open_foreign")
    if method in ELSEWHERE:
        raise UserError(
            f"{name}: {method} weights need {ELSEWHERE[method]} and an NVIDIA GPU, and bitatlas does not run that package; measure it with its own "
            "tools on a machine that has one, or give the GGUF, MLX or GPTQ folder of the same model"
        )
    unpack = UNPACKERS.get(method)
    if unpack is None:
        return _by_transformers(folder, name, method, settings, device)
    config, packed = _plain_config(folder, name), _Packed(name, Reader(weight_files(folder)), settings)
    if method == "mlx":
        return _load_mlx(config, packed, device), OURS
    weights = unpack(packed)
    if not weights:
        raise UserError(f"{name}: config.json says {method}, but no tensor of the weights is quantized so")
    kept = {key: packed.reader.read(key) for key in packed.reader if key not in packed.used}
    return _load(config, name, kept, weights, device, method not in AS_KEPT), OURS


def _plain_config(folder: Path, name: str) -> Any:
    """Return the config that the model had before it was quantized."""
    content = _json(folder / "config.json")
    if not content:
        return read_config(folder, name, quantized=True)
    for part in (content, content.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
            part.pop("quantization", None)
    with TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return read_config(Path(place), name)


def _load(config: Any, name: str, kept: dict[str, Tensor], weights: dict[str, Tensor], device: str, turned: bool) -> Any:
    """Return the model of a plain checkpoint. turned: unpacked weights are [out, in], whatever way round the model keeps them."""
    skeleton = skeleton_of(config, name)
    if turned:
        rules, wanted, kinds = rules_of(skeleton), dict.fromkeys(skeleton.state_dict(), True), dict(skeleton.named_modules())
        for key in weights:
            if is_transposed(kinds.get(rules.target(key, wanted)[0].removesuffix(".weight"))):
                weights[key] = weights[key].T.contiguous()
    state = kept | weights
    try:
        with quiet_transformers():
            model, report = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
                None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # each model type fails in its own way
        raise UserError(f"{name}: transformers cannot load what was unpacked ({reason_of(error)})") from None
    if report["mismatched_keys"]:
        key, stored, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{name}: {key} has shape {tuple(stored)} once unpacked, but the config says {tuple(expected)}")
    if report["missing_keys"]:
        raise UserError(
            f"{name}: the weights lack {sorted(report['missing_keys'])[0]}, or have it under a name that is not known"
        )
    _check_unexpected(sorted(report["unexpected_keys"]), state, set(weights), config, name)
    return model.to(device).eval().requires_grad_(False)


def _check_unexpected(keys: list[str], state: dict[str, Tensor], unpacked: set[str], config: Any, name: str) -> None:
    """Refuse, with UserError, what the model has no place for but is part of what the folder computes: weights, biases, scales of activations."""
    layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)
    for key in keys:
        number = re.search(r"\.(\d+)\.", key)
        inside = number and int(number[1]) < layers and not key.endswith("rotary_emb.inv_freq")
        if key in unpacked or (inside and key in state and bool(state[key].any())):
            raise UserError(f"{name}: the weights hold {key}, which transformers' {config.model_type} has no place for")


# --- codes in words ------------------------------------------------------------------------------------------------------


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes that lie one after the other, little-endian, in each row of 32-bit words [rows, words]: uint8 [rows, codes]."""
    together = math.gcd(8, bits)
    size, count = bits // together, 8 // together  # so many bytes are so many codes
    if words.shape[1] * 4 % size:
        raise ValueError(f"{words.shape[1]} words are no whole number of {bits}-bit codes")
    parts = []
    for block in words.contiguous().split(max(1, TOGETHER // max(1, words.shape[1] * WORD // bits))):
        units = block.view(torch.uint8).unflatten(1, (-1, size)).long()
        joined = (units << (8 * torch.arange(size))).sum(-1, keepdim=True)
        parts.append(((joined >> (bits * torch.arange(count))) & (2**bits - 1)).to(torch.uint8).flatten(1))
    return torch.cat(parts)


# --- GPTQ, AutoRound, AWQ ------------------------------------------------------------------------------------------------


def _gptq(packed: _Packed) -> dict[str, Tensor]:
    settings = packed.settings
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if layout not in GPTQ_FORMATS or settings.get("is_marlin_format"):
        shown = "marlin" if settings.get("is_marlin_format") else layout
        raise packed.refuse(f"GPTQ weights in the {shown} layout are not unpacked, only {' and '.join(GPTQ_FORMATS)} are")
    _check_setting(packed, "bits", (2, 3, 4, 8))
    return _gptq_weights(packed, GPTQ_FORMATS[layout])


def _autoround(packed: _Packed) -> dict[str, Tensor]:
    layout = str(packed.settings.get("packing_format") or packed.settings.get("backend") or "auto_round:auto_gptq").lower()
    _check_setting(packed, "bits", (2, 3, 4, 8))
    if layout in ("auto_round:auto_awq", "auto_round:awq"):
        return _awq_weights(packed)
    if layout not in AUTOROUND_FORMATS:
        raise packed.refuse(
            f"AutoRound weights packed as {layout} are not unpacked, only {', '.join((*AUTOROUND_FORMATS, 'auto_round:auto_awq'))} are"
        )
    return _gptq_weights(packed, AUTOROUND_FORMATS[layout])


def _awq(packed: _Packed) -> dict[str, Tensor]:
    version = str(packed.settings.get("version") or packed.settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise packed.refuse(f"AWQ weights of version {version} are laid out for one kernel and are not unpacked, only gemm's are")
    _check_setting(packed, "w_bit" if "w_bit" in packed.settings else "bits", (4,))
    return _awq_weights(packed)


def _check_setting(packed: _Packed, key: str, allowed: tuple[int, ...]) -> None:
    value = packed.settings.get(key)
    if value is not None and value not in allowed:
        raise packed.refuse(f"its settings say {key} {value!r}, but this layout has {', '.join(map(str, allowed))}")


def _gptq_weights(packed: _Packed, missing: int) -> dict[str, Tensor]:
    """Return weights [out, in] by name. missing: how much less than the zero-points is stored."""
    result = {}
    for stem in packed.stems(".qweight"):
        words, scales, stored = (packed.take(f"{stem}.{part}") for part in ("qweight", "scales", "qzeros"))
        bits = _bits_of(packed, stem, words, scales, stored, (2, 3, 4, 8))
        try:
            codes = unpack_words(words.T, bits)  # [out, in]
            zeros = _zeros(packed, stored, bits, missing)  # [groups, out]
        except ValueError as error:
            raise packed.refuse(f"{stem}.qweight cannot be unpacked ({error})") from None
        group = _groups(packed, stem, codes.shape[1], len(scales))
        if codes.shape[0] != scales.shape[1] or zeros.shape[1] < scales.shape[1]:
            raise packed.refuse(
                f"{stem}.qweight has shape {tuple(words.shape)}, and its scales {tuple(scales.shape)}, which do not fit"
            )
        zeros = zeros[:, : scales.shape[1]]
        result[f"{stem}.weight"] = codes.float().sub_(zeros.float().T[:, group]).mul_(scales.float().T[:, group])
    return result


def _bits_of(packed: _Packed, stem: str, words: Tensor, scales: Tensor, zeros: Tensor, allowed: tuple[int, ...]) -> int:
    """Return the bits of a module's codes, from its shapes: folders have modules of several widths. UserError where these make no sense."""
    shapes = [tuple(part.shape) for part in (words, scales, zeros)]
    whole = (
        words.dtype == zeros.dtype == torch.int32 and scales.is_floating_point() and all(len(s) == 2 and all(s) for s in shapes)
    )
    bits = zeros.shape[1] * WORD / scales.shape[1] if whole else 0
    if bits not in allowed or zeros.shape[0] != scales.shape[0]:
        raise packed.refuse(
            f"{stem}: qweight, scales and qzeros have the shapes {', '.join(map(str, shapes))}, which are no codes of {', '.join(map(str, allowed))} bits"
        )
    told = packed.settings.get("bits", packed.settings.get("w_bit"))
    if told not in (None, bits) and not any(packed.settings.get(key) for key in ("dynamic", "extra_config")):
        raise packed.refuse(f"{stem}: its shapes are those of {bits:.0f} bits, but its settings say {told}")
    return int(bits)


def _zeros(packed: _Packed, stored: Tensor, bits: int, missing: int) -> Tensor:
    """Return the zero-points, [groups, out]."""
    writer = _writer(packed.settings)
    if missing and writer and (bits != 3 or writer < 7):
        ones = torch.tensor(ONES[bits]).repeat(stored.shape[1] // len(ONES[bits]) + 1)[: stored.shape[1]]
        return unpack_words((stored.long() + ones).to(torch.int32), bits)
    return (unpack_words(stored, bits) + missing) & (2**bits - 1)


def _writer(settings: dict[str, Any]) -> int:
    """Return the major version of the gptqmodel that wrote a folder; 0 for any other writer."""
    meta = settings.get("meta")
    match = re.search(r"gptqmodel:(\d+)", str(meta.get("quantizer"))) if isinstance(meta, dict) else None
    return max(1, int(match[1])) if match else 0


def _groups(packed: _Packed, stem: str, width: int, count: int) -> Tensor:
    """Return the group of each input, int64 [in]."""
    if f"{stem}.g_idx" in packed.reader:
        group = packed.take(f"{stem}.g_idx").long()
        if group.shape == (width,) and bool(((group >= 0) & (group < count)).all()):
            return group
        raise packed.refuse(f"{stem}.g_idx does not give each of {width} inputs one of {count} groups")
    told = packed.settings.get("group_size", packed.settings.get("q_group_size"))
    size = told if isinstance(told, int) and told > 0 and math.ceil(width / told) == count else width // count
    if not size or math.ceil(width / size) != count:
        raise packed.refuse(f"{stem}: {count} groups do not divide its {width} inputs")
    return torch.arange(width) // size


def _awq_weights(packed: _Packed) -> dict[str, Tensor]:
    result = {}
    for stem in packed.stems(".qweight"):
        words, scales, stored = (packed.take(f"{stem}.{part}") for part in ("qweight", "scales", "qzeros"))
        _bits_of(packed, stem, words, scales, stored, (4,))
        if words.shape[1] != stored.shape[1]:
            raise packed.refuse(
                f"{stem}.qweight has {words.shape[1]} columns, and its qzeros {stored.shape[1]}, so these are not AWQ's gemm layout"
            )
        place = torch.tensor(AWQ_ORDER).argsort()
        codes, zeros = (unpack_words(part, 4).unflatten(1, (-1, 8))[:, :, place].flatten(1) for part in (words, stored))
        group = _groups(packed, stem, len(codes), len(scales))
        result[f"{stem}.weight"] = codes.float().sub_(zeros[group]).mul_(scales.float()[group]).T.contiguous()
    return result


# --- fp8, mxfp4 ----------------------------------------------------------------------------------------------------------


def _fp8(packed: _Packed) -> dict[str, Tensor]:
    """Return weights as the model keeps them: float8 with a scale for all, a row, or a block."""
    result = {}
    for key in [key for key in packed.reader if packed.reader.dtype(key) in ("F8_E4M3", "F8_E5M2")]:
        scale_key = next((name for suffix in ("_scale_inv", "_scale") if (name := key + suffix) in packed.reader), "")
        if not scale_key:
            raise packed.refuse(f"{key} is stored as {packed.reader.dtype(key)}, and has no scale")
        scale = packed.take(scale_key)
        scale = _power_of_two(scale) if scale.dtype == torch.uint8 else scale.float()
        weight = packed.take(key).float()
        result[key] = weight.mul_(_spread(packed, key, scale, tuple(weight.shape)))
    packed.used.update(key for key in packed.reader if key.endswith((".input_scale", ".activation_scale", ".input_scale_ub")))
    return result


def _spread(packed: _Packed, key: str, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return scales that can be multiplied with a weight [..., out, in]."""
    if scale.numel() == 1:
        return scale.reshape(())
    scale = scale.unsqueeze(-1) if scale.dim() < len(shape) else scale
    if scale.shape[-1] == 1 and tuple(scale.shape[:-1]) == shape[:-1]:
        return scale
    sizes = packed.settings.get("weight_block_size")
    if not (isinstance(sizes, list | tuple) and len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes)):
        raise packed.refuse(
            f"{key}: scales of shape {tuple(scale.shape)} need a weight_block_size of two numbers in the settings, not {sizes!r}"
        )
    grid = (*shape[:-2], *(math.ceil(width / size) for width, size in zip(shape[-2:], sizes, strict=True)))
    if tuple(scale.shape) != grid:
        raise packed.refuse(
            f"{key}: its scales have shape {tuple(scale.shape)}, but blocks of {sizes[0]} by {sizes[1]} need {grid}"
        )
    for axis, size in zip((-2, -1), sizes, strict=True):
        scale = scale.repeat_interleave(size, axis)
    return scale[..., : shape[-2], : shape[-1]]


def _power_of_two(exponents: Tensor) -> Tensor:
    return torch.exp2(exponents.float() - 127)


def _mxfp4(packed: _Packed) -> dict[str, Tensor]:
    """Return gpt-oss's experts as the model keeps them: of [experts, out, groups, 16] bytes with two codes each, [experts, in, out]."""
    result = {}
    for stem in packed.stems("_blocks"):
        blocks, scales = packed.take(f"{stem}_blocks"), packed.take(f"{stem}_scales")
        fit = blocks.dtype == scales.dtype == torch.uint8 and blocks.dim() == 4 and scales.shape == blocks.shape[:-1]
        if not fit or blocks.shape[-1] != 16:
            raise packed.refuse(
                f"{stem}_blocks has shape {tuple(blocks.shape)}, and its scales {tuple(scales.shape)}, so these are not mxfp4"
            )
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        result[stem] = (FP4[codes.int()] * _power_of_two(scales).unsqueeze(-1)).flatten(-2).transpose(-1, -2).contiguous()
    return result


# --- MLX -----------------------------------------------------------------------------------------------------------------


def _load_mlx(config: Any, packed: _Packed, device: str) -> Any:
    weights, kind = _mlx(packed), str(config.model_type)
    if not weights:
        raise packed.refuse("config.json has MLX's quantization, but no tensor of the weights is quantized so")
    kept = {key: packed.reader.read(key) for key in packed.reader if key not in packed.used}
    nested = "language_model."  # of a model that also sees: its text part
    if any(key.startswith(nested) for key in (*weights, *kept)) and hasattr(config, "text_config"):
        config = config.get_text_config()
        weights, kept = ({k.removeprefix(nested): v for k, v in part.items() if k.startswith(nested)} for part in (weights, kept))
        config.tie_word_embeddings = "lm_head.weight" not in {*weights, *kept}
        kind = str(config.model_type)
    if kind in MLX_SHIFTED:
        kept = {key: value.float() - 1 if key.endswith(SHIFTED_NORMS) else value for key, value in kept.items()}
    # MLX's depthwise convolutions are [channels, width, 1]
    kept = {
        key: value.transpose(1, 2) if value.dim() == 3 and value.shape[2] == 1 < value.shape[1] else value
        for key, value in kept.items()
    }
    kept, weights = (_apart({_renamed(k, kind): v for k, v in part.items()}, kind) for part in (kept, weights))
    return _load(config, packed.name, kept, weights, device, True)


def _renamed(key: str, kind: str) -> str:
    """Return transformers' name of what mlx-lm calls `key`."""
    if kind != "gpt_neox":
        return key
    for theirs, ours in MLX_NEOX:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _apart(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return tensors with the experts that MLX stacks in `switch_mlp` one by one, as checkpoints have them."""
    result = {}
    for key, tensor in tensors.items():
        if ".switch_mlp." not in key:
            result[key] = tensor
            continue
        before, _, after = key.partition(".switch_mlp.")
        layer, _, rest = after.partition(".")
        layer = MIXTRAL.get(layer, layer) if kind == "mixtral" else layer
        result |= {f"{before}.experts.{number}.{layer}.{rest}": part for number, part in enumerate(tensor)}
    return result


def _mlx(packed: _Packed) -> dict[str, Tensor]:
    """Return weights [out, in], of stacked experts [experts, out, in]."""
    settings, result = packed.settings, {}
    stems = [stem for stem in packed.stems(".scales") if f"{stem}.weight" in packed.reader]
    usual = {key: settings.get(key) for key in ("bits", "group_size", "mode")}
    if usual["bits"] or usual["group_size"]:
        _mlx_format(packed, "quantization", usual)
    paths = {_renamed(path, "gpt_neox"): entry for path, entry in settings.items() if isinstance(entry, dict)}
    for stem in stems:
        entry = settings.get(stem)
        entry = entry if isinstance(entry, dict) else paths.get(stem, usual)
        mode, bits, size = _mlx_format(packed, stem, {**usual, **entry})
        if f"{stem}.global_scale" in packed.reader:
            raise packed.refuse(f"{stem}.global_scale: MLX weights with a scale for the whole tensor are not unpacked")
        words, scales = packed.take(f"{stem}.weight"), packed.take(f"{stem}.scales")
        biases = packed.take(f"{stem}.biases") if mode == "affine" else None
        fit = words.dim() >= 2 and words.dtype == torch.uint32 and words.shape[:-1] == scales.shape[:-1]
        fit = (
            fit and words.shape[-1] * WORD == scales.shape[-1] * size * bits and (biases is None or biases.shape == scales.shape)
        )
        if not fit or scales.is_floating_point() != (mode == "affine"):
            raise packed.refuse(
                f"{stem}.weight has shape {tuple(words.shape)}, and its scales {tuple(scales.shape)}, which are no {bits} bits in groups of {size}"
            )
        result[f"{stem}.weight"] = _mlx_weight(words, scales, biases, mode, bits, size)
    return result


def _mlx_format(packed: _Packed, where: str, entry: dict[str, Any]) -> tuple[str, int, int]:
    """Return (mode, bits, group size) that make sense; UserError for others."""
    mode = str(entry.get("mode") or "affine")
    bits, size = (entry.get(key) or MLX_MODES.get(mode, (None, None))[k] for k, key in enumerate(("bits", "group_size")))
    whole = isinstance(bits, int) and isinstance(size, int) and size > 0 and size % 8 == 0
    if whole and ((mode == "affine" and bits in (2, 3, 4, 5, 6, 8)) or MLX_MODES.get(mode) == (bits, size)):
        return mode, bits, size  # type: ignore[return-value]
    raise packed.refuse(
        f"{where} says {bits!r} bits in groups of {size!r}, mode {mode}; MLX has 2, 3, 4, 5, 6 and 8 bits in mode affine, and {', '.join(MLX_MODES)}"
    )


def _mlx_weight(words: Tensor, scales: Tensor, biases: Tensor | None, mode: str, bits: int, size: int) -> Tensor:
    codes = unpack_words(words.flatten(0, -2), bits).unflatten(1, (-1, size))  # [rows, groups, size]
    sides = [side.flatten(0, -2).unsqueeze(-1) for side in (scales, biases) if side is not None]
    if mode == "affine":
        weight = codes.float().mul_(sides[0].float()).add_(sides[1].float())
    else:
        values = codes.view(torch.float8_e4m3fn).float() if bits == 8 else FP4[codes.int()]
        weight = values * (sides[0].view(torch.float8_e4m3fn).float() if mode == "nvfp4" else _power_of_two(sides[0]))
    return weight.view(*words.shape[:-1], -1)


# --- what transformers loads by itself -----------------------------------------------------------------------------------


def _by_transformers(folder: Path, name: str, method: str, settings: dict[str, Any], device: str) -> tuple[Any, str]:
    """Return (model, how) of a folder that transformers loads with the package of the tool."""
    module, package = PACKAGES.get(method, ("", ""))
    if module and not _is_here(module):
        raise UserError(f"{name}: {method} weights are read by its own package, which is not here yet: pip install '{package}'")
    if method in GPU_ALONE and not device.startswith(("cuda", "xpu")):
        raise UserError(f"{name}: {method} weights need a GPU; compare it on a machine that has one, with --device cuda")
    if (folder / QUANTO_FILE).is_file():
        return _by_quanto(folder, name, device), "run by optimum-quanto"
    if method == "hqq":
        raise UserError(
            f"{name}: transformers {transformers.__version__} no longer loads what hqq quantized; quantize the plain checkpoint again, or give "
            "its GGUF, MLX or GPTQ folder"
        )
    if method == "unknown":
        raise UserError(
            f"{name}: config.json has a quantization_config without quant_method, so how its weights are laid out is not known"
        )
    known = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
    if method not in known and not any(key.startswith(method) for key in known):
        raise UserError(
            f"{name}: {method} weights are read neither by bitatlas nor by transformers {transformers.__version__}; give its GGUF, MLX or GPTQ folder"
        )
    try:
        model, _ = open_model(str(folder), device)
    except UserError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise UserError(f"{name}: quantized by {method}, and {reason}") from None
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        # as its kernel for CPUs rounds what it multiplies
        model = model.dequantize().float().eval().requires_grad_(False)
        return model, "dequantized by bitsandbytes"
    return model, f"run by transformers with {package or method}"


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _by_quanto(folder: Path, name: str, device: str) -> Any:
    """Return the model of a folder that optimum-quanto's own `save_pretrained` wrote."""
    from optimum.quanto import QuantizedModelForCausalLM

    try:
        with quiet_transformers():
            model = QuantizedModelForCausalLM.from_pretrained(folder)._wrapped
    except Exception as error:  # each model type fails in its own way
        raise UserError(f"{name}: optimum-quanto cannot load it ({reason_of(error)})") from None
    return model.float().to(device).eval().requires_grad_(False)


UNPACKERS: dict[str, Callable[[_Packed], dict[str, Tensor]]] = {
    "gptq": _gptq, "auto-round": _autoround, "awq": _awq, "mlx": _mlx, "fp8": _fp8, "fbgemm_fp8": _fp8, "mxfp4": _mxfp4,
}  # fmt: skip
AS_KEPT = ("fp8", "fbgemm_fp8", "mxfp4")  # what they unpack is the way round that the model keeps it
