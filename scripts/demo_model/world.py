"""A small seeded world to train and test the demo model on: word problems, four-choice questions, and plain text of both.

Problems have SVAMP's JSON form (Patel et al. 2021, arXiv:2103.07191), questions the flattened ARC form (Clark et al. 2018,
arXiv:1803.05457) as lm-evaluation-harness reads them, so that the demo runs through the same task files as the real data sets.

Training and test items are disjoint by construction: a hash of what makes an item (story, question and operands of a problem;
wording of a question; fact and phrasing of a statement) puts it into exactly one split. The facts and the sums themselves occur in
training in other phrasings, so a test item asks for something known, worded in a way never seen. Left out on purpose:
multi-step problems, fractions, facts with exceptions.
"""

import itertools
import json
import random
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import named
import tables
from tables import BOXES, NAMES, OBJECTS, PLACES, STORIES, THINGS

TYPES = {"+": "Addition", "-": "Subtraction", "*": "Multiplication", "/": "Common-Division"}
SPLIT_PERCENT = {"test": 10, "text": 15, "train": 75}  # items for the tasks, for the held-out text, for training
TASK_ITEMS = 300
TEXT_BYTES = 300_000
WORLD_SEED = 0  # of the facts; the seeds given to the functions below choose among stories, wordings and documents only
PHRASES = {**tables.PHRASES, **named.PHRASES}

Fact = tuple[str, str, str, str]  # kind, thing, attribute, value: ("animal", "fox", "home", "forest")
Record = dict[str, Any]  # one item of a task file


def split_of(*key: object) -> str:
    """Return the split an item belongs to, from what identifies it: the same on every machine and for every seed."""
    percent = zlib.crc32(repr(key).encode()) % 100
    for split, share in SPLIT_PERCENT.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("SPLIT_PERCENT must add up to 100")


# ---- word problems ----------------------------------------------------------------------------------------------------


def solve(x: int, operator: str, y: int) -> int:
    """Return x operator y for whole numbers, division without remainder."""
    return {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]


def draw_operands(rng: random.Random, operator: str) -> tuple[int, int]:
    """Return two numbers whose result is a whole number in 1..99: sums of 2..40, products and quotients from the 2..9 table."""
    if operator == "+":
        return rng.randint(2, 40), rng.randint(2, 40)
    if operator == "-":
        y, x = sorted(rng.sample(range(2, 41), 2))
        return x, y
    x, y = rng.randint(2, 9), rng.randint(2, 9)
    return (x, y) if operator == "*" else (x * y, y)


def draw_problem(rng: random.Random, split: str) -> tuple[tuple[int, int, int, int], Record]:
    """Return one problem of `split`: (key, record in SVAMP's form without ID)."""
    while True:
        story = rng.randrange(len(STORIES))
        body, questions = STORIES[story]
        which = rng.randrange(len(questions))
        question, operator = questions[which]
        x, y = draw_operands(rng, operator)
        if split_of("problem", story, which, x, y) == split:
            break
    n, m = rng.sample(NAMES, 2)
    o, p = rng.sample(OBJECTS, 2)
    z = rng.choice([number for number in range(2, 41) if number not in (x, y)])
    slots = {"n": n, "m": m, "o": o, "p": p, "x": x, "y": y, "z": z, "box": rng.choice(BOXES), "place": rng.choice(PLACES)}
    record = {
        "Body": body.format(**slots),
        "Question": question.format(**slots),
        "Equation": f"( {x:.1f} {operator} {y:.1f} )",
        "Answer": float(solve(x, operator, y)),
        "Type": TYPES[operator],
    }
    return (story, which, x, y), record


def problem_prompt(problem: Record) -> str:
    """Return what the model is given; it goes on with " 26 - 9 = 17" and a newline."""
    return f"Question: {problem['Body']} {problem['Question']}\nAnswer:"


def problem_text(problem: Record) -> str:
    """Return the prompt with its worked answer, as a document."""
    x, operator, y = problem["Equation"].strip("() ").split()
    return f"{problem_prompt(problem)} {float(x):.0f} {operator} {float(y):.0f} = {problem['Answer']:.0f}\n\n"


def draw_sums(rng: random.Random, split: str) -> str:
    """Return a few bare sums, "26 - 9 = 17" a line, as a document."""
    lines: list[str] = []
    while len(lines) < 4:
        operator = rng.choice("++--*/")
        x, y = draw_operands(rng, operator)
        if split_of("sum", operator, x, y) == split:
            lines.append(f"{x} {operator} {y} = {solve(x, operator, y)}")
    return "\n".join(lines) + "\n\n"


# ---- facts and questions ----------------------------------------------------------------------------------------------


def facts() -> list[Fact]:
    """Return the table of THINGS, one fact an entry, then the facts about named people, towns and planets."""
    rows = []
    for kind, table in THINGS.items():
        for line in table.strip().splitlines():
            thing, values = line.split(": ")
            rows += [(kind, thing, attribute, value) for attribute, value in zip(PHRASES[kind], values.split(", "), strict=True)]
    return rows + named.named_facts(WORLD_SEED)


FACTS = facts()


@cache
def alike(kind: str, attribute: str) -> list[Fact]:
    """Return all facts of one attribute of one kind: where the wrong answers come from."""
    return [fact for fact in FACTS if (fact[0], fact[2]) == (kind, attribute)]


def with_article(kind: str, thing: str) -> str:
    """Return the name in a sentence: "the fox", but "iron" and "Ashford"."""
    return thing if kind == "material" or kind in named.PHRASES else f"the {thing}"


