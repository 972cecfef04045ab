"""What each runtime is given, from one small plan, against expectations written by hand; and the numbers in what carries weights."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import runtimes
from bitatlas.errors import UserError
from bitatlas.export import mlx, recipes
from bitatlas.export.targets import TARGETS
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize import rtn
from bitatlas.quantize.codes import Codes
from bitatlas.records.formats import FORMATS, Format
from exports import SMALL, exported, make_plan, refusal
from tiny import make_checkpoint

INT4 = {"bits": 4, "group_size": 64, "sym": False}
INT2 = {"bits": 2, "group_size": 32, "sym": False}


def content(place: Path, file: str) -> dict:
    text = (place / "out" / file).read_text(encoding="utf-8")
    return yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)


def test_the_page_says_what_was_measured():
    """Its table is the one of the results, and every runtime has its row."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "runtimes.md").read_text(encoding="utf-8")
    assert f"{runtimes.BEGIN}\n{runtimes.table(json.loads(runtimes.RESULTS.read_text()))}\n{runtimes.END}" in page
    assert set(TARGETS) <= set(runtimes.ROWS)


# --- recipes -----------------------------------------------------------------------------------------------------------


def test_gptqmodel(tmp_path: Path):
    exported(SMALL, tmp_path, "gptqmodel")
    assert content(tmp_path, "quantize_config.json") == {
        **INT4,
        "desc_act": False,
        "dynamic": {
            r"^model\.layers\.1\.self_attn\.q_proj$": INT4,
            r"^model\.layers\.1\.mlp\.up_proj$": INT2,
            r"^model\.layers\.10\.mlp\.up_proj$": INT4,
        },
    }


def test_a_rule_matches_its_own_module_alone():
    """By the library's own reading: `match` from the beginning. A dot is a dot, and layer 1 is not layer 10."""
    layers = [
        f"{root}.layers.{k}.mlp.{part}" for root in ("model", "smodel") for k in (1, 10, 11, 100, 0) for part in ("up", "up_proj")
    ]
    names = [*layers, "model.layers.1.mlp", "model.layersx1.mlp.up", "model.layers.1.mlp.up.inner"]
    for name in layers:
        assert [other for other in names if re.match(recipes.rule(name), other)] == [name]


def test_modules_that_stay_are_named(tmp_path: Path):
    """Of a checkpoint whose modules are known: the one that the plan leaves out is told to every runtime that needs it."""
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    checkpoint = open_checkpoint(str(model))
    kept = "model.layers.0.mlp.gate_proj"
    modules = {m.name: "int4_g32_sym" for m in checkpoint.modules if m.name != kept}
    plan = make_plan(modules, checkpoint.info.weights_sha256)
    for target in ("gptqmodel", "autoround", "llm-compressor", "exllamav3", "torchao"):
        exported(plan, tmp_path / target, target, model)
    dynamic = content(tmp_path / "gptqmodel", "quantize_config.json")["dynamic"]
    assert [rule for rule in dynamic if rule.startswith("-:")] == [r"-:^model\.layers\.0\.mlp\.gate_proj$"]
    told = content(tmp_path / "autoround", "autoround.json")
    assert told["layer_config"][kept] == {"bits": 16, "data_type": "float"} == told["extra_config"][kept]
    groups = content(tmp_path / "llm-compressor", "recipe.yaml")["default_stage"]["default_modifiers"]["GPTQModifier"]
    assert groups["ignore"] == ["lm_head", kept]
    tensors = content(tmp_path / "exllamav3", "recipe.yaml")["tensors"]
    assert tensors.pop(kept) == 16 and set(tensors.values()) == {4} and set(tensors) == set(modules)  # all, and no other
    assert kept not in content(tmp_path / "torchao", "torchao.json")["_data"]["fqn_to_config"]


