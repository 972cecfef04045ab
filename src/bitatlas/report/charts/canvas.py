"""Scales, ticks and marks for the hand-made charts: SVG text out of numbers, no library, no script.

Colours are CSS classes (the page's custom properties give light and dark), so no colour is written here. Every mark carries its
words in a <title>, which is a tooltip without any script and the accessible name with one.
Left out: everything that the report's charts do not use (bars over time, pies, transitions).
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from bitatlas.records.text import number

Scale = Callable[[float], float]
CAP = 3  # half the width of an interval's ends, px
GLYPH = 6.4  # mean width of a 12 px sans-serif glyph, px: labels are placed with it, never cut by it


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def cut(text: str, longest: int) -> str:
    """Return text cut to a length, with an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Return the scale [low, high] -> [start, end] px; values outside are held at the ends."""
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * min(1.0, max(0.0, (value - low) / span))


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Return the logarithmic scale [low, high] -> [start, end] px; values at or below 0 are held at the low end."""
    inner = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: inner(math.log10(max(value, low)))


def nice_range(values: Sequence[float], include: Sequence[float] = ()) -> tuple[float, float]:
    """Return a range that holds all values with a twentieth to spare; (0, 1) for none."""
    ends = [*values, *include]
    if not ends:
        return 0.0, 1.0
    low, high = min(ends), max(ends)
    spare = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    keep = set(include)
    return low if low in keep else low - spare, high if high in keep else high + spare


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about so many round numbers in [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, about)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_range(values: Sequence[float]) -> tuple[float, float]:
    """Return a log axis's range: the positive values with a little to spare, at least a factor of ten."""
    positive = [value for value in values if value > 0] or [0.01, 1.0]
    low, high = min(positive) / 1.25, max(positive) * 1.25
    middle = math.sqrt(low * high)
    return min(low, middle / 10**0.5), max(high, middle * 10**0.5)


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1-2-5 decades in [low, high]; whole decades only where those would be many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high]
        if len(values) <= 7:
            return values
    return values[:: math.ceil(len(values) / 7)]


