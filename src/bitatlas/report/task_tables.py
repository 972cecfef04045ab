"""At which width is each task held, and what do the bits do to its own text: two tables and a chart, from the atlas alone.

Left out: scores and pairs of precisions as such (`tables`).
"""

from __future__ import annotations

from markupsafe import Markup

from bitatlas.findings.tasks import HELD, LOST, TaskWidth, differing, smallest_held, task_widths
from bitatlas.records import Atlas, TaskDamage
from bitatlas.records.text import NOT_MEASURED, byte_size, given, interval, number
from bitatlas.report.charts.canvas import nice_range
from bitatlas.report.charts.charts import Row, forest
from bitatlas.report.facts import Table

WIDTHS_TITLE = "Smallest width at which each task is held"
MARKS = {HELD: ("v-safe", "circle"), LOST: ("v-critical", "diamond")}  # as layers are marked, safe and critical
OPEN_MARK = ("v-uncertain", "triangle")


def width_table(atlas: Atlas) -> Table:
    """A line for each task and uniform width, narrowest first."""
    rows = []
    for widths in task_widths(atlas.task_pairs).values():
        best = smallest_held(widths)
        rows += [_width_row(atlas, one, best) for one in widths]
    note = (
        f"Every module at one width against the reference, on the same items. Held: no loss{margin_text(atlas)} is shown (one-sided, Holm). "
        "Lost: the score falls (McNemar, Holm), and that is not shown. Smallest held: no wider width is lost."
    )
    head = ["Task", "Width", "Whole model", "Difference, points", "90% interval", "Verdict", "Smallest held", "Items for no loss"]
    return Table("widths", WIDTHS_TITLE, note, head, rows, "Not measured: the run was asked for no tasks.")


def _width_row(atlas: Atlas, one: TaskWidth, best: TaskWidth | None) -> list[str]:
    shown = one.pair.no_loss
    assert shown is not None
    sizes = [byte_size(u.size.total_bytes) for u in atlas.uniform if u.format == one.format]
    low, high = (number(end, 1) for end in shown.ci90)
    difference = interval(one.pair.difference)
    more = "" if one.verdict in (HELD, LOST) else f"about {shown.items_needed:,}"
    return [
        one.task,
        one.format,
        *(sizes[:1] or [""]),
        difference,
        f"[{low}, {high}]",
        one.verdict,
        "yes" if one is best else "",
        more,
    ]


def margin_text(atlas: Atlas) -> str:
    """ " within 2 points", where all pairs have one margin."""
    margins = {pair.no_loss.margin_points for pair in atlas.task_pairs if pair.no_loss}
    return f" within {given(round(margins.pop(), 9))} points" if len(margins) == 1 else ""


def text_table(atlas: Atlas) -> Table:
    """Damage on each task's own text at every width, and how its layers' criticality agrees with the general text's."""
    formats = list(dict.fromkeys(name for record in atlas.task_damage for name in record.uniform))
    rows = []
    for record in atlas.task_damage:
        rho = record.agreement
        ends = f" [{number(rho.ci95[0], 2)}, {number(rho.ci95[1], 2)}]" if rho and rho.ci95 else ""
        agrees = f"{number(rho.rho, 2)}{ends}" if rho else NOT_MEASURED
        other = differing(record)
        named = ", ".join(f"{layer} ({_both(record, layer)})" for layer in other) or "none"
        n = next((str(m.n) for m in record.uniform.values()), "")
        rows.append([record.task, n, *(interval(record.uniform.get(name)) for name in formats), agrees, named])
    note = (
        "Questions and right answers of the task's items, in short rows. ρ: rank correlation of the layers' criticality there with that on "
        "general text, test rows cut to the same length, lowered by the noise of few rows. Layers that differ: criticality there against that "
        "on the general text, Benjamini-Hochberg over all tasks and layers."
    )
    head = ["Task", "Rows", *(f"Damage at {name}, nats/token" for name in formats), "ρ with general text", "Layers that differ"]
    return Table("tasktext", "Damage on each task's own text", note, head, rows, "Not measured: the run was asked for no tasks.")


def _both(record: TaskDamage, layer: int) -> str:
    general = f" against {interval(record.general[layer])}" if record.general else ""
    return f"{interval(record.criticality[layer])}{general}"


def held_chart(atlas: Atlas, width: int) -> Markup | None:
    """Accuracy lost or gained at each width, by task; dashed: the margin, where all pairs have one."""
    rows = []
    for task, widths in task_widths(atlas.task_pairs).items():
        for place, one in enumerate(reversed(widths)):
            css, shape = MARKS.get(one.verdict, OPEN_MARK)
            m = one.pair.difference
            name = f"{one.format}: {one.verdict}"
            rows.append(Row(name, m.mean, m.ci95 or (m.mean, m.mean), css, shape, interval(m), heading="" if place else task))
    if not rows:
        return None
    margins = {pair.no_loss.margin_points for pair in atlas.task_pairs if pair.no_loss}
    margin = -margins.pop() if len(margins) == 1 else None
    limits = nice_range([end for row in rows for end in row.ends], (0.0,))
    return forest(rows, width, "linear", (limits[0], max(limits[1], 1.0)), "difference from the reference, points", margin)
