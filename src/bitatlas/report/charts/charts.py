"""The charts of report.html. Each takes the atlas and a width in px and returns an <svg>, or None where nothing was measured.

Drawn twice, wide and narrow, because a picture shrunk to a phone is not readable; the page shows the one that fits.
Shape says the same as colour everywhere (critical: diamond, safe: circle, light: square, uncertain: triangle), for readers who tell colours apart badly.
Intervals are always drawn. Left out: anything that the tables say better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from bitatlas.records import Atlas, CurvePoint, Measured
from bitatlas.records.text import byte_size, interval, number, with_fewer_rows
from bitatlas.report import facts
from bitatlas.report.charts.canvas import (
    GLYPH,
    Canvas,
    Scale,
    bands,
    cut,
    linear,
    log_range,
    log_ticks,
    logarithmic,
    nice_range,
    ticks,
)
from bitatlas.report.charts.heat import bits_cell

SHAPE_OF = {"critical": "diamond", "safe": "circle", "light": "square", "uncertain": "triangle"}
KIND_MARKS = {
    "uniform": ("square", "c-ink"),
    "plan": ("diamond", "c-plan"),
    "curve": ("diamond", "c-plan"),
    "random": ("circle", "c-muted"),
}
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes"))
LONGEST_NAME = 37  # characters of a name on the left of a forest plot
BASELINE_MARK = ("triangle", "c-baseline")


def _ends(m: Measured) -> tuple[float, float]:
    return m.ci95 or (m.mean, m.mean)


# --- layers ----------------------------------------------------------------------------------------------------------


def criticality(atlas: Atlas, width: int) -> Markup | None:
    """Draw the criticality of each layer with its interval over the zones; below, the mean code bits that the plan gives it."""
    if not atlas.layers:
        return None
    planned = [facts.plan_bits(atlas, record.layer) for record in atlas.layers]
    has_plan = any(bits is not None for bits in planned)
    c = Canvas(width, 320 + (30 if has_plan else 0), left=40, right=8, top=44, bottom=40 + (30 if has_plan else 0))
    ends = [end for record in atlas.layers for end in _ends(record.criticality)]
    low, high = nice_range(ends, (0.0, 1.0))
    y = linear(low, high, c.y0, c.y1)
    centre, step = bands(len(atlas.layers), c.x0, c.x1)
    _zone_bands(c, atlas, step)
    c.y_axis(y, ticks(low, high), "criticality (share of damage ÷ share of weights)")
    c.line(c.x0, y(1), c.x1, y(1), "rule")
    size = max(1.6, min(5.0, step / 5))
    for index, record in enumerate(atlas.layers):
        css = f"v-{record.verdict}"
        bottom, top = _ends(record.criticality)
        tip = f"Layer {record.layer}: criticality {interval(record.criticality)}, {record.verdict}"
        c.whisker(centre(index), y(bottom), y(top), css, cap=min(3, step / 4))
        c.mark(centre(index), y(record.criticality.mean), SHAPE_OF.get(record.verdict, "circle"), css, tip, size)
    _layer_strip(c, planned if has_plan else [], [record.layer for record in atlas.layers], centre, step)
    return c.svg(f"Criticality of {len(atlas.layers)} layers with 95% intervals; 1 means as harmful as its size")


def _zone_bands(c: Canvas, atlas: Atlas, step: float) -> None:
    spans = {zone.name: (zone.last - zone.first + 1) * step - 4 for zone in atlas.zones}
    full = all(len(f"{z.name}: {z.verdict}") * GLYPH < spans[z.name] for z in atlas.zones)
    for index, zone in enumerate(atlas.zones):
        inside = [column for column, record in enumerate(atlas.layers) if zone.first <= record.layer <= zone.last]
        if not inside:
            continue
        left, right = c.x0 + min(inside) * step, c.x0 + (max(inside) + 1) * step
        c.rect(left, c.y1 - 22, right - left, c.y0 - c.y1 + 22, f"zone zone-{index % 2}")
        c.rect(left, c.y1 - 22, right - left, 3, f"v-{zone.verdict} edge")
        text = f"{zone.name}: {zone.verdict}" if full else zone.name
        if len(text) * GLYPH < right - left - 4:
            c.text((left + right) / 2, c.y1 - 7, text, "zone-name", "middle")


def _layer_strip(c: Canvas, planned: Sequence[float | None], layers: list[int], centre: Scale, step: float) -> None:
    """Draw layer numbers, and the plan's mean bits as shaded cells under them."""
    c.layer_axis(centre, layers, "" if planned else "layer")
    if not planned:
        return
    top = c.y0 + 24
    widest = max((bits for bits in planned if bits is not None), default=1.0)
    room = step - 2 if step - 2 >= 3 * GLYPH else 0.0  # for "3.9": numbers in all cells or in none
    for index, bits in enumerate(planned):
        if bits is not None:
            with c.tip(f"Layer {layers[index]}: {number(bits, 2)} code bits in the plan"):
                bits_cell(c, centre(index) - step / 2 + 0.5, top, step - 1, 22, bits, max(widest, 4.0), room)
    c.text((c.x0 + c.x1) / 2, top + 40, "layer, and mean code bits in the plan", "axis", "middle")


