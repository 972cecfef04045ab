"""The pages cannot lie: their commands run, what they add is added as they say, and the reference is what the code says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import tiny
from command import run
from pages import commands as lines_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SMALL = "--rows 6,6,8 --row-length 24 --no-refine --no-curve"
# What a page's words stand for here: a tiny model has no 8 GiB to save, and no sum to lose.
STANDS_FOR = {
    "--context 8192": "--context 64",
    "--context 4096": "--context 32",
    "--tasks arc_easy,svamp": "--tasks arc_easy --task-data tasks --limit 8",
    "--tasks arc_easy --out with-tasks": "--tasks arc_easy --task-data tasks --limit 8 --out with-tasks",
    "src/bitatlas/data/bitatlas-demo": "my-model",
    "demo_questions": "arc_easy",
}
NOT_RUN = {
    "bitatlas quantize ./my-model --size 2GiB": "a tiny model has no such size; tests/export/test_gguf_base.py runs the command",
    "bitatlas compare ./my-model a.gguf": "the layouts of other tools: tests/model/test_foreign.py and benchmarks/referee.py",
    "bitatlas survey ./my-model --out my-atlas --for llama.cpp": "the same",
    "bitatlas export my-atlas/plan.json --to llama.cpp": "the same",
    "bitatlas verify ./my-model my-atlas/gguf": "the same",
    "bitatlas survey ./my-model --out gguf-atlas": "llama.cpp is not installed everywhere; tests/export/test_gguf.py runs these",
    "bitatlas survey ./my-model --out math-atlas": "as the one above it, on another text",
    "bitatlas survey ./my-model --out my-atlas --tokens my-text.txt --code-bits 3": "the how-to of memory does this",
    "bitatlas export gguf-atlas": "the same",
    "bitatlas verify ./my-model gguf-atlas": "the same",
    "bitatlas plan my-atlas --protect": "a tiny model has no task to lose; tests/plan/test_protect.py protects one of the demo's",
    "bitatlas --install-completion": "writes to the shell's own files; tests/cli/test_completion.py asks what it would",
}


def commands(page: str) -> list[str]:
    return [line for line in lines_of((DOCS / page).read_text(encoding="utf-8")) if line.startswith("bitatlas")]


def follow(page: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a page's commands in this process, in their order; every one must do what it is for."""
    done = []
    for line in commands(page):
        if any(line.startswith(start) for start in NOT_RUN):
            continue
        told = line
        for words, others in STANDS_FOR.items():
            told = told.replace(words, others)
        told += told.startswith("bitatlas survey") * f" {SMALL}"
        told += (told.startswith("bitatlas survey") and "--tasks" not in told) * " --tasks none"
        told += (told.startswith("bitatlas survey") and "--formats" not in told) * " --formats int2_g32,int4_g32"
        told += (told.startswith("bitatlas verify") and "--tokens" in told) * " --rows 6,6,8 --row-length 24"
        code, out, err = run(capsys, monkeypatch, *shlex.split(told)[1:])
        if code == 2 and (
            possible := re.search(r"possible: ([\d.]+)kB to ([\d.]+)kB", err)
        ):  # a size that is far above a tiny model's
            size = f"{(float(possible[1]) + float(possible[2])) / 2:.1f}kB"
            told = re.sub(r"8GiB|4GB", size, told)
            code, out, err = run(capsys, monkeypatch, *shlex.split(told)[1:])
        # a prediction from so few rows may be too hopeful: then `verify` says so, which is what it is for
        assert code == 0 or (code == 1 and told.startswith("bitatlas verify") and "NOT KEPT" in out), f"{told}: {err}"
        done.append(line)
    return done


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Path:
    """A folder with what the how-tos have: a model, its text, and a task's file."""
    shutil.copytree(tiny_llama, tmp_path / "my-model")
    for name in ("my-text.txt", "my-math.txt"):
        (tmp_path / name).write_text(tiny.TEXT, encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    items = [{"id": f"q{i}", "question": f"Which {i}?", "choices": [{"label": c, "text": f"the {c} {i}"} for c in "AB"], "answerKey": "AB"[i % 2]} for i in range(12)]  # fmt: skip
    (tmp_path / "tasks" / "ARC-Easy-test.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    (tmp_path / "tasks" / "csqa.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_how_tos_of_memory_and_of_scripts(desk: Path, capsys, monkeypatch):
    pytest.importorskip("resvg_py")
    assert len(follow("howto/memory.md", capsys, monkeypatch)) == 5
    told = json.loads((desk / "my-atlas" / "plan.json").read_text())
    assert told["budget"]["kind"] == "vram" and told["budget"]["workload"]["context"] == 64
    assert len(follow("howto/scripts.md", capsys, monkeypatch)) == 3
    assert list((desk / "my-atlas" / "figures").glob("*.png"))


@pytest.mark.slow
def test_how_tos_of_protecting_and_of_exporting(desk: Path, capsys, monkeypatch):
    pytest.importorskip("compressed_tensors")
    assert len(follow("howto/protect.md", capsys, monkeypatch)) == 1
    assert json.loads((desk / "my-atlas" / "atlas.json").read_text())["tasks"]
    assert len(follow("howto/export.md", capsys, monkeypatch)) == 5
    assert (desk / "for-mlx" / "config.json").is_file() and (desk / "for-vllm" / "config.json").is_file()


@pytest.mark.slow
def test_comparing(desk: Path, capsys, monkeypatch):
    """The page of compare, with a rounded copy of the model and a plan."""
    shutil.copytree("my-model", "other")
    weights = load_file("other/model.safetensors")
    save_file({name: (16 * weight).round() / 16 for name, weight in weights.items()}, "other/model.safetensors", {"format": "pt"})
    words = f"survey ./my-model --out my-atlas --tokens my-text.txt --tasks none --formats int2_g32,int4_g32 {SMALL}"
    assert run(capsys, monkeypatch, *words.split())[0] == 0
    assert len(follow("compare.md", capsys, monkeypatch)) == 4
    told = json.loads((desk / "by-domain" / "comparison.json").read_text(encoding="utf-8"))
    assert [domain["name"] for domain in told["domains"]] == ["prose", "math"]
    assert told["requirements"][0]["kept"]
    bundled = json.loads((desk / "with-tasks" / "comparison.json").read_text(encoding="utf-8"))
    assert [domain["name"] for domain in bundled["domains"]] == ["prose", "code", "math"]  # its tokenizer has no chat template
    assert len(bundled["tasks"]) == 2


@pytest.mark.slow
def test_the_tutorial(desk: Path, capsys, monkeypatch):
    """Its commands after `make demo`, with a survey of a tiny model in the demo's place."""
    pytest.importorskip("compressed_tensors")
    words = f"survey ./my-model --out demo-out --tokens my-text.txt --tasks arc_easy --task-data tasks --limit 8 {SMALL}"
    assert run(capsys, monkeypatch, *words.split(), "--formats", "int2_g32,int4_g32")[0] == 0
    assert len(follow("tutorial.md", capsys, monkeypatch)) == 4
    tables = reference().TABLES
    assert set(pq.read_schema("demo-out/tables/items.parquet").names) == set(tables["items.parquet"][1]) - {"output"}
    assert pq.read_schema("demo-out/tables/damage.parquet").names == list(tables["damage.parquet"][1])


# --- the page about adding things ------------------------------------------------------------------------------------


def add_all(root: Path) -> None:
    """Do what `howto/extend.md` says in a copy of the package."""
    text = (DOCS / "howto" / "extend.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (root / name).parent.mkdir(exist_ok=True)
        assert not (root / name).exists()
        (root / name).write_text(content, encoding="utf-8")
    for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
        for name, change in re.findall(r"^--- (\S+)\n(.*?)(?=^---|\Z)", block, re.DOTALL | re.MULTILINE):
            old, new = ("".join(f"{line[1:]}\n" for line in change.splitlines() if line[0] == sign) for sign in "-+")
            source = (root / name).read_text(encoding="utf-8")
            assert source.count(old) == 1, f"{name} has no line {old!r}: the page is behind the code"
            (root / name).write_text(source.replace(old, new), encoding="utf-8")


@pytest.mark.slow
def test_adding_a_quantizer_a_format_an_exporter_and_a_task(desk: Path):
    shutil.copytree(ROOT / "src", desk / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (desk / "tasks").rename("my-tasks")
    (desk / "tests" / "quantize").mkdir(parents=True)
    add_all(desk)
    shutil.copy(ROOT / "tests" / "cli" / "test_completion.py", desk / "tests")
    environment = {**os.environ, "PYTHONPATH": str(desk / "src")}

    def call(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/quantize/test_minmax.py",
        "tests/test_completion.py",
        "-k",
        "step or registries",
    )
    survey, export = commands("howto/extend.md")
    call("-m", *shlex.split(survey), *SMALL.split(), "--limit", "8", "--quiet")
    plan = json.loads((desk / "my-atlas" / "plan.json").read_text())
    assert plan["quantizer"] == "minmax" and set(plan["modules"].values()) <= {"int2_g16", "int4_g16"}
    assert {score["task"] for score in json.loads((desk / "my-atlas" / "atlas.json").read_text())["tasks"]} == {"csqa"}
    assert "codes are not written" in call("-m", *shlex.split(export))
    lines = (desk / "for-anything" / "bits.csv").read_text().splitlines()
    assert len(lines) == len(plan["modules"]) + 1 and lines[1].endswith((",2,16", ",4,16"))


# --- the reference ---------------------------------------------------------------------------------------------------


def reference():
    """docs/reference.py as a module."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["commands.md", "files.md"])
def test_the_reference_is_up_to_date(page: str):
    written = reference().PAGES[page]()
    assert (DOCS / "reference" / page).read_text(encoding="utf-8") == written, "run: python docs/reference.py"


def test_every_record_and_every_option_is_in_the_reference():
    """By another way than the one that writes it: from the JSON of an atlas, and from --help."""
    from atlas_factory import make_atlas
    from bitatlas.records.files import to_json

    text = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in json.loads(to_json(make_atlas())))
    text = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    for part in text.split("\n## ")[1:]:
        name = part.split()[1]
        help_text = subprocess.run([sys.executable, "-m", "bitatlas", name, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=True).stdout  # fmt: skip
        assert set(re.findall(r"--[a-z][a-z-]+", help_text)) - {"--help"} <= set(re.findall(r"--[a-z][a-z-]+", part)), name
