"""A first plan from prices: it keeps the budget and what it promises, measures no swap, and leaves a survey that follows as it would have been."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bitatlas.errors import UserError
from bitatlas.records import Plan
from bitatlas.records.files import read_record
from bitatlas.run.options import VerifyOptions
from bitatlas.run.planner import first_hooks, layers_by_score
from bitatlas.run.prepare import prepare
from bitatlas.run.survey import run_draft, run_survey
from bitatlas.run.verify import verify_plan
from command import run
from surveys import OUTPUTS, QUIET, settings_for, survey_words


@pytest.fixture(scope="module")
def drafted(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    out = tmp_path_factory.mktemp("draft") / "out"
    return out, run_draft(settings_for(tiny_llama, text), out, False, QUIET)


def test_a_draft_is_judged_keeps_its_promise_and_measures_no_swap(drafted: tuple[Path, Plan], tiny_llama: Path, text: Path):
    out, plan = drafted
    assert read_record(out / "plan.json", Plan) == plan
    assert plan.size.code_bits <= 3 and plan.damage.measured and plan.verdict
    assert sum(baseline.is_random for baseline in plan.baselines) == 20
    assert any("most critical" in baseline.name for baseline in plan.baselines)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("run.sqlite")) == ["bank", "plan.json"]
    with closing(sqlite3.connect(out / "run.sqlite")) as journal:
        assert {stage for (stage,) in journal.execute("SELECT stage FROM measured")} == {"damage", "price"}
    checked = verify_plan(VerifyOptions(tiny_llama, out / "plan.json", tokens=text, rows=(8, 8, 8), row_length=24, quiet=True))
    assert checked.kept and checked.damage.mean == pytest.approx(plan.damage.measured.mean, rel=1e-5)


def test_a_survey_goes_on_in_its_folder_and_is_what_it_would_have_been(
    drafted: tuple[Path, Plan], tiny_llama: Path, text: Path, tmp_path: Path
):
    settings = settings_for(tiny_llama, text, refine=False)
    run_survey(settings, drafted[0], True, QUIET)
    run_survey(settings, tmp_path / "alone", False, QUIET)
    for name in OUTPUTS:
        assert (drafted[0] / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_its_scores_rank_true_changes(tiny_llama: Path, text: Path, tmp_path: Path):
    """Against the true damage of each unit's change in the unquantized model: prices are near where the change is small."""
    opened = prepare(settings_for(tiny_llama, text, formats=("int3_g32", "int8_g32"), code_bits=4.0), tmp_path, False, QUIET)
    hooks = first_hooks(opened)
    plans = {str(i): {m.name: "int3_g32" for m in unit.modules} for i, unit in enumerate(opened.subject.units)}
    damage = opened.meter.plans(plans, opened.rows.fit)
    true = np.array([damage[name].mean() for name in plans])
    assert np.corrcoef(hooks.scores.tables["prices"][:, 0], true)[0, 1] > 0.9
    assert sorted(layers_by_score(opened, hooks.scores)) == [0, 1, 2]


def test_the_command(capsys, monkeypatch, tiny_llama: Path, text: Path, tmp_path: Path):
    def draft(name: str, *words: str) -> tuple[int, str, str]:
        draft_words = [*survey_words(tiny_llama, text, tmp_path / name), "--formats", "int2_g32,int4_g32", "--draft"]
        return run(capsys, monkeypatch, *draft_words, *words)

    code, out, err = draft("out", "--code-bits", "3")
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "out" / "plan.json") and "best of 20 random plans" in out
    assert "Verdict: " in out and "with --resume in the place of --draft" in out
    code, out, err = draft("no", "--protect", "svamp=1pp")
    assert (code, out) == (2, "") and err.startswith("bitatlas: --draft --protect: ") and not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="holds a run already"):
        run_draft(settings_for(tiny_llama, text), tmp_path / "out", False, QUIET)
