"""The command line: each mistake is one clear line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from atlas_factory import make_atlas
from bitatlas.cli.show import show_plan
from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.plan.judge import write_plan
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel, Size
from bitatlas.records.files import read_record, to_json
from bitatlas.records.formats import FORMATS
from bitatlas.records.journal import Journal
from bitatlas.records.plan import Workload
from command import run
from tiny import make_checkpoint

SMALL = [
    "--formats",
    "int2_g32,int4_g32",
    "--quantizer",
    "rtn",
    "--rows",
    "8,8,8",
    "--row-length",
    "16",
    "--tasks",
    "none",
    "--quiet",
]


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
    for model, message in (
        (tmp_path / "nowhere", "no such checkpoint folder"),
        (empty, "no safetensors weights"),
        (short, "truncated"),
        (holed, "model.layers.0.mlp.up_proj.weight holds 1 NaN"),
        (encoder, "not a decoder-only"),
        ("", "name is empty"),
        ("~nobody-at-all/model", "no such checkpoint folder"),
        ("./" + "m" * 300, "name too long"),
    ):
        assert message in refused(capsys, monkeypatch, tmp_path / "out", model, *SMALL, "--tokens", text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--code-bits", "1.5"], "--code-bits 1.5 is below"),
        (["--code-bits", "9"], "--code-bits 9 is above"),
        (["--size", "1kB"], "--size"),
        (["--size", "lots"], "'lots' is not a size"),
        (["--code-bits", "3", "--size", "1GB"], "give one of them"),
        (["--vram", "1kB", "--context", "64"], "the cache of 64 tokens and the activations alone take"),
        (["--vram", "8GiB", "--context", "64"], "--vram 8GiB is above"),
        (["--vram", "8GiB", "--context", "129"], "--context 129: the model's own is 128 tokens"),
        (["--vram", "8GiB", "--context", "0"], "--context 0: must be 1 or more"),
        (["--vram", "8 gigs"], "--vram '8 gigs' is not a size"),
        (["--vram", "8GiB", "--size", "1GB"], "give one of them"),
        (["--vram", "8GiB", "--cache-dtype", "q4"], "--cache-dtype q4: unknown; one of float32"),
        (["--vram", "8GiB", "--batch", "0"], "--batch 0"),
        (["--vram", ""], "--vram"),
        (["--context", "64"], "--context 64: belongs to --vram"),
        (["--size", "1GB", "--cache-dtype", "float16"], "--cache-dtype float16: belongs to --vram"),
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
        (["--tolerance", "nan"], "--tolerance nan"),
        (["--tolerance", "inf"], "--tolerance inf"),
        (["--seed", "-1"], "--seed -1"),
        (["--device", "cpu:foo"], "--device cpu:foo"),
        (["--device", "cpu:1"], "--device cpu:1"),
        (["--formats", ""], "--formats"),
        (["--formats", ","], "--formats: give at least two"),
        (["--code-bits", "nan"], "--code-bits nan"),
        (["--stored-bits", "inf"], "--stored-bits inf"),
        (["--max-damage", "-0.1"], "--max-damage -0.1"),
        (["--size", ""], "--size"),
        (["--tokens", ""], "--tokens"),
        (["--tasks", " "], "--tasks"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--seed", "half"], "--seed"),
        (["one-more-argument"], "one-more-argument"),
    ],
)
def test_wrong_options(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path, flags: list[str], message: str):
    assert message in refused(capsys, monkeypatch, tmp_path / "out", tiny_llama, *SMALL, "--tokens", text, *flags)


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


def test_folder_whose_name_is_too_long(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    code, _, err = run(capsys, monkeypatch, "survey", tiny_llama, *SMALL, "--tokens", text, "--out", tmp_path / ("n" * 300))
    assert (code, err.count("\n")) == (2, 1)
    assert "name too long" in err


def test_no_disk_space(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    monkeypatch.setattr("bitatlas.run.prepare.free_bytes", lambda folder: 2**20)
    assert "only 1 MiB free" in refused(capsys, monkeypatch, tmp_path / "out", tiny_llama, *SMALL, "--tokens", text)


@pytest.mark.parametrize("command", ["plan", "report"])
def test_commands_on_an_empty_folder(capsys, monkeypatch, tmp_path: Path, command: str):
    budget = ["--code-bits", "3"] if command == "plan" else []
    code, _, err = run(capsys, monkeypatch, command, tmp_path, *budget)
    assert (code, err.count("\n")) == (2, 1)
    assert "atlas.json" in err


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "3", "null", "[" * 100_000, '{"schema": "other/1"}', '{"schema": "bitatlas.atlas/1"}', '{"schema": NaN}'],
    ids=lambda content: content[:20],
)
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


def test_no_arguments_show_the_help(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch)
    assert code == 2
    assert "Usage: " in out + err
    assert "survey" in out + err
    assert "bitatlas: " not in err


@pytest.mark.parametrize("command", [[], ["survey"]])
def test_help_ends_well(capsys, monkeypatch, command: list[str]):
    code, out, err = run(capsys, monkeypatch, *command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: " in out


def test_unknown_command_is_one_line(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "survye")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("bitatlas: No such command 'survye'")


def test_interruption_is_told(tmp_path: Path):
    """Ctrl-C while the libraries are imported: nothing is measured yet, and nothing but one line is said."""
    started = subprocess.Popen(
        [sys.executable, "-v", "-m", "bitatlas", "survey", "--out", tmp_path / "out", "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip  (jobs in the background are started with SIGINT ignored)
    message = started.stderr
    assert message is not None
    for line in message:  # -v says what is imported
        if line.startswith("import 'torch._C'") or "torch/__pycache__" in line:
            break
    started.send_signal(signal.SIGINT)
    rest = message.read()
    assert started.wait() == 1
    assert rest.count("bitatlas: interrupted; what was measured is kept: run the same command with --resume to go on\n") == 1
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()


def test_interruption_of_other_commands_promises_nothing(capsys, monkeypatch, tmp_path: Path):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitatlas.records.files.read_record", interrupt)
    code, _, err = run(capsys, monkeypatch, "report", tmp_path)
    assert (code, err) == (1, "bitatlas: interrupted\n")


def written(value: float, kind: str = "code_bits") -> Plan:
    size = Size(code_bits=3.0, stored_bits=4.0, quantized_bytes=0, total_bytes=0)
    return Plan(PlanModel("x", None, "0" * 64), {}, "rtn", {}, Budget(kind, value), size, PlanDamage(None, None))


def test_a_plan_is_written_over_nothing_but_a_plan(tmp_path: Path):
    (tmp_path / "atlas.json").write_text('{"schema": "bitatlas.atlas/1"}')
    (tmp_path / "below").mkdir()
    for out, message in (
        (tmp_path / "atlas.json", "is not a bitatlas plan"),
        (tmp_path / "below", "is a folder"),
        (tmp_path / "none" / "plan.json", "there is no folder"),
        (tmp_path / "atlas.json" / "plan.json", "there is no folder"),
        (tmp_path / "plan.json", "survey's own"),
        (tmp_path / ("n" * 300), "cannot be written"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=message):
            write_plan(written(3.0), tmp_path, out)
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "atlas.json").read_text() == '{"schema": "bitatlas.atlas/1"}'
    file = write_plan(written(3.0), tmp_path, tmp_path / "mine.json")
    assert write_plan(written(2.5), tmp_path, file) == file
    assert read_record(file, Plan).budget.value == 2.5


def test_budgets_that_differ_have_files_that_differ(tmp_path: Path):
    names = [write_plan(written(float(size), "size"), tmp_path, None).name for size in (4 * 2**30, 4 * 2**30 + 1)]
    assert names == ["plan-size-4294967296.json", "plan-size-4294967297.json"]
    assert write_plan(written(3.0), tmp_path, None).name == "plan-code_bits-3.json"
    assert write_plan(written(3.0000001), tmp_path, None).name == "plan-code_bits-3.0000001.json"


def test_budgets_of_memory_have_files_of_their_own_and_say_what_they_are_made_of(capsys, tmp_path: Path):
    load = Workload(8192, 1, 512, "float16", "bfloat16", 1_000_000, 200_000)
    plan = replace(written(1_500_000.0, "vram"), budget=Budget("vram", 1_500_000.0, load))
    loads = [load, replace(load, context=4096), replace(load, cache_dtype="float8_e5m2"), replace(load, batch=2)]
    files = [write_plan(replace(plan, budget=replace(plan.budget, workload=one)), tmp_path, None) for one in loads]
    assert files[0].name == "plan-vram-1500000-context-8192-float16-batch-1-chunk-512.json"
    assert len({file.name for file in files}) == 4
    assert [read_record(file, Plan).budget.workload for file in files] == loads
    show_plan(plan)
    message = " ".join(capsys.readouterr().out.split())
    assert (
        "Device memory 1.20 MB of 1.50 MB: weights 0 bytes, KV cache 1.00 MB, activations 200 kB (1 sequence of 8,192 tokens"
        in message
    )


def test_a_broken_promise_ends_with_code_1(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    """Typer's own exit codes come through; the promised size, 0 bytes, cannot be kept."""
    model = PlanModel("tiny", None, open_checkpoint(str(tiny_llama)).info.weights_sha256)
    promised = replace(
        written(3.0),
        model=model,
        formats={"int2_g32": FORMATS["int2_g32"]},
        modules={"model.layers.0.mlp.up_proj": "int2_g32"},
    )
    (tmp_path / "mine.json").write_text(to_json(promised))
    arguments = [tiny_llama, tmp_path / "mine.json", "--tokens", text, "--rows", "2,2,2", "--row-length", "16", "--quiet"]
    code, out, err = run(capsys, monkeypatch, "verify", *arguments)
    assert (code, err) == (1, "")
    assert out
    code, _, err = run(capsys, monkeypatch, "verify", *arguments, "--seed", "-1")
    assert (code, err) == (2, "bitatlas: --seed -1: must be 0 or more\n")


