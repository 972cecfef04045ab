"""Measures reasoning focus: while a solution is being written, does attention go to the numbers that the next number is made from?

A *problem* is a word problem with its worked solution, as the model is given it ("... Answer: 26 - 9 = 17"). Every number that a step
of the solution writes is a *query*, at the position that predicts its first token, i.e. the token in front of it (there a causal model
decides on the number; at the number's own tokens it is known already). Its *targets* are
- of an operand: that operand where it stands in the problem's text, or as the result of an earlier step;
- of the result: the step's operands, in the problem's text, as earlier results, and where the step itself has written them down.
A step counts where at least one of its operands stands in the problem's text or is an earlier result.
Both kinds are needed: a solution that writes its operands down fetches them from the problem when it writes them, and calculates
with the copies.

Null: as many tokens as there are targets, half from the *other* numbers of the same problem (and earlier results), half from tokens
within 8 of a target that belong to no number; these fill up where there are too few other numbers. For an operand, the step's other
operands are other numbers: choosing the right one is the point.

Focus is 100 (m - e) / (1 - e), with m the mass on the targets, e the mass expected under the null, both with sinks stripped and averaged
over a problem's queries: 0 is chance, 100 everything, and negative means that other tokens are preferred.
Sources: SVAMP (arXiv:2103.07191), GSM8K's calculator annotations (arXiv:2110.14168).
Left out: operands that a solution uses but no text mentions (7 days in a week).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitatlas.data.numbers import NUMBER, Mention, Span, find_mentions, number_of
from bitatlas.measure.attention.roles import NEAR_TOKENS, AttentionMass, Cells, Floats

FOCUS_NULL = (
    f"as many tokens as there are targets: half other numbers of the same problem, half tokens within {NEAR_TOKENS} of a target "
    "(these fill up where a problem has too few other numbers)"
)
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_RESULT = re.compile(rf"\$?\s?(-?(?:{NUMBER}))")
_NUMBER = re.compile(NUMBER)


@dataclass(frozen=True)
class Query:
    """A number that a solution writes. Spans are characters of the problem's text, all in front of `written`."""

    written: Span
    needs: tuple[float, ...]  # the operand itself, or a result's operands
    targets: tuple[Span, ...]  # where they stand
    others: tuple[Span, ...]  # the other numbers of the problem, and earlier results


@dataclass(frozen=True)
class Problem:
    """Prompt and worked solution. `numbers`: every number in the text, so that none is taken for an ordinary token."""

    text: str
    queries: tuple[Query, ...]
    numbers: tuple[Span, ...]
    source: str  # "svamp", "gsm8k", or the task it was taken from


# --- from items to problems -----------------------------------------------------------------------------------------------


def problems_of(items: Iterable[Mapping[str, Any]]) -> list[Problem]:
    """Return the problems of items in SVAMP's or GSM8K's form, or in the form of our own tasks (`question` and `worked`), in order.

    Items of any other form (multiple choice), and items in which no operand can be found, have no problem and are left out.
    """
    return [problem for item in items if (problem := _problem_of(item)) is not None]


def _problem_of(item: Mapping[str, Any]) -> Problem | None:
    if {"Body", "Question", "Equation", "Answer"} <= item.keys():
        return svamp_problem(item)
    solution = item.get("worked", item.get("answer"))
    if "question" not in item or not isinstance(solution, str):
        return None
    if "####" in solution:
        return gsm8k_problem({"question": item["question"], "answer": solution})
    equation, _, answer = solution.rpartition("=")
    if _value(answer) is None:
        return None
    return svamp_problem({"Body": item["question"], "Question": "", "Equation": equation, "Answer": _value(answer)})


