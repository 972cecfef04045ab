"""Embedding and head are planned with the layers: budgets in bytes are about the whole file, to the byte, whatever it is for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize.bank import Bank, bank_of_plan
from bitatlas.records import Atlas, Plan
from bitatlas.records.files import read_record
from bitatlas.records.sizes import size_of
from bitatlas.run.options import VerifyOptions
from bitatlas.run.verify import verify_plan
from command import run
from tiny import make_checkpoint

FORMATS = "int2_g32,int3_g32,int4_g32"
ROWS = ["--rows", "8,8,8", "--row-length", "24", "--tasks", "none", "--quiet"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("untied") / "model", "qwen2", tie_word_embeddings=False)


def survey(capsys, monkeypatch, model: Path, text: Path, out: Path, *words: object) -> tuple[Plan, Atlas]:
    command = ["survey", model, "--tokens", text, *ROWS, "--formats", FORMATS, "--quantizer", "rtn", "--out", out]
    code, _, error = run(capsys, monkeypatch, *command, *words)
    assert code == 0, error
    return read_record(out / "plan.json", Plan), read_record(out / "atlas.json", Atlas)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("refine", [True, False])
def test_a_survey_for_mlx_plans_embedding_and_head(
    tied: bool, refine: bool, tiny_llama: Path, untied: Path, text: Path, tmp_path: Path, capsys, monkeypatch
):
    model, out = tiny_llama if tied else untied, tmp_path / "out"
    size = 75_000 if tied else 95_000
    words = ["--for", "mlx", "--size", str(size), "--refine" if refine else "--no-refine", "--no-curve"]
    plan, atlas = survey(capsys, monkeypatch, model, text, out, *words)
    outer = {module.name: module for module in atlas.modules if module.part}
    assert {module.part for module in outer.values()} == ({"embedding and head"} if tied else {"embedding", "head"})
    assert all(module.candidates == ("int3_g32", "int4_g32", "int8_g32") for module in outer.values())
    assert set(outer) <= set(plan.modules) and all(plan.modules[name] in outer[name].candidates for name in outer)
    assert plan.size.total_bytes <= size and plan.size == size_of(atlas.modules, plan.modules, atlas.model)
    for uniform in atlas.uniform:  # the layers at one width, the others at their widest
        widest = dict.fromkeys(outer, "int8_g32")
        assert uniform.size == size_of(
            atlas.modules, {m.name: widest.get(m.name, uniform.format) for m in atlas.modules}, atlas.model
        )
    assert verify_plan(VerifyOptions(model, out / "plan.json", quiet=True)).kept
    plain_damage_is_the_plans(model, plan, out)
    code, _, error = run(capsys, monkeypatch, "export", out / "plan.json", "--to", "mlx", "--model", model, "--out", out / "mlx")
    assert code == 0, error
    mlx_file_holds_the_plan(out / "mlx", plan, atlas)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "What the file is made of" in html
    code, _, error = run(capsys, monkeypatch, "plan", out, "--size", str(size + 9_000))
    assert code == 0, error


def plain_damage_is_the_plans(model: Path, plan: Plan, out: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    decoder = checkpoint.load_model()
    weights = {
        k: v.clone() for k, v in bank_of_plan(plan, out / "plan.json", decoder, list(plan.modules)).weights(plan.modules).items()
    }
    assert isinstance(weights, dict)
    rows = torch.randint(3, 290, (4, 12), generator=torch.Generator().manual_seed(3))
    before = torch.log_softmax(decoder.model(rows).logits.double(), -1)
    bank = Bank(decoder, list(plan.modules), "rtn", plan.formats)
    from bitatlas.measure.damage import DamageMeter
    from bitatlas.records.journal import Journal

    measured = DamageMeter(decoder, bank, "", "rtn", Journal(None)).plans({"plan": plan.modules}, rows)["plan"]
    for name, weight in weights.items():
        decoder.model.get_submodule(name).weight.data.copy_(weight)
    after = torch.log_softmax(decoder.model(rows).logits.double(), -1)
    np.testing.assert_allclose(measured, (before.exp() * (before - after)).sum(-1).mean(-1).detach().numpy(), rtol=2e-3)


def mlx_file_holds_the_plan(folder: Path, plan: Plan, atlas: Atlas) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization"]
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            names = set(reader.keys())
            for module in atlas.modules:
                assert f"{module.name}.scales" in names
    for module in atlas.modules:
        assert config[module.name]["bits"] == plan.formats[plan.modules[module.name]].bits
    assert disk == plan.size.total_bytes  # headers, and scales in float32 as the checkpoint, included


def test_a_planned_head_is_packed_and_loads(untied: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    """In the default, for transformers: logits of the written folder are the plan's, and its promise is kept, to the byte."""
    out = tmp_path / "out"
    plan, _ = survey(capsys, monkeypatch, untied, text, out, "--size", "140kB", "--no-refine", "--no-curve")
    assert "lm_head" in plan.modules and "model.embed_tokens" not in plan.modules
    code, _, error = run(capsys, monkeypatch, "apply", untied, out / "plan.json", "--out", out / "packed")
    assert code == 0, error
    with safe_open(next((out / "packed").glob("*.safetensors")), "pt") as reader:
        assert "lm_head.weight_packed" in set(reader.keys())
    code, printed, error = run(capsys, monkeypatch, "verify", untied, out / "packed", "--quiet")
    assert code == 0, printed + error
    code, _, error = run(capsys, monkeypatch, "export", out / "plan.json", "--to", "torchao", "--out", out / "torchao")
    assert code == 2 and not (out / "torchao").exists()
    assert error == (
        "bitatlas: --to torchao: the plan quantizes lm_head (head), which stays as it is there: make the plan in a survey with --for torchao\n"
    )
    assert "--to mlx" in (out / "report.html").read_text(encoding="utf-8") and "--to torchao" not in (
        out / "report.html"
    ).read_text(encoding="utf-8")


