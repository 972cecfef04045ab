"""llama.cpp's formats and files without llama.cpp: bytes against the package `gguf`, weights against transformers' own reader of GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitatlas.errors import UserError
from bitatlas.export.gguf.names import heads_to_permute, permute, tensor_name, weight_names
from bitatlas.export.gguf.write import blueprint_of, write_gguf
from bitatlas.export.packed import apply_plan
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.plan.baselines import outside_uniform
from bitatlas.quantize import QUANTIZERS, get_quantizer
from bitatlas.quantize.bank import from_tensors, to_tensors
from bitatlas.quantize.ggml import Blocks, quantize
from bitatlas.records import Budget, Module
from bitatlas.records.files import to_json
from bitatlas.records.formats import (
    FORMATS,
    INTEGER_FORMATS,
    LLAMA_CPP,
    LLAMA_CPP_BLOCKS,
    by_width,
    stored_bytes,
    takes,
)
from bitatlas.records.sizes import check_rows, units_of
from gguf_plans import QUIET, make_plan
from tiny import make_checkpoint

gguf = pytest.importorskip("gguf")
pytest.importorskip("libgguf")


# --- formats -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from(sorted(LLAMA_CPP_BLOCKS)))
def test_bytes_are_those_of_the_gguf_package(out: int, blocks: int, name: str):
    """`quant_shape_to_byte_shape` has a table of its own."""
    fmt = FORMATS[name]
    kind = gguf.GGMLQuantizationType[name.upper()]
    width = blocks * fmt.group_size
    assert stored_bytes((out, width), fmt) == int(np.prod(gguf.quants.quant_shape_to_byte_shape((out, width), kind)))
    assert gguf.GGML_QUANT_SIZES[kind][0] == fmt.group_size


@given(st.integers(1, 2000), st.sampled_from(sorted(FORMATS)))
def test_a_row_is_taken_where_the_gguf_package_takes_it(width: int, name: str):
    fmt = FORMATS[name]
    if not fmt.runtime:
        assert takes(fmt, width)
        return
    try:
        gguf.quants.quant_shape_to_byte_shape((1, width), gguf.GGMLQuantizationType[name.upper()])
        able = True
    except ValueError:
        able = False
    assert takes(fmt, width) == able


def test_formats_of_llama_cpp_are_told_apart():
    assert {fmt.runtime for fmt in INTEGER_FORMATS.values()} == {""}
    assert {name for name, fmt in FORMATS.items() if fmt.runtime} == set(LLAMA_CPP_BLOCKS)
    assert all(fmt.name == name for name, fmt in FORMATS.items())
    assert by_width(["q8_0", "q4_k", "q2_k", "q5_1"]) == ["q2_k", "q4_k", "q5_1", "q8_0"]


def test_a_row_that_a_format_cannot_take_is_named_with_the_nearest_that_can(tiny_llama: Path):
    modules = open_checkpoint(str(tiny_llama), None, False).modules  # rows of 64 and 96
    check_rows(modules, ["q4_0", "q8_0"])
    with pytest.raises(UserError, match=r"q_proj has rows of 64, which q4_k cannot take .*256.*nearest .* is (q4_0|iq4_nl)"):
        check_rows(modules, ["q4_0", "q4_k"])
    odd = [Module("odd", 0, "odd", (8, 172), "odd")]
    with pytest.raises(UserError, match=r"odd has rows of 172, .*no format of llama.cpp takes them"):
        check_rows(odd, ["q4_0"])


def test_no_uniform_baseline_of_another_runtime(tiny_llama: Path):
    checkpoint = open_checkpoint(str(tiny_llama), None, False)
    units, info = units_of(checkpoint.modules), checkpoint.info
    found = outside_uniform(Budget("code_bits", 6.0), units, ["q4_0", "q8_0"], info, 6 * sum(u.weights for u in units))
    assert found == "q5_0"


def test_quantizers_and_formats_must_fit():
    with pytest.raises(
        UserError, match=r"--quantizer rtn: makes integer formats alone; for q4_0 give --quantizer gptq or llama.cpp or imatrix"
    ):
        get_quantizer("rtn").check([FORMATS["q4_0"]])
    with pytest.raises(UserError, match=r"--formats: q4_0 is llama.cpp's own and int4_g32 is not; give formats of one kind"):
        get_quantizer("gptq").check([FORMATS["int4_g32"], FORMATS["q4_0"]])
    with pytest.raises(UserError, match=r"--quantizer llama.cpp: makes formats of llama.cpp \(.*q4_0.*for int4_g32 give .*rtn"):
        get_quantizer(LLAMA_CPP).check([FORMATS["int4_g32"]])
    missing = QUANTIZERS[LLAMA_CPP].__class__(**{**vars(QUANTIZERS[LLAMA_CPP]), "package": "no_such_package"})
    with pytest.raises(UserError, match=r"pip install 'bitatlas\[gguf\]'"):
        missing.check([FORMATS["q4_0"]])


def test_blocks_come_back_from_the_bank_and_a_wrong_shape_does_not():
    fmt = FORMATS["q5_1"]
    held = Blocks(torch.randint(256, (3, 2 * 24), dtype=torch.uint8), "q5_1")
    tensors = to_tensors(held, fmt)
    assert sum(t.numel() for t in tensors.values()) == stored_bytes((3, 64), fmt)
    back = from_tensors(tensors, fmt, (3, 64))
    assert isinstance(back, Blocks) and torch.equal(back.blocks, held.blocks)
    with pytest.raises(ValueError, match="blocks of shape"):
        from_tensors(tensors, fmt, (3, 96))


def test_apply_refuses_formats_of_llama_cpp(tiny_llama: Path, tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    (tmp_path / "plan.json").write_text(to_json(make_plan(tiny_llama, ["q4_0"])))
    with pytest.raises(UserError, match=r"of the runtime llama.cpp: use bitatlas export --to llama.cpp"):
        apply_plan(str(tiny_llama), tmp_path / "plan.json", tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_names_are_those_of_the_gguf_package(family: str, tmp_path: Path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path, family)), None, False)
    kind = {"mistral": "llama"}.get(family, family)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(arch, checkpoint.info.layers)
    for key in checkpoint.load_model().model.state_dict():
        ours = tensor_name(key)
        assert ours == f"{table.get_name(key, try_suffixes=('.weight', '.bias')).removesuffix('.weight').removesuffix('.bias')}{key[key.rindex('.'):]}"  # fmt: skip


def test_other_models_get_their_names_from_the_package():
    found = weight_names(["gpt_neox.layers.1.attention.query_key_value"], "gpt_neox", 3)
    assert found == {"gpt_neox.layers.1.attention.query_key_value": "blk.1.attn_qkv.weight"}
    with pytest.raises(UserError, match=r"llama.cpp has no architecture that is called nonsense"):
        weight_names(["a.b"], "nonsense", 3)
    with pytest.raises(UserError, match=r"what llama.cpp calls a\.b of a gpt_neox model is not known here"):
        weight_names(["a.b"], "gpt_neox", 3)


def test_rows_of_q_change_places_as_the_rotation_needs_it():
    """Pairs (2i, 2i+1) of llama.cpp are pairs (i, i + half) of transformers, in every head."""
    heads, half = 3, 4
    rows = torch.arange(heads * 2 * half)
    moved = permute(rows[:, None], heads)[:, 0]
    for head in range(heads):
        start = head * 2 * half
        for i in range(half):
            assert moved[start + 2 * i] == start + i
            assert moved[start + 2 * i + 1] == start + i + half
    config = type("Config", (), {"model_type": "qwen3", "num_attention_heads": 4})
    assert heads_to_permute("model.layers.0.self_attn.q_proj.weight", config) == 0


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
    ],  # the reader knows no other head size of qwen3
)
def test_a_float32_gguf_is_the_model_as_transformers_reads_it(family: str, changes: dict, tmp_path: Path):
    """An independent reader: names, shapes, permuted rows, tied embeddings. The same weights give the same logits, so 0 or rounding."""
    folder = make_checkpoint(tmp_path / "model", family, **changes)
    checkpoint = open_checkpoint(str(folder), None, False)
    (tmp_path / "out").mkdir()
    write_gguf(
        tmp_path / "out" / "model.gguf", checkpoint, None, None, blueprint_of(checkpoint, None, "f32"), lambda done, total: None
    )
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (checkpoint.load_model().model(ids).logits - read(ids).logits).abs().max()
    assert float(difference) <= 1e-5


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_the_config_ties_and_the_file_stores_otherwise_is_written(same: bool, tiny_llama: Path, tmp_path: Path):
    """And what transformers passes over has no place in it."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    more = {"lm_head.weight": embedding.clone() if same else 2 * embedding, "counter": torch.ones(1, dtype=torch.uint32)}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    names = [part.name for part in blueprint_of(open_checkpoint(str(folder)), None).parts]
    assert (
        ("output.weight" in names) != same
        and "token_embd.weight" in names
        and len(names) == len(set(names)) == len(tensors) + (not same)
    )


