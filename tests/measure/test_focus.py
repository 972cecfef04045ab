"""Reasoning focus: numbers found in text, problems read from real items, and masses against brute force."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from bitatlas.data.numbers import find_mentions
from bitatlas.measure.attention.capture import eager
from bitatlas.measure.attention.focus import FocusMass, Problem, Query, gsm8k_problem, problems_of, svamp_problem, tokenize
from bitatlas.measure.attention.maps import Sinks, strip_sinks
from bitatlas.measure.attention.profile import AttentionTexts, attention_profile
from bitatlas.measure.attention.roles import kappa
from bitatlas.model.checkpoint import open_checkpoint

COOKIES = {
    "Body": "Paco had 26 salty cookies and 17 sweet cookies. He ate 14 sweet cookies and 9 salty cookies.",
    "Question": "How many salty cookies did Paco have left?",
    "Equation": "( 26.0 - 9.0 )",
    "Answer": 17.0,
}
DUCKS = {
    "question": "Ducks lay 16 eggs per day. She eats three for breakfast and bakes with four. She sells the rest for $2 an egg. "
    "How much does she make every day?",
    "answer": "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18",
}


def words(problem: Problem, spans: tuple[tuple[int, int], ...]) -> list[str]:
    return [problem.text[start:end] for start, end in spans]


# --- numbers in text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("He has 3 cats.", [3]),
        ("It costs $80,000, or 80000.", [80000, 80000]),
        ("1.5 hours and .5 more", [1.5, 0.5]),
        ("He paid 12.50.", [12.5]),
        ("twenty-five boys, ninety girls", [25, 90]),
        ("Three hundred pages, two thousand words", [300, 2000]),
        ("Someone often tends the stone; nineteenth", []),
        ("4,12 and 7", [4, 12, 7]),
        ("no numbers", []),
    ],
)
def test_mentions(text: str, values: list[float]) -> None:
    found = find_mentions(text)
    assert [mention.values[0] for mention in found] == values
    assert not any(mention.loose for mention in found)


@pytest.mark.parametrize(
    ("text", "values", "loose"),
    [
        ("25%", (25, 0.25), False),
        ("2/5 of it", (2, 5, 0.4), False),
        ("half", (0.5, 2), True),
        ("Twice", (2,), True),
        ("a dozen", (12,), True),
        ("one", (1,), True),
    ],
)
def test_mentions_with_more_meanings(text: str, values: tuple[float, ...], loose: bool) -> None:
    (mention,) = find_mentions(text)
    assert mention.values == values
    assert mention.loose == loose
    assert all(mention.means(value) for value in values)
    assert not mention.means(values[0] + 0.01)


@given(st.lists(st.one_of(st.integers(0, 10**7), st.floats(0, 1e5).map(lambda x: round(x, 2))), max_size=6))
def test_written_numbers_are_found_where_they_stand(numbers: list[float]) -> None:
    text = "".join(f" item {number:,} " for number in numbers)
    found = find_mentions(text)
    assert [mention.values[0] for mention in found] == numbers
    assert [float(text[slice(*mention.span)].replace(",", "")) for mention in found] == numbers


# --- problems -------------------------------------------------------------------------------------------------------------


def test_svamp_problem() -> None:
    problem = svamp_problem(COOKIES)
    assert problem is not None
    assert problem.text == f"Question: {COOKIES['Body']} {COOKIES['Question']}\nAnswer: 26 - 9 = 17"
    assert words(problem, tuple(query.written for query in problem.queries)) == ["26", "9", "17"]
    first, second, result = problem.queries
    end = problem.text.index("\nAnswer")
    assert words(problem, first.targets) == ["26"]
    assert words(problem, second.targets) == ["9"]
    assert first.targets[0][0] < second.targets[0][0] < end  # in the problem's text, not where they are written again
    assert words(problem, first.others) == ["17", "14", "9"]
    assert words(problem, second.others) == ["26", "17", "14"]
    assert words(problem, result.targets) == ["26", "9", "26", "9"]
    assert result.targets[2:] == (first.written, second.written)
    assert words(problem, result.others) == ["17", "14"]
    assert result.written[1] == len(problem.text)
    assert len(problem.numbers) == 4 + 3


def test_nested_equation_keeps_its_brackets() -> None:
    problem = svamp_problem({**COOKIES, "Equation": "( ( 26.0 - 9.0 ) / ( 17.0 - 14.5 ) )", "Answer": 6.8})
    assert problem is not None
    assert problem.text.endswith("Answer: ( 26 - 9 ) / ( 17 - 14.5 ) = 6.8")
    assert problem.queries[-1].needs == (26, 9, 17, 14.5)


def test_gsm8k_problem() -> None:
    problem = gsm8k_problem(DUCKS)
    assert problem is not None
    assert problem.text.endswith(
        "every day?\nAnswer: She sells 16 - 3 - 4 = 9 eggs a day.\nShe makes 9 * 2 = $18 every day.\n#### 18"
    )
    assert words(problem, tuple(query.written for query in problem.queries)) == ["16", "3", "4", "9", "9", "2", "18"]
    targets = [words(problem, query.targets) for query in problem.queries]
    assert targets[:3] == [["16"], ["three"], ["four"]]
    assert targets[3] == ["16", "three", "four", "16", "3", "4"]
    assert targets[4:] == [["9"], ["2"], ["2", "9", "9", "2"]]
    assert problem.queries[4].targets == (problem.queries[3].written,)  # the first step's result
    assert words(problem, problem.queries[3].others) == ["2"]
    assert words(problem, problem.queries[4].others) == ["16", "three", "four", "2"]
    assert words(problem, problem.queries[6].others) == ["16", "three", "four"]


def test_items_of_our_own_tasks_give_the_same_problems() -> None:
    """`question` and `worked`, as the task items are kept: the same text, queries and source as from the original record."""
    own = {
        "id": "1",
        "question": f"{COOKIES['Body']} {COOKIES['Question']}",
        "answer": "17",
        "worked": "26 - 9 = 17",
        "chance": 0.0,
    }
    worked = {"id": "2", "question": DUCKS["question"], "answer": "18", "worked": DUCKS["answer"], "chance": 0.0}
    assert problems_of([own, worked]) == problems_of([COOKIES, DUCKS])
    assert problems_of([{**own, "worked": "17"}]) == []  # no equation is known


def test_words_and_parts_as_operands() -> None:
    """25% is 0.25, half divides by 2, and a product of the two is a result of the third step."""
    problem = gsm8k_problem(
        {
            "question": "A shop had 80 hats. It sold 25% on Monday and half of the rest. How many are left?",
            "answer": "It sold 80*.25=<<80*.25=20>>20 hats.\nThe rest is 80-20=<<80-20=60>>60.\nHalf is 60/2=<<60/2=30>>30.\n#### 30",
        }
    )
    assert problem is not None
    results = [
        query for query in problem.queries if problem.text[slice(*query.written)] in {"30", "60"} and len(query.needs) == 2
    ]
    assert [words(problem, query.targets) for query in results] == [
        ["80", "20", "80", "20"],
        ["half", "60", "Half", "60/2"],
    ]


def test_items_without_operands_or_of_other_forms_are_left_out() -> None:
    unmentioned = {**COOKIES, "Equation": "( 1000.0 - 500.0 )"}
    choice = {"id": "1", "question": "What do 2 and 3 make?", "choices": [{"label": "A", "text": "5"}], "answerKey": "A"}
    unannotated = {"question": "What do 2 and 3 make?", "answer": "5"}
    found = problems_of([COOKIES, unmentioned, choice, unannotated, DUCKS])
    assert [problem.source for problem in found] == ["svamp", "gsm8k"]


def real(name: str) -> Path:
    path = tiny.SHARED / "data" / name
    if not path.is_file():
        pytest.skip("the evaluation sets are not at hand")
    return path


def has_all(problem: Problem, query: Query, before: int) -> bool:
    """Whether every number that the query needs has a target in front of character `before`."""
    targets = [m for m in find_mentions(problem.text) if m.span in query.targets and m.span[1] <= before]
    return all(any(mention.means(need) for mention in targets) for need in query.needs)


def test_real_svamp_items() -> None:
    """In 999 of 1000 items every operand of the equation stands in the text (the other one was calculated from two others)."""
    problems = problems_of(json.loads(real("SVAMP.json").read_text(encoding="utf-8")))
    assert len(problems) == 1000
    whole = 0
    for problem in problems:
        result = problem.queries[-1]
        assert problem.text[slice(*result.written)] == problem.text.rpartition(" = ")[2]
        whole += has_all(problem, result, problem.text.index("\nAnswer:"))
        assert not any(set(query.targets) & set(query.others) for query in problem.queries)
    assert whole == 999
    assert sum(bool(problem.queries[-1].others) for problem in problems) > 400
    assert sum(bool(problem.queries[0].others) for problem in problems) == 1000


def test_real_gsm8k_items() -> None:
    """4282 annotated steps; nearly all have their result behind them and an operand in the text, most all operands."""
    items = [json.loads(line) for line in real("gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    problems = problems_of(items)
    assert len(problems) >= 0.97 * len(items)
    assert not any("<<" in problem.text for problem in problems)
    queries = [(problem, query) for problem in problems for query in problem.queries]
    assert all(end <= query.written[0] for _, query in queries for _, end in query.targets)
    results = [(problem, query) for problem, query in queries if len(query.needs) > 1]
    assert len(results) >= 0.95 * sum(item["answer"].count("<<") for item in items)
    assert sum(has_all(*pair, pair[1].written[0]) for pair in results) >= 0.9 * len(results)


HAND_LABELLED = {
    # item: for each result, what it is made from in the problem or as an earlier result, and the other numbers that stand in front of it
    ("SVAMP.json", 57): [("31", ["89", "60"], [])],
    ("SVAMP.json", 430): [("6", ["9", "3"], ["5", "62"])],
    ("SVAMP.json", 777): [("24", ["384", "16"], ["192", "345"])],
    ("gsm8k_test.jsonl", 5): [
        ("3", ["5", "60%"], ["16"]),
        ("8", ["16"], ["5", "60%", "3"]),
        ("24", ["3", "8"], ["5", "60%", "16"]),
        ("40", ["5", "8"], ["60%", "16", "3", "24"]),
        ("64", ["24", "40"], ["5", "60%", "16", "3", "8"]),
    ],
    ("gsm8k_test.jsonl", 40): [("2", ["two", "1"], ["four"]), ("8", ["four", "two", "2"], ["1"])],
    ("gsm8k_test.jsonl", 123): [
        ("30", ["10", "3"], ["5", "7"]),
        ("4", ["3", "7"], ["10", "5", "30"]),
        ("20", ["5", "4"], ["10", "3", "7", "30"]),
        ("50", ["30", "20"], ["10", "3", "5", "7", "4"]),
    ],
}


@pytest.mark.parametrize(("name", "number"), list(HAND_LABELLED))
def test_hand_labelled_problems(name: str, number: int) -> None:
    """Operands and other numbers of real items as a person marked them; copies in the step itself are operands too."""
    text = real(name).read_text(encoding="utf-8")
    item = json.loads(text.splitlines()[number]) if name.endswith("l") else json.loads(text)[number]
    (problem,) = problems_of([item])
    found = []
    end = problem.text.index("\nAnswer:")
    results = {
        query.written for query in problem.queries if len(query.needs) > 1 and "/" not in problem.text[slice(*query.written)]
    }
    for query in (query for query in problem.queries if query.written in results):
        known = [span for span in query.targets if span[0] < end or span in results]
        assert len(query.targets) > len(known)  # the step writes its operands down
        found.append((problem.text[slice(*query.written)], words(problem, tuple(known)), words(problem, query.others)))
    assert found == HAND_LABELLED[name, number]


# --- tokens and masses ------------------------------------------------------------------------------------------------------


def token_texts(problem: Problem, keys: np.ndarray) -> list[str]:
    offsets = tiny.tokenizer()(problem.text, return_offsets_mapping=True)["offset_mapping"]
    return [problem.text[slice(*offsets[key])] for key in keys]


def test_tokens_of_a_problem() -> None:
    problem = svamp_problem(COOKIES)
    assert problem is not None
    offsets = tiny.tokenizer()(problem.text, return_offsets_mapping=True)["offset_mapping"]
    tokens = tokenize(problem, tiny.tokenizer())
    assert len(tokens.queries) == len(problem.queries) == 3
    for query, positions in zip(problem.queries, tokens.queries, strict=True):
        start, _ = query.written
        assert offsets[positions.query][1] <= start  # in front of the number ...
        assert offsets[positions.query + 1][1] > start  # ... and the next token begins it
        for spans, keys in ((query.targets, positions.targets), (query.others, positions.others)):
            assert "".join(token_texts(problem, keys)).replace(" ", "") == "".join(words(problem, spans))
        assert not any(any(c.isdigit() for c in text) for text in token_texts(problem, positions.near))
        assert np.abs(positions.near[:, None] - positions.targets).min(1).max() <= 8
        assert positions.near.max() <= positions.query


def focus_of(masses: FocusMass, head: Tensor) -> float:
    """Focus of one hand-made head [tokens, tokens] on a batch of one problem."""
    maps, _ = strip_sinks(head[None, None], Sinks(masses.ids).keys)
    mass, expected = masses.read(maps)
    return float(100 * kappa(mass.mean(0), expected.mean(0))[0])


@pytest.mark.parametrize("item", [COOKIES, {**COOKIES, "Equation": "( 26.0 - 9.0 - 17.0 - 14.0 )"}, DUCKS])
def test_planted_focus(item: dict) -> None:
    (problem,) = problems_of([item])
    tokens = tokenize(problem, tiny.tokenizer())
    masses = FocusMass([tokens])
    size = masses.ids.shape[1]
    even = torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]
    assert focus_of(masses, even) == pytest.approx(0, abs=1e-4)  # no preference is chance
    onto = torch.zeros(size, size)
    away = torch.zeros(size, size)
    for query in tokens.queries:
        onto[query.query, query.targets] = 1 / len(query.targets)
        pool = query.others if len(query.others) else query.near
        away[query.query, pool] = 1 / len(pool)
    assert focus_of(masses, onto) == pytest.approx(100)
    assert focus_of(masses, away) < -1
    assert 45 < focus_of(masses, 0.5 * onto + 0.5 * even) < 55


def brute_force(maps: Tensor, ids: list[int], problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(m, e) of each head from one problem's map [heads, queries, keys], by loops over the definition."""
    offsets = tiny.tokenizer()(problem.text, return_offsets_mapping=True)["offset_mapping"]

    def cover(spans: tuple) -> set[int]:
        return {t for t, (a, b) in enumerate(offsets) for first, last in spans if a < last and b > first}

    found, expected = [], []
    for query in problem.queries:
        place = min(cover((query.written,))) - 1
        row = maps[:, place].clone().double()
        row[:, 0] = 0
        row /= row.sum(1, keepdim=True)
        targets = {t for t in cover(query.targets) if 0 < t <= place}
        others = {t for t in cover(query.others) if 0 < t <= place} - targets
        near = {t + d for t in targets for d in range(-8, 9) if 0 < t + d <= place} - cover(problem.numbers) - targets
        from_others = min(len(targets), len(others)) / 2
        mean_of = [row[:, sorted(pool)].mean(1) if pool else 0.0 for pool in (others, near)]
        found.append(row[:, sorted(targets)].sum(1).numpy())
        expected.append((from_others * mean_of[0] + (len(targets) - from_others) * mean_of[1]).numpy())
    assert len(ids) == len(offsets)
    return np.mean(found, axis=0), np.mean(expected, axis=0)


