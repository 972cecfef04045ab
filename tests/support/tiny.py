"""Tiny checkpoints with random weights, one a model family, written in Hugging Face layout (nothing is downloaded)."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[3] / "shared"
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 300,
}
GATED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES: dict[str, dict] = {
    "llama": {**GATED, "tie_word_embeddings": True},
    "mistral": {**GATED, "sliding_window": 16},
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 16},
    "gpt_neox": {**COMMON, "intermediate_size": 96},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 300},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
TEXT = " ".join(f"The {a} {b} {c} {i}." for i, (a, b, c) in enumerate(
    (a, b, c) for a in ("red", "old", "tall", "wet") for b in ("fox", "oak", "stone", "boat", "girl") for c in ("runs", "stands", "sings", "falls")
))  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def make_checkpoint(folder: Path, family: str = "llama", seed: int = 0, scale: float = 1.0, **changes: object) -> Path:
    """Write a checkpoint of `family`; weights are N(0, scale / sqrt(width)), large enough that layers matter."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    config.architectures = [ARCHITECTURES[family]]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, scale / 64**0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
