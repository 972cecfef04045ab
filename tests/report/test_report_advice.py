"""What the report advises: that it follows from the plan and the verdicts, says no more than was measured, and says it once."""

from __future__ import annotations

import dataclasses
import re

import pytest

from atlas_factory import Recipe, make_atlas
from bitatlas.records import Atlas, Baseline, Finding, Measured
from bitatlas.records.text import interval
from bitatlas.report import advice, facts
from bitatlas.report.charts.figures import figures
from bitatlas.report.html import html
from bitatlas.report.markdown import markdown
from bitatlas.report.overview import overview
from report_cases import RECIPES


@pytest.fixture(params=RECIPES.values(), ids=list(RECIPES))
def atlas(request: pytest.FixtureRequest) -> Atlas:
    return make_atlas(request.param)


def test_a_plan_that_lost_is_not_recommended() -> None:
    atlas = make_atlas(Recipe(recommended=False))
    assert advice.answer(atlas).startswith("Mixed plan not recommended at 3.")
    for text in (overview(atlas), markdown(atlas), html(atlas)):
        assert "Not recommended: last layers high does less damage" in re.sub(r"<[^>]*>|\\", "", text)
    assert "bitatlas verify" not in markdown(atlas)


def test_a_plan_beaten_by_a_format_outside_says_which_to_add() -> None:
    atlas = make_atlas(RECIPES["beaten from outside"])
    assert atlas.plan is not None
    answer = advice.answer(atlas)
    assert answer.startswith("Mixed plan not recommended at 3.")
    assert answer.count("add int3_g64 to --formats. Layers") == 1
    silent = dataclasses.replace(atlas, plan=dataclasses.replace(atlas.plan, verdict="Not recommended: a baseline won."))
    assert "): a baseline won; add int3_g64 to --formats. Layers" in advice.answer(silent)
    for text in (markdown(atlas), html(atlas)):
        assert "| uniform int3_g64 (not in --formats) |" in text or ">uniform int3_g64 (not in --formats)</th>" in text
    drawn = figures(atlas)
    assert ">uniform int3_g64 (not in --formats)</text>" in drawn["baselines"].wide
    assert ">int3_g64 (not in --formats)</text>" in drawn["baselines"].narrow
    for picture in (drawn["size"].wide, drawn["size"].narrow):
        assert ">int3_g64</text>" in picture
        assert picture.count("<title>uniform ") == 4  # each once, though one of them is also a baseline
    assert "not open to the plan: int3_g64" in drawn["size"].caption


def test_advice_on_layers_claims_no_bits(atlas: Atlas) -> None:
    said = advice.answer(atlas)
    assert not re.search(r"should get|can go|keep|need", said)
    for verdict, claim in (("critical", "more harmful than"), ("safe", "within the tolerance if lowered alone")):
        found = facts.with_verdict(atlas, verdict)
        part = next(part for part in advice.strategy(atlas) if verdict in part.follows)
        assert (claim in said) == bool(found)
        if found:
            assert claim in part.lines[0]
            assert ("The plan decides by module" if atlas.plan else "Bits are decided by module") in part.lines[1]


@pytest.mark.parametrize(
    ("mean", "ends", "word"),
    [(-0.05, (-0.06, -0.04), "beats"), (-0.01, (-0.03, 0.01), "ties with"), (0.05, (0.04, 0.06), "loses to")],
)
def test_whole_critical_layers_are_compared_where_they_were_measured(mean: float, ends: tuple[float, float], word: str) -> None:
    atlas = make_atlas()
    made, name = atlas.plan, "most critical layers high"
    assert made is not None
    others = [one for one in made.baselines if one.name != name]
    own = next(one for one in made.baselines if one.name == name)
    difference = Measured(mean, ends, "nats/token", "plan", "test", 96)

    def lines(baselines: list[Baseline]) -> list[str]:
        plan = dataclasses.replace(made, baselines=baselines)
        mixed = next(part for part in advice.strategy(dataclasses.replace(atlas, plan=plan)) if part.key == "MIXED")
        return [line for line in mixed.lines if line.startswith("Raising whole")]

    assert lines(others) == []
    assert lines([*others, dataclasses.replace(own, difference=difference)]) == [
        f"Raising whole critical layers instead does {interval(own.damage, unit=True)} at the same size; "
        f"the plan {word} it (plan minus this: {interval(difference)})"
    ]


def test_commands_that_the_report_names_exist() -> None:
    from bitatlas.cli.main import app

    exist = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = re.findall(r"`bitatlas (\w+)", markdown(make_atlas()))
    assert set(named) == {"verify", "plan"} <= exist


@pytest.mark.parametrize(
    ("text", "p", "printed"),
    [
        ("It loses 48 [43, 54] points.", 0.0011, ["p = 0.0011"]),
        ("It loses 48 points.", 0.0011, ["48.3 [42.7, 54.3] points", "p = 0.0011"]),
        ("It loses 48 points (Holm p < 0.0001).", 0.0011, ["48.3 [42.7, 54.3] points"]),
        ("It loses −48 [−54.3, −43] points (p = 0.001).", 0.0011, []),
    ],
)
def test_an_interval_is_printed_once_in_a_finding(text: str, p: float, printed: list[str]) -> None:
    evidence = Measured(48.3, (42.7, 54.3), "points", "reference", "items:svamp", 200)
    assert facts.evidence(Finding("tasks", "a", "falls", text, evidence, p)) == printed


def test_names_stand_at_their_own_marks_where_a_format_lies_just_under_the_plan() -> None:
    for recipe in ("sixteen", "beaten from outside"):
        for picture in (figures(make_atlas(RECIPES[recipe]))["size"].wide, figures(make_atlas(RECIPES[recipe]))["size"].narrow):
            found = re.findall(r'<text class="label[^"]*" x="[\d.]+" y="([\d.]+)"[^>]*>(plan|int3_g64)</text>', picture)
            heights = {name: float(y) for y, name in found}
            worse = recipe == "beaten from outside"  # then the plan's damage is the higher one, and its name has to be
            assert (heights["plan"] < heights["int3_g64"]) == worse
