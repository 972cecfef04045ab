"""Read numbers in texts: all that a text mentions, with where they stand and what they may mean, and the one that an answer states.

A mention can have more than one value: "25%" is 25 or 0.25, "half" divides by 2 or multiplies by 0.5, "2/5" is 0.4 and also a 2 and
a 5. *Loose* words ("one", "half", "double", ...) are often no number at all: they are recognized where a calculation uses their
value, and never counted as a number otherwise.
Left out: ordinals in words, clock times as one number, words for a scale ("2 million") and units ("half a dozen") in answers, languages
other than English.
"""

from __future__ import annotations

import math
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
    "one": (1.0,), "a hundred": (100.0,), "a thousand": (1000.0,), "half": (0.5, 2.0), "quarter": (0.25, 4.0), "twice": (2.0,),
    "double": (2.0,), "doubled": (2.0,), "couple": (2.0,), "pair": (2.0,), "triple": (3.0,), "tripled": (3.0,), "thrice": (3.0,),
    "dozen": (12.0,),
}  # fmt: skip


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
        """Return whether `value` is one of the values that the mention may have."""
        return any(same_number(possible, value) for possible in self.values)


def same_number(first: float, second: float) -> bool:
    """Return whether two numbers are equal but for rounding."""
    return abs(first - second) <= 1e-9 * max(1.0, abs(first), abs(second))


def number_of(text: str) -> float:
    """Return the value of digits as `NUMBER` matches them ("80,000", ".5")."""
    return float(text.replace(",", ""))


def find_mentions(text: str, start: int = 0, end: int | None = None) -> list[Mention]:
    """Return all mentions in text[start:end], in order, spans counted from the beginning of `text`."""
    end = len(text) if end is None else end
    mentions = [_digits(match) for match in _DIGITS.finditer(text, start, end)]
    mentions += [_words(match) for match in _WORDS.finditer(text, start, end)]
    return sorted(mentions, key=lambda mention: mention.span)


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


# --- the number that a written answer states -----------------------------------------------------------------------------

# One rule for every model and precision; what would be right plays no part in it.
#
# Of a short answer (SVAMP) the first line that is not empty counts, of a worked solution (GSM8K) the last one that states a number:
#
# 1. What follows the last `####`, `\boxed{` or "answer is" counts alone, if it states a number.
# 2. A number that such a text, or a short answer, begins with is the answer: "17 (26 - 9)", "17, not 26", "17 apples and 3 pears", "17 or 18".
# 3. Of an equation it is the result, the last side that is no calculation: "26 - 9 = 17 apples in 2 boxes", "17 = 26 - 9".
# 4. Else it is the last number, but for those in brackets, after "because" or "since", and after "not", "than" or "instead of".
#
# A calculation without a result states nothing. Without digits, a number in words is read the same way ("seventeen").
# Numbers: "1,200", "1 200", "1.200.000", "1e3", "3/4", "2 1/2", "-5", "$17.00"; "17%" is 17, and a single point is a decimal point ("1.200" is 1.2).
#
# lm-evaluation-harness's GSM8K has two rules instead: what follows `####`, or nothing ("strict-match"), and the last number of all
# ("flexible-extract"), which reads 9 of "17 (26 - 9)".

_SPACE = "[ \u00a0\u2009\u202f]"  # between thousands
_WHOLE = rf"\d{{1,3}}(?:,\d{{3}})+(?![\d,])|\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)|\d+"
_PLAIN = rf"(?:\d{{1,3}}(?:\.\d{{3}}){{2,}}(?!\d)|(?:{_WHOLE})(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+(?!\w))?"
_FRACTION = r"(?:\d+\s+)?\d+\s?/\s?\d+(?![\d./])"
_SIGN = r"(?:(?<![\w).%])[-−–])?[$€£]?"
WRITTEN_NUMBER = re.compile(rf"{_SIGN}(?:(?P<fraction>{_FRACTION})|(?P<plain>{_PLAIN}))")

_MARK = re.compile(r"####|\\boxed\s*\{|\banswer(?:\s+is|\s+was|\s*[:=])", re.IGNORECASE)
_EQUALS = re.compile(r"=>|->|[=≈→⇒]|\b(?:equals|is equal to)\b")
_OPERATOR = r"(?:\s*(?:[-+*×÷−–^/]|\b(?:plus|minus|times|x|divided by)\b)\s*)"
_CALCULATION = re.compile(rf"\w\)?{_OPERATOR}+[$€£(]*\d")  # also "26 pens - 9"
_IS = re.compile(r"\b(?:is|are|makes?|leaves?|gives?)\s+(?=[$€£]?[-−]?\d)")
_REASON = re.compile(r"\b(?:because|since)\b.*", re.IGNORECASE)
_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_OTHER = re.compile(r"\b(?:not|than|instead\s+of)\s+(?:just\s+|only\s+)?$", re.IGNORECASE)
_CLAUSE = re.compile(r"(?:[.;:,!?](?=\s|$))|\n")
_BEFORE = " \t*_`\"'“$€£~+:{"  # may stand before a number that begins a text


