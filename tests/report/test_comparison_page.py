"""The page of a comparison against the record it was made from, and in a real browser; the answer against made-up situations.

Oracles: the page parses, and holds every name, rank and interval of the record; the answer calls a file better only where a pair says so;
the browser says what is cut, what lies over another, and axe-core what cannot be read.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from bitatlas.records.comparison import NOISE, TOLD_APART, UNTOLD, Comparison
from bitatlas.records.text import interval
from bitatlas.report.charts.canvas import GLYPH
from bitatlas.report.charts.compared import figures, ranked, seen_in
from bitatlas.report.charts.labels import Box, Labels, bare_names, fit, letter, short_names, text_width
from bitatlas.report.comparison import answer, comparison_html, comparison_markdown, comparison_notebook_html
from bitatlas.report.comparison_tables import minus, pair_of
from bitatlas.report.markdown import escape
from browser import axe_script, launched, opened
from comparison_factory import EIGHT, EVIL, LONG, MORE, CompareRecipe, FileRecipe, make_comparison
from test_report_browser import CUT_OR_OVERLAID

REFUSED = "its tokenizer is not the reference’s (151,643 of 151,665 tokens differ)"
RECIPES = {
    "eight": CompareRecipe(),
    "twelve": CompareRecipe(files=EIGHT + MORE, require=[("atlas/plan.json", 0.02), (EIGHT[4].name, 0.001)]),
    "close": CompareRecipe(files=EIGHT + MORE, error=3.0, noise=None),
    "hostile": CompareRecipe(
        files=(
            replace(EIGHT[0], name=EVIL),
            replace(EIGHT[2], name=LONG),
            replace(EIGHT[3], name="x" * 300, refused=REFUSED),
            EIGHT[4],
        ),
        domains=(EVIL, "d" * 200),
        tasks=(EVIL,),
        notes=(EVIL, "</script>"),
    ),
    "one": CompareRecipe(files=EIGHT[:1], tasks=(), noise=None, domains=("prose",)),
    "one document": CompareRecipe(files=EIGHT[:3], tasks=(), domains=("prose",), documents=1),
    "no text": CompareRecipe(text=False),
    "all refused": CompareRecipe(files=[replace(one, refused=REFUSED) for one in EIGHT[:2]], tasks=("demo_sums",)),
    "no damage": CompareRecipe(files=(replace(EIGHT[0], damage=0.0), replace(EIGHT[1], damage=0.0), EIGHT[2]), tasks=()),
    "many": CompareRecipe(files=[replace(EIGHT[2], name=f"{'same-' * 9}{n}.gguf") for n in range(30)], tasks=()),
}


@pytest.fixture(params=RECIPES.values(), ids=list(RECIPES))
def comparison(request: pytest.FixtureRequest) -> Comparison:
    return make_comparison(request.param)


# --- the page as text --------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "rect", "line", "path", "circle", "image"}


class _Reader(HTMLParser):
    """What a page says: its tags, closed in order, and its text by the last tag around it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_holds_the_record(comparison: Comparison) -> None:
    page = comparison_html(comparison)
    reader = read(page)
    text = " ".join("".join(reader.text).split())
    assert " ".join(answer(comparison).split()) in text
    for candidate in comparison.candidates:
        assert " ".join(candidate.file.name.split()) in text
        if candidate.deviation:
            for m in (candidate.deviation.damage, candidate.deviation.same_top, *candidate.deviation.quantiles.values()):
                assert interval(m) in text
    for pair in comparison.pairs:
        assert (
            interval(minus(pair, pair.first, pair.difference)) in text
            or interval(minus(pair, pair.second, pair.difference)) in text
        )
    assert comparison_html(comparison) == page
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for tag, attrs in reader.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links if link} <= set(ids)


def test_files_stand_in_the_order_of_their_ranks(comparison: Comparison) -> None:
    page = comparison_html(comparison)
    if not ranked(comparison):
        assert 'class="t-ranking"' not in page
        return
    table = page[page.index('<table class="t-ranking">') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr class=.*?</tr>", table, re.DOTALL)
    places, spans = [], []
    for row in rows:
        found = re.search(r'<td class="rank" rowspan="(\d+)">(\d+)</td>', row)
        places.append(int(found[2]) if found else places[-1])
        spans += [int(found[1])] if found else []
    names = [unescape(name) for name in re.findall(r"<bdi>(.*?)</bdi>", table, re.DOTALL)]
    assert names == [candidate.file.name for candidate in ranked(comparison)]
    assert places == [candidate.rank for candidate in ranked(comparison)]
    assert sum(spans) == len(rows)


def test_nothing_is_loaded_and_only_its_own_script_may_run(comparison: Comparison) -> None:
    page = comparison_html(comparison)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    for tag, attrs in read(page).tags:
        assert not any(name.startswith("on") for name in attrs), tag
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)


def test_a_markdown_row_has_as_many_cells_as_its_head(comparison: Comparison) -> None:
    text = comparison_markdown(comparison)
    assert text.endswith("\n")
    assert "<" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()}) == 1
    for candidate in ranked(comparison):
        assert escape(interval(seen_in(candidate).damage)) in text


