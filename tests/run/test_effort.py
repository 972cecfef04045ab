"""How much is measured and how long it takes: levels, times, and what is said before the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.errors import UserError
from bitatlas.records.text import duration
from bitatlas.run.effort import (
    EFFORTS,
    Shape,
    effort_within,
    left_out_text,
    nominal_effort,
    rows_by_stage,
)
from bitatlas.run.prepare import open_model, prepare
from bitatlas.run.settings import parse_time
from command import run
from surveys import QUIET, settings_for, survey_words

SMALL = Shape(
    layers=4, units=16, kinds=7, formats=3, rows=(24, 24, 64), row_length=192, weights=10**6, tasks=2, refine=True, curve=True
)
REAL = replace(SMALL, layers=30, units=120, weights=134_000_000)


def total(name: str, shape: Shape) -> float:
    return sum(rows_by_stage(EFFORTS[name], shape).values())


@settings(deadline=None)
@given(
    st.builds(
        Shape, layers=st.integers(1, 80), units=st.integers(1, 500), kinds=st.integers(1, 9), formats=st.integers(2, 5),
        rows=st.tuples(*[st.integers(2, 200)] * 3), row_length=st.integers(16, 2048), weights=st.integers(10**5, 10**10),
        tasks=st.integers(0, 4), refine=st.booleans(), curve=st.booleans(),
    ),
    st.floats(1, 1e5), st.floats(1e-4, 100),
)  # fmt: skip
def test_a_greater_effort_takes_longer_and_the_greatest_that_fits_is_taken(shape: Shape, seconds: float, row: float):
    times = [total(name, shape) * row for name in EFFORTS]
    assert times == sorted(times, reverse=True)
    effort = effort_within(shape, seconds, row)
    assert total(effort.name, shape) * row <= seconds or effort.name == "least"
    greater = list(EFFORTS)[: list(EFFORTS).index(effort.name)]
    assert all(total(name, shape) * row > seconds for name in greater)


def test_small_models_are_measured_in_full_and_a_real_one_in_a_coffee_break():
    assert nominal_effort(SMALL).name == "full"
    assert nominal_effort(REAL).name == "quarter"
    assert left_out_text(EFFORTS["full"], SMALL) == "none"
    assert "layers on 16 of 64 rows" in left_out_text(EFFORTS["quarter"], REAL)


@pytest.mark.parametrize(("text", "seconds"), [("20min", 1200), ("90 s", 90), ("1.5h", 5400)])
def test_times_are_read(text: str, seconds: float):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "min", "0min", "-3h", "1e3 s", "2 days"])
def test_other_words_are_refused(text: str):
    with pytest.raises(UserError, match="--time"):
        parse_time(text)


@pytest.mark.parametrize(("seconds", "text"), [(12, "12 s"), (1200, "20 min"), (9000, "2.50 h")])
def test_durations_are_said_as_people_do(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_dry_run_says_how_long_and_writes_nothing(capsys, monkeypatch, tiny_llama: Path, text: Path, tmp_path: Path):
    words = [*survey_words(tiny_llama, text, tmp_path / "out"), "--tasks", "none"]
    code, out, err = run(capsys, monkeypatch, *words, "--dry-run")
    assert (code, out) == (0, "") and not (tmp_path / "out").exists()
    for stage in ("about ", "quantizing", "first plan", "its verdict", "layers", "units", "the plan"):
        assert stage in err, stage


def test_a_short_time_takes_the_least_effort_and_few_items(tiny_llama: Path, text: Path, tmp_path: Path):
    asked = settings_for(tiny_llama, text, tasks=("demo_questions",), limit=300, time="1s")
    opened = open_model(asked, tmp_path / "out", False, QUIET)
    limit = opened.settings.limit  # how many items a second holds is the machine's
    assert opened.settings.effort == "least" and limit is not None and 8 <= limit < 300
    assert [len(items) for items in opened.items.values()] == [limit]
    session = prepare(replace(asked, time_seconds=None), tmp_path / "out", False, QUIET)
    assert session.effort.name == "full" and len(session.items["demo_questions"]) == 300
