"""Loads in transformers what the exported script made with AutoRound."""

from __future__ import annotations

import torch
from common import check
from transformers import AutoModelForCausalLM


def load(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def declared(module: torch.nn.Module) -> dict | None:
    return {"bits": int(module.bits), "group_size": int(module.group_size)}


check("auto-round", load, declared)
