"""The report looks as it did when somebody last looked at it: its sections beside stored pictures (see screens.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from browser import launched
from screens import LOOKS, SECTIONS, alike, apart, page_of, shot, stored


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.fixture(scope="module", params=LOOKS)
def seen(browser: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    with page_of(browser, tmp_path_factory.mktemp("screens"), request.param) as page:
        yield request.param, page


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_looks_as_its_stored_picture(seen: tuple[str, Any], section: str) -> None:
    look, page = seen
    now, then = shot(page, section), stored(look, section)
    again = "if that is meant, take the pictures anew (python tests/screens.py) and look at them"
    assert alike(now, then), f"{apart(now, then)}: {again}"


# Takes one thing that can be seen out of a section, and puts it back.
CHANGES = {
    "a label": ("tasks", "svg.chart text", "element.style.visibility = 'hidden'"),
    "a cell of another shade": ("budget", "#figure-plan [data-cell] rect", "element.style.fillOpacity = '0.05'"),
    "a mark": ("answer", "svg.chart g.tip", "element.style.visibility = 'hidden'"),
    "a figure": ("layers", "svg.chart", "element.style.visibility = 'hidden'"),
    "a sentence": ("overview", "p, li", "element.style.visibility = 'hidden'"),
    "a section moved down": ("profiles", "h2", "element.style.marginTop = '40px'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_missing_is_noticed(seen: tuple[str, Any], change: str) -> None:
    (look, page), (section, what, how) = seen, CHANGES[change]
    find = f"const element = [...document.querySelectorAll('#{section} :is({what})')].find(one => one.getBoundingClientRect().width > 9)"
    page.evaluate(f"() => {{ {find}; window.undo = [element, element.getAttribute('style') ?? '']; {how}; }}")
    noticed = not alike(shot(page, section), stored(look, section))
    page.evaluate("() => window.undo[0].setAttribute('style', window.undo[1])")
    assert noticed
    assert alike(shot(page, section), stored(look, section))
