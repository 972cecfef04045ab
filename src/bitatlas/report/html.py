"""report.html: the whole report in one file that needs no network, light and dark, for a desk, a phone and paper.

Text is data: the template escapes everything, and the page's policy lets no script run but its own (by its hash), and nothing be
loaded. Without scripts nothing is lost but the theme switch and the faster tooltips.
Left out: a chart library and the Mermaid renderer (5 MB); the overview is drawn as HTML, its Mermaid source stands beside it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from bitatlas.records import Atlas, Finding, Plan
from bitatlas.records.files import write_text
from bitatlas.records.text import byte_size, interval, number
from bitatlas.report import advice, facts
from bitatlas.report.budget import memory_of, slider_data, stops
from bitatlas.report.charts import diagram, panels
from bitatlas.report.charts.figures import figures
from bitatlas.report.charts.heat import head_examples, head_grids
from bitatlas.report.facts import Table
from bitatlas.report.markdown import markdown
from bitatlas.report.overview import LINK_NOTE, overview
from bitatlas.report.tables import tables

_KEPT = re.compile(r"(\[[−0-9., ]+\])|\d+–\d+|\bn = \d+|\b\d-bit\b|(?<!\w)--[a-z]+")
LONG_TABLE = 12  # rows from which a table starts folded
LONG_LAYERS = 40  # the same for the table of layers
STACKED = ("folk",)  # keys of tables with sentences: on a phone a row's cells stand below each other


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    name: str
    value: str
    detail: str
    css: str = ""


def html(atlas: Atlas) -> str:
    """Return the whole of report.html; the same atlas gives the same text."""
    plans, memory = stops(atlas), memory_of(atlas)
    return render(
        "report.html.j2",
        ("report.js", "budget.js"),
        ("report.css",),
        atlas=atlas,
        title=facts.title_of(atlas),
        formats=facts.formats_text(atlas),
        answer=advice.answer(atlas),
        tiles=_tiles(atlas),
        stops=plans,
        own=next((index for index, stop in enumerate(plans) if stop.plan is atlas.plan), 0),
        memory=memory,
        slider=slider_data(atlas, plans, memory),
        figures=figures(atlas),
        rows=diagram.rows(atlas),
        link_note=LINK_NOTE,
        mermaid=overview(atlas),
        panels={"Attention": panels.attention_panels(atlas), "Weights": panels.weight_panels(atlas)},
        heads=head_grids(atlas),
        head_maps=head_examples(atlas),
        tables={table.key: table for table in tables(atlas)},
        strategy=advice.strategy(atlas),
        findings=facts.findings_by_topic(atlas),
        folded=facts.comparisons_at_chance(atlas),
        stacked_tables=STACKED,
        critical=facts.critical_lines(atlas),
        numbers_of=numbers_of,
        facts=facts,
        long_table=LONG_TABLE,
        long_layers=LONG_LAYERS,
    )


def render(template: str, scripts: Sequence[str], styles: Sequence[str], **values: object) -> str:
    """Return a page of a template that holds its scripts and styles (files of `assets/`), and lets no other script run."""
    script = "\n".join(_read(f"assets/{name}").strip() for name in scripts)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kept"] = keep_together
    page = environment.from_string(_read(f"templates/{template}")).render(
        **values,
        style=Markup("\n".join(_read(f"assets/{name}").strip() for name in styles)),
        script=Markup(script),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.strip() + "\n"


def keep_together(text: str) -> Markup:
    """Return escaped text in which intervals, ranges, counts, widths and options are not torn apart at a line's end, and intervals stand back."""
    return Markup(_KEPT.sub(lambda m: f'<span class="{"ci" if m[1] else "nb"}">{m[0]}</span>', str(escape(text))))


def write_reports(atlas: Atlas, out_dir: Path) -> None:
    """Write report.md and report.html into a folder that exists, each whole or not at all."""
    write_text(out_dir / "report.md", markdown(atlas))
    write_text(out_dir / "report.html", html(atlas))


def progress_html(plan: Plan, results: Mapping[str, str], waiting: Sequence[str]) -> str:
    """Return the page of a survey that still runs: its first plan, the results so far by name, and the stages to come."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    assert plan.damage.measured
    return environment.from_string(_read("templates/progress.html.j2")).render(
        plan=plan,
        size=byte_size(plan.size.total_bytes),
        bits=number(plan.size.code_bits),
        damage=interval(plan.damage.measured, unit=True),
        results=results,
        waiting=waiting,
        style=Markup(_read("assets/report.css")),
    )


def _read(path: str) -> str:
    return resources.files("bitatlas.report").joinpath(path).read_text(encoding="utf-8")


def _tiles(atlas: Atlas) -> list[Tile]:
    tiles = []
    if atlas.plan is not None:
        size, damage = atlas.plan.size, atlas.plan.damage.measured
        tiles.append(Tile("Plan's damage", facts.mean_text(damage), facts.ends_text(damage)))
        bits = f"{number(size.stored_bits, 2)} stored bits, from {byte_size(atlas.model.total_bytes)}"
        tiles.append(Tile(f"Plan's size, {number(size.code_bits, 2)} code bits", byte_size(size.total_bytes), bits))
    for uniform in atlas.uniform:
        if uniform.format in (atlas.low, atlas.high):
            name = f"Uniform {facts.width_of(atlas, uniform.format)}, {byte_size(uniform.size.total_bytes)}"
            tiles.append(Tile(name, facts.mean_text(uniform.damage), facts.ends_text(uniform.damage)))
    return tiles


# --- links to a finding's numbers: a table, or its section where the table has no rows -------------------------------
#
# Left out: a link to the very row; a finding mostly rests on several.

# (topic, words in the claim, table's key), the first that fits; the last of a topic takes all that is left
TABLES = (
    ("layers", "weight statistics", "correlations"),
    ("layers", "than a Gaussian has", "sparsity"),
    ("layers", "", "layers"),
    ("zones", "", "zones"),
    ("attention", "tells where the damage is", "correlations"),
    ("attention", "removing the heads", "ablation"),
    ("attention", "drifts", "drift"),
    ("attention", "", "attention"),
    ("tasks", "own text", "tasktext"),
    ("tasks", "smallest uniform width", "widths"),
    ("tasks", "is above chance", "tasks"),
    ("tasks", "", "pairs"),
    ("plan", "is predicted", "prediction"),
    ("plan", "", "plan"),
)
SECTIONS = {
    "layers": ("layers", "Layers and zones"),
    "zones": ("layers", "Layers and zones"),
    "attention": ("profiles", "Attention and weights"),
    "tasks": ("tasks", "Tasks"),
    "plan": ("plan", "The plan"),
    "folk": ("folk", "Folk rules"),
}


class Target(NamedTuple):
    """A link's end: an id of the page, and what stands there."""

    id: str
    title: str


def numbers_of(finding: Finding, tables: Collection[Table]) -> Target:
    """Return the one of the page's `tables` with a finding's numbers; its section where that is empty, the method where the topic has none."""
    wanted = next((key for topic, words, key in TABLES if topic == finding.topic and words in finding.claim), None)
    for table in tables:
        if table.key == wanted and table.rows:
            return Target(f"table-{table.key}", table.title)
    return Target(*SECTIONS.get(finding.topic, ("method", "Method and provenance")))
