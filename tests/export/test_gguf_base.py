"""GGUFs with another's metadata, importance matrices as files, GGUFs as models, and `bitatlas quantize`: what is followed, kept and refused."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.cli.main import main
from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.from_gguf import folder_of
from bitatlas.quantize import ggml
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.importance import ImportanceMatrix, collect
from bitatlas.records import Budget, Module, Plan, PlanDamage, PlanModel
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS, LLAMA_CPP
from bitatlas.records.sizes import size_of, units_of
from tiny import make_checkpoint
from tiny_shapes import MIXTURES, build

gguf = pytest.importorskip("gguf")
pytest.importorskip("libgguf")
from bitatlas.export.gguf.base import base_of, followed, kinds_of, open_base, write_on_base  # noqa: E402
from bitatlas.export.gguf.imatrix import read_imatrix, write_imatrix  # noqa: E402
from bitatlas.export.gguf.run import find_library, open_gguf  # noqa: E402
from bitatlas.export.gguf.write import blueprint_of, write_gguf  # noqa: E402
from bitatlas.run.settings import held_formats  # noqa: E402
from bitatlas.run.verify import damage_in_llama_cpp  # noqa: E402

KINDS = ("q4_0", "q8_0", "q5_1", "iq4_nl", "q5_0", "q4_1")
needs_llama_cpp = pytest.mark.skipif(find_library() is None, reason="no llama.cpp at hand")


def base_gguf(model: Path, file: Path, kind: str = "f32") -> Path:
    checkpoint = open_checkpoint(str(model), None, False)
    write_gguf(file, checkpoint, None, None, blueprint_of(checkpoint, None, kind), lambda done, total: None)
    return file


def planned(model: Path, base: Path) -> tuple:
    """The checkpoint as followed, the base, and a plan whose units have the formats in turn."""
    checkpoint = open_checkpoint(str(model), None, True)
    checkpoint = checkpoint.planning(checkpoint.outer)
    opened = open_base(base, checkpoint)
    checkpoint, lost = followed(opened, checkpoint)
    modules = {m.name: KINDS[k % len(KINDS)] for k, unit in enumerate(units_of(checkpoint.modules)) for m in unit.modules}
    model_of = PlanModel(checkpoint.info.name, None, checkpoint.info.weights_sha256)
    size = size_of(checkpoint.modules, modules, checkpoint.info)
    table = {name: FORMATS[name] for name in KINDS}
    plan = Plan(model_of, table, LLAMA_CPP, modules, Budget("size", 1e6), size, PlanDamage(None, None), runtime=LLAMA_CPP)
    return checkpoint, opened, plan, lost


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_base_is_quantized_as_measured_and_to_the_byte(family: str, tmp_path: Path):
    """Rows of q and k that changed places are followed; llama.cpp's logits are those of our reconstruction but for its own rounding."""
    model = make_checkpoint(tmp_path / "model", family)
    checkpoint, base, plan, lost = planned(model, base_gguf(model, tmp_path / "base.gguf"))
    assert not lost
    (tmp_path / "plan.json").write_text(to_json(plan))
    file = tmp_path / "planned.gguf"
    kinds = write_on_base(file, base, checkpoint, plan, tmp_path / "plan.json", lambda done, total: None)
    assert file.stat().st_size == plan.size.total_bytes
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert {name: tensors[name].tensor_type.name.lower() for name in kinds} == kinds and len(kinds) == len(plan.modules)
    decoder = checkpoint.load_model()
    rows = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    bank = Bank(decoder, list(plan.modules), LLAMA_CPP, plan.formats)
    with open_gguf(file, 16) as session:
        whole = damage_in_llama_cpp(decoder, session, rows, lambda done, total: None)
        with decoder.swapped(bank.weights(plan.modules)):
            rest = damage_in_llama_cpp(decoder, session, rows, lambda done, total: None)
    assert rest.max() < 1e-3 < whole.min()


