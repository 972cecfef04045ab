"""The report where people see it: the page in headless Chromium, the overview drawn by the real Mermaid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atlas_factory import make_atlas
from bitatlas.records import Atlas
from bitatlas.records.text import interval
from bitatlas.report import advice
from bitatlas.report.charts.canvas import escape
from bitatlas.report.html import html, write_reports
from bitatlas.report.overview import overview, overview_of
from bitatlas.report.tables import tables
from browser import Opened, launched, mermaid_script, opened
from report_cases import RECIPES


@pytest.fixture(params=RECIPES.values(), ids=list(RECIPES))
def atlas(request: pytest.FixtureRequest) -> Atlas:
    return make_atlas(request.param)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


# --- the real Mermaid ----------------------------------------------------------------------------------------------------

RENDER = """async source => {
  const { svg } = await mermaid.render("drawn", source);
  const box = document.createElement("div");
  box.innerHTML = svg;
  document.body.replaceChildren(box);
  const lines = element => {
    for (const br of element.querySelectorAll("br")) br.replaceWith("\\n");
    return element.textContent.split("\\n").map(line => line.trim()).filter(Boolean);
  };
  const all = selector => [...box.querySelectorAll(selector)];
  return {
    nodes: all(".node").map(node => ({ id: node.id, css: node.getAttribute("class"), lines: lines(node) })),
    groups: all(".cluster-label").map(label => label.textContent.trim()),
    links: all("path.flowchart-link").length,
    labels: all(".edgeLabels > .edgeLabel").map(label => label.textContent.trim()).filter(Boolean).sort(),
    active: all("script, a, [onclick], .clickable, iframe").length,
  };
}"""


@pytest.fixture(scope="module")
def mermaid(browser: Any) -> Iterator[Opened]:
    """A page with the real Mermaid, used for one source after the other."""
    script = mermaid_script()
    with opened(browser) as seen:
        seen.page.add_script_tag(path=str(script))
        seen.page.evaluate('mermaid.initialize({ startOnLoad: false, securityLevel: "strict" })')
        yield seen


@pytest.mark.slow
def test_mermaid_draws_every_box_and_link(mermaid: Opened, atlas: Atlas) -> None:
    view, source = overview_of(atlas), overview(atlas)
    assert len(source) < 50_000, "Mermaid's default limit"
    drawn = mermaid.page.evaluate(RENDER, source)
    assert not mermaid.dialogs
    assert not [message for message in mermaid.messages if message.startswith("error")]
    assert drawn["active"] == 0
    assert drawn["links"] == len(view.links)
    assert drawn["labels"] == sorted(link.label for link in view.links if link.label)
    assert len(drawn["groups"]) == 6
    assert any(label.startswith(f"🎯 {view.title}: {atlas.model.name[:40]}") for label in drawn["groups"])
    _check_boxes(drawn["nodes"], [*view.datasets, *view.layers, *view.attention, *view.effects, *view.strategy])


def _check_boxes(nodes: list[dict], cards: list) -> None:
    """Every card is one node, of its class, with all its lines as text (long ones may be cut)."""
    assert len(nodes) == len(cards)
    for card in cards:
        node = next(node for node in nodes if re.search(rf"-{card.key}-\d+$", node["id"]))
        assert not card.css or card.css in node["css"].split()
        for line in (card.title, *card.lines, card.mark):
            start = " ".join(line.split())[:150]
            assert any(start in shown for shown in node["lines"]), (start, node["lines"])


# --- report.html in a browser --------------------------------------------------------------------------------------------

CUT_OR_OVERLAID = """() => {
  const bad = [];
  const visible = element => element.getClientRects().length > 0;
  for (const svg of [...document.querySelectorAll("svg.chart")].filter(visible)) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
    const boxes = texts.map(text => text.getBoundingClientRect());
    texts.forEach((text, i) => {
      const a = boxes[i];
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        bad.push("cut: " + text.textContent);
      if (text.parentNode.hasAttribute("transform")) return;  // a slanted label's box is larger than the label
      for (let j = i + 1; j < texts.length; j++) {
        const b = boxes[j];
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 4 && !texts[j].parentNode.hasAttribute("transform"))
          bad.push("over: " + text.textContent + " / " + texts[j].textContent);
      }
    });
  }
  for (const box of document.querySelectorAll(".card, .tiles div, figure, .advice li, .finding-grid li"))
    if (visible(box) && box.scrollWidth > box.clientWidth + 1) bad.push("wide: " + box.textContent.slice(0, 60));
  return bad;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_alone_quiet_and_fits(browser: Any, atlas: Atlas, width: int, tmp_path: Path) -> None:
    write_reports(atlas, tmp_path)
    assert (tmp_path / "report.html").stat().st_size <= 3_000_000
    url = (tmp_path / "report.html").as_uri()
    with opened(browser, url, width) as seen:
        page = seen.page
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        problems = page.evaluate(CUT_OR_OVERLAID)
        scripts = page.evaluate("[...document.scripts].filter(script => !script.type).length")
        answer = page.inner_text(".answer")
    assert [request for request in seen.requests if not request.startswith(("data:", url))] == []
    assert seen.messages == []
    assert seen.dialogs == []
    assert size[0] <= size[1] == width
    assert problems == []
    assert scripts == 1
    assert answer == advice.answer(atlas)


def test_dark_and_light_follow_the_reader_and_the_button(browser: Any, tmp_path: Path) -> None:
    write_reports(make_atlas(), tmp_path)
    url = (tmp_path / "report.html").as_uri()
    paper = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    shades = {}
    for dark in (False, True):
        with opened(browser, url, dark=dark) as seen:
            page = seen.page
            before = page.evaluate(paper)
            page.click("#theme")
            shades[dark] = (before, page.evaluate(paper))
            contrast = page.evaluate(CONTRAST)
        assert contrast >= 4.5
    light, night = shades[False][0], shades[True][0]
    assert light > 690 > 150 > night
    assert shades == {False: (light, night), True: (night, light)}


# the least contrast (WCAG) of body text, soft text and the three verdicts against what they stand on
CONTRAST = """() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const probe = name => { const i = document.createElement("i"); i.style.color = `var(--${name})`; document.body.append(i); const c = getComputedStyle(i).color; i.remove(); return light(c); };
  const pairs = [["ink", "paper"], ["soft", "paper"], ["soft", "surface"], ["critical", "surface"], ["safe", "surface"], ["on-dark", "bits"]];
  return Math.min(...pairs.map(([a, b]) => ratio(probe(a), probe(b))));
}"""


def test_tooltips_say_a_marks_words(browser: Any, tmp_path: Path) -> None:
    atlas = make_atlas()
    write_reports(atlas, tmp_path)
    with opened(browser, (tmp_path / "report.html").as_uri()) as seen:
        page = seen.page
        page.hover("#figure-criticality .wide g.tip >> nth=0")
        shown = page.inner_text("#tip")
    first = atlas.layers[0]
    assert shown == f"Layer 0: criticality {interval(first.criticality)}, {first.verdict}"


def test_without_scripts_the_page_still_says_everything(atlas: Atlas) -> None:
    page = html(atlas)
    body = page[page.index("<body>") : page.index("<script>")]
    for table in tables(atlas):
        for row in table.rows:
            assert str(escape(row[0])) in body
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
