"""Packed checkpoints: what transformers loads is our reconstruction, the bytes are those that were told, nothing half is left."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import bitatlas.data as demo
import tiny
from bitatlas.cli.main import main
from bitatlas.errors import UserError
from bitatlas.export import compressed_tensors
from bitatlas.export.packed import apply_plan
from bitatlas.model import folder
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.tensor_files import Entry, Writer, split_shards
from bitatlas.quantize import rtn
from bitatlas.quantize.bank import BANK, Bank
from bitatlas.records import Plan, PlanDamage
from bitatlas.records.files import to_json
from bitatlas.records.formats import Format
from bitatlas.run.options import VerifyOptions
from bitatlas.run.verify import kl_between, verify_plan
from live_bytes import LiveBytes
from packing import LOGITS, QUIET, applied, check_bytes, largest_difference, make_plan
from tiny import SHARED, make_checkpoint

pytest.importorskip("compressed_tensors")
stage = importlib.import_module("bitatlas.export.packed")


# --- what is loaded is what was planned --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "intermediate_size": 172}),
        ("llama", {"tie_word_embeddings": False, "intermediate_size": 172}),
        ("mistral", {}),
        ("qwen3", {"intermediate_size": 100}),
        ("gpt_neox", {}),
    ],
)
def test_transformers_loads_our_reconstruction(family: str, changes: dict, tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", family, **changes)
    plan = make_plan(model, skip=4)
    found = applied(model, plan, tmp_path)
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)


@pytest.mark.parametrize("name", ["babyllama-105", "stories260K", "demo"])
def test_trained_checkpoints(name: str, tmp_path: Path):
    model = demo.MODEL_DIR if name == "demo" else SHARED / "models" / name
    if not model.is_dir():
        pytest.skip("the trained checkpoints are not at hand")
    plan = make_plan(model)
    found = applied(model, plan, tmp_path)
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)
    assert AutoTokenizer.from_pretrained(found.out).get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()


def test_zero_points_that_are_no_whole_numbers(tmp_path: Path):
    pytest.importorskip("hqq")
    model = make_checkpoint(tmp_path / "model", intermediate_size=172)
    plan = make_plan(model, ["int2_g32", "int3_g64", "int4_g128"], "hqq")
    found = applied(model, plan, tmp_path)
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)
    assert found.causes["zero-points (4 bytes, not 2)"] > 0


def test_codes_that_were_fitted_come_from_the_bank_alone(tiny_llama: Path, tmp_path: Path):
    checkpoint = open_checkpoint(str(tiny_llama), None, False)
    rows = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
    decoder, names = checkpoint.load_model(), [module.name for module in checkpoint.modules]
    bank = Bank(decoder, names, "gptq", rows=rows, folder=tmp_path / BANK, weights_sha256=checkpoint.info.weights_sha256)
    plan = make_plan(tiny_llama, ["int2_g32", "int3_g64"], "gptq", codes=bank.identity)
    with pytest.raises(UserError, match="folder 'bank' must lie beside the plan"):
        applied(tiny_llama, plan, tmp_path)
    assert not (tmp_path / "packed").exists()
    bank.weights(plan.modules)
    assert largest_difference(tiny_llama, plan, applied(tiny_llama, plan, tmp_path).out, rows) <= LOGITS


def test_several_files_and_bare_names(tiny_llama: Path, tmp_path: Path):
    """A checkpoint in shards, of the base model alone, becomes another one in shards."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = {key.removeprefix("model."): value for key, value in load_file(model / "model.safetensors").items()}
    (model / "model.safetensors").unlink()
    files = {key: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, key in enumerate(tensors)}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in files if files[key] == file}, model / file, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    plan = make_plan(model)
    found = applied(model, plan, tmp_path, shard_bytes=30_000)
    assert len(list(found.out.glob("*.safetensors"))) > 2
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 140),
    st.integers(1, 5),
    st.sampled_from([32, 64]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_packages_own_functions_agree(bits: int, width: int, out: int, size: int, symmetric: bool, seed: int):
    """Our words are theirs, and their decompressor gives our reconstruction, bit for bit."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationConfig

    fmt = Format(bits, size, symmetric, zero_bits=0 if symmetric else 16)
    codes = rtn.quantize(torch.randn(out, width, generator=torch.Generator().manual_seed(seed)), fmt)
    signed = (codes.codes.short() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(compressed_tensors.pack_rows(codes.codes, bits), pack_to_int32(signed, bits))
    tensors = compressed_tensors.tensors(codes, fmt)
    told = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert told == compressed_tensors.layout((out, width), fmt, whole_zeros=True)
    content = compressed_tensors.quantization_config({"m": fmt}, {"m": (out, width)}, [], True, "0.20.0", "pack-quantized")
    (scheme,) = QuantizationConfig.model_validate(content).config_groups.values()
    tensors["weight_scale"] = tensors["weight_scale"].float()  # as transformers loads it into a float32 model
    assert torch.equal(PackedQuantizationCompressor.decompress(tensors, scheme)["weight"], codes.weight())


# --- the folder --------------------------------------------------------------------------------------------------------


def test_what_belongs_to_a_model_comes_along(tiny_llama: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "LICENSE").write_text("Do what you like.\n")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: en\nmodel-index: []\n---\n# A model\n")
    (model / "training.log").write_text("not of a model")
    plan = make_plan(model)
    (tmp_path / "packed").mkdir()  # an empty folder will do
    out = applied(model, plan, tmp_path).out
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert not (out / "training.log").exists()
    front = metadata_load(out / "README.md")
    assert (front["license"], front["base_model"]) == ("mit", "model")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| 0 | int2_g32 | int3_g64 | int4_g32_sym | int8_g128 | int3_g32 | int4_g128 | int2_g64_sym |" in card
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    kept = json.loads((out / "config.json").read_text())
    config = kept.pop("quantization_config")
    assert kept == json.loads((model / "config.json").read_text())
    assert config["ignore"] == ["lm_head"]


def test_a_run_that_is_killed_leaves_nothing_that_loads(tiny_llama: Path, tmp_path: Path, monkeypatch):
    plan = make_plan(tiny_llama)
    (tmp_path / "plan.json").write_text(to_json(plan), encoding="utf-8")
    real, asked = stage._packed, []

    def killed(*arguments):
        asked.append(arguments)
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    monkeypatch.setattr(stage, "_packed", killed)
    child = os.fork()
    if child == 0:
        apply_plan(str(tiny_llama), tmp_path / "plan.json", tmp_path / "packed", QUIET)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.glob(".*.partial")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(UserError, match=r"no config\.json"):
        open_checkpoint(str(left), None, False)
    monkeypatch.setattr(stage, "_packed", real)
    assert largest_difference(tiny_llama, plan, applied(tiny_llama, plan, tmp_path).out) <= LOGITS
    assert not left.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_fails_cleans_up(tiny_llama: Path, tmp_path: Path, monkeypatch, error: BaseException):
    def failing(*_):
        raise error

    monkeypatch.setattr(stage, "_packed", failing)
    with pytest.raises(type(error)):
        applied(tiny_llama, make_plan(tiny_llama), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_less_than_a_layer_twice_is_held(tmp_path: Path, monkeypatch):
    """Of float32, quantizing included, where the model has six layers."""
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=6, hidden_size=128, intermediate_size=512)
    one_layer = sum(m.weights for m in open_checkpoint(str(model), None, False).modules if m.layer == 0)
    real, live = stage._write_weights, LiveBytes([])

    def watched(*arguments):
        with live:
            real(*arguments)

    monkeypatch.setattr(stage, "_write_weights", watched)
    applied(model, make_plan(model), tmp_path)
    assert 0 < live.peak < 2 * 4 * one_layer


def test_shards_hold_what_was_written(tmp_path: Path):
    tensors = {
        "a": torch.arange(5, dtype=torch.int8),
        "b": torch.randn(3, 3),
        "c": torch.arange(4),
        "d": torch.zeros(0, 2).half(),
    }
    words = {torch.int8: "I8", torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}
    entries = [Entry(k, words[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for k, t in tensors.items()]
    for limit, count in ((10**6, 1), (40, 3)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        shards = split_shards(entries, limit)
        with Writer(folder, shards) as writer:
            for key in "dcba":
                data = tensors[key].numpy().tobytes()
                writer.write(key, data[:3])
                writer.write(key, data[3:])
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == len(shards) == count
        found = {key: value for file in files for key, value in load_file(file).items()}
        assert all(torch.equal(found[key], tensors[key]) for key in tensors) and len(found) == 4
        assert [file.stat().st_size for file in files] == [shard.size_bytes for shard in shards]
    with pytest.raises(ValueError, match="bytes are missing"), Writer(tmp_path, split_shards(entries)) as writer:
        writer.write("a", b"12345")
    with pytest.raises(ValueError, match="1 bytes too many"), Writer(tmp_path, split_shards(entries)) as writer:
        writer.write("a", b"123456")


# --- verifying ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny.TEXT, encoding="utf-8")
    return file


def test_verify_measures_the_folder(tiny_llama: Path, tmp_path: Path, text: Path, capsys, monkeypatch):
    plan = make_plan(tiny_llama, ["int4_g32", "int3_g32"])
    out = applied(tiny_llama, plan, tmp_path).out
    flags = ["--tokens", str(text), "--rows", "2,2,8", "--row-length", "16", "--quiet"]

    def verified(place: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bitatlas", "verify", str(tiny_llama), str(place), *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    planned = verify_plan(
        VerifyOptions(tiny_llama, tmp_path / "plan.json", tokens=text, rows=(2, 2, 8), row_length=16, quiet=True)
    )
    promise = PlanDamage(None, planned.damage)
    (out / "plan.json").write_text(to_json(Plan(**{**vars(plan), "damage": promise})), encoding="utf-8")
    found = verify_plan(VerifyOptions(tiny_llama, out, tokens=text, rows=(2, 2, 8), row_length=16, card=True, quiet=True))
    assert found.kept
    assert found.damage.mean == pytest.approx(planned.damage.mean, rel=1e-5)  # the same weights, another pass over them
    assert "measured by `bitatlas verify`" in (out / "README.md").read_text(encoding="utf-8")
    (result,) = metadata_load(out / "README.md")["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(found.damage.mean, abs=1e-6)
    assert verified(out)[0] == 0
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"].mul_(-2)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, told = verified(out)
    assert code == 1 and "NOT KEPT" in told
    save_file({**tensors, "of_no_use": torch.zeros(8)}, out / "model.safetensors", metadata={"format": "pt"})
    code, told = verified(out)
    assert code == 1 and "weights' files, bytes" in told
    shorter = {key: value for key, value in tensors.items() if "norm" not in key}
    save_file(shorter, out / "model.safetensors", metadata={"format": "pt"})
    assert verified(out)[0] == 2  # norms that are not there cannot be measured


def test_two_copies_of_a_model_do_no_damage(tiny_llama: Path):
    decoder = open_checkpoint(str(tiny_llama), None, False).load_model()
    rows = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    # sums of 300 float32 probabilities are 1 to 1e-7
    assert kl_between(decoder, decoder.model, rows, lambda done, total: None) == pytest.approx(0, abs=1e-7)


# --- wrong use ---------------------------------------------------------------------------------------------------------


def refused(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["bitatlas", *map(str, arguments), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("bitatlas: ") and told.count("\n") == 1, told
    return told


def test_one_line_for_what_cannot_be_done(tiny_llama: Path, tmp_path: Path, monkeypatch, capsys, text: Path):
    plan_file, out = tmp_path / "plan.json", tmp_path / "packed"
    plan_file.write_text(to_json(make_plan(tiny_llama)), encoding="utf-8")
    other = make_checkpoint(tmp_path / "other", seed=1)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for arguments, said in (
        ((tiny_llama, plan_file, "--out", full), "exists and is not empty"),
        ((tiny_llama, plan_file, "--out", text), "is not a folder"),
        ((tiny_llama, plan_file, "--out", tmp_path / "no" / "where"), "there is no folder"),
        ((tiny_llama, tmp_path / "nothing.json", "--out", out), "no such file"),
        ((other, plan_file, "--out", out), "not the weights that the plan was made for"),
    ):
        assert said in refused(monkeypatch, capsys, "apply", *arguments)
    said = refused(monkeypatch, capsys, "verify", tiny_llama, plan_file, "--tokens", text, "--card")
    assert "belong to a packed checkpoint" in said
    with monkeypatch.context() as patched:
        patched.setattr(folder, "free_bytes", lambda folder: 1000)
        assert "1.00 kB free" in refused(patched, capsys, "apply", tiny_llama, plan_file, "--out", out)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "PACKAGE", "no_such_package")
        assert "bitatlas[export]" in refused(patched, capsys, "apply", tiny_llama, plan_file, "--out", out)
    assert sorted(tmp_path.rglob("*")) == before
