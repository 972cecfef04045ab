"""The report against the atlas it was made from, against the real Mermaid, and in a real browser.

Oracles: the numbers printed are read back and compared with the record; Mermaid itself says whether the source is valid and what its
boxes say; the browser says what was loaded, what ran, and whether a text is cut or lies over another.
"""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_factory import Recipe, make_atlas
from bitatlas.records import Atlas, Measured
from bitatlas.records.files import read_record, to_json
from bitatlas.records.text import interval, number, runs
from bitatlas.report import facts
from bitatlas.report.charts.canvas import log_range, log_ticks, ticks
from bitatlas.report.charts.panels import attention_panels
from bitatlas.report.html import html, write_reports
from bitatlas.report.markdown import escape as markdown_escape
from bitatlas.report.markdown import markdown
from bitatlas.report.overview import escape as mermaid_escape
from bitatlas.report.overview import overview, overview_of
from bitatlas.report.tables import tables
from report_cases import EVIL, RECIPES, emptied


@pytest.fixture(params=RECIPES.values(), ids=list(RECIPES))
def atlas(request: pytest.FixtureRequest) -> Atlas:
    return make_atlas(request.param)


# --- numbers as text ---------------------------------------------------------------------------------------------------


def read_back(text: str) -> tuple[float, float, float, int]:
    """`0.214 [0.199, 0.232]` -> mean, low, high, decimals."""
    found = re.fullmatch(r"(\S+?)%? \[(\S+), (\S+)\]", text)
    assert found, text
    numbers = [part.replace("−", "-").replace(",", "") for part in found.groups()]
    return *(float(part) for part in numbers), len(numbers[1].partition(".")[2])  # type: ignore[return-value]


@settings(deadline=None, max_examples=60)
@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e5), st.sampled_from(["nats/token", "%", "points", "ratio", "share"]))
def test_an_interval_as_text_is_the_number_to_its_last_decimal(mean: float, half: float, unit: str) -> None:
    m = Measured(mean, (mean - half, mean + 2 * half), unit, "plan", "test", 8)
    *numbers, decimals = read_back(interval(m))
    scale = 100 if unit == "share" else 1
    for shown, true in zip(numbers, (mean, mean - half, mean + 2 * half), strict=True):
        assert shown == pytest.approx(scale * true, abs=0.5001 * 10**-decimals, rel=1e-9)
    width = 3 * half * scale
    if 1e-4 < width < 10:  # two digits of the width
        assert width / 100 < 10**-decimals <= width * (10 if unit in ("%", "points") else 1)


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 90), min_size=1))
def test_runs_name_every_layer_once(layers: set[int]) -> None:
    named: list[int] = []
    for part in runs(layers).split(", "):
        first, _, last = part.partition("–")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(layers)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (-0.0001, "−0.000100"), (1234.5, "1,234"), (0.5, "0.500"), (-3.14159, "−3.14")]
)
def test_numbers_have_three_digits_and_a_real_minus(value: float, text: str) -> None:
    assert number(value) == text


def test_a_number_that_rounds_to_zero_has_no_sign() -> None:
    assert number(-0.0004, 2) == "0.00"


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e4))
def test_log_ticks_lie_inside_and_are_few(low: float, factor: float) -> None:
    span = log_range([low, low * factor])
    assert span[0] < low
    assert span[1] > low * factor
    found = log_ticks(*span)
    assert 1 <= len(found) <= 7
    assert all(span[0] <= tick <= span[1] for tick in found)


@settings(deadline=None, max_examples=60)
@given(st.floats(-1e5, 1e5), st.floats(1e-4, 1e5))
def test_ticks_lie_inside_and_are_evenly_spaced(low: float, span: float) -> None:
    found = ticks(low, low + span)
    steps = {round((b - a) / span, 6) for a, b in pairwise(found)}
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)
    assert len(steps) <= 1
    assert 1 <= len(found) <= 7


# --- which layers are drawn ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 6), st.integers(0, 50))
def test_the_layers_drawn_follow_the_rule(layers: int, zones: int, seed: int) -> None:
    atlas = make_atlas(Recipe(seed=seed, layers=layers, zones=zones, tasks=(), attention=False))
    chosen = facts.select_layers(atlas)
    assert chosen == sorted(set(chosen))
    if layers <= facts.SHOWN_LAYERS:
        assert chosen == list(range(layers))
        return
    worst = max(atlas.layers, key=lambda record: record.criticality.mean)
    best = min(atlas.layers, key=lambda record: record.criticality.mean)
    assert {0, layers - 1, worst.layer, best.layer} <= set(chosen)
    assert all(any(zone.first <= layer <= zone.last for layer in chosen) for zone in atlas.zones)
    assert facts.SHOWN_LAYERS <= len(chosen) <= facts.SHOWN_LAYERS + len(atlas.zones)
    gaps = [b - a for a, b in pairwise(chosen)]
    assert max(gaps) <= layers / 2


# --- the overview's meaning ----------------------------------------------------------------------------------------------