def swap(atlas: Atlas, width: int, raised: bool) -> Markup | None:
    """Draw the damage with each layer lowered and the others high, or (`raised`) the reverse; dashed: with no layer changed."""
    values = [(record.layer, record.raised if raised else record.lowered) for record in atlas.layers]
    if not values:
        return None
    c = Canvas(width, 260, left=52, right=8, top=28, bottom=40)
    unchanged = [u.damage.mean for u in atlas.uniform if u.format == (atlas.low if raised else atlas.high)]
    low, high = nice_range([*unchanged, *(end for _, m in values for end in (m.mean, *_ends(m)))])
    y = linear(low, high, c.y0, c.y1)
    centre, step = bands(len(values), c.x0, c.x1)
    c.y_axis(y, ticks(low, high), "damage of the whole model, nats/token")
    for value in unchanged:
        c.line(c.x0, y(value), c.x1, y(value), "rule")
    css, shape = ("c-high", "square") if raised else ("c-low", "circle")
    for index, (layer, m) in enumerate(values):
        bottom, top = _ends(m)
        c.whisker(centre(index), y(bottom), y(top), css, cap=min(3, step / 4))
        tip = f"Layer {layer} {'raised' if raised else 'lowered'}: {interval(m, unit=True)}"
        c.mark(centre(index), y(m.mean), shape, css, tip, max(1.4, min(4.5, step / 6)))
    c.layer_axis(centre, [layer for layer, _ in values])
    return c.svg(f"Damage with each layer {'raised' if raised else 'lowered'}, with 95% intervals")


# --- plan against others ---------------------------------------------------------------------------------------------


