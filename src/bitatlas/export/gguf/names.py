"""Which models llama.cpp can be given, and what it calls their tensors. Pure: no weights, no llama.cpp.

Written here: Llama and Mistral (llama.cpp's `llama`, whose rotary embedding pairs neighbouring rows where transformers pairs halves, so
the rows of q and k change places) and Qwen2 and Qwen3 (which keep them). Other models' tensors are named by the package `gguf`, for the
list of types that llama-quantize reads; their weights are not written.
Source: llama.cpp's conversion/llama.py and qwen.py; the permutation is theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitatlas.errors import UserError

CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py and llama-quantize (commands.txt)"
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    name: str  # llama.cpp's
    permuted: bool  # rows of q and k change places


ARCHITECTURES = {
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
}


def architecture_of(config: Any) -> Architecture:
    """UserError for a model that cannot be written here, saying what can be done."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"--to llama.cpp: a GGUF of {config.model_type} is not written here (only of {known}); {CONVERT}")
    if config.hidden_act != "silu":
        raise UserError(f"--to llama.cpp: llama.cpp's {found.name} computes silu, the model {config.hidden_act}; {CONVERT}")
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"--to llama.cpp: rotary embeddings of the kind {kind} are not written here; {CONVERT}")
    return found


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary embedding's parameters; UserError where layers differ in them."""
    rope = dict(config.rope_parameters or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"--to llama.cpp: layers with rotary embeddings of several kinds are not written here; {CONVERT}")
    return rope


def tensor_name(key: str) -> str | None:
    """A checkpoint's tensor -> its name in a GGUF of one of `ARCHITECTURES`; None where there is none."""
    key = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"  # checkpoints of the bare base model
    stem, _, suffix = key.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{suffix}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{found[1]}.{INNER[found[2]]}.{suffix}" if found and found[2] in INNER else None


def weight_names(modules: list[str], model_type: str, layers: int) -> dict[str, str]:
    """Module -> the GGUF's name of its weight, for any model that llama.cpp knows; UserError otherwise."""
    if model_type in ARCHITECTURES:
        named = {module: tensor_name(f"{module}.weight") for module in modules}
    else:
        named = _foreign_names(modules, model_type, layers)
    lost = [module for module, name in named.items() if name is None]
    if lost:
        raise UserError(f"--to llama.cpp: what llama.cpp calls {lost[0]} of a {model_type} model is not known here")
    return {module: str(name) for module, name in named.items()}


def _foreign_names(modules: list[str], model_type: str, layers: int) -> dict[str, str | None]:
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"--to llama.cpp: the names of a {model_type} model's tensors come from a package that is not here: pip install 'bitatlas[gguf]'"
        ) from None
    plain = re.sub(r"[^a-z0-9]", "", model_type)
    found = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if re.sub(r"[^a-z0-9]", "", name) == plain]
    if not found:
        return dict.fromkeys(modules)
    table = gguf.get_tensor_name_map(found[0], layers)
    names = {module: table.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
    return {module: name and f"{name.removesuffix('.weight')}.weight" for module, name in names.items()}


def heads_to_permute(key: str, config: Any) -> int:
    """Heads among whose rows those of this tensor change places; 0: they stay."""
    architecture = ARCHITECTURES[config.model_type]
    if architecture.permuted and ".q_proj." in key:
        return int(config.num_attention_heads)
    if architecture.permuted and ".k_proj." in key:
        return int(config.num_key_value_heads)
    return 0


def permute(rows: Tensor, heads: int) -> Tensor:
    """`rows` [out, ...] in transformers' order -> llama.cpp's: the two halves of every head one by one in turn."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(config: Any) -> Tensor | None:
    """float32 [head size / 2], by which llama.cpp divides the rotary frequencies; None where it need not.

    From transformers' own frequencies of the kind `llama3`, whichever way they come about.
    """
    if rope_of(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / (rope_of(config)["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    return (plain / scaled).float()


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