def test_plan_with_an_undescribed_format_is_refused(tmp_path: Path):
    content = json.loads(to_json(written(3.0)))
    content["modules"] = {"model.layers.0.mlp.up_proj": "int2_g64"}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="'int2_g64', which formats does not describe"):
        read_record(tmp_path / "mine.json", Plan)


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--row-length", "0"], ["--rows", "0,0,0"]])
def test_compare_refuses_what_it_cannot_do(capsys, monkeypatch, text: Path, tiny_llama: Path, flags: list[str]):
    code, _, err = run(capsys, monkeypatch, "compare", tiny_llama, tiny_llama, "--tokens", text, "--quiet", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert flags[0] in err


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


def test_json_of_a_plan_and_of_a_report(capsys, monkeypatch, tmp_path: Path):
    """One object on stdout, nothing else; its records are those of the files."""
    atlas = make_atlas()
    (tmp_path / "atlas.json").write_text(to_json(atlas), encoding="utf-8")
    code, out, err = run(capsys, monkeypatch, "plan", tmp_path, "--code-bits", "3", "--json")
    parsed = json.loads(out)
    assert (code, err, parsed["schema"]) == (0, "", "bitatlas.planned/1")
    assert parsed["plan"] == json.loads(Path(parsed["file"]).read_text())
    code, out, err = run(capsys, monkeypatch, "report", tmp_path, "--json")
    parsed = json.loads(out)
    assert (code, err, parsed["schema"]) == (0, "", "bitatlas.files/1")
    assert all(Path(file).is_file() for file in parsed["files"])


def test_json_of_a_survey_and_of_its_verification(capsys, monkeypatch, tmp_path: Path, text: Path, tiny_llama: Path):
    out = tmp_path / "out"
    code, message, err = run(
        capsys, monkeypatch, "survey", tiny_llama, *SMALL, "--no-refine", "--tokens", text, "--out", out, "--json"
    )
    parsed, atlas = json.loads(message), json.loads((out / "atlas.json").read_text())
    assert (code, err, parsed.pop("schema")) == (0, "", "bitatlas.survey/1")
    assert all(Path(file).is_file() for file in parsed.pop("files").values())
    assert parsed == {name: atlas[name] for name in parsed} and parsed["plan"]["modules"]
    rows = ["--rows", "8,8,8", "--row-length", "16", "--tokens", text, "--quiet", "--json"]
    code, message, err = run(capsys, monkeypatch, "verify", tiny_llama, out / "plan.json", *rows)
    parsed = json.loads(message)
    assert (parsed["schema"], parsed["kept"], code) == ("bitatlas.verification/1", True, 0)
    assert parsed["found"]["size"] == atlas["plan"]["size"] == parsed["promised"]["size"]
    words = ["--rows", "8", "--row-length", "16", "--tokens", text, "--quiet", "--json", "--out", tmp_path / "compared"]
    code, message, err = run(capsys, monkeypatch, "compare", tiny_llama, out / "plan.json", *words)
    parsed, written = json.loads(message), json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert (parsed["schema"], parsed.pop("kept"), code) == ("bitatlas.comparison/2", True, 0)
    assert parsed == written and parsed["candidates"][0]["deviation"]["damage"]["mean"] > 0
    # what its survey was made on is the text that is compared on
    assert any("flatters" in note for note in parsed["notes"])