def svamp_problem(item: Mapping[str, Any]) -> Problem | None:
    """Return a problem as in "Question: {Body} {Question}\\nAnswer: 26 - 9 = 17"; None where the text has none of the equation's operands."""
    prompt = f"Question: {item['Body']} {item['Question']}".rstrip() + "\nAnswer:"
    equation = _without_outer_brackets(str(item["Equation"]))
    operands = tuple(number_of(number) for number in _NUMBER.findall(equation))
    shown = _NUMBER.sub(lambda match: f"{number_of(match[0]):g}", equation)
    front = f"{prompt} {shown} = "
    text = f"{front}{float(item['Answer']):g}"
    mentions = find_mentions(text, len("Question: "), len(prompt))
    copies = find_mentions(text, len(prompt), len(front))
    return _problem(text, _queries((len(front), len(text)), operands, mentions, copies), "svamp")


def _without_outer_brackets(equation: str) -> str:
    """Strip as from "( ( 7.0 + 3.0 ) - 2.0 )" to "( 7.0 + 3.0 ) - 2.0"."""
    equation = equation.strip()
    if equation.startswith("(") and equation.endswith(")"):
        depths = np.cumsum([(c == "(") - (c == ")") for c in equation])
        if not (depths[:-1] == 0).any():
            return equation[1:-1].strip()
    return equation


def gsm8k_problem(item: Mapping[str, Any]) -> Problem | None:
    """Return the question and its answer without the <<16-3-4=9>> annotations; None where no step has an operand in the text.

    A step counts where its result is written right behind its annotation.
    """
    prompt = f"Question: {item['question']}\nAnswer:"
    solution = str(item["answer"])
    text, last = f"{prompt} ", 0
    marks: list[tuple[int, str, str]] = []  # where the annotation stood, its calculation, its result
    for match in _ANNOTATION.finditer(solution):
        text += solution[last : match.start()]
        marks.append((len(text), match[1], match[2]))
        last = match.end()
    text += solution[last:]
    known = find_mentions(text, len("Question: "), len(prompt))  # numbers of the question, then also results
    queries: list[Query] = []
    begin = len(prompt)  # of the step
    for position, calculation, result in marks:
        written = _RESULT.match(text, position)
        if written is None or number_of(written[1]) != _value(result):
            continue
        operands = tuple(number_of(number) for number in _NUMBER.findall(calculation))
        queries += _queries(written.span(1), operands, known, find_mentions(text, begin, position))
        known.append(Mention(written.span(1), (number_of(written[1]),)))
        begin = written.end()
    return _problem(text, queries, "gsm8k")


def _value(text: str) -> float | None:
    match = re.fullmatch(rf"\s*(-?(?:{NUMBER}))\s*", text)
    return number_of(match[1]) if match else None


def _queries(result: Span, operands: tuple[float, ...], known: Sequence[Mention], copies: Sequence[Mention]) -> list[Query]:
    """Return the queries of one step: its operands as it writes them (`copies`), then its result; none where no operand is `known`."""
    used = [copy for copy in copies if _means_any(copy, operands)]
    queries = []
    for copy in used:
        needs = tuple(operand for operand in dict.fromkeys(operands) if copy.means(operand))
        queries.append(_query(copy.span, needs, known, []))
    if any(_means_any(mention, operands) for mention in known):
        queries.append(_query(result, operands, known, used))
    return [query for query in queries if query.targets]


def _query(written: Span, needs: tuple[float, ...], known: Sequence[Mention], copies: Sequence[Mention]) -> Query:
    targets = [mention.span for mention in [*known, *copies] if _means_any(mention, needs)]
    others = [mention.span for mention in known if not mention.loose and not _means_any(mention, needs)]
    return Query(written, needs, tuple(targets), tuple(others))


def _means_any(mention: Mention, values: tuple[float, ...]) -> bool:
    return any(mention.means(value) for value in values)


def _problem(text: str, queries: Sequence[Query], source: str) -> Problem | None:
    numbers = tuple(mention.span for mention in find_mentions(text))
    return Problem(text, tuple(queries), numbers, source) if queries else None


# --- from characters to tokens --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenQuery:
    """Token positions: int64 arrays, all in front of or at `query`."""

    query: int
    targets: NDArray[np.int64]
    others: NDArray[np.int64]
    near: NDArray[np.int64]


@dataclass(frozen=True)
class TokenProblem:
    ids: list[int]
    queries: tuple[TokenQuery, ...]


