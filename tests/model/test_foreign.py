"""Folders of other tools: every layout is packed here by plain loops, and the model must compute what one with these weights in it computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config, Qwen3_5Config, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.foreign import _Packed, _zeros, open_foreign, quantization_of, unpack_words
from bitatlas.model.linear import oriented
from exports import exported, make_plan
from tiny import make_checkpoint

WIDTH, GROUP = 128, 32
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "llama"
    return make_checkpoint(folder, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1)


# --- packing, by plain loops ---------------------------------------------------------------------------------------------


def words_of(values: list[int], bits: int) -> list[int]:
    """Codes one after the other in 32-bit words, the first in the lowest bits."""
    stream = sum(value << (bits * k) for k, value in enumerate(values))
    return [stream >> (32 * k) & 0xFFFFFFFF for k in range(-(-len(values) * bits // 32))]


def three_bits(v: list[int]) -> list[int]:
    """AutoGPTQ's layout of 32 codes of 3 bits in three words, as its `pack` spells it out."""
    return [
        sum(v[j] << (3 * j) for j in range(10)) | (v[10] & 3) << 30,
        v[10] >> 2 | sum(v[11 + j] << (3 * j + 1) for j in range(10)) | (v[21] & 1) << 31,
        v[21] >> 1 | sum(v[22 + j] << (3 * j + 2) for j in range(10)),
    ]


def gptq_words(values: list[int], bits: int) -> list[int]:
    if bits == 3:
        return [word for k in range(0, len(values), 32) for word in three_bits(values[k : k + 32])]
    return words_of(values, bits)


def awq_words(values: list[int]) -> list[int]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return [sum(values[k + order[i]] << (4 * i) for i in range(8)) for k in range(0, len(values), 8)]


def packed_rows(rows: np.ndarray, pack: Callable[[list[int]], list[int]]) -> torch.Tensor:
    """int32 [rows, words]"""
    return torch.from_numpy(np.array([pack(row) for row in rows.tolist()], dtype=np.uint32).view(np.int32))


class Random:
    """Codes, scales and zero-points of a module, and the weight that they stand for."""

    def __init__(self, out: int, width: int, bits: int, size: int, seed: int, smallest_zero: int = 1) -> None:
        rng = np.random.default_rng(seed)
        groups = width // size
        self.codes = rng.integers(0, 2**bits, (out, width))
        self.zeros = rng.integers(smallest_zero, 2**bits, (out, groups))
        self.scales = torch.from_numpy(rng.uniform(0.5, 1.5, (out, groups)) / 2**bits / 3).half()
        self.group = np.arange(width) // size

    def shuffled(self, seed: int) -> Random:
        self.group = np.random.default_rng(seed).permutation(self.group)
        return self

    def weight(self) -> torch.Tensor:
        scales = self.scales.double().numpy()[:, self.group]
        return torch.from_numpy((self.codes - self.zeros[:, self.group]) * scales).float()


def gptq_tensors(module: Random, bits: int, missing: int = 1, g_idx: bool = True) -> Tensors:
    zeros = (module.zeros.T - missing) % 2**bits
    tensors = {
        "qweight": packed_rows(module.codes, lambda row: gptq_words(row, bits)).T.contiguous(),
        "qzeros": packed_rows(zeros, lambda row: gptq_words(row, bits)),
        "scales": module.scales.T.contiguous(),
    }
    return {**tensors, "g_idx": torch.from_numpy(module.group).int()} if g_idx else tensors


def awq_tensors(module: Random) -> Tensors:
    return {
        "qweight": packed_rows(module.codes.T, awq_words),
        "qzeros": packed_rows(module.zeros.T, awq_words),
        "scales": module.scales.T.contiguous(),
    }


def mlx_tensors(module: Random, bits: int) -> tuple[Tensors, torch.Tensor]:
    """(tensors, weight). w = scale * code + bias."""
    biases = (torch.from_numpy(module.zeros) * -module.scales.double()).half()
    weight = torch.from_numpy(module.codes) * module.scales.double()[:, module.group] + biases.double()[:, module.group]
    words = packed_rows(module.codes, lambda row: words_of(row, bits)).view(torch.uint32)
    return {"weight": words, "scales": module.scales, "biases": biases}, weight.float()


