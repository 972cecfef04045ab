"""A grid of shades as one small picture: what would be thousands of rectangles (heads of all layers, pairs of units) in a few kB.

The picture is a grey PNG that masks a rectangle of the page's own colour, so it follows the theme; shades are cut to 16 steps, which no eye
tells from 256 in cells of this size and which packs well. Source: PNG (W3C), its four obligatory chunks, written out.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

from bitatlas.report.svg import Canvas

STEPS = 15


def png(shades: Sequence[Sequence[float]]) -> bytes:
    """Rows of shades in 0..1 -> a grey PNG of one pixel a value."""
    height, width = len(shades), len(shades[0])
    lines = b"".join(b"\0" + bytes(17 * round(STEPS * min(1.0, max(0.0, value))) for value in row) for row in shades)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def draw(
    c: Canvas, key: str, x: float, y: float, width: float, height: float, shades: Sequence[Sequence[float]], css: str
) -> None:
    """A rectangle of the class `css`, let through by the shades. `key`: a name that no other mask of the page has."""
    at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    data = base64.b64encode(png(shades)).decode()
    c.add(f'<mask id="{key}" maskUnits="userSpaceOnUse" {at}><image {at} preserveAspectRatio="none" class="pixels" ')
    c.add(f'href="data:image/png;base64,{data}"/></mask><rect class="{css}" {at} mask="url(#{key})"/>')
