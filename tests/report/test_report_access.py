"""The report by other means than a mouse and good eyes: axe-core's judgement, the keyboard, paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atlas_factory import Recipe, make_atlas
from bitatlas.report.budget import stops
from bitatlas.report.charts import heat
from bitatlas.report.html import write_reports
from browser import axe_script, launched, opened

RUN = "axe.run(document, { resultTypes: ['violations'] })"  # with every passed node the answer takes minutes to cross over


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 390)], ids=["light", "dark"])
def test_axe_finds_no_serious_problem(browser: Any, dark: bool, width: int, tmp_path: Path) -> None:
    write_reports(make_atlas(Recipe(layers=6)), tmp_path)
    with opened(browser, (tmp_path / "report.html").as_uri(), width, dark) as seen:
        seen.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        seen.page.evaluate(axe_script().read_text(encoding="utf-8"))
        result = seen.page.evaluate(RUN)
    assert len(result["passes"]) > 20  # it did look
    bad = {one["id"]: one["nodes"][0]["target"] for one in result["violations"] if one["impact"] in ("serious", "critical")}
    assert bad == {}


def test_axe_would_find_one(browser: Any, tmp_path: Path) -> None:
    write_reports(make_atlas(Recipe(layers=2, tasks=(), attention=False)), tmp_path)
    with opened(browser, (tmp_path / "report.html").as_uri()) as seen:
        seen.page.evaluate("document.documentElement.style.setProperty('--soft', '#c8ccd0')")
        seen.page.evaluate(axe_script().read_text(encoding="utf-8"))
        result = seen.page.evaluate(RUN)
        assert "color-contrast" in {one["id"] for one in result["violations"] if one["impact"] == "serious"}


def test_arrows_go_from_cell_to_cell_and_say_why(browser: Any, tmp_path: Path) -> None:
    atlas = make_atlas()
    assert atlas.plan is not None
    write_reports(atlas, tmp_path)
    cells = heat.cells_of(atlas)
    raises = cells.raises(atlas.plan)
    place = {key: number for number, key in enumerate(cells.keys)}
    with opened(browser, (tmp_path / "report.html").as_uri()) as seen:
        page = seen.page
        page.locator("#figure-plan .wide svg").focus()
        walk = [
            ("ArrowRight", (0, "q_proj")),
            ("ArrowRight", (1, "q_proj")),
            ("ArrowDown", (1, "k_proj")),
            ("ArrowLeft", (0, "k_proj")),
        ]
        for key, at in walk:
            page.keyboard.press(key)
            assert page.inner_text("#tip") == cells.words(place[at], atlas.plan, raises)
        assert "would cost" in page.inner_text("#tip")
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.keyboard.press("Tab")
        assert page.evaluate("document.querySelectorAll('g.at').length") == 0


def test_every_mark_can_be_reached_by_keyboard(browser: Any, tmp_path: Path) -> None:
    atlas = make_atlas(Recipe(layers=5))
    write_reports(atlas, tmp_path)
    with opened(browser, (tmp_path / "report.html").as_uri()) as seen:
        page = seen.page
        page.locator("#figure-criticality .wide svg").focus()
        told = set()
        for _ in range(8):
            page.keyboard.press("ArrowRight")
            told.add(page.inner_text("#tip"))
    assert sum(text.startswith("Layer") and "criticality" in text for text in told) == len(atlas.layers)


def test_on_paper_one_stop_stands_and_nothing_is_cut(browser: Any, tmp_path: Path) -> None:
    atlas = make_atlas()
    write_reports(atlas, tmp_path)
    with opened(browser, (tmp_path / "report.html").as_uri(), 794) as seen:  # A4 at 96 dots an inch
        page = seen.page
        page.emulate_media(media="print")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("document.querySelectorAll('details:not([open]):not(.source)').length") == 0
        widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert widths[0] <= widths[1]
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
        paper = page.pdf(format="A4", print_background=True)
        assert page.locator(".stop:visible").count() == 1
    assert paper.startswith(b"%PDF")
    assert len(stops(atlas)) > 1