# --- folders and what they compute ---------------------------------------------------------------------------------------


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            yield name, module


def write(plain: Path, place: Path, tensors: Tensors, dropped: list[str], **config: Any) -> Path:
    """A copy of `plain` with other tensors instead of `dropped`, and more in its config."""
    place.mkdir(parents=True)
    state = {key: value for key, value in load_file(plain / "model.safetensors").items() if key not in dropped}
    save_file(state | tensors, place / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((plain / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(content | config))
    for file in plain.glob("tokenizer*"):
        shutil.copy(file, place)
    return place


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(1, 41)[None], use_cache=False).logits


def check(folder: Path, plain: Path, weights: Tensors) -> None:
    """The folder's model is `plain` with `weights` [out, in] in it: to 1e-5 of the largest logit, as both multiply the same float32 numbers."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for name, weight in weights.items():
        module = model.get_submodule(name)
        module.weight.data = oriented(module, weight).contiguous()
    expected = logits(model)
    opened, how = open_foreign(folder, "x")
    assert how == "dequantized by bitatlas"
    assert not opened.training and not any(p.requires_grad or p.dtype != torch.float32 for p in opened.parameters())
    assert (logits(opened) - expected).abs().max() <= 1e-5 * expected.abs().max()


def quantized(plain: Path, place: Path, make: Callable[[Random, int], Tensors], bits: Callable[[int], int] | int, **more: Any):
    """(folder, weights): every linear module of `plain` packed by `make`. more: of `Random`, and `config`."""
    config, size = more.pop("config"), more.pop("size", GROUP)
    order = more.pop("order", False)
    model = AutoModelForCausalLM.from_pretrained(plain)
    tensors, weights = Tensors(), Tensors()
    for seed, (name, module) in enumerate(linears(model)):
        out, width = oriented(module, module.weight).shape
        width_bits = bits if isinstance(bits, int) else bits(seed)
        random = Random(out, width, width_bits, width if size == -1 else size, seed, **more)
        random = random.shuffled(seed) if order else random
        tensors |= {f"{name}.{part}": value for part, value in make(random, width_bits).items()}
        weights[name] = random.weight()
    return write(plain, place, tensors, [f"{name}.weight" for name in weights], quantization_config=config), weights


def gptq_config(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": False, **more}


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 3), st.integers(1, 5), st.data())
def test_words_hold_codes_bit_after_bit(bits: int, rows: int, blocks: int, data: st.DataObject):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * blocks * 32, max_size=rows * blocks * 32)))
    codes = codes.reshape(rows, blocks * 32)
    words = packed_rows(codes, lambda row: words_of(row, bits))
    assert torch.equal(unpack_words(words, bits), torch.from_numpy(codes).to(torch.uint8))
    assert torch.equal(unpack_words(words.view(torch.uint32), bits), unpack_words(words, bits))
    if bits == 3:
        assert torch.equal(packed_rows(codes, lambda row: gptq_words(row, 3)), words)


# --- GPTQ, AutoRound, AWQ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "missing"), [("gptq", 1), ("gptq_v2", 0), (None, 1)])
def test_gptq(bits: int, layout: str | None, missing: int, plain: Path, tmp_path: Path):
    config = gptq_config(bits, desc_act=True) | ({"checkpoint_format": layout} if layout else {})
    folder, weights = quantized(
        plain, tmp_path / "q", lambda m, b: gptq_tensors(m, b, missing), bits, config=config, order=True, smallest_zero=missing
    )
    check(folder, plain, weights)


@pytest.mark.parametrize(("size", "g_idx"), [(-1, True), (-1, False), (64, False)])
def test_gptq_groups(size: int, g_idx: bool, plain: Path, tmp_path: Path):
    config = gptq_config(4, group_size=size)
    folder, weights = quantized(plain, tmp_path / "q", lambda m, b: gptq_tensors(m, b, 1, g_idx), 4, config=config, size=size)
    check(folder, plain, weights)


def test_gptq_of_modules_that_keep_their_weights_the_other_way_round(tmp_path: Path):
    plain = make_checkpoint(tmp_path / "gpt2", "gpt2", n_layer=1)
    folder, weights = quantized(plain, tmp_path / "q", gptq_tensors, 4, config=gptq_config(4))
    check(folder, plain, weights)


def test_gptq_with_its_settings_beside_the_config(plain: Path, tmp_path: Path):
    folder, weights = quantized(plain, tmp_path / "q", gptq_tensors, 4, config=None)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP, "desc_act": False}))
    check(folder, plain, weights)


@pytest.mark.parametrize(
    ("writer", "bits"), [("gptqmodel:5.8.0", 2), ("gptqmodel:5.8.0", 3), ("gptqmodel:7.7.0", 4), ("gptqmodel:7.7.0", 8)]
)
def test_gptqmodel_subtracts_from_whole_words(writer: str, bits: int, tmp_path: Path):
    """Its own constants, of `convert_gptq_v2_to_v1_format_module`: a zero-point of 0 borrows of the one above."""
    constants = {2: [0b01010101010101010101010101010101], 4: [0x11111111], 8: [0x01010101]}
    constants[3] = [0b00100100100100100100100100100100, 0b10010010010010010010010010010010, 0b01001001001001001001001001001001]
    zeros = np.random.default_rng(bits).integers(0, 2**bits, (4, 64))
    words = packed_rows(zeros, lambda row: gptq_words(row, bits)).numpy().view(np.uint32)
    one = np.array([constants[bits][k % len(constants[bits])] for k in range(words.shape[1])], dtype=np.uint32)
    stored = torch.from_numpy((words - one).view(np.int32))
    packed = _Packed("x", None, {"meta": {"quantizer": [writer]}})  # type: ignore[arg-type]
    assert torch.equal(_zeros(packed, stored, bits, 1), torch.from_numpy(zeros).to(torch.uint8))


@pytest.mark.parametrize(
    ("layout", "missing"), [("auto_round:auto_gptq", 1), ("auto_round:gptq", 1), ("auto_round:gptqmodel", 0), ("auto_round", 0)]
)
def test_autoround(layout: str, missing: int, plain: Path, tmp_path: Path):
    """Modules of several widths, as `extra_config` says, and no g_idx."""
    config = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "packing_format": layout}
    config["extra_config"] = {"model.layers.0.self_attn.q_proj": {"bits": 8}}
    folder, weights = quantized(
        plain, tmp_path / "q", lambda m, b: gptq_tensors(m, b, missing, False), lambda k: (8, 4, 2, 3)[k % 4], config=config
    )
    check(folder, plain, weights)


@pytest.mark.parametrize("sidecar", [False, True])
@pytest.mark.parametrize("method", ["awq", "auto-round"])
def test_awq(method: str, sidecar: bool, plain: Path, tmp_path: Path):
    config = {"quant_method": method, "bits": 4, "group_size": GROUP, "zero_point": True}
    config |= {"version": "GEMM"} if method == "awq" else {"packing_format": "auto_round:auto_awq"}
    folder, weights = quantized(plain, tmp_path / "q", lambda m, _: awq_tensors(m), 4, config=None if sidecar else config)
    if sidecar:
        told = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"} if method == "awq" else config
        (folder / "quant_config.json").write_text(json.dumps(told))
    check(folder, plain, weights)


# --- MLX -----------------------------------------------------------------------------------------------------------------

# mx.quantize and mx.dequantize of mlx 0.32.4 on RandomState(bits).randint(-8, 9, 32) / 4: words, scale, bias, weights
GOLDEN = {
    3: (
        [3024956650, 2891765398, 2405630153], -0.6666666865348816, 2.0,
        [0.6666666, -1.3333335, 0.0, -2.0, 0.6666666, 0.6666666, 0.0, 0.6666666, -0.6666667, -2.0, 0.6666666, 0.0, 1.3333333, -1.3333335, -1.3333335,
         -2.0, -0.6666667, 0.0, 1.3333333, -2.0, 0.6666666, 0.0, 0.6666666, -2.0, 2.0, 2.0, -0.6666667, 1.3333333, -2.0, -2.0, 0.0, -0.6666667],
    ),
    5: (
        [470419610, 2298483396, 684196996, 3463650351, 132923467], -0.125, 2.0,
        [-1.25, 1.5, 1.75, -0.5, 2.0, 0.25, 0.0, -1.0, -0.25, 2.0, 2.0, -0.25, 1.0, 1.75, -0.25, 2.0, 1.0, 1.25, 0.75, -1.75, 1.75, 0.25, 0.5, 0.25,
         0.25, -1.75, -0.25, 2.0, 1.5, -0.75, -1.875, 2.0],
    ),
    6: (
        [225146778, 3581870497, 3431235344, 4232562879, 1005540427, 1473183935], -0.05882352963089943, 2.0,
        [0.4705882, 0.2352941, -1.2352941, 0.4705882, 1.2352941, 1.7647059, 0.4705882, 2.0, -1.7058823, 0.7647059, 1.2352941, 1.7647059, -1.7058823,
         1.0, 1.5294118, -1.0, -1.7058823, 0.0, -1.5294118, 1.0, -1.5294118, -0.7647059, 1.7647059, 0.7647059, -0.7647059, -0.7647059, -1.0,
         -0.7647059, 2.0, -1.5294118, -1.5294118, 0.7647059],
    ),
}  # fmt: skip
# the same on RandomState(bits).randint(-60, 61, 32) / 4: bits, group size, words, scales, weights
GOLDEN_MODES = {
    "mxfp4": (
        4, 32, [2436227482, 160716045, 3915098549, 95603870], [129],
        [-4, -2, 2, -16, 12, 6, 2, -2, -12, 0, 12, 12, 8, -2, -2, 0, 12, -6, -2, -4, -6, 12, -2, -16, -16, -2, -8, -8, 4, -6, 12, 0],
    ),
    "mxfp8": (
        8, 32, [2071819366, 1962768382, 2095864955, 2129330292, 4236048494, 2029736189, 4244295802, 4259346554], [122],
        [1.75, 6, 13, 11, -14, 7.5, -13, 6, 11, 0.75, -3, 12, 6, 0, -2.75, 14, 3.5, -8, 12, -12, -13, 0.25, -11, 8, 10, -0.25, -10, -12, 10, 8, -1, -13],
    ),
    "nvfp4": (
        4, 16, [2723607195, 2576705039, 4201429702, 2529423007], [66, 66],
        [-3.75, -1.25, 2.5, -15, 10, 7.5, 2.5, -2.5, -15, 0, 10, 10, 7.5, -1.25, -1.25, -1.25, 10, -5, -2.5, -3.75, -5, 10, -2.5, -15, -15, -1.25,
         -10, -10, 3.75, -5, 10, -1.25],
    ),
}  # fmt: skip


def mlx_folder(
    plain: Path, place: Path, formats: Callable[[str], tuple[int, int]], names: list[str], **settings: Any
) -> tuple[Path, Tensors]:
    tensors, weights = Tensors(), Tensors()
    shapes = {key.removesuffix(".weight"): tuple(value.shape) for key, value in load_file(plain / "model.safetensors").items()}
    for seed, name in enumerate(names):
        bits, size = formats(name)
        parts, weights[name] = mlx_tensors(Random(*shapes[name], bits, size, seed), bits)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    told = {"bits": 4, "group_size": GROUP, **settings}
    dropped = [f"{name}.weight" for name in names]
    return write(plain, place, tensors, dropped, quantization=told, quantization_config=told), weights


def linear_names(plain: Path) -> list[str]:
    return [name for name, _ in linears(AutoModelForCausalLM.from_pretrained(plain))]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int, plain: Path, tmp_path: Path):
    """Embeddings that are the head, too, are quantized as well."""
    names = [*linear_names(plain), "model.embed_tokens"]
    folder, weights = mlx_folder(plain, tmp_path / "q", lambda _: (bits, 64), names, bits=bits, group_size=64)
    assert quantization_of(folder) == ("mlx", {"bits": bits, "group_size": 64})
    check(folder, plain, weights)


def test_mlx_modules_have_formats_of_their_own(plain: Path, tmp_path: Path):
    q, v, *others = linear_names(plain)
    formats = {q: (6, 64), others[0]: (3, GROUP)}
    told = {name: {"bits": bits, "group_size": size} for name, (bits, size) in formats.items()} | {v: False}
    folder, weights = mlx_folder(plain, tmp_path / "q", lambda name: formats.get(name, (4, GROUP)), [q, *others], **told)
    check(folder, plain, weights)


@pytest.mark.parametrize("bits", GOLDEN)
def test_mlx_golden(bits: int, plain: Path, tmp_path: Path):
    """One group of mlx's own in every row of q_proj."""
    words, scale, bias, weight = GOLDEN[bits]
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.weight": torch.tensor([words * 4] * WIDTH, dtype=torch.uint32),
        f"{name}.scales": torch.full((WIDTH, 4), scale),
        f"{name}.biases": torch.full((WIDTH, 4), bias),
    }
    folder = write(plain, tmp_path / "q", tensors, [f"{name}.weight"], quantization={"bits": bits, "group_size": 32})
    opened = open_foreign(folder, "x")[0].get_submodule(name).weight
    assert (opened - torch.tensor([weight * 4])).abs().max() <= 1e-6  # mlx's own float32 rounds the product and the sum at once