def test_models_that_are_not_written_are_told_what_to_do(tmp_path: Path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "a", "gpt_neox")), None, False)
    with pytest.raises(UserError, match=r"a GGUF of gpt_neox is not written here \(only of llama.*convert_hf_to_gguf.py"):
        blueprint_of(checkpoint, None)


# --- blocks ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 3), st.sampled_from(sorted(LLAMA_CPP_BLOCKS)), st.integers(-12, 4), st.integers(0, 2**32)
)
def test_reconstruction_is_the_gguf_packages(out: int, blocks: int, name: str, power: int, seed: int):
    """Its dequantizers are an independent implementation, in numpy: the same float32 numbers, to the last bit."""
    weight = torch.randn(out, blocks * FORMATS[name].group_size, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    found = quantize(weight, FORMATS[name])
    theirs = gguf.quants.dequantize(found.blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(found.weight().numpy(), theirs)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_blocks_are_the_gguf_packages(name: str):
    """Of these it has quantizers too."""
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(quantize(weight, FORMATS[name]).blocks.numpy(), theirs)


def test_part_blocks_are_not_quantized():
    with pytest.raises(ValueError, match="rows of 48 are no whole blocks of 32"):
        quantize(torch.zeros(2, 48), FORMATS["q4_0"])


def test_wider_formats_reconstruct_better():
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(2))
    errors = [
        float((quantize(weight, FORMATS[n]).weight() - weight).square().mean()) for n in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * float(weight.square().mean())
