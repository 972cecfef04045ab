"""Loads in transformers what the exported script made with torchao."""

from __future__ import annotations

import math

import torch
from common import check
from transformers import AutoModelForCausalLM


def load(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def declared(module: torch.nn.Module) -> dict | None:
    weight = module.weight
    bits = int(str(weight.target_dtype).removeprefix("torch.int"))
    return {"bits": bits, "group_size": math.prod(weight.block_size)}


check("torchao", load, declared)
