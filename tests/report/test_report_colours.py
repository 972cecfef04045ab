"""The report's colours stay apart for people who tell some of them apart badly; shape says the same everywhere, this is the second line."""

from __future__ import annotations

from importlib import resources
from itertools import combinations, pairwise

import numpy as np
import pytest

from bitatlas.report.charts.heat import shade
from colours import BLINDNESS, distance, lab, over, properties, rgb

CSS = resources.files("bitatlas.report").joinpath("assets", "report.css").read_text(encoding="utf-8")
APART = 18.0  # CIE 1976; a difference that is just seen is 2.3
STEPS_APART = 7.0  # between neighbouring shades of bits, which carry their number, too

SETS = {
    "verdicts": ("critical", "safe", "light", "uncertain"),
    "precisions": ("low", "high", "plan", "ink"),
    "plans": ("plan", "ink", "baseline", "muted"),
    "signs of an interaction": ("heat", "bits"),
}


@pytest.mark.parametrize("blindness", list(BLINDNESS))
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("names", SETS.values(), ids=list(SETS))
def test_colours_that_mean_different_things_look_different(names: tuple[str, ...], theme: str, blindness: str) -> None:
    colours = properties(CSS, theme)
    for a, b in combinations(names, 2):
        assert distance(rgb(colours[a]), rgb(colours[b]), blindness) >= APART, (a, b)


@pytest.mark.parametrize("blindness", list(BLINDNESS))
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 3, 4, 8), (4, 5, 8)])
def test_more_bits_look_stronger_step_by_step(widths: tuple[int, ...], theme: str, blindness: str) -> None:
    colours = properties(CSS, theme)
    surface = rgb(colours["surface"])
    cells = [over(rgb(colours["bits"]), shade(bits, max(widths))[0], surface) for bits in widths]
    far = [distance(cell, surface, blindness) for cell in cells]
    assert far == sorted(far)
    assert min(far[0], *(distance(a, b, blindness) for a, b in pairwise(cells))) >= STEPS_APART


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 5, 6, 8])
def test_numbers_on_cells_can_be_read(bits: float, theme: str) -> None:
    colours = properties(CSS, theme)
    for widest in (4, 8):
        depth, css = shade(min(bits, widest), widest)
        cell = over(rgb(colours["bits"]), depth, rgb(colours["surface"]))
        light, dark = sorted((_luminance(cell), _luminance(rgb(colours[css]))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def _luminance(colour: np.ndarray) -> float:
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_the_simulation_is_the_published_one() -> None:
    """White stays white, greys keep their lightness, and red and green of one lightness meet where cones are missing."""
    for name, matrix in BLINDNESS.items():
        assert matrix.sum(axis=1) == pytest.approx(np.ones(3), abs=2e-5), name
        assert lab(np.full(3, 0.5), name)[1:] == pytest.approx([0, 0], abs=0.05)
    assert lab(rgb("#ffffff"))[0] == pytest.approx(100, abs=1e-3)
    assert lab(rgb("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)  # the value that colour tables give for sRGB red
    red, green = rgb("#c05040"), rgb("#748a40")
    assert distance(red, green, "deutan") < distance(red, green, "none") / 3
