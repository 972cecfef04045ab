"""report.html: the whole report in one file that needs no network, light and dark, for a desk, a phone and paper.

Text is data: the template escapes everything, and the page's policy lets no script run but its own (by its hash), and nothing be
loaded. Without scripts nothing is lost but the theme switch and the faster tooltips.
Left out: a chart library and the Mermaid renderer (5 MB); the overview is drawn as HTML, its Mermaid source stands beside it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from bitatlas.records import Atlas, Finding
from bitatlas.records.files import write_text
from bitatlas.records.text import byte_size, number
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
STACKED = ("folk",)  # tables with sentences: on a phone a row's cells stand below each other


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    name: str
    value: str
    detail: str


def html(atlas: Atlas) -> str:
    """The whole of report.html; same atlas, same text."""
    script = f"{_asset('report.js')}\n{_asset('budget.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kept"] = keep_together
    template = environment.from_string(_read("templates", "report.html.j2"))
    at, beside = stops(atlas), memory_of(atlas)
    page = template.render(
        atlas=atlas,
        title=facts.title_of(atlas),
        formats=facts.formats_text(atlas),
        answer=advice.answer(atlas),
        tiles=_tiles(atlas),
        stops=at,
        own=next((place for place, stop in enumerate(at) if stop.plan is atlas.plan), 0),
        memory=beside,
        slider=slider_data(atlas, at, beside),
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
        is_long=_is_long,
        long_layers=LONG_LAYERS,
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_sha256=digest,
    )
    return page.strip() + "\n"


def keep_together(text: str) -> Markup:
    """Escaped text in which intervals, ranges, counts, widths and options are not torn apart at a line's end, and intervals stand back."""
    return Markup(_KEPT.sub(lambda m: f'<span class="{"ci" if m[1] else "nb"}">{m[0]}</span>', str(escape(text))))


def write_reports(atlas: Atlas, out_dir: Path) -> None:
    """Write report.md and report.html into a folder that exists, each whole or not at all."""
    write_text(out_dir / "report.md", markdown(atlas))
    write_text(out_dir / "report.html", html(atlas))


def _read(folder: str, name: str) -> str:
    return resources.files("bitatlas.report").joinpath(folder, name).read_text(encoding="utf-8")


def _asset(name: str) -> str:
    return _read("assets", name).strip()


def _is_long(table: Table) -> bool:
    return len(table.rows) >= LONG_TABLE


def _tiles(atlas: Atlas) -> list[Tile]:
    tiles = []
    if atlas.plan is not None:
        size = atlas.plan.size
        tiles.append(
            Tile("Plan's damage", facts.mean_text(atlas.plan.damage.measured), facts.ends_text(atlas.plan.damage.measured))
        )
        bits = f"{number(size.stored_bits, 2)} stored bits, from {byte_size(atlas.model.total_bytes)}"
        tiles.append(Tile(f"Plan's size, {number(size.code_bits, 2)} code bits", byte_size(size.total_bytes), bits))
    for uniform in atlas.uniform:
        if uniform.format in (atlas.low, atlas.high):
            name = f"Uniform {facts.width_of(atlas, uniform.format)}, {byte_size(uniform.size.total_bytes)}"
            tiles.append(Tile(name, facts.mean_text(uniform.damage), facts.ends_text(uniform.damage)))
    return tiles


# --- links -----------------------------------------------------------------------------------------------------------------

# Where on the page a finding's numbers stand: the id of a table, or of a section where that table has no rows.
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


class Place(NamedTuple):
    """A link's end: an id of the page, and what stands there."""

    id: str
    title: str


def numbers_of(finding: Finding, tables: Collection[Table]) -> Place:
    """The table with a finding's numbers; its section where the table is empty, the method where the topic has none.

    tables: those of the page.
    """
    fits = (key for topic, said, key in TABLES if topic == finding.topic and said in finding.claim)
    wanted = next(fits, None)
    for table in tables:
        if table.key == wanted and table.rows:
            return Place(f"table-{table.key}", table.title)
    return Place(*SECTIONS.get(finding.topic, ("method", "Method and provenance")))