def test_focus_of_a_model_against_loops(tmp_path: Path) -> None:
    """Two problems of different length in one padded batch, every layer and head; a third is too long and is counted."""
    checkpoint = open_checkpoint(str(tiny.make_checkpoint(tmp_path, max_position_embeddings=400)))
    decoder, tokenizer = checkpoint.load_model(), tiny.tokenizer()
    long = {**COOKIES, "Body": COOKIES["Body"] + " He likes cookies." * 100}
    problems = problems_of([COOKIES, DUCKS, long])
    rows = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    result = attention_profile(decoder, tokenizer, checkpoint.modules, AttentionTexts(rows, problems), "reference")
    assert any("1 of 3 problems are longer than the context of 400 tokens" in note for note in result.notes)
    masses = []
    for problem in problems[:2]:
        ids = tokenizer(problem.text)["input_ids"]
        with eager(decoder.model), torch.no_grad():
            maps = decoder.model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
        masses.append([brute_force(layer[0], ids, problem) for layer in maps])
    exact = np.asarray(masses).mean(0)  # [layers, m/e, heads]
    for head in result.heads:
        mass, expected = exact[head.layer, :, head.head]
        assert head.focus_percent == pytest.approx(100 * (mass - expected) / (1 - expected), abs=1e-3)
    for layer in result.layers:
        mass, expected = exact[layer.layer].mean(1)
        assert layer.focus_percent is not None
        assert layer.focus_percent.mean == pytest.approx(100 * (mass - expected) / (1 - expected), abs=1e-3)
        assert (layer.focus_percent.n, layer.focus_percent.rows, layer.focus_percent.unit) == (2, "items:gsm8k+svamp", "%")


def test_slow_tokenizers_give_a_note(tiny_llama: Path) -> None:
    """A tokenizer that cannot say where its tokens stand: everything but focus is measured."""
    checkpoint = open_checkpoint(str(tiny_llama))
    tokenizer = tiny.tokenizer()

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

    rows = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    result = attention_profile(
        checkpoint.load_model(), Slow(), checkpoint.modules, AttentionTexts(rows, problems_of([COOKIES])), "reference"
    )
    assert len(result.layers) == 3
    assert all(layer.focus_percent is None for layer in result.layers)
    assert any("tokenizer" in note for note in result.notes)