def tick_text(value: float) -> str:
    """Return a tick as text, without trailing zeros: 0.05, 2, 1,000."""
    text = number(value, max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0)
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass
class Canvas:
    """One drawing: its size and inner edges in px, and the parts so far."""

    width: int
    height: int
    left: float = 52
    right: float = 12
    top: float = 14
    bottom: float = 36
    parts: list[str] = field(default_factory=list)

    @property
    def x0(self) -> float:
        return self.left

    @property
    def x1(self) -> float:
        return self.width - self.right

    @property
    def y0(self) -> float:
        """Return the lower edge of the plot (y grows downwards)."""
        return self.height - self.bottom

    @property
    def y1(self) -> float:
        return self.top

    def add(self, text: str) -> None:
        self.parts.append(text)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self.add(f'<line class="{css}" x1="{_px(x1)}" y1="{_px(y1)}" x2="{_px(x2)}" y2="{_px(y2)}"/>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, extra: str = "") -> None:
        size = f'x="{_px(x)}" y="{_px(y)}" width="{_px(max(0, width))}" height="{_px(max(0, height))}"'
        self.add(f'<rect class="{css}" {size}{extra}/>')

    def text(self, x: float, y: float, content: str, css: str = "", anchor: str = "start") -> None:
        """Write text with its baseline at y; anchor: start, middle or end."""
        self.add(f'<text class="{css}" x="{_px(x)}" y="{_px(y)}" text-anchor="{anchor}">{escape(content)}</text>')

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Draw a line through the points."""
        steps = " ".join(f"{'M' if i == 0 else 'L'}{_px(x)} {_px(y)}" for i, (x, y) in enumerate(points))
        self.add(f'<path class="{css}" d="{steps}"/>')

    @contextmanager
    def tip(self, words: str, extra: str = "") -> Iterator[None]:
        """Give what is drawn inside a tooltip. `extra`: attributes of the group."""
        self.add(f'<g class="tip"{extra}><title>{escape(words)}</title>')
        yield
        self.add("</g>")

    def turned(self, x: str, y: str, degrees: int, content: str, css: str, anchor: str = "start") -> None:
        """Write text that is turned around (x, y)."""
        self.add(f'<g transform="translate({x} {y}) rotate({degrees})">')
        self.text(0, 0, content, css, anchor)
        self.add("</g>")

    def mark(self, x: float, y: float, shape: str, css: str, words: str = "", size: float = 5, extra: str = "") -> None:
        """Draw a circle, square, diamond or triangle, with a tooltip and a larger invisible target for it. `extra`: attributes."""
        s, d = size, round(1.4 * size, 2)
        shapes = {
            "circle": f'<circle class="{css}" cx="{_px(x)}" cy="{_px(y)}" r="{_px(s)}"/>',
            "square": f'<path class="{css}" d="M{_px(x - s)} {_px(y - s)}h{2 * s}v{2 * s}h{-2 * s}z"/>',
            "diamond": f'<path class="{css}" d="M{_px(x)} {_px(y - d)}l{d} {d}l{-d} {d}l{-d} {-d}z"/>',
            "triangle": f'<path class="{css}" d="M{_px(x)} {_px(y - 1.2 * s)}l{1.2 * s:g} {2.1 * s:g}h{-2.4 * s:g}z"/>',
        }
        if not words:
            self.add(shapes[shape])
            return
        with self.tip(words, extra):
            self.add(f'<circle class="target" cx="{_px(x)}" cy="{_px(y)}" r="{_px(s + 5)}"/>{shapes[shape]}')

    def whisker(self, x: float, low: float, high: float, css: str, cap: float = CAP) -> None:
        """Draw a vertical interval with caps, in px."""
        self.add(
            f'<path class="whisker {css}" d="M{_px(x)} {_px(low)}V{_px(high)}M{_px(x - cap)} {_px(low)}h{2 * cap:g}'
            f'M{_px(x - cap)} {_px(high)}h{2 * cap:g}"/>'
        )

    def whisker_across(self, y: float, low: float, high: float, css: str) -> None:
        """Draw a horizontal interval with caps, in px."""
        self.add(
            f'<path class="whisker {css}" d="M{_px(low)} {_px(y)}H{_px(high)}M{_px(low)} {_px(y - CAP)}v{2 * CAP}'
            f'M{_px(high)} {_px(y - CAP)}v{2 * CAP}"/>'
        )

    def y_axis(self, scale: Scale, at: Sequence[float], label: str) -> None:
        """Draw grid lines and numbers on the left; the label stands above the plot, so that it is read without turning."""
        for value in at:
            y = scale(value)
            self.line(self.x0, y, self.x1, y, "grid")
            self.text(self.x0 - 7, y + 4, tick_text(value), "tick", "end")
        self.text(2, 11, label, "axis")

    def x_axis(self, scale: Scale, at: Sequence[float], label: str, grid: bool = False) -> None:
        for value in at:
            x = scale(value)
            if grid:
                self.line(x, self.y0, x, self.y1, "grid")
            self.text(x, self.y0 + 16, tick_text(value), "tick", "middle")
        self._base(label)

    def _base(self, label: str) -> None:
        self.line(self.x0, self.y0, self.x1, self.y0, "base")
        self.text((self.x0 + self.x1) / 2, self.y0 + 32, label, "axis", "middle")

    def layer_axis(self, centre: Scale, layers: Sequence[int], label: str = "layer") -> None:
        """Write layer numbers below the plot, as many as fit; always the first and the last."""
        room = (self.x1 - self.x0) / max(1, len(layers))
        every = max(1, math.ceil((GLYPH * len(str(max(layers, default=0))) + 6) / room))
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            if index == last or (index % every == 0 and last - index >= every):
                self.text(centre(index), self.y0 + 16, str(layer), "tick", "middle")
        self._base(label)

    def svg(self, label: str) -> Markup:
        """Return the whole drawing as an <svg> element; `label` is its accessible name."""
        head = f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">'
        return Markup(head + "".join(self.parts) + "</svg>")


def bands(count: int, start: float, end: float) -> tuple[Scale, float]:
    """Return the centres of `count` equal bands between two px, and the width of one."""
    step = (end - start) / max(1, count)
    return (lambda index: start + (index + 0.5) * step), step


# --- a grid of shades as one small picture: what would be thousands of rectangles, in a few kB ------------------------
#
# The picture is a grey PNG that masks a rectangle of the page's own colour, so it follows the theme; shades are cut to 16 steps, which no eye
# tells from 256 in cells of this size and which packs well. Source: PNG (W3C), its four obligatory chunks, written out.

STEPS = 15


def png(shades: Sequence[Sequence[float]]) -> bytes:
    """Return rows of shades in 0..1 as a grey PNG of one pixel a value."""
    height, width = len(shades), len(shades[0])
    lines = b"".join(b"\0" + bytes(17 * round(STEPS * min(1.0, max(0.0, value))) for value in row) for row in shades)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def draw_shades(
    c: Canvas, key: str, x: float, y: float, width: float, height: float, shades: Sequence[Sequence[float]], css: str
) -> None:
    """Draw a rectangle of the class `css`, let through by the shades. `key`: a name that no other mask of the page has."""
    at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    data = base64.b64encode(png(shades)).decode()
    c.add(f'<mask id="{key}" maskUnits="userSpaceOnUse" {at}><image {at} preserveAspectRatio="none" class="pixels" ')
    c.add(f'href="data:image/png;base64,{data}"/></mask><rect class="{css}" {at} mask="url(#{key})"/>')
