"""A finding's link leads to its numbers: every link in the page has its end, and a folded table opens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from atlas_factory import make_atlas
from bitatlas.findings.correlations import SPARSITY_CLAIM as SPARSER
from bitatlas.findings.reliability import PREDICTION_CLAIM as PREDICTED
from bitatlas.records import Atlas, Finding
from bitatlas.report.html import SECTIONS, html, numbers_of, write_reports
from bitatlas.report.tables import tables
from browser import launched, opened
from report_cases import RECIPES, emptied

ATLASES = {name: make_atlas(recipe) for name, recipe in RECIPES.items()}
ATLASES["emptied"] = emptied(make_atlas())


@pytest.mark.parametrize("atlas", ATLASES.values(), ids=list(ATLASES))
def test_every_link_has_its_end_and_no_end_is_there_twice(atlas: Atlas) -> None:
    page = html(atlas)
    ends = re.findall(r'<[a-z0-9]+ [^>]*?\bid="([^"]+)"', page)
    assert len(ends) == len(set(ends))
    links = re.findall(r'href="#([^"]*)"', page)
    assert set(links) <= set(ends)
    shown = [finding for finding in atlas.findings if finding.topic != "folk"]
    assert page.count('<a class="numbers"') == len([f for f in shown if (f.topic, f.verdict) != ("layers", "critical")])


@pytest.mark.parametrize(
    ("topic", "claim", "key"),
    [
        ("layers", "the layers' shares add up", "layers"),
        ("layers", "weight statistics tell where the damage is", "correlations"),
        ("layers", SPARSER, "sparsity"),
        ("zones", "early layers 0–5", "zones"),
        ("attention", "attention of the unquantized model", "attention"),
        ("attention", "attention tells where the damage is", "correlations"),
        ("tasks", "arc_easy is above chance", "tasks"),
        ("tasks", "arc_easy, reference to uniform:int2_g64", "pairs"),
        ("plan", PREDICTED, "prediction"),
        ("plan", "the plan does less damage than simple plans of its size", "plan"),
    ],
)
def test_a_finding_leads_to_its_own_table_else_to_its_section(topic: str, claim: str, key: str) -> None:
    finding = Finding(topic, claim, "holds", "")
    assert numbers_of(finding, tables(make_atlas())).id == f"table-{key}"
    assert numbers_of(finding, tables(emptied(make_atlas()))) == SECTIONS[topic]


def test_a_topic_of_its_own_leads_to_the_method() -> None:
    assert numbers_of(Finding("moon", "it is full", "holds", ""), []).id == "method"


def test_a_link_to_a_folded_table_opens_it(tmp_path: Path) -> None:
    write_reports(make_atlas(), tmp_path)
    with launched() as browser, opened(browser, (tmp_path / "report.html").as_uri()) as seen:
        page = seen.page
        assert not page.is_visible("#table-attention table")
        page.click('a.numbers[href="#table-attention"] >> nth=0')
        page.wait_for_selector("#table-attention table", state="visible")
    assert seen.messages == []