def phrased_questions(fact: Fact) -> Iterator[tuple[str, str, list[str]]]:
    """Return every way to ask for one fact: (question, right answer, wrong answers)."""
    kind, thing, attribute, value = fact
    forward, backward, _ = PHRASES[kind][attribute]
    others = [other for other in alike(kind, attribute) if other[3] != value]
    values = list(dict.fromkeys(other[3] for other in others))
    name = with_article(kind, thing)
    for question in forward:
        for carrier in named.CARRIERS if kind in named.PHRASES else tables.CARRIERS:
            asked = question.format(e=name if carrier == "{q}" else f"the {kind}")
            yield carrier.format(e=name, q=asked), value, values
    for question in backward:
        yield question.format(v=value), thing, [other[1] for other in others]


Asked = tuple[Fact, str, str, list[str]]  # fact, question, right answer, wrong answers


def all_questions(split: str) -> list[list[Asked]]:
    """Return the questions of one split, a list for each fact that has any. The wording decides, so that "Which animal eats mice?",
    which has several right answers, is in one split only."""
    asked = [[(fact, *rest) for rest in phrased_questions(fact) if split_of("question", rest[0]) == split] for fact in FACTS]
    return [questions for questions in asked if questions]


def with_choices(rng: random.Random, question: str, right: str, wrong: list[str]) -> Record:
    """Return a question in ARC's form without id: the right answer among three wrong ones of the same attribute."""
    choices = [right, *rng.sample(wrong, 3)]
    rng.shuffle(choices)
    return {
        "question": question,
        "choices": [{"label": label, "text": text} for label, text in zip("ABCD", choices, strict=True)],
        "answerKey": "ABCD"[choices.index(right)],
    }


def question_prompt(question: Record) -> str:
    """Return what the model is given; each choice is scored as " " + its text."""
    return f"Question: {question['question']}\nAnswer:"


def question_text(question: str, right: str) -> str:
    """Return a question with its right answer, as a document."""
    return f"Question: {question}\nAnswer: {right}\n\n"


def all_statements(split: str) -> list[list[str]]:
    """Return plain sentences of one split, grouped by thing: lists of "The fox lives in the forest."."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, thing, attribute, value in FACTS:
        for number, sentence in enumerate(PHRASES[kind][attribute][2]):
            if split_of("statement", kind, thing, attribute, number) == split:
                name = with_article(kind, thing)
                groups.setdefault((kind, thing), []).append(sentence.format(e=name, E=name[0].upper() + name[1:], v=value))
    return list(groups.values())


# ---- documents and files ----------------------------------------------------------------------------------------------


def documents(rng: random.Random, split: str) -> Iterator[str]:
    """Yield an endless stream of documents of one split: two fifths problems, the rest questions (every fact as often), statements and
    bare sums."""
    questions, statements = all_questions(split), all_statements(split)
    while True:
        kind = rng.random()
        if kind < 0.42:
            yield problem_text(draw_problem(rng, split)[1])
        elif kind < 0.78:
            _, question, right, _ = rng.choice(rng.choice(questions))
            yield question_text(question, right)
        elif kind < 0.94:
            group = rng.choice(statements)
            yield " ".join(rng.sample(group, min(len(group), 6))) + "\n\n"
        else:
            yield draw_sums(rng, split)


def task_problems(seed: int) -> list[Record]:
    """Return `TASK_ITEMS` test problems with different stories or numbers, in SVAMP's form."""
    rng = random.Random(f"problems {seed}")
    records: dict[tuple[int, int, int, int], Record] = {}
    while len(records) < TASK_ITEMS:
        key, record = draw_problem(rng, "test")
        records.setdefault(key, record)
    return [{"ID": f"demo-{number}", **record} for number, record in enumerate(records.values(), 1)]


def task_questions(seed: int) -> list[Record]:
    """Return `TASK_ITEMS` different test questions, in the flattened ARC form: every kind of thing about as often, a fact once at most."""
    rng = random.Random(f"questions {seed}")
    groups = all_questions("test")
    kinds = [[asked for asked in rng.sample(groups, len(groups)) if asked[0][0][0] == kind] for kind in PHRASES]
    records: dict[str, Asked] = {}
    for questions in itertools.chain.from_iterable(itertools.zip_longest(*kinds, fillvalue=[])):
        if questions:
            asked = rng.choice(questions)
            records.setdefault(asked[1], asked)
    drawn = list(records.values())[:TASK_ITEMS]
    return [{"id": f"demo-{number}", **with_choices(rng, *asked[1:])} for number, asked in enumerate(drawn, 1)]


def held_out_text(seed: int) -> str:
    """Return about `TEXT_BYTES` of different documents that are neither trained on nor test items."""
    rng = random.Random(f"text {seed}")
    texts: dict[str, int] = {}  # document -> its size; a dict keeps the order
    stream = documents(rng, "text")
    while sum(texts.values()) < TEXT_BYTES:
        document = next(stream)
        texts[document] = len(document)
    return "".join(texts)


def write_data(folder: str | Path, seed: int) -> None:
    """Write problems.json, questions.jsonl and text.txt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    problems = json.dumps(task_problems(seed), indent=1)
    questions = "".join(json.dumps(question) + "\n" for question in task_questions(seed))
    for name, content in [("problems.json", problems + "\n"), ("questions.jsonl", questions), ("text.txt", held_out_text(seed))]:
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