def test_autoround(tmp_path: Path):
    exported(SMALL, tmp_path, "autoround")
    int4, int2 = ({**scheme, "data_type": "int"} for scheme in (INT4, INT2))
    assert content(tmp_path, "autoround.json") == {
        "scheme": INT4,
        "layer_config": {
            "model.layers.1.self_attn.q_proj": int4,
            "model.layers.1.mlp.up_proj": int2,
            "model.layers.10.mlp.up_proj": int4,
        },
        "extra_config": {"model.layers.1.mlp.up_proj": {"bits": 2, "group_size": 32}},  # what differs, as its checkpoints say it
    }
    said = refusal(make_plan({"m": "int8_g64"}), tmp_path / "eight", "autoround")
    assert said.endswith("m has the format int8_g64, which autoround cannot hold; the nearest that it can is int8_g64_sym")


def test_torchao(tmp_path: Path):
    exported(make_plan({"a.b": "int3_g128_sym", "a.c": "int2_g32"}), tmp_path, "torchao")

    def told(dtype: str, size: int, mapping: str) -> dict:
        return {
            "_type": "IntxWeightOnlyConfig",
            "_version": 2,
            "_data": {
                "weight_dtype": {"_type": "torch.dtype", "_data": dtype},
                "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}},
                "mapping_type": {"_type": "MappingType", "_data": mapping},
            },
        }

    assert content(tmp_path, "torchao.json") == {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {
            "fqn_to_config": {"a.b": told("int3", 128, "SYMMETRIC"), "a.c": told("int2", 32, "ASYMMETRIC")},
            "module_fqn_to_config": {},
        },
    }


@pytest.mark.parametrize(("file", "modifier"), [("recipe.yaml", "GPTQModifier"), ("recipe-rtn.yaml", "QuantizationModifier")])
def test_llm_compressor(tmp_path: Path, file: str, modifier: str):
    exported(SMALL, tmp_path, "llm-compressor")
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64, "dynamic": False}
    groups = {
        "int4_g64": {"targets": ["model.layers.1.self_attn.q_proj", "model.layers.10.mlp.up_proj"], "weights": weights},
        "int2_g32": {"targets": ["model.layers.1.mlp.up_proj"], "weights": {**weights, "num_bits": 2, "group_size": 32}},
    }
    stage = {"default_modifiers": {modifier: {"ignore": ["lm_head"], "config_groups": groups}}}
    assert content(tmp_path, file) == {"default_stage": stage}


