"""Tiny checkpoints of families that hand other things from layer to layer than one hidden state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tiny import tokenizer

SIZE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 128}
GATED = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
PER_LAYER = {"head_dim": 16, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 300, "sliding_window": 8}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT_PART = {key: value for key, value in GATED.items() if key != "pad_token_id"}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "inputs of two axes": ("opt", {**SIZE, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "inputs of four axes, shared experts": (
        "deepseek_v2",
        {**GATED, **EXPERTS, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "keys and values of layers in front, inputs by layer": (
        "gemma4_text",
        {**GATED, **PER_LAYER, "global_head_dim": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": TWO_KINDS},
    ),
    "several streams side by side": (
        "gemma3n_text",
        {**GATED, **PER_LAYER, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": TWO_KINDS, "altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    ),
    "several values, state": ("rwkv", {"hidden_size": 64, "num_hidden_layers": 4, "attention_hidden_size": 64, "intermediate_size": 96, "context_length": 128, "vocab_size": 300, "rescale_every": 2}),
    "two classes of blocks": ("olmo_hybrid", {**GATED, **LINEAR, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "routed experts": ("qwen2_moe", {**GATED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}),
    "a weight that is read without its module": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "vocab_size": 300}),
    "values of a router for the next one": ("zaya", {**GATED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32}),
    "a part that sees": ("llava", {"text_config": {"model_type": "llama", **TEXT_PART}, "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}, "image_token_index": 299}),
    "a part that sees, keys and values of its own": ("gemma3", {"text_config": {"model_type": "gemma3_text", **TEXT_PART, "head_dim": 16, "sliding_window": 8}, "vision_config": {"model_type": "siglip_vision_model", **VISION}, "mm_tokens_per_image": 4, "image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}),
}  # fmt: skip
ROUTED = {**GATED, **EXPERTS, "num_experts": 4, "head_dim": 16}
DEEPSEEK = {
    **GATED,
    **EXPERTS,
    **LATENT,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", ROUTED),
    "olmoe": ("olmoe", {**ROUTED, "intermediate_size": 32}),
    "mixtral": ("mixtral", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": 32, "n_group": 2, "topk_group": 1}),
    "llama4": ("llama4_text", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 16, "interleave_moe_layer_step": 1, "attention_chunk_size": 64}),
    "gemma4": ("gemma4_text", {**GATED, "head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "granitemoe": ("granitemoe", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5_moe": ("ernie4_5_moe", {**GATED, "head_dim": 16, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
}  # fmt: skip
WHOLE = {"values of a router for the next one"}  # that cannot be run layer by layer


def build(folder: Path, family: str, config: dict[str, Any]) -> Path:
    """A checkpoint with random weights in which every linear module matters."""
    content = AutoConfig.for_model(family, **copy.deepcopy(config))
    torch.manual_seed(0)
    made = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = made.from_config(content).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in (2, 3) and "conv" not in name and not name.endswith(("A_log", "_bias", ".D")):
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif not bool(torch.isfinite(parameter).all()):
                parameter.zero_()
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