def test_every_layer_and_its_attention_leads_to_its_own_zone(atlas: Atlas) -> None:
    view = overview_of(atlas)
    ends = {link.start: link.end for link in view.links if not link.dotted}
    for layer in view.chosen:
        zone = atlas.zones[int(ends[f"L{layer}"][1:])]
        assert zone.first <= layer <= zone.last
        if atlas.attention:
            assert ends[f"ATT{layer}"] == ends[f"L{layer}"]
    for place, zone in enumerate(atlas.zones):
        assert ends[f"Z{place}"] == {"critical": "PRESERVE", "safe": "SAFE", "light": "MIXED", "uncertain": "MIXED"}[zone.verdict]


def test_a_dotted_link_reaches_layers_only_where_a_score_is_shown_to_fall() -> None:
    atlas = make_atlas()
    falls = {(pair.task, pair.second) for pair in atlas.task_pairs if pair.verdict == "falls"}
    assert falls == {("arc_easy", "uniform:int2_g64")}  # the recipe has exactly one
    critical = {f"L{record.layer}" for record in atlas.layers if record.verdict == "critical"}
    for place, score in enumerate(atlas.tasks):
        ends = {link.end for link in overview_of(atlas).links if link.start == f"T{place}"}
        if (score.task, score.precision) in falls:
            assert ends
            assert ends <= critical
        else:
            assert ends == {"TASKS"}


def test_the_page_draws_the_nodes_and_links_of_the_mermaid_source(atlas: Atlas) -> None:
    source, page = overview(atlas), html(atlas)
    nodes = re.findall(r'^ +(?!subgraph)(\w+)\["', source, re.MULTILINE)
    links = re.findall(r'^ +(\w+) -\.?->(?:\|"[^"]*"\|)? (\w+)$', source, re.MULTILINE)
    drawn = re.findall(r'data-node="(\w+)" data-to="([\w ]*)"', page)
    assert [key for key, _ in drawn] == nodes
    assert sorted((key, end) for key, ends in drawn for end in ends.split()) == sorted(links)
    assert len(nodes) >= 9
    assert links
    said = re.findall(r'data-to="[\w ]+".*?</li>', page, re.DOTALL)
    assert all('class="leads' in card for card in said)  # a card with links says where they go


def test_what_was_not_measured_is_said() -> None:
    source = overview(emptied(make_atlas()))
    for key in ("NOTASKS", "NOLAYERS", "NOATTENTION", "NOZONES"):
        assert re.search(rf'{key}\["[^"]*not measured"\]', source)
    assert "No plan was made" in source
    assert "MIXED[" in source
    assert "TASKS[" in source


def test_an_empty_atlas_makes_both_reports() -> None:
    atlas = emptied(make_atlas())
    assert markdown(atlas).count("Not measured") >= 5
    assert "No plan was made" in html(atlas)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=200))
def test_a_mermaid_label_has_no_character_that_means_something(text: str) -> None:
    label = mermaid_escape(text)
    assert not re.search(r'["<>`{}|\\\n;#&]', re.sub(r"#\d+;", "", label))
    assert "%%" not in label
    brackets = re.sub(r"\[[−0-9., ]+\]", "", label)
    assert "[" not in brackets
    assert "]" not in brackets


# --- report.md -----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> list:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """Heading -> rows of the table under it, cells as a reader sees them."""
    found: dict[str, list[list[str]]] = {}
    heading, previous = "", None
    for token in parsed(text):
        if token.type == "inline" and previous == "heading_open":
            heading = _plain(token)
        elif token.type == "tr_open":
            found.setdefault(heading, []).append([])
        elif token.type == "inline" and previous in ("th_open", "td_open"):
            found[heading][-1].append(_plain(token))
        previous = token.type
    return found


def _plain(token: object) -> str:
    return "".join(child.content for child in token.children)


def test_markdown_tables_are_whole(atlas: Atlas) -> None:
    read = markdown_tables(markdown(atlas))
    made = {table.title: table for table in tables(atlas)}
    assert set(read) == {title for title, table in made.items() if table.rows}
    for title, rows in read.items():
        expected = [made[title].head, *made[title].rows]
        assert [[" ".join(cell.split()) for cell in row] for row in expected] == rows


