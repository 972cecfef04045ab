"""What files store their weights as, read off their headers, for every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitatlas.model.stored import OTHERS, kinds_of_files, kinds_of_gguf
from bitatlas.records.comparison import StoredKind

WEIGHTS = {f"model.layers.{layer}.mlp.up_proj.weight": 64 * 128 for layer in range(2)}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    save_file(tensors, folder / "model.safetensors")
    return [folder / "model.safetensors"]


def tensors(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of two layers' module, a norm and an embedding."""
    result = {f"model.layers.{layer}.mlp.up_proj.{name}": part.clone() for layer in range(2) for name, part in parts.items()}
    return result | {"model.norm.weight": torch.ones(128), "model.embed_tokens.weight": torch.ones(10, 128, dtype=torch.bfloat16)}


INT32, INT8, HALF = torch.int32, torch.int8, torch.float16


@pytest.mark.parametrize(
    ("method", "parts", "stored", "size"),
    [
        ("", {"weight": torch.ones(64, 128, dtype=torch.bfloat16)}, "bf16", 64 * 128 * 2),
        (
            "gptq",
            {"qweight": torch.ones(16, 64, dtype=INT32), "qzeros": torch.ones(4, 8, dtype=INT32), "scales": torch.ones(4, 64, dtype=HALF),
             "g_idx": torch.ones(128, dtype=INT32)},
            "gptq 4 bits, 32 a scale",
            16 * 64 * 4 + 4 * 8 * 4 + 4 * 64 * 2 + 128 * 4,
        ),
        (
            "mlx",
            {"weight": torch.ones(64, 12, dtype=torch.uint32), "scales": torch.ones(64, 2, dtype=HALF), "biases": torch.ones(64, 2, dtype=HALF)},
            "mlx 3 bits, 64 a scale",
            64 * 12 * 4 + 2 * 64 * 2 * 2,
        ),
        (
            "compressed-tensors",
            {"weight_packed": torch.ones(64, 8, dtype=INT32), "weight_scale": torch.ones(64, 4), "weight_shape": torch.ones(2, dtype=torch.int64)},
            "compressed-tensors 2 bits, 32 a scale",
            64 * 8 * 4 + 64 * 4 * 4 + 16,
        ),
        (
            "bitsandbytes",
            {"weight": torch.ones(4096, 1, dtype=torch.uint8), "weight.absmax": torch.ones(128), "weight.quant_map": torch.ones(16),
             "weight.quant_state.bitsandbytes__nf4": torch.ones(80, dtype=torch.uint8)},
            "bitsandbytes 4 bits",
            4096 + 512 + 64 + 80,
        ),
        (
            "fp8",
            {"weight": torch.ones(64, 128).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
            "fp8 fp8 e4m3",
            64 * 128 + 4,
        ),
    ],
)  # fmt: skip
def test_layouts(tmp_path: Path, method: str, parts: dict[str, torch.Tensor], stored: str, size: int):
    kinds = kinds_of_files(write(tmp_path, tensors(parts)), method, WEIGHTS)
    assert kinds == [
        StoredKind("embed_tokens", "bf16", 1, 1280, 2560),
        StoredKind("up_proj", stored, 2, 2 * 64 * 128, 2 * size),
        StoredKind(OTHERS, "f32", 1, 128, 512),
    ]


def test_a_gguf(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((64, 128), dtype=np.float16))
    blocks = gguf.quants.quantize(np.ones((64, 128), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.1.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.1.attn_norm.weight", np.ones(128, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert kinds_of_gguf(tmp_path / "a.gguf") == [
        StoredKind("ffn_up", "F16", 1, 8192, 16384),
        StoredKind("ffn_up", "Q8_0", 1, 8192, 8704),
        StoredKind(OTHERS, "F32", 1, 128, 512),
    ]
