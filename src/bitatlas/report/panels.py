"""The small charts of report.html: one measure of attention or weights by layer, all of one size so that they can be compared.

These measures describe; whether one of them earns a say in the bits is told by its correlation with damage, printed beside them.
Left out: a chart a head; the Parquet tables have every head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitatlas import words
from bitatlas.records import Atlas, AttentionLayer, Measured, WeightProfile
from bitatlas.report import facts, svg
from bitatlas.report.svg import Canvas

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
    """A small chart: one measure a layer; None where it was not measured."""

    title: str
    caption: str
    drawing: Markup | None


def _series(name: str, css: str, shape: str, values: Sequence[tuple[int, Measured | None]]) -> Series:
    points = []
    for layer, m in values:
        if m is not None:
            mean, ci95, _ = words.shown(m)
            points.append((layer, mean, *(ci95 or (mean, mean))))
    return Series(name, css, shape, points)


def panel(series: Sequence[Series], label: str, rule: float | None = None, zero: bool = True) -> Markup | None:
    """A small chart of measures over layers, 340 px wide; None without a point."""
    points = [point for one in series for point in one.points]
    if not points:
        return None
    c = Canvas(340, 190, left=44, right=8, top=26, bottom=36)
    include = [0.0] if zero and min(p[2] for p in points) >= 0 else []
    low, high = svg.nice_range([end for p in points for end in p[1:]], include)
    y = svg.linear(low, high, c.y0, c.y1)
    layers = sorted({point[0] for point in points})
    centre, step = svg.bands(len(layers), c.x0, c.x1)
    c.y_axis(y, svg.ticks(low, high, 4), label)
    if rule is not None:
        c.line(c.x0, y(rule), c.x1, y(rule), "rule")
    size = max(1.4, min(3.4, step / 4))
    for one in series:
        c.path([(centre(layers.index(p[0])), y(p[1])) for p in one.points], f"join {one.css}")
        for layer, mean, bottom, top in one.points:
            x = centre(layers.index(layer))
            if top > bottom:
                c.whisker(x, y(bottom), y(top), one.css, cap=min(2, step / 4))
            c.mark(x, y(mean), one.shape, one.css, f"Layer {layer}, {one.name}: {words.number(mean)}", size)
    c.layer_axis(centre, layers)
    return c.svg(f"{', '.join(one.name for one in series)} by layer: {label}")


def profile_panels(atlas: Atlas) -> list[Panel]:
    """Attention and weights by layer, always the same nine."""
    records = facts.attention_at(atlas)
    blue = ("c-high", "circle")

    def one(name: str, pick: str) -> list[Series]:
        return [_series(name, *blue, [(a.layer, getattr(a, pick)) for a in records])]

    def weights(value: Value) -> list[Series]:
        return _weights(atlas, value)

    special, focus = one("specialization", "specialization_percent"), one("focus", "focus_percent")
    energy = f"‖W − Q(W)‖² / ‖W‖² at {atlas.low}"
    tail = weights(lambda p: p.outlier_ratio)
    return [
        Panel("Attention entropy", "0 one key, 1 all alike; sinks removed", panel(one("entropy", "entropy"), "entropy, 0..1")),
        Panel("Head specialization", "Heads with a recognized role", panel(special, "% of heads")),
        Panel("Reasoning focus", "0 is chance; negative is possible", panel(focus, "% above chance", 0.0)),
        Panel("Sink mass", "Attention on sink keys", panel(one("sink mass", "sink_mass"), "% of attention")),
        Panel("Attention drift", _drift_caption(atlas), panel(_drift(atlas), "Jensen-Shannon distance, 0..1")),
        Panel("Sparsity", "Weights with |w| below 1% of σ", panel(weights(lambda p: 100 * p.sparsity), "% of weights")),
        Panel("Excess kurtosis", "0 for a normal distribution", panel(weights(lambda p: p.kurtosis), "kurtosis")),
        Panel("Quantization error", energy, panel(weights(_error_at(atlas.low)), "% of the weights' energy")),
        Panel("Largest outlier", "Largest |w| / σ, mean over modules", panel(tail, "standard deviations")),
    ]


def drift_base(atlas: Atlas) -> str | None:
    """The model whose drift is drawn: the plan, else the low uniform plan, else any that was measured."""
    bases = list(dict.fromkeys(a.base for a in atlas.attention if a.drift_local or a.drift_cumulative))
    return next((base for base in ("plan", f"uniform:{atlas.low}", *bases) if base in bases), None)


def _drift_caption(atlas: Atlas) -> str:
    base = drift_base(atlas)
    return f"{facts.precision_name(atlas, base)} against the reference: ● local, ■ cumulative, ▲ noise floor" if base else ""


def _drift(atlas: Atlas) -> list[Series]:
    base = drift_base(atlas)
    records: list[AttentionLayer] = facts.attention_at(atlas, base) if base else []
    return [
        _series("local drift", "c-high", "circle", [(a.layer, a.drift_local) for a in records]),
        _series("cumulative drift", "c-low", "square", [(a.layer, a.drift_cumulative) for a in records]),
        _series("noise floor", "c-muted", "triangle", [(a.layer, a.drift_noise) for a in records]),
    ]


def _error_at(name: str) -> Value:
    """Relative error at a format, in %; None for a module that was not tried in it."""
    return lambda p: 100 * p.relative_error[name] if name in p.relative_error else None


def _weights(atlas: Atlas, value: Value) -> list[Series]:
    """A measure of the weights by layer: mean over its modules, weighted by their size. Exact, so without an interval."""
    points = []
    for layer in sorted({profile.layer for profile in atlas.weights}):
        inside = [(value(p), p.weights) for p in atlas.weights if p.layer == layer]
        known = [(v, w) for v, w in inside if v is not None]
        if known:
            mean = sum(v * w for v, w in known) / sum(w for _, w in known)
            points.append((layer, mean, mean, mean))
    return [Series("mean", "c-high", "circle", points)]