def size_damage(atlas: Atlas, width: int) -> Markup | None:
    """Draw damage (log) against the whole model's size: uniform formats joined, plans of other sizes joined, the plan, its baselines."""
    if not atlas.curve:
        return None
    c = Canvas(width, 380 if width > 500 else 340, left=58, right=18, top=28, bottom=42)
    points = list({point.name: point for point in reversed(atlas.curve)}.values())[::-1]  # a uniform baseline comes twice
    largest = max(point.total_bytes for point in points)
    unit, name = next(pair for pair in BYTE_UNITS if largest >= pair[0])
    sizes = [point.total_bytes / unit for point in points]
    x_low, x_high = nice_range(sizes)
    y_low, y_high = log_range([end for p in points for end in (p.damage.mean, *_ends(p.damage))])
    x, y = linear(x_low, x_high, c.x0, c.x1), logarithmic(y_low, y_high, c.y0, c.y1)
    c.y_axis(y, log_ticks(y_low, y_high), "damage, nats/token (log)")
    c.x_axis(x, ticks(x_low, x_high, 6 if width > 500 else 4), f"size of the whole model, {name}")
    line = sorted((p.total_bytes, p.damage.mean) for p in points if _is_uniform(p))
    c.path([(x(size / unit), y(damage)) for size, damage in line], "join")
    if any(point.kind == "curve" for point in points):  # `bitatlas plan --curve` was run
        plans = sorted((p.total_bytes, p.damage.mean) for p in points if p.kind in ("curve", "plan"))
        c.path([(x(size / unit), y(damage)) for size, damage in plans], "join c-plan")
    for point in sorted(points, key=lambda p: p.kind == "plan"):
        shape, css = KIND_MARKS.get("uniform" if _is_uniform(point) else point.kind, BASELINE_MARK)
        px, (bottom, top) = x(point.total_bytes / unit), _ends(point.damage)
        tip = (
            f"{with_fewer_rows(point.name, point.damage, atlas.plan)}: {interval(point.damage, unit=True)}; {byte_size(point.total_bytes)}, "
            f"{number(point.code_bits, 2)} code bits, {number(point.stored_bits, 2)} stored bits"
        )
        c.whisker(px, y(bottom), y(top), css)
        size = {"plan": 6.0, "random": 2.5, "curve": 3.5}.get(point.kind, 4.5)
        c.mark(px, y(point.damage.mean), shape, css, tip, size, f' data-point="{escape(point.name)}"')
    named = [p for p in points if _is_uniform(p) or p.kind == "plan"]
    _names(c, [(x(p.total_bytes / unit), y(p.damage.mean), p.name, p.kind == "plan") for p in named])
    return c.svg("Damage against size of the whole model, log damage axis, with 95% intervals")


def _is_uniform(point: CurvePoint) -> bool:
    """Tell whether a point belongs to the line of uniform formats: those of the run, and baselines outside --formats."""
    return point.kind == "uniform" or point.name.startswith("uniform ")


def _names(c: Canvas, marks: Sequence[tuple[float, float, str, bool]]) -> None:
    """Write names of (x, y, name, is the plan) above all marks: the plan's below on the left, the uniform formats' above on the right.

    Where a uniform format lies just under the plan it is the other way round, so that each name stands at its own mark.
    """
    plans = [(x, y) for x, y, _, plan in marks if plan]

    def under(x: float, y: float, top: tuple[float, float]) -> bool:
        return abs(x - top[0]) < 70 and 0 <= y - top[1] < 70

    for x, y, name, plan in marks:
        if plan:
            below = not any(under(a, b, (x, y)) for a, b, _, other in marks if not other)
        else:
            below = any(under(x, y, top) for top in plans)
        _beside(c, x, y, name, plan, below)


def _beside(c: Canvas, x: float, y: float, name: str, plan: bool, below: bool) -> None:
    """Write a point's name: below on the left or above on the right, on the other side where the edge is near."""
    text = "plan" if plan else cut(name.removeprefix("uniform ").removesuffix(facts.OUTSIDE), 16)
    room = 12 + GLYPH * len(text)
    left = x - room > c.x0 if below else x + room > c.x1
    css = "label strong" if plan else "label"
    c.text(x - 10 if left else x + 10, y + (16 if below else -7), text, css, "end" if left else "start")


@dataclass(frozen=True)
class Row:
    """One line of a forest plot. `at` is a second value on the same axis, drawn as a tick (a task's chance level)."""

    name: str
    mean: float
    ends: tuple[float, float]
    css: str
    shape: str
    value: str
    at: float | None = None
    heading: str = ""


def forest(
    rows: Sequence[Row], width: int, scale_of: str, limits: tuple[float, float], label: str, rule: float | None = None
) -> Markup:
    """Draw means with intervals across, one a line: names on the left and values on the right, or above the line on a narrow page."""
    wide = width > 500
    pitch = 28 if wide else 42
    tops: list[float] = []
    y = 10.0
    for row in rows:
        y += 30 if row.heading else 0
        tops.append(y)
        y += pitch
    longest = max(len(cut(row.name, LONGEST_NAME)) for row in rows)
    left, right = (24 + GLYPH * longest, 176.0) if wide else (10.0, 10.0)
    c = Canvas(width, int(y + 44), left=left, right=right, top=10, bottom=40)
    make = logarithmic if scale_of == "log" else linear
    x = make(*limits, c.x0, c.x1)
    at = log_ticks(*limits) if scale_of == "log" else ticks(*limits, 6 if wide else 4)
    c.x_axis(x, at, label, grid=True)
    if rule is not None:
        c.line(x(rule), c.y1, x(rule), c.y0, "rule")
    for row, top in zip(rows, tops, strict=True):
        _forest_row(c, row, x, top, wide)
    return c.svg(label)


