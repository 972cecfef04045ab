"""Does the prediction hold? The scatter of predicted and measured damage, and its table."""

from __future__ import annotations

from markupsafe import Markup

from bitatlas.findings.prediction import as_measured, line_text, verdict_on
from bitatlas.records import Atlas, CalibrationPoint
from bitatlas.records.text import interval, number, percent
from bitatlas.report.charts.canvas import Canvas, Scale, linear, nice_range, ticks
from bitatlas.report.facts import Table

TITLE = "Does the prediction hold?"
NOT_TESTED = "Not measured: it takes a plan that was refined (--refine), and enough units for different plans around it."


def scatter(atlas: Atlas, width: int) -> Markup | None:
    """Measured on predicted damage of the random plans; dashed: equal; solid: the fitted line over the range of the plans."""
    found = atlas.calibration
    if found is None or not found.points:
        return None
    points = [*found.points, found.centre]
    c = Canvas(width, min(460, width), left=52, right=14, top=28, bottom=40)
    x_low, x_high = nice_range([p.predicted for p in points])
    y_low, y_high = nice_range([end for p in points for end in (p.measured.mean, *(p.measured.ci95 or ()))])
    low, high = min(x_low, y_low), max(x_high, y_high)
    x, y = linear(low, high, c.x0, c.x1), linear(low, high, c.y0, c.y1)
    c.y_axis(y, ticks(low, high, 6), "measured damage, nats/token")
    c.x_axis(x, ticks(low, high, 6), "predicted damage, nats/token", grid=True)
    c.line(x(low), y(low), x(high), y(high), "rule")
    for point in found.points:
        _point(c, x, y, point, "circle", "c-high", 3.5)
    ends = (min(p.predicted for p in found.points), max(p.predicted for p in found.points))
    c.path([(x(end), y(found.slope.mean * end + found.intercept.mean)) for end in ends], "fitted")
    _point(c, x, y, found.centre, "diamond", "c-plan", 6)
    rho = interval(as_measured(found.prediction))
    return c.svg(
        f"Measured against predicted damage of {len(found.points)} random plans around the plan, with 95% intervals: "
        f"rank correlation {rho}, slope {interval(found.slope)}"
    )


def _point(c: Canvas, x: Scale, y: Scale, point: CalibrationPoint, shape: str, css: str, size: float) -> None:
    units = f"{point.changed} unit{'' if point.changed == 1 else 's'} changed" if point.changed else "the plan"
    tip = f"{units}: predicted {number(point.predicted)}, measured {interval(point.measured, unit=True)}"
    at = x(point.predicted)
    if point.measured.ci95:
        bottom, top = point.measured.ci95
        c.whisker(at, y(bottom), y(top), f"{css} faint", cap=0)
    c.mark(at, y(point.measured.mean), shape, css, tip, size)


def caption(atlas: Atlas) -> str:
    """The word, the rank correlation and the line; the whole sentence is among the findings."""
    found = atlas.calibration
    if found is None:
        return ""
    word = {"holds": "It does", "does not hold": "It does not"}.get(verdict_on(found), "Inconclusive")
    return (
        f"{word}: rank correlation {interval(as_measured(found.prediction))} over {len(found.points)} random plans around the plan, "
        f"predicted from fit rows, measured on {found.centre.measured.rows} rows. Solid line: {line_text(found)}; dashed: equal. Bars: 95% intervals over rows."
    )


def table(atlas: Atlas) -> Table:
    """Rank correlation of each prediction, and the line of the one that is used."""
    found, head = atlas.calibration, ["What", "Value", "Plans"]
    if found is None:
        return Table("prediction", TITLE, "", head, empty=NOT_TESTED)
    named = [("ρ of the prediction", found.prediction), *((f"ρ of the {one.measure}", one) for one in found.others)]
    named.append(("ρ of the same plans measured on fit rows", found.on_fit))
    rows = [[name, interval(as_measured(one)), str(one.n)] for name, one in named]
    rows += [
        ["slope of measured on predicted", interval(found.slope), str(found.slope.n)],
        ["intercept, nats/token", interval(found.intercept), str(found.intercept.n)],
        ["mean error, of the damage", interval(found.relative_error), str(found.relative_error.n)],
        ["curvature between changes kept", percent(found.kept, 0), f"{found.training} others"],
    ]
    note = (
        "Random plans around the plan: each changes 1 unit to a third of all, which ones and to which format by chance, whatever the size. "
        "Prediction: the plan's damage on fit rows, plus every change's own measured there, plus a fitted share of the curvature between each two. "
        f"Measured on {found.centre.measured.rows} rows, which it did not see. Intervals: bootstrap over plans, one draw for all."
    )
    return Table("prediction", TITLE, note, head, rows)
