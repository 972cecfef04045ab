"""Where on the page a finding's numbers stand: the id of a table, or of a section where that table has no rows.

Left out: a link to the very row; a finding mostly rests on several.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from bitatlas.records import Finding
from bitatlas.report.table import Table

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
