"""Loads in GPTQModel what the exported script made with it."""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling every shape takes minutes and says nothing about the weights
import torch
from common import check
from gptqmodel import BACKEND, GPTQModel


def load(folder: str) -> torch.nn.Module:
    return GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.eval()


def declared(module: torch.nn.Module) -> dict | None:
    return {"bits": int(module.bits), "group_size": int(module.group_size), "symmetric": bool(module.sym)}


check("gptqmodel", load, declared)