def numbers_in(text: str) -> list[float]:
    """Return the numbers in a text, in order. "1,234.5" is one; the minus of "76-25" is an operator, that of "= -25" a sign."""
    return [_value(match) for match in WRITTEN_NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> float:
    sign = -1.0 if match[0][0] in "-−–" else 1.0
    if match["fraction"]:
        *whole, above, below = re.findall(r"\d+", match["fraction"])
        value = (float(whole[0]) if whole else 0.0) + (float(above) / float(below) if float(below) else math.inf)
    else:
        digits = re.sub(rf",|{_SPACE}", "", match["plain"])
        value = float(digits.replace(".", "") if digits.count(".") > 1 else digits)
    return sign * value


def plain_number(value: object) -> str:
    """Return "51.0", "2,125", 1e16 and "3/4" as "51", "2125", "10000000000000000" and "0.75". ValueError where it is no single number."""
    numbers = numbers_in(str(value))
    if len(numbers) != 1 or not math.isfinite(numbers[0]):
        raise ValueError(f"{value!r} is not a number")
    return str(int(numbers[0])) if numbers[0].is_integer() else repr(numbers[0])


def same_answer(number: float | None, answer: float) -> bool:
    """Return whether a number equals the answer but for the rounding of a decimal: within 1e-6, and within 1e-6 of the answer where that is small."""
    return number is not None and abs(number - answer) <= 1e-6 * min(1.0, abs(answer))


def read_number(form: str, output: str) -> float | None:
    """Return the number that `output` states, by the rules above; None where there is none. form: "problem" (short) or "worked"."""
    if form == "problem":
        output = next((line for line in output.splitlines() if line.strip()), "")
    marks = list(_MARK.finditer(output))
    stated = _stated(next(iter(output[marks[-1].end() :].strip().splitlines()), ""), begins=True) if marks else None
    lines = [_MARK.sub(" ", line) for line in reversed(output.splitlines())]
    for line in lines if stated is None else []:
        stated = _stated(line, begins=form == "problem")
        if stated is not None:
            break
    return stated if stated is not None and math.isfinite(stated) else None


def _stated(text: str, begins: bool) -> float | None:
    """Return the number that one line states. `begins`: one that it begins with is the answer."""
    text = _IS.sub("= ", text if re.search(r"\d", text) else _in_digits(text))
    bare = _REASON.sub("", _BRACKETS.sub(" ", text))
    bare = bare if re.search(r"\d", bare) else text
    first = WRITTEN_NUMBER.match(bare.lstrip(_BEFORE))
    clauses = [clause for clause in _CLAUSE.split(bare) if re.search(r"\d", clause)]
    if begins and first and not _EQUALS.search(clauses[0]) and not _calculates(clauses[0]):
        return _value(first)
    equations = [_result(clause) for clause in clauses if _EQUALS.search(clause)]
    if equations:
        return equations[-1]
    for clause in reversed(clauses):
        numbers = [_value(match) for match in WRITTEN_NUMBER.finditer(clause) if not _OTHER.search(clause[: match.start()])]
        if numbers and not _calculates(clause):
            return numbers[-1]
    return None


def _result(equation: str) -> float | None:
    """Return the number on the last side of an equation that is no calculation: the first there, the last on the first side."""
    sides = _EQUALS.split(equation)
    for index in reversed(range(len(sides))):
        numbers = numbers_in(sides[index])
        if numbers and not _calculates(sides[index]):
            return numbers[0 if index else -1]
    return None


def _calculates(text: str) -> bool:
    """Return whether there is an operator between numbers. A sign, a fraction's bar or an exponent's minus is none."""
    return bool(_CALCULATION.search(WRITTEN_NUMBER.sub("1", text)))


def _in_digits(text: str) -> str:
    """Return `text` with the numbers in words that are surely numbers in digits."""
    for mention in reversed(find_mentions(text)):
        if not mention.loose:
            text = f"{text[: mention.span[0]]}{mention.values[0]:.15g}{text[mention.span[1] :]}"
    return text