def test_its_groups_are_what_the_package_expects(tmp_path: Path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    exported(SMALL, tmp_path, "llm-compressor")
    groups = content(tmp_path, "recipe.yaml")["default_stage"]["default_modifiers"]["GPTQModifier"]["config_groups"]
    schemes = {name: quantization.QuantizationScheme.model_validate(group) for name, group in groups.items()}
    assert (schemes["int2_g32"].weights.num_bits, schemes["int2_g32"].weights.group_size) == (2, 32)


def test_llm_compressor_notes_what_vllm_would_fuse(tmp_path: Path):
    plan = make_plan({"l.0.self_attn.q_proj": "int4_g64", "l.0.self_attn.v_proj": "int2_g64"})
    assert any("vLLM runs l.0.self_attn.q_proj and l.0.self_attn.v_proj" in note for note in exported(plan, tmp_path, "llm-compressor").notes)  # fmt: skip


def test_exllamav3(tmp_path: Path):
    said = refusal(SMALL, tmp_path / "alone", "exllamav3")
    assert said == "--to exllamav3: its recipe names every linear module of the model, so it needs --model"
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    checkpoint = open_checkpoint(str(model))
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    exported(make_plan({up: "int2_g32", down: "int3_g32"}, checkpoint.info.weights_sha256), tmp_path / "here", "exllamav3", model)
    recipe = content(tmp_path / "here", "recipe.yaml")
    assert (recipe["target_bpw"], recipe["head_bits"]) == (2.5, 16)
    assert recipe["tensors"] == {m.name: {up: 2, down: 3}.get(m.name, 16) for m in checkpoint.modules}
    for file in ("recipe.yaml", "README.md"):
        assert "codebook" in (tmp_path / "here" / "out" / file).read_text()


def test_vllm_is_given_what_apply_writes(tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    checkpoint = open_checkpoint(str(model))
    sha256 = checkpoint.info.weights_sha256
    modules = {m.name: "int4_g32_sym" for m in checkpoint.modules}
    out = exported(make_plan(modules, sha256), tmp_path / "good", "vllm", model).out
    assert {"model.safetensors", "config.json", "plan.json"} <= {file.name for file in out.iterdir()}
    assert not list((tmp_path / "good" / "out").glob(".*"))
    said = refusal(
        make_plan({**modules, "model.layers.0.mlp.up_proj": "int3_g32_sym"}, sha256), tmp_path / "split", "vllm", model
    )
    assert "model.layers.0.mlp.up_proj has the format int3_g32_sym and model.layers.0.mlp.gate_proj int4_g32_sym" in said
    assert "nearest that it can is int4_g32_sym" in refusal(make_plan({"m": "int4_g32"}), tmp_path / "zeros", "vllm", model)
    assert "needs --model" in refusal(make_plan(modules, sha256), tmp_path / "alone", "vllm")


@pytest.mark.parametrize("target", ["torchao", "llm-compressor", "gptqmodel", "autoround"])
def test_scripts_are_programs(target: str, tmp_path: Path):
    """They parse, and the files that they read are those that are written."""
    out = exported(SMALL, tmp_path, target).out
    source = (out / "quantize.py").read_text(encoding="utf-8")
    ast.parse(source)
    files = re.findall(r'"([\w-]+\.(?:json|yaml))"', source)
    assert files and all((out / file).is_file() for file in files)


# --- MLX: our own codes ------------------------------------------------------------------------------------------------


def unpacked(words: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Codes [out, width] of uint32 words [out, width * bits / 32]: code k is the bits k*bits .. (k+1)*bits - 1 of its row, lowest first."""
    found = np.zeros((len(words), width), dtype=np.int64)
    for row in range(len(words)):
        whole = sum(int(word) << (32 * place) for place, word in enumerate(words[row]))
        for k in range(width):
            found[row, k] = (whole >> (k * bits)) & (2**bits - 1)
    return found


def dequantized(tensors: dict[str, np.ndarray], bits: int, group_size: int) -> np.ndarray:
    """w = scale * q + bias, in float64."""
    width = tensors["scales"].shape[1] * group_size
    scale, bias = (np.repeat(tensors[part].astype(np.float64), group_size, axis=1) for part in ("scales", "biases"))
    return scale * unpacked(tensors["weight"].view(np.uint32), bits, width) + bias


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 2**32))  # fmt: skip
def test_mlx_packing(bits: int, size: int, groups: int, out: int, symmetric: bool, seed: int):
    fmt = Format(bits, size, symmetric, zero_bits=0 if symmetric else 16)
    codes = rtn.quantize(torch.randn(out, groups * size, generator=torch.Generator().manual_seed(seed)), fmt)
    exact, half = (
        {name: tensor.numpy() for name, tensor in mlx.tensors(codes, fmt, dtype).items()}
        for dtype in (torch.float32, torch.float16)
    )
    assert exact["weight"].shape == (out, groups * size * bits // 32)
    ours = codes.weight().double().numpy()
    steps = codes.scale.double().numpy().max()
    # float32 holds scale * zero exactly, so what is left is the rounding of our own float32 product.
    assert np.abs(dequantized(exact, bits, size) - ours).max() <= 2.0**-23 * np.abs(ours).max()
    assert np.abs(dequantized(half, bits, size) - ours).max() <= 2.0**bits * 2.0**-11 * steps


def test_mlx_takes_zero_points_between_codes():
    """As hqq makes them."""
    fmt = FORMATS["int2_g32"]
    codes = Codes(torch.full((1, 32), 3, dtype=torch.uint8), torch.tensor([[0.5]]).half(), torch.tensor([[1.25]]).half(), 32)
    tensors = {name: tensor.numpy() for name, tensor in mlx.tensors(codes, fmt, torch.float32).items()}
    assert np.array_equal(dequantized(tensors, 2, 32), np.full((1, 32), 0.5 * (3 - 1.25)))


def test_mlx_folder(tmp_path: Path):
    """Every weight is our reconstruction, everything else is byte for byte what it was, every path has its own bits."""
    model = make_checkpoint(tmp_path / "model", intermediate_size=128, hidden_size=128, num_hidden_layers=1)
    checkpoint = open_checkpoint(str(model))
    names = [m.name for m in checkpoint.modules]
    formats = dict(zip(names, ("int2_g32", "int3_g64", "int4_g128_sym", "int8_g32", "int3_g128", "int2_g64_sym"), strict=False))
    out = exported(make_plan(formats, checkpoint.info.weights_sha256), tmp_path / "here", "mlx", model).out
    config = json.loads((out / "config.json").read_text())
    told = config.pop("quantization")
    assert config.pop("rope_theta") == config["rope_parameters"]["rope_theta"]
    assert config == json.loads((model / "config.json").read_text())
    assert {k: told.pop(k) for k in ("group_size", "bits", "mode")} == {"group_size": 32, "bits": 2, "mode": "affine"}
    sizes = {name: (FORMATS[fmt].bits, FORMATS[fmt].group_size) for name, fmt in formats.items()}
    assert {name: (entry["bits"], entry["group_size"]) for name, entry in told.items()} == sizes
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for name, fmt in formats.items():
        tensors = {part: after.pop(f"{name}.{part}") for part in ("weight", "scales", "biases")}
        assert tensors["weight"].dtype == np.uint32 and tensors["scales"].dtype == np.float32
        ours = rtn.quantize(torch.from_numpy(before.pop(f"{name}.weight")), FORMATS[fmt]).weight().numpy()
        assert np.abs(dequantized(tensors, *sizes[name]) - ours).max() <= 2.0**-23 * np.abs(ours).max()
    assert set(after) == set(before) and all(np.array_equal(after[key], before[key]) for key in after)
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    ast.parse((out / "load.py").read_text(encoding="utf-8"))


def test_mlx_refuses_rows_that_groups_do_not_divide(tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", intermediate_size=100, num_hidden_layers=1)
    plan = make_plan({"model.layers.0.mlp.down_proj": "int4_g32"}, open_checkpoint(str(model)).info.weights_sha256)
    said = refusal(plan, tmp_path / "here", "mlx", model)
    assert "rows of 100 weights, which groups of 32 do not divide" in said and said.endswith("no group size of it does")
    with pytest.raises(UserError, match="needs --model"):
        exported(plan, tmp_path / "alone", "mlx")


def test_mlx_finds_rotary_settings_under_the_names_that_it_reads(tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", "gpt_neox")
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    plan = make_plan({name: "int4_g32"}, open_checkpoint(str(model)).info.weights_sha256)
    config = json.loads((exported(plan, tmp_path / "here", "mlx", model).out / "config.json").read_text())
    rope = config["rope_parameters"]
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (rope["rope_theta"], rope["partial_rotary_factor"])
    assert "model.h.0.mlp.dense_h_to_4h" in config["quantization"]
    own = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "yarn", "factor": 2.0}, "model_type": "llama", "rope_theta": 7.0}
    older = mlx._older_names(own)
    assert (older["rope_theta"], older["rope_scaling"]) == (7.0, {"rope_type": "yarn", "factor": 2.0})


def test_mlx_paths_of_families_that_are_renamed():
    assert mlx.path_of("gpt_neox.layers.3.mlp.dense_h_to_4h", "gpt_neox") == "model.h.3.mlp.dense_h_to_4h"
    assert mlx.path_of("model.layers.3.mlp.up_proj", "llama") == "model.layers.3.mlp.up_proj"