def _forest_row(c: Canvas, row: Row, x: Scale, top: float, wide: bool) -> None:
    if row.heading:
        c.text(2, top - 8, cut(row.heading, 40), "heading")
    y = top + (14 if wide else 28)
    if row.at is not None:
        c.line(x(row.at), y - 10, x(row.at), y + 10, "chance")
    c.whisker_across(y, x(row.ends[0]), x(row.ends[1]), row.css)
    c.mark(x(row.mean), y, row.shape, row.css, f"{row.heading} {row.name}: {row.value}".strip(), 5)
    strong = "label strong" if row.css == "c-plan" else "label"
    if wide:
        c.text(c.left - 14, y + 4, cut(row.name, LONGEST_NAME), strong, "end")
        c.text(c.width - 2, y + 4, row.value, "value", "end")
    else:
        room = int((c.width - 12) / GLYPH) - len(row.value)
        name = row.name if len(row.name) <= room else row.name.removeprefix("uniform ")
        c.text(2, top + 13, cut(name, room), strong)
        c.text(c.width - 2, top + 13, row.value, "value", "end")


def baselines(atlas: Atlas, width: int) -> Markup | None:
    """Draw the plan and its baselines by damage, on a log axis; of many random plans the best, the middle and the worst."""
    plan = atlas.plan
    if plan is None or plan.damage.measured is None:
        return None
    random = sorted((b for b in plan.baselines if b.is_random), key=lambda b: b.damage.mean)
    lines = [(b.name, b.damage) for b in plan.baselines if len(random) <= 3 or not b.is_random]
    if len(random) > 3:
        of = f"of {len(random)} random plans"
        lines += [(f"best {of}", random[0].damage), (f"middle {of}", random[len(random) // 2].damage)]
        lines += [(f"worst {of}", random[-1].damage)]
    shape, css = BASELINE_MARK
    rows = [Row(with_fewer_rows(name, m, plan), m.mean, _ends(m), css, shape, interval(m)) for name, m in lines]
    ours = plan.damage.measured
    rows.append(Row("our plan", ours.mean, _ends(ours), "c-plan", "diamond", interval(ours)))
    limits = log_range([end for row in rows for end in (row.mean, *row.ends)])
    return forest(sorted(rows, key=lambda row: row.mean), width, "log", limits, "damage, nats/token (log)")


def tasks(atlas: Atlas, width: int) -> Markup | None:
    """Draw the accuracy at each precision with its Wilson interval; a tick marks chance."""
    rows, seen = [], ""
    for score in sorted(atlas.tasks, key=lambda s: facts.task_names(atlas).index(s.task)):
        if not score.n:
            continue
        css, shape = facts.precision_mark(atlas, score.precision)
        low, high = (100 * end for end in score.wilson95)
        mean = 100 * score.correct / score.n
        value = f"{number(mean, 1)}% {facts.wilson_text(score)}"
        heading = "" if score.task == seen else score.task
        seen = score.task
        name = facts.precision_name(atlas, score.precision)
        rows.append(Row(name, mean, (low, high), css, shape, value, 100 * score.chance, heading))
    return forest(rows, width, "linear", (0.0, 100.0), "accuracy, %") if rows else None


def correlations(atlas: Atlas, width: int) -> Markup | None:
    """Draw the rank correlation of cheap measures with measured damage."""
    rows = [
        Row(c.measure, c.rho, c.ci95 or (c.rho, c.rho), "c-high", "circle", facts.correlation_text(c)) for c in atlas.correlations
    ]
    return forest(rows, width, "linear", (-1.0, 1.0), "Spearman's ρ with measured damage", 0.0) if rows else None