@pytest.mark.parametrize("mode", GOLDEN_MODES)
def test_mlx_modes_golden(mode: str, plain: Path, tmp_path: Path):
    bits, size, words, scales, weight = GOLDEN_MODES[mode]
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.weight": torch.tensor([words * 4] * WIDTH, dtype=torch.uint32),
        f"{name}.scales": torch.tensor([scales * 4] * WIDTH, dtype=torch.uint8),
    }
    folder = write(
        plain, tmp_path / "q", tensors, [f"{name}.weight"], quantization={"bits": bits, "group_size": size, "mode": mode}
    )
    assert torch.equal(open_foreign(folder, "x")[0].get_submodule(name).weight, torch.tensor([weight * 4] * WIDTH))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_itself(bits: int, plain: Path, tmp_path: Path):
    mx = pytest.importorskip("mlx.core")
    weight = load_file(plain / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    parts = mx.quantize(mx.array(weight.numpy()), group_size=32, bits=bits)
    tensors = {
        f"model.layers.0.mlp.up_proj.{p}": torch.from_numpy(np.array(v))
        for p, v in zip(("weight", "scales", "biases"), parts, strict=True)
    }
    folder = write(plain, tmp_path / "q", tensors, [], quantization={"bits": bits, "group_size": 32})
    expected = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=32, bits=bits)))
    assert (open_foreign(folder, "x")[0].model.layers[0].mlp.up_proj.weight - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_our_own_mlx_folder(family: str, tmp_path: Path):
    """What `export --to mlx` wrote is opened; its weights are the plan's."""
    plain = make_checkpoint(tmp_path / "plain", family, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1)
    checkpoint = open_checkpoint(str(plain), fuse=False)
    names = [module.name for module in checkpoint.modules]
    formats = {name: ("int2_g32", "int3_g64", "int4_g128_sym", "int8_g32")[k % 4] for k, name in enumerate(names[:-1])}
    plan = make_plan(formats, checkpoint.info.weights_sha256)
    folder = exported(plan, tmp_path / "here", "mlx", plain).out
    from bitatlas.quantize import rtn
    from bitatlas.records.formats import FORMATS

    decoder = checkpoint.load_model()
    check(folder, plain, {name: rtn.quantize(decoder.weight(name), FORMATS[fmt]).weight() for name, fmt in formats.items()})


def test_mlx_names_of_gpt_neox(tmp_path: Path):
    """mlx-lm calls layers model.h, and everything else model, too."""
    plain = make_checkpoint(tmp_path / "plain", "gpt_neox", num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    folder, weights = mlx_folder(plain, tmp_path / "q", lambda _: (4, GROUP), linear_names(plain)[:-1])
    state = load_file(folder / "model.safetensors")
    theirs = {
        ("model." + key.removeprefix("gpt_neox.")).replace("model.layers.", "model.h."): value for key, value in state.items()
    }
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    check(folder, plain, weights)


def test_mlx_stacked_experts(tmp_path: Path):
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_experts=4, num_experts_per_tok=2, vocab_size=300, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    tensors, dropped, fused = Tensors(), [], {}
    for k, part in enumerate(("gate_proj", "up_proj", "down_proj")):
        shape = (64, 32) if part == "down_proj" else (32, 64)
        experts = [mlx_tensors(Random(*shape, 4, GROUP, 10 * k + e), 4) for e in range(4)]
        for suffix in ("weight", "scales", "biases"):
            stacked = [parts[suffix].view(torch.int32) if suffix == "weight" else parts[suffix] for parts, _ in experts]
            stack = torch.stack(stacked)
            tensors[f"model.layers.0.mlp.switch_mlp.{part}.{suffix}"] = stack.view(torch.uint32) if suffix == "weight" else stack
        dropped += [f"model.layers.0.mlp.experts.{e}.{part}.weight" for e in range(4)]
        fused[part] = torch.stack([weight for _, weight in experts])
    folder = write(plain, tmp_path / "q", tensors, dropped, quantization={"bits": 4, "group_size": GROUP})
    experts_of = model.model.layers[0].mlp.experts
    experts_of.gate_up_proj.data = torch.cat([fused["gate_proj"], fused["up_proj"]], 1)
    experts_of.down_proj.data = fused["down_proj"]
    expected = logits(model)
    assert (logits(open_foreign(folder, "x")[0]) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_mlx_text_part_of_a_model_that_sees(tmp_path: Path):
    """mlx-lm keeps the text part alone, norms as 1 + w and convolutions as [channels, width, 1]: `qwen3_5.Model.sanitize` of mlx_lm 0.32."""
    text = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 300, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, architectures=["Qwen3_5ForConditionalGeneration"])
    model = AutoModelForCausalLM.from_config(config.text_config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    weight = mlx_tensors(Random(64, 64, 4, GROUP, 0), 4)
    state = dict(model.state_dict())
    model.model.layers[0].mlp.up_proj.weight.data = weight[1]
    expected = logits(model)
    state = {key: value + 1 if "norm" in key and "linear_attn" not in key else value for key, value in state.items()}
    state = {key: value.transpose(1, 2).contiguous() if "conv1d" in key else value for key, value in state.items()}
    state |= {f"model.layers.0.mlp.up_proj.{part}": value for part, value in weight[0].items()}
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "quantization": {"bits": 4, "group_size": GROUP}}))
    save_file({f"language_model.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
    assert (logits(open_foreign(tmp_path, "x")[0]) - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- fp8, mxfp4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["block", "short block", "tensor", "row", "exponents"])
def test_fp8(kind: str, plain: Path, tmp_path: Path):
    block = {"block": (32, 64), "short block": (48, 100), "exponents": (32, 64)}.get(kind)
    tensors, weights = Tensors(), Tensors()
    for name in linear_names(plain):
        before = load_file(plain / "model.safetensors")[f"{name}.weight"]
        codes = (before * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        out, width = before.shape
        shape = {"tensor": (), "row": (out, 1)}.get(kind) or ((-(-out // block[0]), -(-width // block[1])) if block else ())
        scale = torch.rand(shape) / 50 + 0.005
        stored = torch.randint(119, 123, shape, dtype=torch.uint8) if kind == "exponents" else scale
        scale = 2.0 ** (stored.float() - 127) if kind == "exponents" else scale
        weight = codes.float()
        for i in range(out):
            for j in range(width):
                at = (i // block[0], j // block[1]) if block else (i, 0) if kind == "row" else ()
                weight[i, j] *= scale[at]
        suffix = "weight_scale" if kind == "row" else "weight_scale_inv"
        tensors |= {f"{name}.weight": codes, f"{name}.{suffix}": stored, f"{name}.activation_scale": torch.ones(())}
        weights[name] = weight
    config = {"quant_method": "fbgemm_fp8" if kind == "row" else "fp8", "weight_block_size": list(block) if block else None}
    check(write(plain, tmp_path / "q", tensors, [], quantization_config=config), plain, weights)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path):
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_local_experts=4,
        num_experts_per_tok=2, vocab_size=300, layer_types=["full_attention"], architectures=["GptOssForCausalLM"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "plain")
    tensors, dropped = Tensors(), []
    for part in ("gate_up_proj", "down_proj"):
        stem = f"model.layers.0.mlp.experts.{part}"
        rows = 128 if part == "gate_up_proj" else 64
        tensors[f"{stem}_blocks"] = torch.randint(256, (4, rows, 2, 16), dtype=torch.uint8)
        tensors[f"{stem}_scales"] = torch.randint(118, 124, (4, rows, 2), dtype=torch.uint8)
        dropped.append(stem)
    folder = write(tmp_path / "plain", tmp_path / "q", tensors, dropped, quantization_config={"quant_method": "mxfp4"})
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    ).eval()
    expected = logits(theirs.float())
    assert (logits(open_foreign(folder, "x")[0]) - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- what is refused -----------------------------------------------------------------------------------------------------

Change = Callable[[Tensors, dict[str, Any]], object]
Q = "model.layers.0.self_attn.q_proj"
REFUSED: list[tuple[str, Change, str]] = [
    ("bits 7", lambda t, c: c.update(bits=7), "its settings say bits 7, but this layout has 2, 3, 4, 8"),
    ("other bits", lambda t, c: c.update(bits=8), "its shapes are those of 4 bits, but its settings say 8"),
    ("marlin", lambda t, c: c.update(checkpoint_format="marlin"), "GPTQ weights in the marlin layout are not unpacked, only gptq and gptq_v2 are"),
    ("no scales", lambda t, c: t.pop(f"{Q}.scales"), f"the weights lack {Q}.scales"),
    ("no codes", lambda t, c: [t.pop(key) for key in list(t) if key.startswith(Q)], f"the weights lack {Q}.weight"),
    ("shape", lambda t, c: t.update({f"{Q}.qzeros": torch.zeros(4, 3, dtype=torch.int32)}), "which are no codes of 2, 3, 4, 8 bits"),
    ("flat", lambda t, c: t.update({f"{Q}.qzeros": torch.zeros(4, dtype=torch.int32)}), "which are no codes of 2, 3, 4, 8 bits"),
    ("g_idx", lambda t, c: t.update({f"{Q}.g_idx": torch.full((WIDTH,), 9)}), f"{Q}.g_idx does not give each of 128 inputs one of 4 groups"),
    ("rows", lambda t, c: t.update({f"{Q}.qweight": torch.zeros(8, WIDTH, dtype=torch.int32)}), f"{Q}.g_idx does not give each of 64 inputs"),
    ("bias", lambda t, c: t.update({f"{Q}.bias": torch.ones(WIDTH)}), f"the weights hold {Q}.bias, which transformers' llama has no place for"),
    ("act scales", lambda t, c: t.update({"model.layers.0.mlp.act.scales": torch.ones(WIDTH)}), "the weights hold model.layers.0.mlp.act.scales"),
    ("exl2", lambda t, c: c.update(quant_method="exl2"), "exl2 weights need exllamav2 and an NVIDIA GPU"),
    ("exl3", lambda t, c: c.update(quant_method="exl3"), "exl3 weights need exllamav3 and an NVIDIA GPU"),
    ("eetq", lambda t, c: c.update(quant_method="eetq"), "eetq weights need a GPU"),
    ("hqq", lambda t, c: c.update(quant_method="hqq"), "no longer loads what hqq quantized"),
    ("quark", lambda t, c: c.update(quant_method="quark"), "quantized by quark, and transformers cannot load it"),
    ("own", lambda t, c: c.update(quant_method="mine"), "mine weights are read neither by bitatlas nor by transformers"),
    ("aqlm", lambda t, c: c.update(quant_method="aqlm"), "pip install 'aqlm[cpu]'"),
    ("unnamed", lambda t, c: c.pop("quant_method"), "a quantization_config without quant_method"),
    ("awq gemv", lambda t, c: c.update(quant_method="awq", version="gemv"), "AWQ weights of version gemv are laid out for one kernel"),
    ("awq bits", lambda t, c: c.update(quant_method="awq", bits=8), "its settings say bits 8, but this layout has 4"),
    ("awq layout", lambda t, c: c.update(quant_method="awq"), "these are not AWQ's gemm layout"),
    ("auto-round", lambda t, c: c.update(quant_method="auto-round", packing_format="auto_round:fp8_static"), "packed as auto_round:fp8_static"),
    ("nothing", lambda t, c: c.update(quant_method="mxfp4"), "config.json says mxfp4, but no tensor of the weights is quantized so"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), [entry[1:] for entry in REFUSED], ids=[entry[0] for entry in REFUSED])
def test_refused(change: Change, line: str, plain: Path, tmp_path: Path):
    module, config = Random(WIDTH, WIDTH, 4, GROUP, 0), gptq_config(4)
    tensors = {f"{Q}.{part}": value for part, value in gptq_tensors(module, 4).items()}
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(64)  # of old writers; it changes nothing
    change(tensors, config)
    if not any("qweight" in key for key in tensors):
        tensors |= {f"model.layers.0.mlp.up_proj.{part}": value for part, value in gptq_tensors(module, 4).items()}
    folder = write(plain, tmp_path / "q", tensors, [f"{Q}.weight"], quantization_config=config)
    with pytest.raises(UserError) as refused:
        open_foreign(folder, "the-name")
    assert str(refused.value).startswith("the-name: ") and line in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"bits": 7}, "quantization says 7 bits in groups of 32, mode affine"),
        ({"bits": "4"}, "quantization says '4' bits"),
        ({"mode": "mxfp4", "bits": 4, "group_size": 64}, "quantization says 4 bits in groups of 64, mode mxfp4"),
        ({"mode": "other"}, "mode other"),
        ({"bits": 8}, "which are no 8 bits in groups of 32"),
        ({"group_size": 64, "bits": 2}, "has shape (128, 256) once unpacked, but the config says (128, 128)"),
        ({Q: {"bits": 3}}, f"{Q}.weight has shape (128, 16), and its scales (128, 4), which are no 3 bits in groups of 32"),
    ],
)
def test_mlx_refused(settings: dict[str, Any], line: str, plain: Path, tmp_path: Path):
    folder, _ = mlx_folder(plain, tmp_path / "q", lambda _: (4, GROUP), [Q], **settings)
    with pytest.raises(UserError) as refused:
        open_foreign(folder, "the-name")
    assert line in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"scales": torch.ones(WIDTH, 4, dtype=torch.uint8)},
        {"biases": torch.ones(WIDTH, 3)},
        {"weight": torch.ones(16, dtype=torch.uint32)},
    ],
    ids=["dtype", "biases", "flat"],
)
def test_mlx_tensors_that_do_not_fit(change: Tensors, plain: Path, tmp_path: Path):
    folder, _ = mlx_folder(plain, tmp_path / "q", lambda _: (4, GROUP), [Q])
    state = load_file(folder / "model.safetensors") | {f"{Q}.{part}": value for part, value in change.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="which are no 4 bits in groups of 32"):
        open_foreign(folder, "the-name")