def test_a_plan_with_an_embedding_is_tuned_and_applied(tiny_llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    """Tuning starts from the embedding's codes and leaves them."""
    out = tmp_path / "out"
    plan, _ = survey(capsys, monkeypatch, tiny_llama, text, out, "--for", "mlx", "--size", "70kB", "--no-refine", "--no-curve")
    code, printed, error = run(capsys, monkeypatch, "tune", tiny_llama, out / "plan.json", "--steps", "8", "--quiet")
    assert code == 0, error
    tuned = read_record(out / "plan-tuned.json", Plan)
    assert tuned.modules == plan.modules and tuned.size == plan.size
    assert tuned.damage.measured.mean < tuned.baselines[0].damage.mean == pytest.approx(plan.damage.measured.mean, rel=1e-4)
    assert verify_plan(VerifyOptions(tiny_llama, out / "plan-tuned.json", quiet=True)).kept
    code, printed, error = run(capsys, monkeypatch, "apply", tiny_llama, out / "plan-tuned.json", "--out", out / "packed")
    assert code == 0, error
    assert "Opened by bitatlas.load_packed: model.embed_tokens is an embedding" in printed + error
    code, printed, error = run(capsys, monkeypatch, "verify", tiny_llama, out / "packed", "--quiet")
    assert code == 0, printed + error


def test_what_stays_as_it_is_is_said_with_its_bytes(
    tiny_llama: Path, untied: Path, text: Path, tmp_path: Path, capsys, monkeypatch
):
    for model, expected in ((tiny_llama, "embedding and head (model.embed_tokens)"), (untied, "embedding (model.embed_tokens)")):
        command = ["survey", model, "--tokens", text, *ROWS[:-1], "--formats", FORMATS, "--quantizer", "rtn", "--draft"]
        code, _, error = run(capsys, monkeypatch, *command, "--out", tmp_path / f"{model.parent.name}-out")
        assert code == 0, error
        (line,) = [line for line in error.splitlines() if line.startswith(expected)]
        assert "of the file: stays as it is, 76.8 kB, since transformers reads none in other formats (--for)" in line


def test_a_budget_in_bits_is_about_the_layers(tiny_llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    words = ["--code-bits", "3", "--for", "mlx", "--no-refine", "--no-curve"]
    plan, _ = survey(capsys, monkeypatch, tiny_llama, text, tmp_path / "out", *words)
    assert plan.size.code_bits <= 3 and plan.modules["model.embed_tokens"] == "int8_g32"


def test_own_candidates_and_none(tiny_llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    words = ["--for", "mlx", "--no-refine", "--no-curve", "--code-bits", "3"]
    plan, atlas = survey(capsys, monkeypatch, tiny_llama, text, tmp_path / "a", *words, "--embedding-formats", "int4_g64")
    (module,) = [module for module in atlas.modules if module.part]
    assert module.candidates == ("int4_g64",) * 3 and plan.modules[module.name] == "int4_g64"
    plan, atlas = survey(capsys, monkeypatch, tiny_llama, text, tmp_path / "b", *words, "--embedding-formats", "none")
    assert not [module for module in atlas.modules if module.part] and "model.embed_tokens" not in plan.modules


def test_one_line_for_what_cannot_be(tiny_llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    command = ["survey", tiny_llama, "--tokens", text, *ROWS, "--formats", "int2_g32,int4_g32", "--out", tmp_path / "out"]
    cases = [
        (
            ["--for", "mxl"],
            "--for mxl: unknown; one of transformers, bitatlas, vllm, mlx, torchao, llm-compressor, gptqmodel, autoround, exllamav3, llama.cpp",
        ),
        (
            ["--embedding-formats", "int4_g32,int8_g32,int3_g32"],
            "--embedding-formats: 3 formats; give at most as many as --formats has (2)",
        ),
        (["--for", "mlx", "--size", "10kB"], "the least that these formats give"),
    ]
    for words, expected in cases:
        code, out, error = run(capsys, monkeypatch, *command, *words)
        assert (code, out) == (2, "") and expected in error, error


def test_modules_have_what_they_can_hold(tiny_llama: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    """MLX has no short groups: rows of 64 and 96 get smaller ones, are counted and measured with them, and the file is written."""
    out = tmp_path / "out"
    command = [
        "survey",
        tiny_llama,
        "--tokens",
        text,
        *ROWS[:-1],
        "--formats",
        "int2_g64,int4_g128",
        "--quantizer",
        "rtn",
        "--out",
        out,
    ]
    code, _, error = run(capsys, monkeypatch, *command, "--for", "mlx", "--size", "62kB")
    assert code == 0, error
    assert "rows of 96 (3 modules): int2_g32 in the place of int2_g64, int4_g32 in the place of int4_g128" in error
    plan, atlas = read_record(out / "plan.json", Plan), read_record(out / "atlas.json", Atlas)
    for module in atlas.modules:
        if module.kind == "down_proj":
            assert plan.modules[module.name] in ("int2_g32", "int4_g32")
        elif not module.part:
            assert plan.modules[module.name] in ("int2_g64", "int4_g64")
    assert plan.size == size_of(atlas.modules, plan.modules, atlas.model) and plan.size.total_bytes <= 62_000
    (wide,) = [uniform for uniform in atlas.uniform if uniform.format == "int4_g128"]
    held = {m.name: "int8_g64" if m.part else "int4_g32" if m.kind == "down_proj" else "int4_g64" for m in atlas.modules}
    assert wide.size == size_of(atlas.modules, held, atlas.model)
    code, _, error = run(
        capsys, monkeypatch, "export", out / "plan.json", "--to", "mlx", "--model", tiny_llama, "--out", out / "mlx"
    )
    assert code == 0, error
    code, _, error = run(capsys, monkeypatch, "plan", out, "--size", "70kB")
    assert code == 0, error


def test_a_module_may_stay_as_it_is(untied: Path, text: Path, tmp_path: Path, capsys, monkeypatch):
    """f32 is a candidate where the checkpoint has it: what stays is in the plan with its bytes, is not packed, and the promise is kept to the byte."""
    out = tmp_path / "out"
    words = ["--formats", "int2_g32,int4_g32,f32", "--for", "bitatlas", "--size", "250kB", "--no-refine", "--no-curve"]
    plan, atlas = survey(capsys, monkeypatch, untied, text, out, *words)
    counts = Counter(plan.modules.values())
    assert counts["f32"] and counts["int2_g32"] + counts["int4_g32"] + counts["int8_g32"]
    assert plan.size.total_bytes <= 250_000 and plan.size == size_of(atlas.modules, plan.modules, atlas.model)
    assert not list((out / "bank").rglob("f32"))
    code, _, error = run(capsys, monkeypatch, "apply", untied, out / "plan.json", "--out", out / "packed")
    assert code == 0, error
    assert sum(file.stat().st_size for file in (out / "packed").glob("*.safetensors")) == plan.size.total_bytes
    with safe_open(next((out / "packed").glob("*.safetensors")), "pt") as reader:
        packed = {name.removesuffix(".weight_packed") for name in reader.keys() if name.endswith(".weight_packed")}  # noqa: SIM118
    assert packed == {name for name, fmt in plan.modules.items() if fmt != "f32"}
    for what in ("packed", "plan.json"):
        assert verify_plan(VerifyOptions(untied, out / what, quiet=True)).kept
    code, _, error = run(capsys, monkeypatch, "tune", untied, out / "plan.json", "--steps", "4", "--quiet")
    assert code == 0, error
    assert read_record(out / "plan-tuned.json", Plan).modules == plan.modules
    code, _, error = run(capsys, monkeypatch, "export", out / "plan.json", "--to", "mlx", "--model", untied, "--out", out / "mlx")
    assert code == 0, error
    command = ["survey", untied, "--tokens", text, *ROWS, "--out", tmp_path / "no", "--formats", "int2_g32,bf16"]
    code, _, error = run(capsys, monkeypatch, *command)
    assert (
        code == 2
        and "--formats bf16: stands for weights that stay as they are, and the checkpoint's are float32: give f32" in error
    )
