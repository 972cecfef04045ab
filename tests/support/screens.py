"""Screenshots of the report's sections, compared with stored ones; after a change that is meant, take them anew and look at them:

    python tests/screens.py

What a page looks like hangs on fonts more than on the page, so the page gets one of its own: Noto Sans, in the version that package.json pins.
Two pictures are compared block by block, each block's mean colour: how an edge is smoothed differs between builds of a browser
and is gone in the mean, a label, a cell or a mark that is missing or of another colour is not.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from atlas_factory import Recipe, make_atlas
from bitatlas.report.html import write_reports
from browser import font_folder, launched, opened

FOLDER = Path(__file__).with_name("screens")
RECIPE = Recipe(layers=12, zones=3, others=2)
SECTIONS = ("answer", "budget", "overview", "strategy", "findings", "layers", "profiles", "tasks")
LOOKS = {"desk": (1280, False), "phone-dark": (390, True)}  # width, dark
KEPT = 4  # a stored picture has a pixel for so many by so many
BLOCK = 8  # pixels of the page, each way, whose mean colour is compared
# Of 255, in the worst channel: how far one block may be off, and their mean. Measured: without the placing of letters between pixels, 27.5
# and 2.4; the smallest label of a section gone, 32; the smallest dot, 29; a cell of another shade, 167; a paragraph, 58; a figure, 150.
BLOCK_LIMIT = 30.0
MEAN_LIMIT = 3.0
SIZE_LIMIT = 4  # pixels of the page


@contextmanager
def page_of(browser: Any, folder: Path, look: str) -> Iterator[Any]:
    """The report of an atlas that is always the same, in the pinned font."""
    width, dark = LOOKS[look]
    write_reports(make_atlas(RECIPE), folder)
    with opened(browser, (folder / "report.html").as_uri(), width, dark, bypass_csp=True) as seen:
        seen.page.add_style_tag(content=_font())
        seen.page.evaluate("document.fonts.ready")
        yield seen.page


def _font() -> str:
    faces = []
    for weight in (400, 600, 700):
        data = (font_folder() / f"noto-sans-latin-{weight}-normal.woff2").read_bytes()
        source = f"url(data:font/woff2;base64,{base64.b64encode(data).decode()}) format('woff2')"
        faces.append(f"@font-face {{ font-family: Pinned; font-weight: {weight}; src: {source} }}")
    return (
        "".join(faces)
        + " html *, svg text { font-family: Pinned, 'DejaVu Sans', sans-serif !important; transition: none !important }"
    )


def shot(page: Any, section: str) -> np.ndarray:
    """What a section looks like: uint8 [height, width, 3], one of each `KEPT` x `KEPT` pixels' mean."""
    png = page.locator(f"#{section}").screenshot(animations="disabled", caret="hide")
    return smaller(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), KEPT).round().astype(np.uint8)


def smaller(picture: np.ndarray, times: int) -> np.ndarray:
    """The means of blocks of `times` by `times` pixels; what is left at the right and at the bottom is cut."""
    height, width = (length // times for length in picture.shape[:2])
    return picture[: height * times, : width * times].reshape(height, times, width, times, 3).mean((1, 3))


def stored(look: str, section: str) -> np.ndarray:
    return np.asarray(Image.open(FOLDER / f"{section}-{look}.png").convert("RGB"))


def apart(one: np.ndarray, other: np.ndarray) -> tuple[int, float, float]:
    """How far two pictures are apart: pixels of the page in size, the worst block, the mean of blocks."""
    size = KEPT * max(abs(a - b) for a, b in zip(one.shape, other.shape, strict=True))
    height, width = (min(a, b) for a, b in zip(one.shape[:2], other.shape[:2], strict=True))
    blocks = [smaller(picture[:height, :width].astype(float), BLOCK // KEPT) for picture in (one, other)]
    off = np.abs(blocks[0] - blocks[1]).max(-1)
    return size, float(off.max()), float(off.mean())


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    size, worst, mean = apart(one, other)
    return size <= SIZE_LIMIT and worst <= BLOCK_LIMIT and mean <= MEAN_LIMIT


def main() -> None:
    """Take those anew that look different now; the others keep their bytes."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, launched() as browser:
        for look in LOOKS:
            with page_of(browser, Path(place), look) as page:
                for section in SECTIONS:
                    file, picture = FOLDER / f"{section}-{look}.png", shot(page, section)
                    if not file.exists() or not alike(picture, stored(look, section)):
                        Image.fromarray(picture).save(file, optimize=True)
                        print(file)


if __name__ == "__main__":
    main()