def test_every_layer_is_listed_with_all_its_intervals(atlas: Atlas) -> None:
    rows = markdown_tables(markdown(atlas))["Layers"]
    body = {int(row[0]): dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert sorted(body) == [record.layer for record in atlas.layers]
    columns = {"lowered": "Damage lowered", "raised": "Damage raised", "share": "Share of", "criticality": "Criticality"}
    for record in atlas.layers:
        for name, start in columns.items():
            cell = next(text for head, text in body[record.layer].items() if head.startswith(start))
            m: Measured = getattr(record, name)
            *numbers, decimals = read_back(cell)
            scale = 100 if m.unit == "share" else 1
            assert m.ci95 is not None
            for shown, true in zip(numbers, (m.mean, *m.ci95), strict=True):
                assert shown == pytest.approx(scale * true, abs=0.5001 * 10**-decimals)
        assert body[record.layer]["Verdict"] == record.verdict


def test_attention_at_each_precision_is_the_records(atlas: Atlas) -> None:
    rows = markdown_tables(markdown(atlas)).get("Attention at each precision", [[]])
    read = {(int(row[0]), row[1]): dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert set(read) == {(a.layer, facts.precision_name(atlas, a.base)) for a in atlas.attention}
    assert len(read) == len(atlas.attention)
    columns = {
        "Entropy, 0..1": "entropy",
        "Head specialization": "specialization_percent",
        "Reasoning focus": "focus_percent",
        "Sink mass": "sink_mass",
        "Cumulative drift": "drift_cumulative",
    }
    for a in atlas.attention:
        shown = read[a.layer, facts.precision_name(atlas, a.base)]
        for head, name in columns.items():
            wanted = interval(getattr(a, name))
            assert shown[head] == ("0 by definition" if name.startswith("drift") and a.base == "reference" else wanted)


def test_attention_notes_say_each_measures_own_basis() -> None:
    made = {table.key: table.note for table in tables(make_atlas())}
    for key, base in (("attention", "reference"), ("precisions", "each row's own")):
        assert f"Entropy and sink mass: base {base}, test rows, n = 96." in made[key]
        assert f"Head specialization: base {base}, test + repeated random tokens, n = 64." in made[key]
        assert f"Reasoning focus: base {base}, items of svamp, n = 40." in made[key]


def test_attention_charts_draw_every_precision_and_name_it() -> None:
    atlas = make_atlas()
    quantized = ["4-bit", "2-bit", facts.precision_name(atlas, "plan")]
    for panel in attention_panels(atlas):
        drift = "drift" in panel.title
        assert [name for _, _, name in panel.keys] == ([*quantized, "noise floor"] if drift else ["reference", *quantized])
        assert len({css for _, css, _ in panel.keys}) == 4
        for _, _, name in panel.keys:
            assert str(panel.drawing).count(f", {name}: ") == len(atlas.layers)


def test_the_overview_has_the_low_widths_attention_beside_the_references() -> None:
    atlas = make_atlas()
    low = {a.layer: a for a in facts.attention_at(atlas, f"uniform:{atlas.low}")}
    view = overview_of(atlas)
    for layer, card in zip(view.chosen, view.attention, strict=True):
        assert card.lines[1] == f"at 2-bit: {interval(low[layer].entropy)}"
        assert card.lines[3] == f"at 2-bit: {interval(low[layer].specialization_percent)}"


def test_sections_stand_in_the_form_that_users_asked_for() -> None:
    text = markdown(make_atlas())
    wanted = [
        "# Quantization Analysis Overview",
        "## 4-bit vs 2-bit Strategic Analysis",
        "```mermaid\ngraph TD",
        "## Key Findings",
    ]
    wanted += ["**Critical Layers Identified:**", "## Optimization Strategy", "## Uniform damage", "## Layers", "## Zones"]
    wanted += [
        "## Plan and baselines",
        "## Tasks",
        "## Attention",
        "## Attention at each precision",
        "## Weights",
        "## Folk rules",
        "## Definitions",
        "## Provenance",
    ]
    places = [text.index(f"{part}\n") for part in wanted]
    assert places == sorted(places)


def test_nothing_hostile_is_markup_in_markdown() -> None:
    text = markdown(make_atlas(RECIPES["hostile"]))
    tokens = [child for token in parsed(text) for child in (token, *(token.children or []))]
    assert not {token.type for token in tokens} & {"html_block", "html_inline", "link_open", "em_open", "s_open", "image"}
    assert sum(token.type == "fence" for token in tokens) == 1
    codes = {token.content for token in tokens if token.type == "code_inline"}
    assert codes == set()  # nothing of ours: the plan lost, so there is no command to print
    assert EVIL in {row[1] for row in markdown_tables(text)["Provenance"]}


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=60))
def test_escaped_markdown_reads_as_the_text(text: str) -> None:
    tokens = parsed(f"| a |\n| --- |\n| x{markdown_escape(text)}x |")
    cells = [token for token in tokens if token.type == "inline"]
    assert _plain(cells[-1]) == f"x{text}x"
    assert {child.type for child in cells[-1].children} <= {"text", "text_special"}


def test_the_same_atlas_gives_the_same_bytes_also_from_its_file(atlas: Atlas, tmp_path: Path) -> None:
    (tmp_path / "atlas.json").write_text(to_json(atlas), encoding="utf-8")
    again = read_record(tmp_path / "atlas.json", Atlas)
    assert markdown(atlas) == markdown(again)
    assert html(atlas) == html(again)


def test_no_date_is_printed() -> None:
    atlas = make_atlas()
    for text in (markdown(atlas), html(atlas)):
        assert not re.search(r"\b20\d\d-\d\d|\b\d\d:\d\d:\d\d\b", text)


def test_both_files_are_written_whole(tmp_path: Path) -> None:
    atlas = make_atlas()
    write_reports(atlas, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown(atlas)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(atlas)


def test_reporting_needs_no_torch() -> None:
    program = "import sys, bitatlas.report.html; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
