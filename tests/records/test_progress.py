"""What a long run shows: a live part on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from bitatlas.progress import Live, Reporter


def told(terminal: bool, quiet: bool = False) -> str:
    file = io.StringIO()
    reporter = Reporter(console=Console(file=file, force_terminal=terminal, width=120, quiet=quiet, highlight=False))
    reporter.found("uniform int2_g64", "2.81 [2.60, 3.07] nats/token")
    with reporter.stage("units") as progress:
        for done in range(4):
            progress(done, 4)
            time.sleep(0.15)
    reporter.say("step 1: kept")
    return file.getvalue()


def test_elsewhere_every_line_is_plain():
    text = told(terminal=False)
    assert "\x1b" not in text and "\r" not in text
    first, second, third = text.splitlines()
    assert first == "uniform int2_g64: 2.81 [2.60, 3.07] nats/token"
    assert re.fullmatch(r"units: \d\.\d s", second)
    assert third == "step 1: kept"


def test_on_a_terminal_the_stage_its_pace_and_what_was_found():
    text = told(terminal=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"units +━+.* 3/4 +[\d.]+/s +0:00:0\d left +0:00:0\d", plain)
    assert "uniform int2_g64 2.81 [2.60, 3.07] nats/token" in re.sub(r" +", " ", plain)
    assert re.search(r"so far +0:0\d", plain)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is shown again


def test_nothing_when_quiet():
    assert told(terminal=True, quiet=True) == told(terminal=False, quiet=True) == ""


def test_a_result_is_replaced_by_the_next_of_its_name_and_not_said_twice():
    file = io.StringIO()
    reporter = Reporter(console=Console(file=file, force_terminal=False))
    for value in ("0.9", "0.9", "0.8"):
        reporter.found("best", value)
    assert file.getvalue().splitlines() == ["best: 0.9", "best: 0.8"]
    assert reporter.results == {"best": "0.8"}


def test_what_is_left_follows_the_pace_of_what_is_done(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 0.0, 20.0, 20.5, 80.5, 90.0])
    monkeypatch.setattr("bitatlas.progress.time.monotonic", lambda: next(clock))
    file = io.StringIO()
    reporter = Reporter(console=Console(file=file, force_terminal=False))
    reporter.expect({"a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0, "e": 50.0})
    reporter.passed("a")  # 20 s in the place of 10: twice as long
    assert reporter.results["left"] == "about 5 min"  # 2 x 140 s
    reporter.passed("b")  # was known: tells nothing
    assert reporter.results["left"] == "about 4 min"  # 2 x 120 s
    reporter.passed("c", "left out")  # 60 s in the place of 30
    assert reporter.results["left"] == "about 3 min"  # 2 x 90 s
    reporter.passed("nothing that was expected")
    assert file.getvalue().count("left: about") == 3


def test_markup_in_a_result_is_text():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with Live(console, {"[red]task[/]": "[bold]x[/]"}, time.monotonic()) as live:
        live.add_task("stage", total=None)
    assert "[red]task[/]" in file.getvalue() and "[bold]x[/]" in file.getvalue()
