"""Draw the plots of `scale.py`: seconds and memory against each size, in memory and streamed, the floor beside them. SVG, without a library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.report.charts.canvas import Canvas, log_range, log_ticks, logarithmic

STYLE = (
    "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.base{stroke:#888}path{fill:none;stroke-width:2}"
    ".memory{stroke:#0b62a4}circle.memory{fill:#0b62a4}.streamed{stroke:#c4561a}circle.streamed{fill:#c4561a}"
    ".floor{stroke:#777;stroke-dasharray:5 4}.target{display:none}"
)
TITLES = {"layers": "modules", "width": "width of the model", "rows": "rows of 128 tokens", "formats": "formats"}


def write_plots(points: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Write `scale-NAME.svg` for each series: seconds of the curvature pass on the left, memory on the right."""
    folder.mkdir(exist_ok=True)
    for name, measured in points.items():
        key = "modules" if name == "layers" else name
        halves = [
            _plot(measured, key, lambda p: p["seconds"]["curvature"], "curvature pass, seconds", TITLES[name], floor=True),
            _plot(measured, key, lambda p: p["host_added_bytes"] / 1e6, "memory added, MB", TITLES[name]),
        ]
        style = f"<style>{STYLE}</style><rect width='880' height='300' fill='#fff'/>"
        inner = f'<g>{halves[0]}</g><g transform="translate(440 0)">{halves[1]}</g>'
        text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 300" width="880" height="300">{style}{inner}</svg>\n'
        (folder / f"scale-{name}.svg").write_text(text, encoding="utf-8")


def _plot(measured: list[dict[str, Any]], key: str, value: Any, label: str, title: str, floor: bool = False) -> str:
    canvas = Canvas(430, 300, top=40)
    lines = {
        "memory": [(p[key], value(p)) for p in measured if not p["streamed"]],
        "streamed": [(p[key], value(p)) for p in measured if p["streamed"]],
    }
    if floor:
        lines["floor"] = [(p[key], p["floor"]["seconds"]) for p in measured if not p["streamed"]]
    low, high = log_range([y for points in lines.values() for _, y in points])
    y = logarithmic(low, high, canvas.y0, canvas.y1)
    xs = [x for x, _ in lines["memory"]]
    x = logarithmic(min(xs) / 1.1, max(xs) * 1.1, canvas.x0, canvas.x1)
    canvas.y_axis(y, log_ticks(low, high), label)
    canvas.x_axis(x, xs, title)
    for index, (name, points) in enumerate(lines.items()):
        canvas.path([(x(a), y(b)) for a, b in points], name)
        for a, b in points if name != "floor" else ():
            canvas.mark(x(a), y(b), "circle", name, size=3)
        left = canvas.x0 + 110 * index
        canvas.line(left, 26, left + 20, 26, name)
        canvas.text(left + 25, 30, {"memory": "in memory", "streamed": "layer by layer", "floor": "floor"}[name])
    return "".join(canvas.parts)
