"""`plan --curve` on a small model: verified plans at every size, none above it, written whole, and the report shows them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from bitatlas.errors import UserError
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Plan
from bitatlas.records.files import read_record
from bitatlas.run.curve import SHORT_POINTS, sizes_beside, trace_curve
from bitatlas.run.options import VerifyOptions
from bitatlas.run.prepare import settings_of
from bitatlas.run.survey import run_survey
from bitatlas.run.verify import verify_plan
from surveys import settings_for

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def surveyed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve")
    (folder / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    settings = settings_for(tiny_llama, folder / "text.txt", rows=(4, 4, 4), refine=False)
    run_survey(settings, folder / "out", False, QUIET)
    shutil.copytree(folder / "out", folder / "first", ignore=shutil.ignore_patterns("bank", "run.sqlite*"))
    run_survey(replace(settings, curve=False), folder / "out", True, QUIET)
    return folder / "out"


def test_settings_of_a_survey_that_had_an_option_which_has_gone(surveyed: Path):
    atlas = read_record(surveyed / "atlas.json", Atlas)
    assert settings_of(replace(atlas, settings=atlas.settings | {"allow_pickle": False})) == settings_of(atlas)


@pytest.fixture(scope="module")
def curve(surveyed: Path):
    return trace_curve(surveyed, 3, None, None, QUIET)


def test_a_survey_adds_a_few_verified_plans_unless_told_not_to(surveyed: Path):
    first, without = (read_record(folder / "atlas.json", Atlas) for folder in (surveyed.parent / "first", surveyed))
    assert first.plan == without.plan
    assert without.plans == []
    assert len(first.plans) == SHORT_POINTS - 1
    files = [read_record(file, Plan) for file in (surveyed.parent / "first" / "curve").iterdir()]
    assert sorted(files, key=lambda plan: plan.size.total_bytes) == first.plans
    ends = [u.size.total_bytes for u in first.uniform]
    for plan in first.plans:
        assert min(ends) < plan.size.total_bytes <= plan.budget.value < max(ends)
        assert plan.damage.measured is not None
        assert plan.damage.measured.rows == "test"
        names = {baseline.name for baseline in plan.baselines}
        assert {"first layers high", "last layers high", "most critical layers high"} <= names
        assert not any(name.startswith("random") for name in names)
        uniform = next(b for b in plan.baselines if b.name == "uniform int2_g32")
        assert uniform.damage.mean == pytest.approx(next(u.damage.mean for u in first.uniform if u.format == "int2_g32"))


def test_a_survey_keeps_how_any_two_units_interact(surveyed: Path):
    atlas = read_record(surveyed / "atlas.json", Atlas)
    found = atlas.interactions
    assert found is not None
    assert (found.base, found.format) == ("uniform:int4_g32", "int2_g32")
    assert found.units == list(dict.fromkeys(m.unit for m in atlas.modules))
    assert [len(row) for row in found.extra] == list(range(len(found.units)))
    strongest = sorted((value for row in found.extra for value in row), reverse=True)[: len(found.pairs)]
    for pair, value in zip(found.pairs, strongest, strict=True):
        indices = sorted(map(found.units.index, (pair.first, pair.second)))
        assert found.extra[indices[1]][indices[0]] == value
        assert pair.extra.mean == pytest.approx(value, rel=6e-3)  # three digits
        assert (pair.extra.base, pair.extra.rows, pair.extra.n) == (found.base, "fit", 4)


@given(st.integers(10, 10**6), st.integers(4, 10**6), st.floats(0, 1))
def test_sizes_beside_the_surveys_plan_leave_out_the_nearest(least: int, span: int, at: float):
    plan_size = least + int(at * span)
    sizes = sizes_beside(plan_size, least, least + span)
    assert len(sizes) == SHORT_POINTS - 1
    assert all(least < size < least + span for size in sizes)
    assert all(abs(size - plan_size) >= span / 8 - 1 for size in sizes)


def test_every_plan_is_measured_within_its_size_and_larger_ones_do_less(surveyed: Path, curve):
    assert len(curve.plans) == 3
    budgets = [plan.budget.value for plan, _ in curve.plans]
    assert budgets == sorted(budgets)
    ends = {u.format: u.size.total_bytes for u in curve.atlas.uniform}
    assert ends["int2_g32"] < budgets[0] < budgets[-1] < ends["int4_g32"]
    for plan, file in curve.plans:
        assert plan.size.total_bytes <= plan.budget.value
        assert plan.damage.measured is not None and plan.damage.measured.rows == "test"
        assert plan.recommended is not None and plan.baselines
        assert read_record(file, Plan) == plan
    selected = [plan.solver["select_damage"] for plan, _ in curve.plans]
    assert selected == sorted(selected, reverse=True)


def test_the_atlas_and_the_report_hold_the_curve_and_a_second_run_changes_nothing(surveyed: Path, curve):
    atlas = read_record(surveyed / "atlas.json", Atlas)
    points = [point for point in atlas.curve if point.kind == "curve"]
    assert [point.damage for point in points] == [plan.damage.measured for plan, _ in curve.plans]
    assert points[0].name in (surveyed / "report.html").read_text(encoding="utf-8")
    before = (surveyed / "atlas.json").read_bytes()
    trace_curve(surveyed, 3, None, None, QUIET)
    assert (surveyed / "atlas.json").read_bytes() == before
    assert read_record(surveyed / "plan.json", Plan) == atlas.plan


def test_a_plan_of_the_curve_is_verified_with_the_surveys_bank(surveyed: Path, tiny_llama: Path, curve):
    plan, file = curve.plans[1]
    result = verify_plan(
        VerifyOptions(tiny_llama, file, tokens=surveyed.parent / "text.txt", rows=(4, 4, 4), row_length=24, quiet=True)
    )
    assert result.size_kept and result.damage.mean == pytest.approx(plan.damage.measured.mean, rel=1e-6)


def test_wrong_use_is_one_line(surveyed: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--points 0: give 1 to 99"):
        trace_curve(surveyed, 0, None, None, QUIET)
    other = tiny.make_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="not the weights"):
        trace_curve(surveyed, 2, str(other), None, QUIET)
    moved = tmp_path / "moved"
    shutil.copytree(surveyed, moved)
    with pytest.raises(UserError, match="nowhere"):
        trace_curve(moved, 2, str(tmp_path / "nowhere"), None, QUIET)