def test_joined_and_stacked_modules_are_followed(tmp_path: Path):
    """q, k and v in one tensor, gate and up of all experts in two, each in its own order: modules of a tensor share a unit, bytes are exact."""
    checkpoint = open_checkpoint(str(build(tmp_path / "model", *MIXTURES["mixtral"])), None, False)
    checkpoint = checkpoint.planning(checkpoint.outer)
    decoder = checkpoint.load_model()
    file = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(file, "made-up")
    writer.add_array("some.words", ["a", "b"])
    weights = {module.name: decoder.weight(module.name).float() for module in checkpoint.modules}
    for layer in range(checkpoint.info.layers):
        of_layer = {name: weight for name, weight in weights.items() if f".layers.{layer}." in name}
        attention = [next(w for name, w in of_layer.items() if name.endswith(f"{part}_proj")) for part in ("v", "q", "k")]
        writer.add_tensor(f"blk.{layer}.attn_qkv.weight", torch.cat(attention).numpy())
        writer.add_tensor(f"blk.{layer}.attn_output.weight", next(w for n, w in of_layer.items() if n.endswith("o_proj")).numpy())
        both = [weight for name, weight in of_layer.items() if ".gate_up_proj." in name]
        down = [weight for name, weight in of_layer.items() if ".down_proj." in name]
        half = len(both[0]) // 2
        writer.add_tensor(f"blk.{layer}.ffn_gate_exps.weight", torch.stack([w[:half] for w in both]).numpy())
        writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", torch.stack([w[half:].flip(0) for w in both]).numpy())
        writer.add_tensor(f"blk.{layer}.ffn_down_exps.weight", torch.stack(down).numpy())
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", np.ones(8, np.float32))
    for name in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, name)()
    base = open_base(file, checkpoint)
    checkpoint, lost = followed(base, checkpoint)
    assert {module.name for module in lost} == {module.name for module in checkpoint.outer}  # which the file lacks
    units = {module.name: module.unit for module in checkpoint.modules}
    attention = {unit for name, unit in units.items() if ".layers.0." in name and name.endswith(("q_proj", "k_proj", "v_proj"))}
    assert len(attention) == 1
    modules = {m.name: KINDS[k % len(KINDS)] for k, unit in enumerate(units_of(checkpoint.modules)) for m in unit.modules}
    plan = Plan(
        PlanModel("m", None, checkpoint.info.weights_sha256), {name: FORMATS[name] for name in KINDS}, LLAMA_CPP, modules,
        Budget("size", 1e6), size_of(checkpoint.modules, modules, checkpoint.info), PlanDamage(None, None), runtime=LLAMA_CPP,
    )  # fmt: skip
    (tmp_path / "plan.json").write_text("{}")
    write_on_base(tmp_path / "out.gguf", base, checkpoint, plan, tmp_path / "plan.json", lambda done, total: None)
    assert (tmp_path / "out.gguf").stat().st_size == plan.size.total_bytes
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["some.words"].contents() == ["a", "b"]
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    name = next(name for name in modules if ".layers.1." in name and name.endswith("gate_up_proj.2"))
    kind = modules[name]
    assert up.tensor_type.name.lower() == kind
    expected = ggml.quantize(weights[name], FORMATS[kind]).blocks
    assert np.array_equal(np.array(up.data)[2].reshape(len(expected) // 2, -1), expected[len(expected) // 2 :].flip(0).numpy())
    other = next(kind for kind in KINDS if kind != modules["model.layers.0.self_attn.q_proj"])
    unlike = dataclasses.replace(plan, modules={**modules, "model.layers.0.self_attn.q_proj": other})
    with pytest.raises(UserError, match=r"blk.0.attn_qkv.weight holds .* make the plan in a survey with --base-gguf"):
        kinds_of(base, unlike)


def test_bases_that_are_refused(tiny_llama: Path, tmp_path: Path):
    checkpoint = open_checkpoint(str(tiny_llama), None, False)
    other = base_gguf(make_checkpoint(tmp_path / "other", seed=1), tmp_path / "other.gguf")
    with pytest.raises(
        UserError, match=r"--base-gguf .*other.gguf: has none of the weights of tiny-llama: it is of another model"
    ):
        open_base(other, checkpoint)
    with pytest.raises(UserError, match=r"none.gguf: no such file"):
        open_base(tmp_path / "none.gguf", checkpoint)
    half = tmp_path / "half.gguf"
    half.write_bytes(other.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"half.gguf: not a whole GGUF"):
        open_base(half, checkpoint)


# --- importance matrices -----------------------------------------------------------------------------------------------


def test_an_importance_matrix_is_the_mean_square_and_comes_back_from_its_file(tiny_llama: Path, tmp_path: Path):
    checkpoint = open_checkpoint(str(tiny_llama), None, False)
    decoder, names = checkpoint.load_model(), [module.name for module in checkpoint.modules]
    rows = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    matrix = collect(decoder, [*names, "model.embed_tokens"], rows)
    seen: list[torch.Tensor] = []
    hook = decoder.model.get_submodule(names[-1]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoder.model(rows)
    hook.remove()
    inputs = torch.cat(seen).flatten(0, 1).double()
    assert matrix.counts[names[-1]] == 48 and "model.embed_tokens" not in matrix.mean_squares
    assert torch.allclose(matrix.mean_squares[names[-1]].double(), inputs.square().mean(0), rtol=1e-5)  # float32 inputs
    tensors = {name: f"t.{index}.weight" for index, name in enumerate(names)}
    widths = {name: len(matrix.mean_squares[name]) for name in names}
    write_imatrix(tmp_path / "imatrix.gguf", matrix, tensors, {}, "text", (3, 16))
    back, missing = read_imatrix(tmp_path / "imatrix.gguf", tensors, {}, widths)
    assert missing == 0
    for name in names:
        assert torch.allclose(back.mean_squares[name], matrix.mean_squares[name], rtol=1e-6)
    with pytest.raises(UserError, match=r"it is of another model"):
        read_imatrix(tmp_path / "imatrix.gguf", {"a": "b.weight"}, {}, {"a": 4})
    with pytest.raises(UserError, match=r"t.0.weight has 64 inputs, .* 65: it is of another model"):
        read_imatrix(tmp_path / "imatrix.gguf", tensors, {}, {**widths, names[0]: 65})


def test_experts_are_stacked_and_the_older_form_is_read(tmp_path: Path):
    squares = {f"e.{n}": torch.rand(4) for n in range(3)}
    matrix = ImportanceMatrix(squares, {"e.0": 5, "e.1": 7, "e.2": 1})
    tensors, experts = dict.fromkeys(squares, "blk.0.ffn_up_exps.weight"), {f"e.{n}": n for n in range(3)}
    write_imatrix(tmp_path / "i.gguf", matrix, tensors, experts, "text", (1, 13))
    back, _ = read_imatrix(tmp_path / "i.gguf", tensors, experts, dict.fromkeys(squares, 4))
    assert all(torch.allclose(back.mean_squares[name], squares[name], rtol=1e-6) for name in squares)
    name, values = b"a.weight", np.arange(4, dtype=np.float32)
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 2, 4) + values.tobytes()
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 1) + entry + struct.pack("<i", 2) + struct.pack("<i", 1) + b"x")
    old, _ = read_imatrix(tmp_path / "old.dat", {"m": "a.weight"}, {}, {"m": 4})
    assert torch.allclose(old.mean_squares["m"], torch.from_numpy(values) / 2)  # sums over two calls
    (tmp_path / "not.dat").write_bytes(b"\x01\x00")
    with pytest.raises(UserError, match=r"not an importance matrix of llama.cpp"):
        read_imatrix(tmp_path / "not.dat", {"m": "a.weight"}, {}, {"m": 4})