def tokenize(problem: Problem, tokenizer: Any) -> TokenProblem:
    """Return the tokens of a problem and its queries' positions (`queries` is empty where none survives). Needs a fast tokenizer."""
    encoded = tokenizer(problem.text, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)  # [tokens, 2] characters
    numbers = _covering(offsets, problem.numbers)
    queries = [_token_query(query, offsets, numbers) for query in problem.queries]
    return TokenProblem(list(encoded["input_ids"]), tuple(query for query in queries if query is not None))


def _covering(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Return which tokens share a character with any of the spans."""
    start, end = offsets[:, 0], offsets[:, 1]
    hit = np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        hit |= (start < last) & (end > first)
    return hit


def _token_query(query: Query, offsets: NDArray[np.int64], numbers: NDArray[np.bool_]) -> TokenQuery | None:
    """Return a query's positions; None without a target or without null tokens. numbers: [tokens], those that belong to a number."""
    written = np.flatnonzero(_covering(offsets, [query.written]))
    if not len(written) or written[0] < 2:
        return None
    position = int(written[0]) - 1
    before = np.zeros(len(offsets), dtype=bool)
    before[1 : position + 1] = True  # key 0 is a sink
    target = _covering(offsets, query.targets) & before
    targets = np.flatnonzero(target)
    around = np.zeros(len(offsets), dtype=bool)
    for key in targets:
        around[max(0, key - NEAR_TOKENS) : key + NEAR_TOKENS + 1] = True
    others = np.flatnonzero(_covering(offsets, query.others) & before & ~target)
    near = np.flatnonzero(around & before & ~numbers & ~target)
    if not len(targets) or not (len(others) or len(near)):
        return None
    return TokenQuery(position, targets, others, near)


# --- from maps to focus ---------------------------------------------------------------------------------------------------


class FocusMass:
    """Mass on targets and under the null of a batch of problems, padded on the right to one length."""

    def __init__(self, problems: Sequence[TokenProblem]):
        tokens = max(len(problem.ids) for problem in problems)
        self.lengths = torch.tensor([len(problem.ids) for problem in problems])
        self.ids = torch.zeros(len(problems), tokens, dtype=torch.int64)  # queries never see the padding behind them
        cells: list[Cells] = []
        self.row: list[int] = []  # of each query
        shares = []
        for row, problem in enumerate(problems):
            self.ids[row, : len(problem.ids)] = torch.tensor(problem.ids)
            for query in problem.queries:
                self.row.append(row)
                shares.append(_null_shares(query))
                for keys in (query.targets, query.others, query.near):
                    cells.append((row, np.full(len(keys), query.query), keys))
        self.shares = np.asarray(shares)  # [queries, 2] weights of others' and near tokens' mass
        self.mass = AttentionMass((len(problems), tokens), cells, [1.0] * len(cells))

    def read(self, maps: Tensor) -> tuple[Floats, Floats]:
        """Return mass on targets and under the null. maps: [problems, heads, queries, keys], sinks stripped -> (m, e), each float64 [problems, heads]."""
        sums = self.mass.read(maps)
        sums = sums.reshape(len(self.row), 3, sums.shape[1])  # [queries, targets/others/near, heads]
        expected = (sums[:, 1:] * self.shares[:, :, None]).sum(1)
        row = np.asarray(self.row)
        members = (row == np.arange(len(self.lengths))[:, None]).astype(float)  # [problems, queries]
        members /= members.sum(1, keepdims=True)
        return members @ sums[:, 0], members @ expected


def _null_shares(query: TokenQuery) -> tuple[float, float]:
    """Return factors that turn the mass on all other numbers, and on all near tokens, into that on as many null tokens as there are targets.

    Where there are fewer other numbers than targets, near tokens fill up, so that a head without preference scores 0.
    """
    targets, others, near = len(query.targets), len(query.others), len(query.near)
    if not near:
        return min(1.0, targets / others), 0.0
    from_others = min(targets, others) / 2
    return from_others / others if others else 0.0, min(1.0, (targets - from_others) / near)
