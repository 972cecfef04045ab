"""The small charts of report.html: a measure of attention or weights by layer, all of one size; and the test of the prediction.

These measures describe; whether one of them earns a say in the bits is told by its correlation with damage, printed beside them.
Left out: a chart a head; the Parquet tables have every head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from bitatlas.findings.correlations import gaussian_share
from bitatlas.findings.reliability import as_measured, calibration_verdict, line_text
from bitatlas.records import Atlas, CalibrationPoint, Measured, WeightProfile
from bitatlas.records.text import interval, number, percent, shown
from bitatlas.report import facts
from bitatlas.report.charts.canvas import Canvas, Scale, bands, linear, nice_range, ticks
from bitatlas.report.facts import Table

SIGNS = {"circle": "●", "square": "■", "triangle": "▲", "diamond": "◆"}  # the shapes as text, for legends
DISTANCE = "Jensen-Shannon distance, 0..1"
GAUSSIAN = 100 * gaussian_share(0.01)  # % of its values within 1 % of its standard deviation
Value = Callable[[WeightProfile], float | None]


@dataclass(frozen=True)
class Series:
    """One measure over layers: (layer, mean, low, high) each, as printed."""

    name: str
    css: str
    shape: str
    points: list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Panel:
    """A small chart: one measure a layer; None where it was not measured. `keys`: (shape, css class, meaning) of its series."""

    title: str
    caption: str
    drawing: Markup | None
    keys: list[tuple[str, str, str]] = field(default_factory=list)


def _series(name: str, css: str, shape: str, values: Sequence[tuple[int, Measured | None]]) -> Series:
    points = []
    for layer, m in values:
        if m is not None:
            mean, ci95, _ = shown(m)
            points.append((layer, mean, *(ci95 or (mean, mean))))
    return Series(name, css, shape, points)


def panel(series: Sequence[Series], label: str, rule: float | None = None) -> Markup | None:
    """Draw a small chart of measures over layers, 340 px wide; None without a point."""
    points = [point for line in series for point in line.points]
    if not points:
        return None
    c = Canvas(340, 190, left=44, right=8, top=26, bottom=36)
    include = [0.0] if min(p[2] for p in points) >= 0 else []
    include += [] if rule is None else [rule]
    low, high = nice_range([end for p in points for end in p[1:]], include)
    y = linear(low, high, c.y0, c.y1)
    layers = sorted({point[0] for point in points})
    centre, step = bands(len(layers), c.x0, c.x1)
    c.y_axis(y, ticks(low, high, 4), label)
    if rule is not None:
        c.line(c.x0, y(rule), c.x1, y(rule), "rule")
    size = max(1.4, min(3.4, step / (4 if len(series) < 2 else 5)))
    apart = min(3.0, 0.5 * step / len(series))  # px between the series of a layer, so that equal values do not hide each other
    for index, line in enumerate(series):
        aside = apart * (index - (len(series) - 1) / 2)
        c.path([(centre(layers.index(p[0])) + aside, y(p[1])) for p in line.points], f"join {line.css}")
        for layer, mean, bottom, top in line.points:
            x = centre(layers.index(layer)) + aside
            if top > bottom:
                c.whisker(x, y(bottom), y(top), line.css, cap=min(2, step / 4))
            c.mark(x, y(mean), line.shape, line.css, f"Layer {layer}, {line.name}: {number(mean)}", size)
    c.layer_axis(centre, layers)
    return c.svg(f"{', '.join(line.name for line in series)} by layer: {label}")


def attention_panels(atlas: Atlas) -> list[Panel]:
    """Draw attention by layer, always the same six, with every precision that was measured in each."""
    return [
        _overlay(atlas, "Attention entropy", "0 one key, 1 all alike; sinks removed", "entropy", "entropy, 0..1"),
        _overlay(atlas, "Head specialization", "Heads with a recognized role", "specialization_percent", "% of heads"),
        _overlay(atlas, "Reasoning focus", "0 is chance; negative is possible", "focus_percent", "% above chance", 0.0),
        _overlay(atlas, "Sink mass", "Attention on sink keys", "sink_mass", "% of attention"),
        _overlay(atlas, "Local drift", "From the reference's maps, same inputs", "drift_local", DISTANCE),
        _overlay(atlas, "Cumulative drift", "From the reference's maps, whole model", "drift_cumulative", DISTANCE),
    ]


def weight_panels(atlas: Atlas) -> list[Panel]:
    """Draw weights by layer, always the same four."""

    def make(title: str, caption: str, value: Value, label: str, rule: float | None = None) -> Panel:
        return Panel(title, caption, panel(_weights(atlas, value), label, rule))

    near_0, energy = "Weights with |w| below 1% of σ; dashed: of a Gaussian", f"‖W − Q(W)‖² / ‖W‖² at {atlas.low}"
    return [
        make("Sparsity", near_0, lambda p: 100 * p.sparsity, "% of weights", GAUSSIAN),
        make("Excess kurtosis", "0 for a normal distribution", lambda p: p.kurtosis, "kurtosis"),
        make("Quantization error", energy, _error_at(atlas.low), "% of the weights' energy"),
        make("Largest outlier", "Largest |w| / σ, mean over modules", lambda p: p.outlier_ratio, "standard deviations"),
    ]


def _overlay(atlas: Atlas, title: str, caption: str, pick: str, label: str, rule: float | None = None) -> Panel:
    """Draw one measure at every base, side by side in each layer; a drift with its noise floor."""
    series = []
    for base in facts.attention_bases(atlas):
        values = [(a.layer, getattr(a, pick)) for a in facts.attention_at(atlas, base)]
        series.append(_series(facts.precision_name(atlas, base), *facts.precision_mark(atlas, base), values))
    if pick.startswith("drift"):
        noise = {a.layer: a.drift_noise for a in atlas.attention if a.drift_noise is not None}
        series.append(_series("noise floor", "c-muted", "circle", sorted(noise.items())))
    series = [line for line in series if line.points]
    keys = [(SIGNS[line.shape], line.css, line.name) for line in series]
    return Panel(title, caption, panel(series, label, rule), keys)


def _error_at(name: str) -> Value:
    """Return the relative error at a format, in %; None for a module that was not tried in it."""
    return lambda p: 100 * p.relative_error[name] if name in p.relative_error else None


def _weights(atlas: Atlas, value: Value) -> list[Series]:
    """Return a measure of the weights by layer: mean over its modules, weighted by their size. Exact, so without an interval."""
    points = []
    for layer in sorted({profile.layer for profile in atlas.weights}):
        mean = facts.weighted_mean((p for p in atlas.weights if p.layer == layer), value)
        if mean is not None:
            points.append((layer, mean, mean, mean))
    return [Series("mean", "c-high", "circle", points)]


# --- does the prediction hold? The scatter of predicted and measured damage, and its table ----------------------------

PREDICTION_TITLE = "Does the prediction hold?"
NOT_TESTED = "Not measured: it takes a plan that was refined (--refine), and enough units for different plans around it."


def prediction_scatter(atlas: Atlas, width: int) -> Markup | None:
    """Draw measured on predicted damage of the random plans; dashed: equal; solid: the fitted line over the range of the plans."""
    calibration = atlas.calibration
    if calibration is None or not calibration.points:
        return None
    points = [*calibration.points, calibration.centre]
    c = Canvas(width, min(460, width), left=52, right=14, top=28, bottom=40)
    x_low, x_high = nice_range([p.predicted for p in points])
    y_low, y_high = nice_range([end for p in points for end in (p.measured.mean, *(p.measured.ci95 or ()))])
    low, high = min(x_low, y_low), max(x_high, y_high)
    x, y = linear(low, high, c.x0, c.x1), linear(low, high, c.y0, c.y1)
    c.y_axis(y, ticks(low, high, 6), "measured damage, nats/token")
    c.x_axis(x, ticks(low, high, 6), "predicted damage, nats/token", grid=True)
    c.line(x(low), y(low), x(high), y(high), "rule")
    for point in calibration.points:
        _point(c, x, y, point, "circle", "c-high", 3.5)
    ends = (min(p.predicted for p in calibration.points), max(p.predicted for p in calibration.points))
    c.path([(x(end), y(calibration.slope.mean * end + calibration.intercept.mean)) for end in ends], "fitted")
    _point(c, x, y, calibration.centre, "diamond", "c-plan", 6)
    rho = interval(as_measured(calibration.prediction))
    return c.svg(
        f"Measured against predicted damage of {len(calibration.points)} random plans around the plan, with 95% intervals: "
        f"rank correlation {rho}, slope {interval(calibration.slope)}"
    )


def _point(c: Canvas, x: Scale, y: Scale, point: CalibrationPoint, shape: str, css: str, size: float) -> None:
    units = f"{point.changed} unit{'' if point.changed == 1 else 's'} changed" if point.changed else "the plan"
    tip = f"{units}: predicted {number(point.predicted)}, measured {interval(point.measured, unit=True)}"
    at = x(point.predicted)
    if point.measured.ci95:
        bottom, top = point.measured.ci95
        c.whisker(at, y(bottom), y(top), f"{css} faint", cap=0)
    c.mark(at, y(point.measured.mean), shape, css, tip, size)


def prediction_caption(atlas: Atlas) -> str:
    """Return the verdict, the rank correlation and the line; the whole sentence is among the findings."""
    calibration = atlas.calibration
    if calibration is None:
        return ""
    verdict = {"holds": "It does", "does not hold": "It does not"}.get(calibration_verdict(calibration), "Inconclusive")
    rho, count = interval(as_measured(calibration.prediction)), len(calibration.points)
    return (
        f"{verdict}: rank correlation {rho} over {count} random plans around the plan, predicted from fit rows, "
        f"measured on {calibration.centre.measured.rows} rows. Solid line: {line_text(calibration)}; dashed: equal. Bars: 95% intervals over rows."
    )


def prediction_table(atlas: Atlas) -> Table:
    """Make the table of the rank correlation of each prediction, and the line of the one that is used."""
    calibration, head = atlas.calibration, ["What", "Value", "Plans"]
    if calibration is None:
        return Table("prediction", PREDICTION_TITLE, "", head, empty=NOT_TESTED)
    values = {"ρ of the prediction": as_measured(calibration.prediction)}
    values |= {f"ρ of the {other.measure}": as_measured(other) for other in calibration.others}
    values |= {
        "ρ of the same plans measured on fit rows": as_measured(calibration.on_fit),
        "slope of measured on predicted": calibration.slope,
        "intercept, nats/token": calibration.intercept,
        "mean error, of the damage": calibration.relative_error,
    }
    rows = [[name, interval(value), str(value.n)] for name, value in values.items()]
    rows.append(["curvature between changes kept", percent(calibration.kept, 0), f"{calibration.training} others"])
    note = (
        "Random plans around the plan: each changes 1 unit to a third of all, which ones and to which format by chance, whatever the size. "
        "Prediction: the plan's damage on fit rows, plus every change's own measured there, plus a fitted share of the curvature between each two. "
        f"Measured on {calibration.centre.measured.rows} rows, which it did not see. Intervals: bootstrap over plans, one draw for all."
    )
    return Table("prediction", PREDICTION_TITLE, note, head, rows)