def test_a_notebook_shows_files_and_the_answer(comparison: Comparison) -> None:
    reader = read(comparison_notebook_html(comparison))
    said = "".join(reader.text)
    assert answer(comparison) in said
    assert sum(tag == "tr" for tag, _ in reader.tags) == 1 + len(comparison.candidates)
    assert all(candidate.file.name in said for candidate in comparison.candidates)


# --- the charts ----------------------------------------------------------------------------------------------------------

TEXT = re.compile(r'<text class="[^"]*" x="([-\d.]+)" y="([-\d.]+)" text-anchor="(\w+)">([^<]*)</text>')


@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_no_label_lies_over_another_or_beyond_the_edge(comparison: Comparison, width: str) -> None:
    for key, drawn in figures(comparison).items():
        svg = str(getattr(drawn, width))
        across = int(re.search(r'viewBox="0 0 (\d+)', svg)[1])  # type: ignore[index]
        boxes = []
        for x, y, anchor, text in TEXT.findall(svg):
            long = 0.9 * GLYPH * len(unescape(text))
            left = float(x) - {"start": 0.0, "middle": long / 2, "end": long}[anchor]
            boxes.append((Box(left, float(y) - 9, left + long, float(y)), unescape(text)))
        for box, text in boxes:
            assert box.left >= -1 and box.right <= across + 1, (key, text)
        for (one, first), (other, second) in combinations(boxes, 2):
            assert not one.over(other, 0.0), (key, first, second)


def test_every_file_has_a_mark_of_its_kind_and_the_front_is_joined() -> None:
    comparison = make_comparison(RECIPES["twelve"])
    svg = str(figures(comparison)["front"].wide)
    for candidate in ranked(comparison):
        assert f"<title>{candidate.file.name}: {interval(seen_in(candidate).damage, unit=True)}; " in svg
    steps = re.search(r'class="join front" d="([^"]*)"', svg)
    assert steps is not None
    assert len(re.findall("[ML]", steps[1])) == sum(candidate.on_front for candidate in ranked(comparison))
    assert "noise floor: 0.00043" in svg.replace("0.000430", "0.00043")


def test_names_are_cut_in_the_middle_and_stay_different() -> None:
    names = [f"{'Model-' * 8}Q{n}_K.gguf" for n in (2, 3)]
    assert bare_names(names) == ["Q2_K.gguf", "Q3_K.gguf"]
    assert short_names(names, 90) == ["…Q2_K.gguf", "…Q3_K.gguf"]
    assert bare_names(["a", "b"]) == ["a", "b"]
    assert bare_names([]) == []
    hard = ["x" * 40 + "a" + "y" * 40, "x" * 40 + "b" + "y" * 40]
    assert len(set(short_names(hard, 100))) == 2
    for name in (*names, EVIL, LONG, "漢字" * 30):
        assert text_width(fit(name, 120)) <= 120
    assert [letter(index) for index in (0, 25, 26, 27)] == ["A", "Z", "AA", "AB"]


def test_labels_find_places_or_say_that_there_are_none() -> None:
    frame = Box(0, 0, 400, 300)
    marks = [(200.0 + 3 * n, 150.0 + 2 * n) for n in range(6)]
    places = Labels(marks, [60.0] * 6, frame).placed()
    assert places is not None
    assert all(place.box.within(frame) for place in places)
    assert not any(one.box.over(other.box, 0) for one, other in combinations(places, 2))
    assert Labels(marks, [500.0] * 6, frame).placed() is None


# --- the answer ------------------------------------------------------------------------------------------------------------


def files(*damages: float, **more: Any) -> Comparison:
    """Files a, b, c... from small to large with these damages."""
    made = [FileRecipe(chr(ord("a") + n), "GGUF", 4.0 + n, damage) for n, damage in enumerate(damages)]
    return make_comparison(CompareRecipe(files=made, tasks=(), **{"noise": 0.0004, **more}))


def test_one_told_winner() -> None:
    comparison = files(0.2, 0.05, 0.01)
    text = answer(comparison)
    assert text.startswith(
        "Take c (370 MB) for the least damage, 0.0100 [0.0092, 0.0108] nats/token: every other file is told to do more."
    )
    assert text.endswith("From small to large, the front is a (247 MB), b (309 MB) and c (370 MB); all of them are told apart.")


def test_a_larger_file_that_is_told_to_do_more_is_not_on_the_front() -> None:
    text = answer(files(0.01, 0.05, 0.2))
    assert text.startswith("Take a (247 MB) for the least damage")
    assert "The front of size and damage is a alone: for every other file, one of at most its size is told to do less" in text