# --- from a GGUF, and the command --------------------------------------------------------------------------------------


def run(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["bitatlas", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_a_gguf_is_opened_as_a_checkpoint(tiny_llama: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = base_gguf(tiny_llama, tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(file), None, False)
    assert checkpoint.info.name == "tiny" and checkpoint.notes[0] == "read from a GGUF, whose matrices are 22 F32"
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    theirs = open_checkpoint(str(tiny_llama), None, False).load_model().model(ids).logits
    assert torch.equal(checkpoint.load_model().model(ids).logits, theirs)
    stamp = (folder_of(file) / "config.json").stat().st_mtime_ns
    assert (folder_of(file) / "config.json").stat().st_mtime_ns == stamp  # made once


@needs_llama_cpp
def test_a_gguf_in_q8_0_is_opened_and_what_it_was_is_told(tiny_llama: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from llama_quantize import llama_quantize

    file = tmp_path / "q8.gguf"
    llama_quantize(base_gguf(tiny_llama, tmp_path / "f32.gguf"), file, "Q8_0")
    checkpoint = open_checkpoint(str(file), None, False)
    assert "it was quantized before" in checkpoint.notes[0] and "22 Q8_0" in checkpoint.notes[0]
    name = checkpoint.modules[0].name
    weight = open_checkpoint(str(tiny_llama), None, False).load_model().weight(name)
    read = checkpoint.load_model().weight(name)
    assert torch.allclose(read, ggml.quantize(weight, FORMATS["q8_0"]).weight(), rtol=2**-8, atol=1e-6)  # rounded to bfloat16
    assert base_of(str(file), None) is None and base_of(str(tmp_path / "f32.gguf"), None) == tmp_path / "f32.gguf"


@needs_llama_cpp
@pytest.mark.slow
def test_quantize_writes_measures_and_goes_on(tiny_llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    """From a GGUF to a GGUF: planned, written, measured in llama.cpp, beside its recipes; the second time nothing is made again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = base_gguf(tiny_llama, tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    words = [
        "quantize",
        model,
        "--out",
        out,
        "--tokens",
        text,
        "--rows",
        "4,4,8",
        "--row-length",
        "32",
        "--formats",
        "q4_0,q5_1,q8_0",
    ]
    other = ["quantize", make_checkpoint(tmp_path / "neox", "gpt_neox"), "--out", out, "--size", "100kB", "--tokens", text, "-q"]
    code, _, error = run(capsys, monkeypatch, *other)
    assert code == 2 and "a GGUF of gpt_neox is not written here" in error and "--base-gguf" in error and not out.exists()
    code, _, error = run(capsys, monkeypatch, *words, "-q")
    assert code == 2 and "give a budget, like --size 2GiB" in error and not out.exists()
    code, printed, error = run(capsys, monkeypatch, *words, "--size", "100kB", "--json")
    assert code == 0, error
    content = json.loads(printed)
    file = Path(content["file"])
    assert file == out / "llama-cpp" / "tiny.gguf" and file.stat().st_size == content["size"]["total_bytes"] <= 100_000
    assert content["kept"] and content["measured"]["n"] == 8 and content["recipes"]
    assert all(recipe["bytes"] <= 100_000 for recipe in content["recipes"])
    assert (out / "imatrix.gguf").is_file()
    check = [
        "verify",
        model,
        out / "plan.json",
        *words[4:10],
        "-q",
    ]  # of the plan: its bytes are those on the model's own metadata
    code, printed, error = run(capsys, monkeypatch, *check)
    assert code == 0 and "NOT KEPT" not in printed, error
    # The GGUF's weights are those of the checkpoint that it was made of, to the byte; its metadata is what the size is counted with.
    assert run(capsys, monkeypatch, "verify", tiny_llama, *check[2:], "--base-gguf", model)[0] == 0
    stamp = file.stat().st_mtime_ns
    code, printed, error = run(capsys, monkeypatch, *words, "--size", "100kB", "-q")
    assert code == 0 and "holds this plan's files already" in printed and file.stat().st_mtime_ns == stamp, error
    assert "This file beside llama.cpp's recipes" in printed and printed.strip().endswith("tiny.gguf")
    code, _, error = run(capsys, monkeypatch, *words, "--size", "110kB", "-q")
    assert code == 2 and "holds the files of another plan" in error
    code, _, error = run(capsys, monkeypatch, "survey", file, "--out", tmp_path / "twice", "--tokens", text)
    assert code == 2 and "would be quantized twice" in error and error.count("\n") == 1


@needs_llama_cpp
@pytest.mark.slow
def test_quantize_goes_on_from_a_survey(text: Path, tmp_path: Path, capsys, monkeypatch):
    """Its own plan, then another size of it: nothing is measured but the file."""
    out, rows = tmp_path / "atlas", ["--tokens", text, "--rows", "4,4,8", "--row-length", "32"]
    # Rows of 96 take neither iq3_s nor q5_k; all layers are safe at such a tolerance, so they are lowered together, too.
    model = make_checkpoint(tmp_path / "model", hidden_size=256, intermediate_size=96, scale=0.25)
    words = ["--for", "llama.cpp", "--formats", "iq3_s,q5_k,q8_0", "--stored-bits", "6", "--tolerance", "10"]
    words += ["--tasks", "none", "--no-refine", "--no-curve"]
    code, _, error = run(capsys, monkeypatch, "survey", model, "--out", out, *words, *rows, "-q")
    assert code == 0, error
    code, printed, error = run(capsys, monkeypatch, "quantize", model, "--out", out, "--json")
    content = json.loads(printed)
    assert code == 0 and content["kept"] and content["plan_file"] == str(out / "plan.json"), error
    assert "quantizing" not in error and "plans on" not in error
    (out / "llama-cpp").rename(tmp_path / "first")
    code, printed, error = run(capsys, monkeypatch, "quantize", model, "--out", out, "--size", "500kB", "--json")
    content = json.loads(printed)
    # Its damage is predicted, which a tiny random model need not keep: the exit code is the verification's.
    assert code == (0 if content["kept"] else 1), error
    assert Path(content["file"]).stat().st_size == content["size"]["total_bytes"] <= 500_000
    code, _, error = run(capsys, monkeypatch, "quantize", model, "--out", out, "--for", "mlx", "-q")
    assert code == 2 and "is for llama.cpp; choose another folder" in error


def test_formats_have_the_names_of_what_rows_hold():
    """A report about iq2_xxs that no module has would be about another format."""
    modules = [Module(f"m{width}", 0, "k", (4, width), "u") for width in (64, 96)]
    ladder = ("iq2_xxs", "q2_k", "iq3_xxs", "q3_k", "iq4_xs", "q5_k", "q6_k", "q8_0")
    assert held_formats(ladder, modules, LLAMA_CPP) == ("iq4_nl", "q5_0", "q5_1", "q8_0")
    some = [*modules, Module("m512", 0, "k", (4, 512), "u")]
    assert held_formats(ladder, some, LLAMA_CPP) == ladder
    with pytest.raises(UserError, match=r"rows of 64 and 96 take only iq4_nl of these; give at least two"):
        held_formats(("iq2_xxs", "q3_k"), modules, LLAMA_CPP)


@pytest.mark.slow
def test_quantize_with_an_importance_matrix_and_for_transformers(
    tiny_llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch
):
    pytest.importorskip("compressed_tensors")
    words = ["--tokens", text, "--rows", "4,4,8", "--row-length", "32", "-q"]
    for runtime in ("transformers", "bitatlas"):  # the second with a packed embedding, which load_packed alone opens
        code, printed, error = run(
            capsys, monkeypatch, "quantize", tiny_llama, "--out", tmp_path / runtime, "--for", runtime, "--formats",
            "int2_g32,int4_g32", "--code-bits", "3", *words,
        )  # fmt: skip
        file = tmp_path / runtime / runtime / "model.safetensors"
        assert code == 0 and "kept" in printed and file.is_file(), error
    survey = ["survey", tiny_llama, "--for", "llama.cpp", "--formats", "q4_0,q8_0", "--stored-bits", "6", "--draft", *words]
    assert run(capsys, monkeypatch, *survey, "--out", tmp_path / "b")[0] == 0
    matrix = tmp_path / "b" / "imatrix.gguf"
    code, _, error = run(capsys, monkeypatch, *survey, "--out", tmp_path / "c", "--imatrix", matrix)
    assert code == 0, error
    assert json.loads((tmp_path / "c" / "plan.json").read_text())["quantizer"] == "imatrix"
    for more, message in (
        (["--imatrix", matrix, "--quantizer", "gptq"], "--imatrix: belongs to --quantizer imatrix, not to gptq"),
        (["--imatrix", tmp_path / "no.gguf"], "no.gguf: no such file"),
        (["--imatrix", text], "not an importance matrix of llama.cpp"),
    ):
        code, _, error = run(capsys, monkeypatch, *survey, "--out", tmp_path / "d", *more)
        assert code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "d").exists()
