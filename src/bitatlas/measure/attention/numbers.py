"""Numbers that a text mentions, in digits and in words, with where they stand and what they may mean.

A mention can have more than one value: "25%" is 25 or 0.25, "half" divides by 2 or multiplies by 0.5, "2/5" is 0.4 and also a 2 and
a 5. *Loose* words ("one", "half", "double", ...) are often no number at all: they are recognized where a calculation uses their
value, and never counted as a number otherwise.
Left out: ordinals in words, clock times as one number, languages other than English.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[int, int]  # characters, end excluded

_UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {
    **{word: value for value, word in enumerate([*_UNITS, *_TEENS], start=1)},
    **{word: 10 * value for value, word in enumerate(_TENS, start=2)},
    "zero": 0,
}
_SCALES = {"hundred": 100.0, "thousand": 1000.0, "million": 1e6}
_LOOSE: dict[str, tuple[float, ...]] = {
    "one": (1.0,),
    "a hundred": (100.0,),
    "a thousand": (1000.0,),
    "half": (0.5, 2.0),
    "quarter": (0.25, 4.0),
    "twice": (2.0,),
    "double": (2.0,),
    "doubled": (2.0,),
    "couple": (2.0,),
    "pair": (2.0,),
    "triple": (3.0,),
    "tripled": (3.0,),
    "thrice": (3.0,),
    "dozen": (12.0,),
}


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?"
_DIGITS = re.compile(rf"(?P<number>{NUMBER})(?:/(?P<below>\d+))?(?P<percent>\s?%)?")
_COUNTED = rf"(?P<tens>{_any_of(_TENS)})(?:[- ](?P<unit>{_any_of(_UNITS)}))?|(?P<small>{_any_of([*_UNITS, *_TEENS, 'zero'])})"
_WORDS = re.compile(
    rf"\b(?:(?P<loose>{_any_of(w for w in _LOOSE if w != 'one')})|(?:{_COUNTED})(?:[- ](?P<scale>{_any_of(_SCALES)}))?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Mention:
    """A number in a text. `loose`: a word that is a number only where a calculation uses it."""

    span: Span
    values: tuple[float, ...]
    loose: bool = False

    def means(self, value: float) -> bool:
        return any(same_number(own, value) for own in self.values)


def same_number(first: float, second: float) -> bool:
    return abs(first - second) <= 1e-9 * max(1.0, abs(first), abs(second))


def number_of(text: str) -> float:
    """The value of digits as `NUMBER` matches them ("80,000", ".5")."""
    return float(text.replace(",", ""))


def find_mentions(text: str, start: int = 0, end: int | None = None) -> list[Mention]:
    """All mentions in text[start:end], in order, spans counted from the beginning of `text`."""
    end = len(text) if end is None else end
    found = [_digits(match) for match in _DIGITS.finditer(text, start, end)]
    found += [_words(match) for match in _WORDS.finditer(text, start, end)]
    return sorted(found, key=lambda mention: mention.span)


def _digits(match: re.Match[str]) -> Mention:
    value = number_of(match["number"])
    values = [value]
    if match["below"]:
        below = float(match["below"])
        values += [below] + ([value / below] if below else [])
    if match["percent"]:
        values.append(value / 100)
    return Mention(match.span(), tuple(values))


def _words(match: re.Match[str]) -> Mention:
    if match["loose"]:
        return Mention(match.span(), _LOOSE[match["loose"].lower()], loose=True)
    parts = [match[name].lower() for name in ("tens", "unit", "small") if match[name]]
    value = float(sum(_VALUES[part] for part in parts))
    if match["scale"]:
        value *= _SCALES[match["scale"].lower()]
    return Mention(match.span(), (value,), loose=match[0].lower() == "one")