def test_fp8_refused(plain: Path, tmp_path: Path):
    def folder(scale: Tensors, **config: Any) -> Path:
        tensors = {f"{Q}.weight": torch.zeros(WIDTH, WIDTH).to(torch.float8_e4m3fn), **scale}
        return write(
            plain,
            tmp_path / str(len(list(tmp_path.iterdir()))),
            tensors,
            [],
            quantization_config={"quant_method": "fp8", **config},
        )

    grid = {f"{Q}.weight_scale_inv": torch.ones(3, 3)}
    for place, line in (
        (folder({}), f"{Q}.weight is stored as F8_E4M3, and has no scale"),
        (folder(grid), "need a weight_block_size of two numbers"),
        (folder(grid, weight_block_size=[64, 64]), "its scales have shape (3, 3), but blocks of 64 by 64 need (2, 2)"),
    ):
        with pytest.raises(UserError) as refused:
            open_foreign(place, "the-name")
        assert line in str(refused.value)


def test_what_a_folder_is(plain: Path, tmp_path: Path):
    assert quantization_of(plain) is None and quantization_of(tmp_path) is None
    with pytest.raises(ValueError, match="no quantization"):
        open_foreign(plain, "x")
    for n, (config, method) in enumerate(
        [
            ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
            ({"quantization_config": {"quant_method": "AWQ"}}, "awq"),
            ({"quantization_config": {"quant_method": "intel/auto-round"}}, "auto-round"),
            ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
            ({"quantization": {"bits": 4}}, "mlx"),
            ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "mlx"),
            ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ]
    ):
        folder = write(plain, tmp_path / str(n), {}, [], **config)
        found = quantization_of(folder)
        assert found is not None and found[0] == method
        if method == "compressed-tensors":
            with pytest.raises(ValueError, match=method):
                open_foreign(folder, "x")


@pytest.mark.parametrize(
    ("method", "package"), [("bitsandbytes", "bitsandbytes"), ("torchao", "torchao"), ("quanto", "optimum-quanto")]
)
def test_packages_that_are_missing_are_named(
    method: str, package: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("bitatlas.model.foreign.find_spec", lambda _: None)
    folder = write(plain, tmp_path / "q", {}, [], quantization_config={"quant_method": method})
    with pytest.raises(UserError, match=f"not here yet: pip install '{package}'"):
        open_foreign(folder, "x")