def test_nothing_told_apart() -> None:
    comparison = files(0.0100, 0.0101, 0.0102)
    assert {pair.verdict for pair in comparison.pairs} == {UNTOLD}
    text = answer(comparison)
    assert text.startswith(
        "No file is told to do less damage than another, so nothing that was measured speaks against the smallest, a (247 MB)."
    )
    assert re.search(
        r"About [\d,]+ to [\d,]+ tokens would tell differences like those seen four times in five; 65,408 were scored\.", text
    )
    assert "better" not in text and "Take" not in text


def test_two_share_the_first_rank() -> None:
    comparison = files(0.2, 0.0101, 0.0100)
    text = answer(comparison)
    assert text.startswith("Take b (309 MB) for the least damage: it is the smallest at rank 1, and c is not told to do less.")
    needed = pair_of(comparison, "b", "c")
    assert needed is not None
    assert (
        f"b and c are not told apart (about {needed.tokens_needed:,} tokens would tell such a difference four times in five"
        in text
    )


def test_within_the_noise() -> None:
    text = answer(files(0.2, 0.00045, 0.00044, 0.00043))
    assert text.startswith("Take b (309 MB): it is the smallest file whose damage is not told to be above the noise floor.")


def test_a_difference_below_the_noise_floor_is_not_called_one() -> None:
    comparison = files(0.0100, 0.0102, error=0.001)
    assert comparison.pairs[0].verdict == NOISE
    assert answer(comparison).endswith("What is told of their differences is smaller than the noise floor.")


def test_equal_files() -> None:
    assert answer(files(0.01, 0.01)).endswith("No difference between them is seen.")


def test_one_refused_and_one_left() -> None:
    made = [FileRecipe("a", "GGUF", 4.0, 0.1), FileRecipe("b|<i>", "GGUF", 5.0, 0.2, refused=REFUSED)]
    comparison = make_comparison(CompareRecipe(files=made, tasks=()))
    text = answer(comparison)
    assert text == (
        "a (247 MB) is the only file that was compared; its damage is 0.1000 [0.0923, 0.1083] nats/token, above the noise floor. "
        "Not compared on the text: b|<i>."
    ).replace("0.1000 [0.0923, 0.1083]", interval(seen_in(comparison.candidates[0]).damage))
    assert "b|&lt;i&gt;</bdi>: its tokenizer is not the reference’s" in comparison_html(comparison)
    assert "not compared: its tokenizer" in comparison_markdown(comparison)


def test_no_text_and_none_that_could_be_compared() -> None:
    assert (
        answer(make_comparison(RECIPES["no text"]))
        == "No text was compared on, so nothing is said of damage; the tasks are below."
    )
    assert answer(make_comparison(RECIPES["all refused"])).startswith("None of the files could be compared on the text")


def test_a_front_in_one_sentence_says_how_many_more_there_are() -> None:
    comparison = make_comparison(RECIPES["twelve"])
    line = [candidate for candidate in ranked(comparison) if candidate.on_front]
    assert len(line) > 6
    assert f"and {len(line) - 5} more" in answer(comparison)


def test_better_is_said_only_where_a_pair_says_so() -> None:
    """With every verdict turned into "not told apart", no sentence names a winner."""
    told = files(0.2, 0.05, 0.01)
    assert {pair.verdict for pair in told.pairs} == {TOLD_APART}
    untold = replace(told, pairs=[replace(pair, verdict=UNTOLD) for pair in told.pairs])
    assert "told to do more" not in answer(untold)
    assert "Take" not in answer(untold)


# --- in a browser ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_alone_quiet_and_fits(browser: Any, comparison: Comparison, width: int, tmp_path: Path) -> None:
    (tmp_path / "compare.html").write_text(comparison_html(comparison), encoding="utf-8")
    url = (tmp_path / "compare.html").as_uri()
    with opened(browser, url, width) as seen:
        page = seen.page
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        problems = page.evaluate(CUT_OR_OVERLAID)
        shown = page.inner_text(".answer")
    assert [request for request in seen.requests if not request.startswith(("data:", url))] == []
    assert seen.messages == []
    assert seen.dialogs == []
    assert size[0] <= size[1] == width
    assert problems == []
    assert " ".join(shown.split()) == " ".join(answer(comparison).split())


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("key", ["twelve", "no text"])
def test_axe_finds_no_serious_problem(browser: Any, key: str, width: int, dark: bool, tmp_path: Path) -> None:
    (tmp_path / "compare.html").write_text(comparison_html(make_comparison(RECIPES[key])), encoding="utf-8")
    with opened(browser, (tmp_path / "compare.html").as_uri(), width, dark) as seen:
        seen.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        seen.page.evaluate(axe_script().read_text(encoding="utf-8"))
        result = seen.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    assert len(result["passes"]) > 15  # it did look
    bad = {one["id"]: one["nodes"][0]["target"] for one in result["violations"] if one["impact"] in ("serious", "critical")}
    assert bad == {}


def test_the_ranking_fits_a_desk_without_scrolling(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "compare.html").write_text(comparison_html(make_comparison()), encoding="utf-8")
    with opened(browser, (tmp_path / "compare.html").as_uri()) as seen:
        inside, outside = seen.page.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.querySelector('.outer'))")
    assert inside <= outside
