"""Names at marks: short enough for a chart, still different from each other, and placed so that none lies over another.

Widths are estimates, a little too large, since the reader's font is not known here. Placing is a search over a few places around each mark, nearest first,
one label after the other, then again with all others standing; a label far from its mark gets a line to it.
Left out: turned and broken labels; a name that is cut is whole in its tooltip and in the tables.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NARROW, BROAD = set("iljtfrI.,:;'|!()[] -"), set("MWmw@%")
LINE = 13.0  # px from the top of a line of 12 px text to its lowest part
HARD = 1000.0  # the cost of lying over something
FAR = 24.0  # px between a mark and its label, from which a line joins them
PASSES = 3
WORD_ENDS, LEAST_SHARED = "-./ ", 5
# (right, down) from the mark, and how much less it is liked than the first
AROUND = (
    (1, 0, 0.0),
    (0.7, -0.7, 0.2),
    (-1, 0, 0.4),
    (-0.7, -0.7, 0.5),
    (0.7, 0.7, 0.5),
    (-0.7, 0.7, 0.7),
    (0, -1, 0.8),
    (0, 1, 0.9),
)
DISTANCES = (9.0, 15.0, 24.0, 36.0, 50.0, 66.0, 84.0)


def text_width(text: str) -> float:
    """Return about how wide a 12 px sans-serif text is, in px."""
    return sum(_width(character) for character in text)


def _width(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 13.0
    if unicodedata.combining(character):
        return 0.0
    if character in BROAD:
        return 11.0
    if character in NARROW:
        return 4.4
    return 8.6 if character.isupper() else 7.2


def fit(text: str, room: float) -> str:
    """Return text that fits into so many px, with an ellipsis in its middle, since files of one model differ at their ends; one letter at least."""
    if text_width(text) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head = kept // 3
        short = f"{text[:head]}…{text[len(text) - (kept - head) :]}"
        if text_width(short) <= room:
            return short
    return text[:1]


def letter(index: int) -> str:
    """Return A, B, ... Z, AA, AB, ... for 0, 1, ..."""
    head, last = divmod(index, 26)
    return (letter(head - 1) if head else "") + chr(ord("A") + last)


def short_names(names: Sequence[str], room: float) -> list[str]:
    """Return the names, each within so many px: without what most begin with where one is too long, cut in the middle after that.

    Names that become alike are told apart by their letters.
    """
    short = list(names)
    if any(text_width(name) > room for name in names):
        short = [bare if bare == name else f"…{bare}" for bare, name in zip(bare_names(names), names, strict=True)]
    short = [fit(name, room) for name in short]
    if len(set(short)) == len(short):
        return short
    letters = [f"{letter(index)} " for index in range(len(names))]
    return [mark + fit(name, room - text_width(mark)) for mark, name in zip(letters, short, strict=True)]


def bare_names(names: Sequence[str]) -> list[str]:
    """Return the names without what most of them begin with, up to the end of a word; as they are where two would then be called alike."""
    starts = Counter(name[:end] for name in names for end in range(LEAST_SHARED, len(name)) if name[end - 1] in WORD_ENDS)
    shared = max((start for start, count in starts.items() if count > 1 and 2 * count >= len(names)), key=len, default="")
    bare = [name.removeprefix(shared) for name in names]
    return bare if len(set(bare)) == len(names) else list(names)


class Box(NamedTuple):
    """A rectangle in px."""

    left: float
    top: float
    right: float
    bottom: float

    def over(self, other: Box, spare: float = 2.0) -> bool:
        return (
            self.left < other.right + spare
            and other.left < self.right + spare
            and self.top < other.bottom + spare
            and other.top < self.bottom + spare
        )

    def within(self, other: Box) -> bool:
        return self.left >= other.left and self.right <= other.right and self.top >= other.top and self.bottom <= other.bottom


class Place(NamedTuple):
    """Where a label stands, and how far it is from its mark."""

    box: Box
    distance: float

    @property
    def baseline(self) -> float:
        return self.box.bottom - 3


@dataclass(frozen=True)
class Labels:
    """Labels to be placed: their marks and widths in px; what none may lie over (`taken`), and what each should rather not (`avoided`)."""

    marks: Sequence[tuple[float, float]]
    widths: Sequence[float]
    frame: Box
    taken: Sequence[Box] = ()
    avoided: Sequence[Box] = ()
    size: float = 7.0  # half a mark's width
    dots: list[Box] = field(init=False)

    def __post_init__(self) -> None:
        s = self.size
        object.__setattr__(self, "dots", [Box(x - s, y - s, x + s, y + s) for x, y in self.marks])

    def placed(self) -> list[Place] | None:
        """Return a place for each; None where some would lie over another, a mark, or the frame."""
        order = sorted(range(len(self.marks)), key=lambda i: sum(dot.over(self.dots[i], 30) for dot in self.dots), reverse=True)
        found: dict[int, Place] = {}
        costs: dict[int, float] = {}
        for _ in range(PASSES):
            for index in order:
                others = [place.box for number, place in found.items() if number != index]
                costs[index], found[index] = min(
                    ((self._cost(index, place, liked, others), place) for place, liked in self._places(index)),
                    key=lambda pair: pair[0],
                )
        return None if any(cost >= HARD for cost in costs.values()) else [found[index] for index in range(len(self.marks))]

    def _places(self, index: int) -> list[tuple[Place, float]]:
        (x, y), width, result = self.marks[index], self.widths[index], []
        for distance in DISTANCES:
            for right, down, less in AROUND:
                left = x + right * distance - (0 if right > 0 else width if right < 0 else width / 2)
                top = y + down * distance - (LINE / 2 if down == 0 else LINE if down < 0 else 0)
                result.append((Place(Box(left, top, left + width, top + LINE), distance), less))
        return result

    def _cost(self, index: int, place: Place, less: float, others: Sequence[Box]) -> float:
        box = place.box
        hard = sum(box.over(other) for other in (*others, *self.taken)) + (not box.within(self.frame))
        hard += sum(box.over(dot, 0.0) for number, dot in enumerate(self.dots) if number != index)
        soft = 2.0 * sum(box.over(other, 0.0) for other in self.avoided)
        own = math.dist(self.marks[index], near_end(self.marks[index], box))
        soft += 3.0 * any(
            math.dist(mark, near_end(mark, box)) < own + 6 for number, mark in enumerate(self.marks) if number != index
        )
        if place.distance >= FAR:
            soft += 3.0 * sum(_crosses(self.marks[index], box, other) for other in (*others, *self.taken))
        return HARD * hard + soft + place.distance / 9 + less


def near_end(mark: tuple[float, float], box: Box) -> tuple[float, float]:
    """Return the point of a label's box that is nearest to its mark."""
    return min(max(mark[0], box.left), box.right), min(max(mark[1], box.top), box.bottom)


def _crosses(mark: tuple[float, float], box: Box, other: Box) -> bool:
    """Tell whether the line from a mark to its label goes through another box."""
    end = near_end(mark, box)
    steps = [(mark[0] + (end[0] - mark[0]) * i / 12, mark[1] + (end[1] - mark[1]) * i / 12) for i in range(13)]
    return any(other.left <= x <= other.right and other.top <= y <= other.bottom for x, y in steps)
