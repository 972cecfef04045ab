"""Loads in transformers what the exported script made with llm-compressor."""

from __future__ import annotations

import torch
from common import check
from transformers import AutoModelForCausalLM


def load(folder: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(input_ids=torch.tensor([[1]]))  # weights are unpacked at the first pass
    return model


def declared(module: torch.nn.Module) -> dict | None:
    weights = module.quantization_scheme.weights
    return {"bits": weights.num_bits, "group_size": weights.group_size, "symmetric": weights.symmetric}


check("llmcompressor", load, declared)
