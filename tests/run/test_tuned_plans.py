"""`tune` on the command line: a plan of its own, kept to the byte, that apply and verify take; what was interrupted goes on; one line for what cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitatlas.data.rows import fit_pool, make_rows
from bitatlas.data.texts import read_documents
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize import tune
from bitatlas.quantize.bank import TUNED
from bitatlas.quantize.tune import Tuner
from bitatlas.records import Plan
from bitatlas.records.files import read_record, to_json
from bitatlas.run.options import TuneOptions, VerifyOptions
from bitatlas.run.survey import run_draft
from bitatlas.run.tune import UNTUNED, tune_plan
from bitatlas.run.verify import verify_plan
from command import run
from surveys import QUIET, settings_for

ROWS = {"rows": (8, 8, 8), "row_length": 24}


@pytest.fixture(scope="module")
def drafted(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("draft") / "out"
    run_draft(settings_for(tiny_llama, text, quantizer="rtn"), out, False, QUIET)
    return out


@pytest.fixture
def survey(drafted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drafted, tmp_path / "survey"))


def options(model: Path, folder: Path, text: Path, steps: int = 24) -> TuneOptions:
    return TuneOptions(model, folder / "plan.json", tokens=text, steps=steps, quiet=True, **ROWS)


def test_a_tuned_plan_does_less_damage_and_keeps_its_promise(tiny_llama: Path, text: Path, survey: Path):
    before = read_record(survey / "plan.json", Plan)
    tuned = tune_plan(options(tiny_llama, survey, text))
    plan = read_record(survey / "plan-tuned.json", Plan)
    assert plan == tuned.plan and tuned.file == survey / "plan-tuned.json"
    assert (plan.modules, plan.size, plan.budget) == (before.modules, before.size, before.budget)
    assert TUNED in plan.codes and plan.codes.startswith(before.codes)
    (baseline,) = plan.baselines
    assert baseline.name == UNTUNED and baseline.damage.mean == pytest.approx(before.damage.measured.mean, rel=1e-5)
    assert plan.damage.measured.mean < baseline.damage.mean
    assert baseline.difference.mean == pytest.approx(plan.damage.measured.mean - baseline.damage.mean)
    checked = verify_plan(VerifyOptions(tiny_llama, tuned.file, tokens=text, quiet=True, **ROWS))
    assert checked.kept and checked.damage.mean == pytest.approx(plan.damage.measured.mean, rel=1e-5)
    assert not list((survey / "bank").glob("tuning-*"))
    again = verify_plan(VerifyOptions(tiny_llama, survey / "plan.json", tokens=text, quiet=True, **ROWS))
    assert again.damage.mean == pytest.approx(before.damage.measured.mean, rel=1e-5)  # the survey's own codes are as they were


def test_the_same_steps_give_the_same_plan(tiny_llama: Path, text: Path, survey: Path):
    first = tune_plan(options(tiny_llama, survey, text, steps=6)).plan
    assert tune_plan(options(tiny_llama, survey, text, steps=6)).plan == first


def test_layer_by_layer(tiny_llama: Path, text: Path, survey: Path, monkeypatch):
    whole = tune_plan(options(tiny_llama, survey, text, steps=8)).plan
    monkeypatch.setattr("bitatlas.run.tune._fits_whole", lambda *words: False)
    first, second = (tune_plan(options(tiny_llama, survey, text, steps=8)).plan for _ in range(2))
    assert first == second and first.codes != whole.codes
    assert first.damage.measured.mean == pytest.approx(whole.damage.measured.mean, rel=1e-3)
    assert verify_plan(VerifyOptions(tiny_llama, survey / "plan-tuned.json", tokens=text, quiet=True, **ROWS)).kept


def test_what_was_interrupted_goes_on(tiny_llama: Path, text: Path, survey: Path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "RATE", 1e-3)  # so that every mark is better
    whole = tune_plan(options(tiny_llama, survey, text, steps=8)).plan
    step = Tuner._step

    def stop(self: Tuner, weights: dict, numbers: list, rate: float) -> None:
        if stop.left == 0:
            raise KeyboardInterrupt
        stop.left -= 1
        step(self, weights, numbers, rate)

    stop.left = 5
    monkeypatch.setattr(Tuner, "_step", stop)
    words = ["--tokens", text, "--rows", "8,8,8", "--row-length", "24", "--steps", "8", "--quiet"]
    code, _, error = run(capsys, monkeypatch, "tune", tiny_llama, survey / "plan.json", *words)
    assert code == 1 and error == "bitatlas: interrupted; the same command goes on from the last quarter of the steps\n"
    assert list((survey / "bank").glob("tuning-*-8.safetensors"))
    stop.left = 4  # the last mark was after 4 of 8
    by_time = replace(options(tiny_llama, survey, text), steps=None, time="2h")  # its steps are those that were begun
    assert tune_plan(by_time).plan == whole
    assert stop.left == 0


def test_apply_tunes_first(tiny_llama: Path, text: Path, survey: Path, tmp_path: Path, monkeypatch, capsys):
    """With the text from the survey beside the plan, by time."""
    words = ["--tokens", text, "--rows", "8,8,8", "--row-length", "24", "--formats", "int2_g32,int4_g32", "--quantizer", "rtn"]
    words += ["--tasks", "none", "--no-fuse", "--no-curve", "--no-refine", "--quiet"]
    code, _, error = run(capsys, monkeypatch, "survey", tiny_llama, *words, "--out", tmp_path / "whole")
    assert code == 0, error
    code, out, error = run(
        capsys,
        monkeypatch,
        "apply",
        tiny_llama,
        tmp_path / "whole" / "plan.json",
        "--out",
        tmp_path / "whole" / "packed",
        "--tune",
        "1s",
    )
    assert code == 0, error
    assert "steps of 2 rows" in error and "codes not tuned" in out
    plan = read_record(tmp_path / "whole" / "packed" / "plan.json", Plan)
    assert TUNED in plan.codes
    card = (tmp_path / "whole" / "packed" / "README.md").read_text(encoding="utf-8")
    assert f"scales trained on the unquantized model's predictions for {plan.solver['tuned']['steps']} steps" in card
    code, out, error = run(capsys, monkeypatch, "verify", tiny_llama, tmp_path / "whole" / "packed", "--quiet")
    assert code == 0, out + error
    code, out, _ = run(
        capsys, monkeypatch, "tune", tiny_llama, tmp_path / "whole" / "plan.json", "--steps", "2", "--json", "--quiet"
    )
    assert code == 0 and json.loads(out)


def test_the_pool_holds_the_fit_rows_and_nothing_of_the_others(tiny_llama: Path, text: Path):
    tokenizer = open_checkpoint(str(tiny_llama)).load_tokenizer()
    documents = read_documents(str(text))
    rows = make_rows(documents, tokenizer, "text", (4, 8, 8), 24, 128, 5)
    pool = {tuple(row) for row in fit_pool(documents, tokenizer, rows, 5).tolist()}
    assert {tuple(row) for row in rows.fit.tolist()} < pool
    assert not pool & {tuple(row) for row in torch.cat([rows.select, rows.test]).tolist()}
    with pytest.raises(ValueError, match="not made of this text"):
        fit_pool(documents, tokenizer, rows, 6)


def test_one_line_for_what_cannot_be_done(tiny_llama: Path, text: Path, survey: Path, tmp_path: Path, monkeypatch, capsys):
    plan_file = survey / "plan.json"
    plan = read_record(plan_file, Plan)
    usual = ["--tokens", text, "--rows", "8,8,8", "--row-length", "24"]
    tuned = tmp_path / "tuned.json"
    tuned.write_text(to_json(replace(plan, codes=plan.codes + TUNED + "0")), encoding="utf-8")
    cases = [
        (["tune", tiny_llama, plan_file, *usual, "--time", "soon"], "--time soon: give a number of s, min or h"),
        (["tune", tiny_llama, plan_file, *usual, "--steps", "0"], "--steps 0: at least 1"),
        (["tune", tiny_llama, plan_file], "--tokens: no atlas.json of this model lies beside"),
        (["tune", tiny_llama, tuned, *usual], "its codes are tuned already"),
        (["apply", tiny_llama, plan_file, "--out", tmp_path / "x", "--tune", "ten"], "--tune ten: give a number of s, min or h"),
        (["apply", tiny_llama, plan_file, "--out", survey, "--tune", "1s"], "exists and is not empty"),
    ]
    for words, expected in cases:
        code, out, error = run(capsys, monkeypatch, *words)
        lines = error.strip().splitlines()
        assert (code, out) == (2, "") and expected in lines[-1], (words, error)
    monkeypatch.setattr("bitatlas.run.tune.available_bytes", lambda device: 1000)
    code, _, error = run(capsys, monkeypatch, "tune", tiny_llama, plan_file, *usual)
    assert code == 2 and "1.00 kB are free here; tuning takes about" in error
    code, _, error = run(capsys, monkeypatch, "tune", tiny_llama, plan_file, *usual, "--memory", "2MB")
    assert code == 2 and "--memory 2.00 MB: too little; tuning takes about" in error
    code, _, error = run(capsys, monkeypatch, "verify", tiny_llama, tuned, *usual)  # never rounded again and called tuned
    assert code == 2 and "tuned weights depend on the text they were fitted on" in error
