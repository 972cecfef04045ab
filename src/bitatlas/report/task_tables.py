"""Tables and a chart of the width at which each task is held, and a table of the damage on its own text.

Left out: scores and pairs of precisions as such (`tables`).
"""

from __future__ import annotations

from markupsafe import Markup

from bitatlas.findings.tasks import HELD, LOST, TaskWidth, differing, smallest_held, task_widths
from bitatlas.records import Atlas, TaskDamage
from bitatlas.records.text import NOT_MEASURED, byte_size, given, interval, number
from bitatlas.report.charts.canvas import nice_range
from bitatlas.report.charts.charts import Row, forest
from bitatlas.report.facts import Table, correlation_text

WIDTHS_TITLE = "Smallest width at which each task is held"
NO_TASKS = "Not measured: the run was asked for no tasks."
MARKS = {HELD: ("v-safe", "circle"), LOST: ("v-critical", "diamond")}  # as layers are marked, safe and critical
OPEN_MARK = ("v-uncertain", "triangle")


def width_table(atlas: Atlas) -> Table:
    """Make the table of every task at every uniform width, narrowest first."""
    rows = []
    for widths in task_widths(atlas.task_pairs).values():
        best = smallest_held(widths)
        rows += [_width_row(atlas, width, best) for width in widths]
    note = (
        f"Every module at one width against the reference, on the same items. Held: no loss{margin_text(atlas)} is shown (one-sided, Holm). "
        "Lost: the score falls (McNemar, Holm), and that is not shown. Smallest held: no wider width is lost."
    )
    head = ["Task", "Width", "Whole model", "Difference, points", "90% interval", "Verdict", "Smallest held", "Items for no loss"]
    return Table("widths", WIDTHS_TITLE, note, head, rows, NO_TASKS)


def _width_row(atlas: Atlas, width: TaskWidth, best: TaskWidth | None) -> list[str]:
    no_loss = width.pair.no_loss
    assert no_loss is not None
    size = next((byte_size(u.size.total_bytes) for u in atlas.uniform if u.format == width.format), "")
    low, high = (number(end, 1) for end in no_loss.ci90)
    needed = "" if width.verdict in (HELD, LOST) else f"about {no_loss.items_needed:,}"
    cells = [width.task, width.format, size, interval(width.pair.difference), f"[{low}, {high}]", width.verdict]
    return [*cells, "yes" if width is best else "", needed]


def _margin(atlas: Atlas) -> float | None:
    """Return the margin of no loss in points, where all pairs have one."""
    margins = {pair.no_loss.margin_points for pair in atlas.task_pairs if pair.no_loss}
    return margins.pop() if len(margins) == 1 else None


def margin_text(atlas: Atlas) -> str:
    """Return " within 2 points", where all pairs have one margin."""
    margin = _margin(atlas)
    return "" if margin is None else f" within {given(round(margin, 9))} points"


def text_table(atlas: Atlas) -> Table:
    """Make the table of damage on each task's own text, and of how its layers' criticality agrees with the general text's."""
    formats = list(dict.fromkeys(name for record in atlas.task_damage for name in record.uniform))
    rows = []
    for record in atlas.task_damage:
        agreement = correlation_text(record.agreement, "") if record.agreement else NOT_MEASURED
        layers = ", ".join(f"{layer} ({_both(record, layer)})" for layer in differing(record)) or "none"
        count = next((str(m.n) for m in record.uniform.values()), "")
        rows.append([record.task, count, *(interval(record.uniform.get(name)) for name in formats), agreement, layers])
    note = (
        "Questions and right answers of the task's items, in short rows. ρ: rank correlation of the layers' criticality there with that on "
        "general text, test rows cut to the same length, lowered by the noise of few rows. Layers that differ: criticality there against that "
        "on the general text, Benjamini-Hochberg over all tasks and layers."
    )
    head = ["Task", "Rows", *(f"Damage at {name}, nats/token" for name in formats), "ρ with general text", "Layers that differ"]
    return Table("tasktext", "Damage on each task's own text", note, head, rows, NO_TASKS)


def _both(record: TaskDamage, layer: int) -> str:
    general = f" against {interval(record.general[layer])}" if record.general else ""
    return f"{interval(record.criticality[layer])}{general}"


def held_chart(atlas: Atlas, width: int) -> Markup | None:
    """Draw the accuracy lost or gained at each width, by task; dashed: the margin, where all pairs have one."""
    rows = []
    for task, widths in task_widths(atlas.task_pairs).items():
        for index, step in enumerate(reversed(widths)):
            css, shape = MARKS.get(step.verdict, OPEN_MARK)
            m = step.pair.difference
            name = f"{step.format}: {step.verdict}"
            rows.append(Row(name, m.mean, m.ci95 or (m.mean, m.mean), css, shape, interval(m), heading="" if index else task))
    if not rows:
        return None
    margin = _margin(atlas)
    limits = nice_range([end for row in rows for end in row.ends], (0.0,))
    rule = None if margin is None else -margin
    return forest(rows, width, "linear", (limits[0], max(limits[1], 1.0)), "difference from the reference, points", rule)
