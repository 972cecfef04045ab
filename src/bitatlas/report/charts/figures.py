"""The large figures of report.html: each chart drawn for a desk and for a phone, with its title, caption and legend.

A figure that an atlas has nothing for is left out here; the page says elsewhere what was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from markupsafe import Markup, escape

from bitatlas.errors import UserError
from bitatlas.records import Atlas
from bitatlas.records.files import write_bytes
from bitatlas.records.text import listed, number
from bitatlas.report import facts
from bitatlas.report.advice import basis
from bitatlas.report.charts import charts, heat
from bitatlas.report.charts.canvas import GLYPH
from bitatlas.report.charts.panels import (
    PREDICTION_TITLE,
    attention_panels,
    prediction_caption,
    prediction_scatter,
    weight_panels,
)
from bitatlas.report.task_tables import WIDTHS_TITLE, held_chart

WIDE, HALF, NARROW = 960, 460, 350  # px of a chart across the page, of one of two, and on a phone

Keys = list[tuple[str, str, str]]  # (shape, css class, meaning)
VERDICTS: Keys = [
    ("◆", "v-critical", "critical"),
    ("●", "v-safe", "safe"),
    ("■", "v-light", "light"),
    ("▲", "v-uncertain", "uncertain"),
]
PLANS: Keys = [
    ("◆", "c-plan", "plan"),
    ("■", "c-ink", "uniform"),
    ("▲", "c-baseline", "baseline"),
    ("●", "c-muted", "random plans"),
]
HELD: Keys = [("●", "v-safe", "held"), ("◆", "v-critical", "lost"), ("▲", "v-uncertain", "inconclusive, at or below chance")]
PAIRS: Keys = [("■", "c-heat", "worse together than apart"), ("■", "c-bits", "they spare each other")]
AROUND: Keys = [("●", "c-high", "random plan"), ("◆", "c-plan", "the plan")]


@dataclass(frozen=True)
class Figure:
    """A chart in both widths, with its words."""

    title: str
    caption: str
    wide: Markup
    narrow: Markup
    keys: Keys


@dataclass(frozen=True)
class Sketch:
    """What a figure is drawn from."""

    draw: Callable[[Atlas, int], Markup | None]
    title: str
    caption: str
    keys: Keys = field(default_factory=list)
    width: int = WIDE


def figures(atlas: Atlas) -> dict[str, Figure]:
    """Return the figures that this atlas has, by the name that the template uses."""
    result = {}
    for key, sketch in {**_layers(atlas), **_plan(atlas), **_others(atlas)}.items():
        wide, narrow = sketch.draw(atlas, sketch.width), sketch.draw(atlas, NARROW)
        if wide is not None and narrow is not None:
            result[key] = Figure(sketch.title, sketch.caption, wide, narrow, sketch.keys)
    return result


def _layers(atlas: Atlas) -> dict[str, Sketch]:
    low, high = facts.width_of(atlas, atlas.low), facts.width_of(atlas, atlas.high)
    rests = facts.basis(record.criticality for record in atlas.layers)
    harm = f"Above the dashed line at 1 a layer does more harm than its size explains. Bars: 95% intervals ({rests})."
    lowered = f"All others at {high}. Far above the dashed line (none lowered): lowering it hurts."
    raised = f"All others at {low}. Far below the dashed line (none raised): raising it helps."
    return {
        "criticality": Sketch(charts.criticality, "Which layers carry the damage", harm, VERDICTS),
        "damage": Sketch(heat.damage_map, "What lowering costs", _costs(atlas)),
        "lowered": Sketch(partial(charts.swap, raised=False), f"One layer lowered to {low}", lowered, width=HALF),
        "raised": Sketch(partial(charts.swap, raised=True), f"One layer raised to {high}", raised, width=HALF),
    }


def _costs(atlas: Atlas) -> str:
    chosen = heat.damage_base(atlas)
    if chosen is None:
        return ""
    least, most = (number(end) for end in heat.damage_ends(atlas))
    return (
        f"Damage that lowering one unit to {chosen[1]} adds at base {chosen[0]}, on fit rows (one number, no interval). "
        f"Faintest {least}, strongest {most} nats/token, log scale. Numbers: the plan's bits."
    )


def _plan(atlas: Atlas) -> dict[str, Sketch]:
    outside = facts.outside_formats(point.name for point in atlas.curve)
    added = f" Not in --formats, so not open to the plan: {listed(outside)}." if outside else ""
    lines = "the line joins the uniform formats"
    if any(point.kind == "curve" for point in atlas.curve):
        lines = "one line joins the uniform formats, the other the plans found at each size"
    size = f"Lower left is better. Bars: 95% intervals; {lines}.{added}"
    others = "None of them is larger than the plan. Bars: 95% intervals."
    bits = "Layers and kinds of module; the stronger the colour, the more bits. Each cell says why."
    bits += f" {basis(atlas)}" if atlas.units or atlas.unit_damage else ""
    return {
        "size": Sketch(charts.size_damage, "Damage against size", size, PLANS),
        "baselines": Sketch(charts.baselines, "The plan and plans that anybody could have made", others),
        "prediction": Sketch(prediction_scatter, PREDICTION_TITLE, prediction_caption(atlas), AROUND, HALF),
        "plan": Sketch(heat.plan_map, "Bits of each module", bits),
    }


def _others(atlas: Atlas) -> dict[str, Sketch]:
    held = "Difference from the reference on the same items. Bars: 95% intervals; dashed: the margin of loss that is ruled out where a task is held."
    earns = "Rank correlation over layers; intervals are over rows, for these layers. Whether a measure beats chance over layers: q in the table."
    return {
        "pairs": Sketch(heat.interaction_matrix, "Which units hurt together", heat.interaction_caption(atlas), PAIRS, HALF),
        "tasks": Sketch(charts.tasks, "Accuracy", "Bars: 95% Wilson intervals; the dotted tick is chance."),
        "widths": Sketch(held_chart, WIDTHS_TITLE, held, HELD),
        "correlations": Sketch(charts.correlations, "Do cheap measures foretell damage?", earns),
    }


# --- figures as files for papers: each chart as an SVG that needs nothing else, and as a PNG of it ------------------------
#
# The page's own charts, in its light colours: the rules of its style sheet that charts use are written into each file with their colours
# put in, the legend is drawn below, the title and caption become the file's <title> and <desc>. PNGs are made by resvg (extra `figures`).
# Left out: other themes and sizes; an SVG scales, and its style is text.

FOLDER = "figures"
MARGIN = 10  # px around a chart
LEGEND = 24  # px a line of the legend
FONTS = "'Helvetica Neue', 'Liberation Sans', 'DejaVu Sans', Arial, sans-serif"
PNG_ZOOM = 3  # 960 px wide charts become 2940 px: 300 dpi on a page of 25 cm
_HEAD = re.compile(r'<svg class="([^"]*)" viewBox="0 0 (\d+) (\d+)"([^>]*)>')
_RULE = re.compile(r"^((?:svg)?\.(?:chart|[vc]-)[^{]*)\{([^}]*)\}$", re.MULTILINE)
_VARIABLE = re.compile(r"(--[\w-]+):\s*([^;]+);")


def write_figures(atlas: Atlas, folder: Path) -> list[Path]:
    """Write `folder`/figures/NAME.svg and NAME.png of every figure that the report has; UserError, and nothing written, without resvg."""
    if find_spec("resvg_py") is None:
        raise UserError("--figures: PNGs need a package: pip install 'bitatlas[figures]'")
    files: dict[str, bytes] = {}
    for name, text in standalone(atlas).items():
        files[f"{name}.svg"] = text.encode()
        files[f"{name}.png"] = png(text)
    (folder / FOLDER).mkdir(exist_ok=True)
    for name, content in files.items():
        write_bytes(folder / FOLDER / name, content)
    return [folder / FOLDER / name for name in files]


def standalone(atlas: Atlas) -> dict[str, str]:
    """Return name -> SVG text of the large figures and of the small ones of attention and weights."""
    result = {key: _whole(figure.wide, figure.title, figure.caption, figure.keys) for key, figure in figures(atlas).items()}
    for panel in (*attention_panels(atlas), *weight_panels(atlas)):
        if panel.drawing is not None:
            name = panel.title.lower().replace(" ", "-")
            result[name] = _whole(panel.drawing, panel.title, panel.caption, panel.keys)
    return result


def png(svg: str) -> bytes:
    """Return the drawing in pixels; UserError on a machine without fonts, where every word would silently be missing."""
    import resvg_py

    probe = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><text y="15" font-family="sans-serif">{}</text></svg>'
    if resvg_py.svg_to_bytes(probe.format("HHH")) == resvg_py.svg_to_bytes(probe.format("")):
        raise UserError("--figures: this machine has no font to draw text with; install one, like fonts-dejavu")
    return bytes(resvg_py.svg_to_bytes(svg, zoom=PNG_ZOOM))


def _whole(drawing: str, title: str, caption: str, keys: Keys) -> str:
    """Return a chart of the page as a file of its own."""
    match = _HEAD.match(drawing)
    assert match is not None  # Canvas.svg writes it so
    width, height = int(match[2]), int(match[3])
    legend, lines = _legend(keys, width, height)
    full_width, full_height = width + 2 * MARGIN, height + LEGEND * lines + 2 * MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{match[1]}" width="{full_width}" height="{full_height}" '
        f'viewBox="{-MARGIN} {-MARGIN} {full_width} {full_height}"{match[4]}>'
    )
    about = f"<title>{escape(title)}</title><desc>{escape(caption)}</desc><style>{_style()}</style>"
    paper = f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{full_width}" height="{full_height}" fill="#ffffff"/>'
    rest = str(drawing)[match.end() :].removesuffix("</svg>")  # Markup would escape what it is joined with
    return head + about + paper + rest + legend + "</svg>\n"


def _legend(keys: Keys, width: int, top: int) -> tuple[str, int]:
    """Return the legend's entries from the left, on as many lines as they take."""
    parts, x, lines = [], 0.0, 1 if keys else 0
    for shape, css, meaning in keys:
        room = GLYPH * (len(meaning) + 5)
        if x and x + room > width:
            x, lines = 0.0, lines + 1
        y = top + LEGEND * (lines - 1) + 16
        parts.append(
            f'<text class="key {css}" x="{x:.0f}" y="{y}">{shape}</text><text x="{x + 14:.0f}" y="{y}">{escape(meaning)}</text>'
        )
        x += room
    return "".join(parts), lines


def _style() -> str:
    """Return the rules of the page that charts use, in its light colours: no variables, since few programs besides browsers know them."""
    css = resources.files("bitatlas.report").joinpath("assets", "report.css").read_text(encoding="utf-8")
    root = css[css.index(":root {") : css.index("}")]
    colours = dict(_VARIABLE.findall(root))
    rules = [f"{where.strip()} {{ {what.strip()} }}" for where, what in _RULE.findall(css) if ":hover" not in where]
    text = re.sub(r"var\((--[\w-]+)\)", lambda m: colours[m[1]].strip(), "\n".join(rules))
    text = text.replace("font-family: inherit", f"font-family: {FONTS}")
    keys = {name: f".chart .key.{name} {{ fill: {colours[f'--{name[2:]}']} }}" for name in re.findall(r"\.([vc]-[a-z]+) \{", css)}
    return "\n".join([text, *keys.values()])
