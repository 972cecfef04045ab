"""The report's figures as files for papers: each chart as an SVG that needs nothing else, and as a PNG of it.

The page's own charts, in its light colours: the rules of its style sheet that charts use are written into each file with their colours
put in, the legend is drawn below, the title and caption become the file's <title> and <desc>. PNGs are made by resvg (extra `figures`).
Left out: other themes and sizes; an SVG scales, and its style is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from markupsafe import escape

from bitatlas.errors import UserError
from bitatlas.records import Atlas
from bitatlas.records.files import write_bytes
from bitatlas.report.charts.canvas import GLYPH
from bitatlas.report.charts.figures import Keys, figures
from bitatlas.report.charts.panels import Panel, attention_panels, weight_panels

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
    """Name -> SVG text of the large figures and of the small ones of attention and weights."""
    made = {key: _whole(one.wide, one.title, one.caption, one.keys) for key, one in figures(atlas).items()}
    return made | dict(_panels([*attention_panels(atlas), *weight_panels(atlas)]))


def _panels(panels: Iterable[Panel]) -> Iterable[tuple[str, str]]:
    for one in panels:
        if one.drawing is not None:
            yield one.title.lower().replace(" ", "-"), _whole(one.drawing, one.title, one.caption, one.keys)


def png(svg: str) -> bytes:
    """The drawing in pixels; UserError on a machine without fonts, where every word would silently be missing."""
    import resvg_py

    probe = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><text y="15" font-family="sans-serif">{}</text></svg>'
    if resvg_py.svg_to_bytes(probe.format("HHH")) == resvg_py.svg_to_bytes(probe.format("")):
        raise UserError("--figures: this machine has no font to draw text with; install one, like fonts-dejavu")
    return bytes(resvg_py.svg_to_bytes(svg, zoom=PNG_ZOOM))


def _whole(drawing: str, title: str, caption: str, keys: Keys) -> str:
    """A chart of the page as a file of its own."""
    found = _HEAD.match(drawing)
    assert found is not None  # Canvas.svg writes it so
    width, height = int(found[2]), int(found[3])
    legend, lines = _legend(keys, width, height)
    full_width, full_height = width + 2 * MARGIN, height + LEGEND * lines + 2 * MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{found[1]}" width="{full_width}" height="{full_height}" '
        f'viewBox="{-MARGIN} {-MARGIN} {full_width} {full_height}"{found[4]}>'
    )
    about = f"<title>{escape(title)}</title><desc>{escape(caption)}</desc><style>{_style()}</style>"
    paper = f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{full_width}" height="{full_height}" fill="#ffffff"/>'
    rest = str(drawing)[found.end() :].removesuffix("</svg>")  # Markup would escape what it is joined with
    return head + about + paper + rest + legend + "</svg>\n"


def _legend(keys: Keys, width: int, top: int) -> tuple[str, int]:
    """The legend's entries from the left, on as many lines as they take."""
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
    """The rules of the page that charts use, in its light colours: no variables, since few programs besides browsers know them."""
    css = resources.files("bitatlas.report").joinpath("assets", "report.css").read_text(encoding="utf-8")
    root = css[css.index(":root {") : css.index("}")]
    colours = dict(_VARIABLE.findall(root))
    rules = [(where.strip(), what.strip()) for where, what in _RULE.findall(css) if ":hover" not in where]
    text = "\n".join(f"{where} {{ {what} }}" for where, what in rules)
    text = re.sub(r"var\((--[\w-]+)\)", lambda m: colours[m[1]].strip(), text).replace(
        "font-family: inherit", f"font-family: {FONTS}"
    )
    keys = {name: f".chart .key.{name} {{ fill: {colours[f'--{name[2:]}']} }}" for name in re.findall(r"\.([vc]-[a-z]+) \{", css)}
    return "\n".join([text, *keys.values()])
