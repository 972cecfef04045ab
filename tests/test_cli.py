"""The command line: each mistake is one clear line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

import tiny
from bitatlas import cli
from bitatlas.journal import Journal
from tiny import make_checkpoint

SMALL = ["--formats", "int2_g32,int4_g32", "--rows", "8,8,8", "--row-length", "16", "--tasks", "none", "--quiet"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny.TEXT, encoding="utf-8")
    return file


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["bitatlas", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: object) -> str:
    code, _, err = run(capsys, monkeypatch, "survey", *arguments, "--out", out)
    assert code == 2, err
    assert err.startswith("bitatlas: ")
    assert err.count("\n") == 1
    assert not out.exists() or out.is_file() or all(p.name.startswith("run.sqlite") for p in out.iterdir())
    return err


def test_wrong_checkpoints(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(tiny_llama, tmp_path / name))

    empty = broken("no-weights")
    (empty / "model.safetensors").unlink()
    short = broken("truncated")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[: len(data) // 2])
    holed = broken("nan")
    tensors = load_file(holed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    encoder = tmp_path / "bert"
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(encoder)
    for model, said in (
        (tmp_path / "nowhere", "no such checkpoint folder"),
        (empty, "no safetensors weights"),
        (short, "truncated"),
        (holed, "model.layers.0.mlp.up_proj.weight holds 1 NaN"),
        (encoder, "not a decoder-only"),
    ):
        assert said in refused(capsys, monkeypatch, tmp_path / "out", model, *SMALL, "--tokens", text)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--code-bits", "1.5"], "--code-bits 1.5 is below"),
        (["--code-bits", "9"], "--code-bits 9 is above"),
        (["--size", "1kB"], "--size"),
        (["--size", "lots"], "'lots' is not a size"),
        (["--code-bits", "3", "--size", "1GB"], "give one of them"),
        (["--formats", "int2_g32,int4_g33"], "nearest is 'int4_g32'"),
        (["--formats", "int4_g32"], "at least two"),
        (["--quantizer", "rnt"], "nearest is 'rtn'"),
        (["--tasks", "arc_eazy"], "nearest is 'arc_easy'"),
        (["--rows", "4,4"], "fit,select,test"),
        (["--rows", "4000,4,4"], "are needed"),
        (["--row-length", "4096"], "context"),
        (["--device", "tpu"], "--device tpu"),
        (["--tokens", "nothing.txt"], "no such file"),
        (["--task-data", "no-folder"], "no such folder"),
        (["--tolerance", "-1"], "--tolerance"),
    ],
)
def test_wrong_options(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path, flags: list[str], said: str):
    assert said in refused(capsys, monkeypatch, tmp_path / "out", tiny_llama, *SMALL, "--tokens", text, *flags)


def test_no_text_is_not_silently_scored_on_nothing(capsys, monkeypatch, tmp_path: Path, tiny_llama: Path):
    assert "no text to measure on" in refused(capsys, monkeypatch, tmp_path / "out", tiny_llama, *SMALL)


def test_wrong_folders(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    arguments = [tiny_llama, *SMALL, "--tokens", text]
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, monkeypatch, tmp_path / "file", *arguments)
    assert (tmp_path / "file").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    journal = Journal(other / "run.sqlite")
    journal.claim("f" * 64, "another-model")
    journal.close()
    assert "holds a run already" in refused(capsys, monkeypatch, other, *arguments)
    assert "holds a run of another-model" in refused(capsys, monkeypatch, other, *arguments, "--resume")
    assert "cannot be made" in refused(capsys, monkeypatch, tmp_path / "file" / "below", *arguments)


def test_no_disk_space(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    monkeypatch.setattr("bitatlas.prepare.free_bytes", lambda folder: 2**20)
    assert "only 1 MiB free" in refused(capsys, monkeypatch, tmp_path / "out", tiny_llama, *SMALL, "--tokens", text)


@pytest.mark.parametrize("command", ["plan", "report"])
def test_commands_on_an_empty_folder(capsys, monkeypatch, tmp_path: Path, command: str):
    budget = ["--code-bits", "3"] if command == "plan" else []
    code, _, err = run(capsys, monkeypatch, command, tmp_path, *budget)
    assert (code, err.count("\n")) == (2, 1)
    assert "atlas.json" in err


@pytest.mark.parametrize("content", ["", "[1]", '{"schema": "other/1"}', '{"schema": "bitatlas.atlas/1"}'])
def test_damaged_atlas(capsys, monkeypatch, tmp_path: Path, content: str):
    (tmp_path / "atlas.json").write_text(content)
    code, _, err = run(capsys, monkeypatch, "report", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "atlas.json"]


def test_help_lists_the_commands_and_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bitatlas", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("survey", "plan", "verify", "compare", "report"):
        assert command in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "lm_eval", "numpy", "scipy", "pyarrow", "pydantic"}


def test_version_is_the_packages(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "--version")
    assert (code, out.split()[0]) == (0, "bitatlas")


def test_plan_of_another_model_is_refused(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    other = make_checkpoint(tmp_path / "other", seed=5)
    plan = {
        "schema": "bitatlas.plan/1", "model": {"name": "x", "revision": None, "weights_sha256": "0" * 64}, "formats": {}, "quantizer": "rtn",
        "modules": {}, "budget": {"kind": "code_bits", "value": 3.0}, "damage": {"predicted": None, "measured": None},
        "size": {"code_bits": 3.0, "stored_bits": 4.0, "quantized_bytes": 0, "total_bytes": 0},
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, _, err = run(capsys, monkeypatch, "verify", other, tmp_path / "plan.json", "--tokens", text)
    assert (code, err.count("\n")) == (2, 1)
    assert "not the weights that the plan was made for" in err
