"""Tasks and their items: what is asked, where it comes from, and one form for all of it.

Two kinds of task. *Choices* (ARC, arXiv:1803.05457): the likeliest of the given answers counts. *Numbers* (SVAMP,
arXiv:2103.07191; GSM8K, arXiv:2110.14168): the model writes, and a number read from what it wrote counts.
Items come from local files (`--task-data DIR`), from the hub data sets, or are bundled (`demo_*`); whatever the source, they
become the same plain dicts, so that the task files, the calibration text and the hashes know one form:

    choices: {"id", "question", "choices": [text, ...], "gold": index, "chance"}
    numbers: {"id", "question", "answer": "17", "worked": "26 - 9 = 17", "chance"}

Items are shuffled by the seed and a limit takes the first of them: a larger limit adds items and keeps the earlier ones.

"chance" is what answering without reading gets right: 1 / number of choices, or for numbers the share of the task's commonest
answer among all its items (7.7 % in SVAMP, 3 % in GSM8K), at least 1 %.

With `few_shot`, each item carries the examples that stand before its question (`examples`, the same for all items of a task and for
every model): the last items of the seed's order, which are never scored.

Left out: the training splits, other languages, other data sets.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.data import PROBLEMS_FILE, QUESTIONS_FILE
from bitatlas.data.numbers import plain_number
from bitatlas.data.texts import json_records, read_text
from bitatlas.errors import UserError

Item = dict[str, Any]
LEAST_CHANCE = 0.01  # of a number, where no answer is common


@dataclass(frozen=True)
class Task:
    """Where a task's items are, and how they are scored. `form` names the task file `measure/harness/{form}.yaml`."""

    name: str
    title: str
    form: str  # "choices", "problem" (SVAMP) or "worked" (GSM8K)
    file: str  # in the folder that --task-data names
    hub: tuple[str, str | None, str] | None  # data set, configuration, split
    bundled: Path | None = None

    @property
    def is_choice(self) -> bool:
        return self.form == "choices"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("demo_problems", "demo problems", "problem", PROBLEMS_FILE.name, None, PROBLEMS_FILE),
        Task("demo_questions", "demo questions", "choices", QUESTIONS_FILE.name, None, QUESTIONS_FILE),
        Task("arc_easy", "ARC easy", "choices", "ARC-Easy-test.jsonl", ("allenai/ai2_arc", "ARC-Easy", "test")),
        Task(
            "arc_challenge", "ARC challenge", "choices", "ARC-Challenge-test.jsonl", ("allenai/ai2_arc", "ARC-Challenge", "test")
        ),
        Task("svamp", "SVAMP", "problem", "SVAMP.json", ("ChilleD/SVAMP", None, "test")),
        Task("gsm8k", "GSM8K", "worked", "gsm8k_test.jsonl", ("openai/gsm8k", "main", "test")),
    )
}


def check_task_names(names: Sequence[str], flag: str = "--tasks") -> list[str]:
    """Return the known tasks among `names`, each once; ["none"] and [] are no tasks. UserError with the nearest name for an unknown one."""
    wanted = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if wanted == ["none"]:
        return []
    for name in wanted:
        if name == "none":
            raise UserError(f"{flag}: 'none' stands alone; leave it out or leave the tasks out")
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
            raise UserError(f"{flag}: unknown task {name!r}; nearest is {near!r} (valid: {', '.join(TASKS)}, or none)")
    return wanted


# --- loading -----------------------------------------------------------------------------------------------------------


def load_items(task: str, task_data: Path | None, limit: int | None, seed: int, few_shot: int = 0) -> list[Item]:
    """Return the items to score, in an order that the seed fixes: the first `limit` of it (None: all but `few_shot`).

    Raises UserError where the data is missing, not readable, or too small for `few_shot`.
    """
    return split_items(task, task_data, limit, seed, few_shot)[0]


def split_items(
    task: str, task_data: Path | None, limit: int | None, seed: int, few_shot: int = 0
) -> tuple[list[Item], list[Item]]:
    """Return (scored, spare): the items to score, each with its `examples` if `few_shot` is above 0, and the rest, whose first they are.

    Text to fit a plan on belongs to the rest: what is fitted on the scored items cannot be judged by them.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1 item a task")
    if few_shot < 0:
        raise UserError(f"--few-shot {few_shot}: 0 or more examples")
    items = _all_items(TASKS[task], task_data)
    if few_shot >= len(items):
        raise UserError(f"--few-shot {few_shot}: {task} has {len(items)} items, and examples are not scored; give fewer")
    order = [items[index] for index in np.random.default_rng(seed).permutation(len(items))]
    count = len(items) - few_shot if limit is None else min(limit, len(items) - few_shot)
    # examples come from the far end, so that neither a larger limit nor more examples move the items in front
    scored, spare = order[:count], order[count:][::-1]
    return [{**item, "examples": spare[:few_shot]} for item in scored] if few_shot else scored, spare


def _all_items(task: Task, task_data: Path | None) -> list[Item]:
    if task.bundled is not None:
        source, records = str(task.bundled), _read_file(task, task.bundled)
    elif task_data is not None:
        path = task_data / task.file
        source, records = f"--task-data: {path}", _read_file(task, path)
    else:
        source, records = f"--tasks {task.name}", _read_hub(task)
    items = _normalized(task, records, source)
    _require(bool(items), f"{source}: has no items")
    twice = [item for item, count in Counter(item["id"] for item in items).items() if count > 1]
    _require(not twice, f"{source}: two items have the id {twice[0] if twice else ''!r}")
    return items


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _read_file(task: Task, path: Path) -> list[Any]:
    """Return the records of a JSON list, or of one JSON object a line."""
    where = f"--task-data: {path}"
    try:
        records = json_records(path, read_text(path), whole=True, where=where)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file; {task.name} is read from {task.file}") from None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    assert records is not None  # the files of tasks are called JSON
    for line, record in records:
        _require(record is not None, f"{line} is not valid JSON")
    return [record for _, record in records]


def _read_hub(task: Task) -> list[Any]:
    """Return the records of the hub data set, through the hub's own cache."""
    assert task.hub is not None
    name, config, split = task.hub
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return list(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # the hub client raises many kinds; each means that the data cannot be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"--tasks {task.name}: the data set {name} cannot be had from the hub ({reason}); "
            f"without a network give --task-data DIR with {task.file} in it, or --tasks demo_problems,demo_questions"
        ) from None
    finally:
        if shown:
            datasets.enable_progress_bars()


# --- one form ----------------------------------------------------------------------------------------------------------


def _normalized(task: Task, records: Sequence[Any], source: str) -> list[Item]:
    read = {"choices": _choice_item, "problem": _problem_item, "worked": _worked_item}[task.form]
    items = []
    for number, record in enumerate(records):
        try:
            items.append(_whole(read(task, number, record)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"has no field {error}" if isinstance(error, KeyError) else f"is not as expected ({error})"
            raise UserError(f"{source}: item {number + 1} {problem}; {task.name} wants {_FIELDS[task.form]}") from None
    if not task.is_choice:
        answers = Counter(item["answer"] for item in items)
        commonest = max(answers.values(), default=0) / max(1, len(items))
        for item in items:
            item["chance"] = max(LEAST_CHANCE, commonest)
    return items


def _whole(item: Item) -> Item:
    """Return `item`; ValueError where a text is empty, or holds half of a surrogate pair, which no tokenizer takes."""
    for name, value in item.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                text.encode()
                if not text.strip():
                    raise ValueError(f"{name.removesuffix('s')} is empty")
    return item


def _text(value: object, name: str) -> str:
    """Return text, or a number as text; ValueError for null, lists and the like, which `str` would turn into words."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name} is {json.dumps(value, default=str)[:40]}, not a text")
    return str(value)


_FIELDS = {
    "choices": "id, question, choices (label and text) and answerKey",
    "problem": "ID, Body, Question, Equation and Answer",
    "worked": "question and answer, with the result after ####",
}


def _choice_item(task: Task, number: int, record: Mapping[str, Any]) -> Item:
    """Read an item of ARC, flattened ([{"label", "text"}, ...]) or as on the hub ({"label": [...], "text": [...]}). Any labels, any number."""
    choices = record["choices"]
    if isinstance(choices, Mapping):
        labels, texts = list(choices["label"]), list(choices["text"])
    else:
        labels, texts = [choice["label"] for choice in choices], [choice["text"] for choice in choices]
    if len(texts) < 2 or len(labels) != len(texts):
        raise ValueError("fewer than two choices")
    if record["answerKey"] not in labels:
        raise ValueError(f"answerKey {record['answerKey']!r} is none of the labels {labels}")
    return {
        "id": _text(record.get("id", f"{task.name}-{number + 1}"), "id"),
        "question": _text(record["question"], "question"),
        "choices": [_text(text, "choice") for text in texts],
        "gold": labels.index(record["answerKey"]),
        "chance": 1 / len(texts),
    }


def _problem_item(task: Task, number: int, record: Mapping[str, Any]) -> Item:
    """Read an item of SVAMP. `worked` is the equation without its outer brackets and trailing ".0", and the answer."""
    answer = plain_number(record["Answer"])
    equation = _text(record.get("Equation") or "", "Equation").strip()
    if equation.startswith("(") and equation.endswith(")"):
        equation = equation[1:-1].strip()
    equation = re.sub(r"(\d)\.0\b", r"\1", equation)
    return {
        "id": _text(record.get("ID", f"{task.name}-{number + 1}"), "ID"),
        "question": f"{record['Body'].strip()} {record['Question'].strip()}",
        "answer": answer,
        "worked": f"{equation} = {answer}" if equation else answer,
    }


def _worked_item(task: Task, number: int, record: Mapping[str, Any]) -> Item:
    """Read an item of GSM8K: the answer is a worked solution whose last line is "#### result"."""
    worked = _text(record["answer"], "answer").strip()
    _, mark, result = worked.rpartition("####")
    if not mark:
        raise ValueError("no #### in the answer")
    return {
        "id": f"{task.name}-{number + 1}",
        "question": _text(record["question"], "question").strip(),
        "answer": plain_number(result),
        "worked": worked,
    }


# --- what others need of the items ---------------------------------------------------------------------------------------


def chance_level(items: Sequence[Item]) -> float:
    """Return the share of the items, 0..1, that answering without reading gets right."""
    return math.fsum(item["chance"] for item in items) / len(items)


def items_sha256(items: Sequence[Item]) -> str:
    """Return a hash of the items and their order."""
    text = json.dumps(list(items), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def task_text(task: str, items: Sequence[Item]) -> str:
    """Return the items with their right answers as plain text, one block an item, a blank line between blocks.

    A default text for fitting, where the user gives none. GSM8K's calculator notes (<<3*4=12>>) are taken out: no text has them.
    """
    blocks = []
    for item in items:
        answer = item["choices"][item["gold"]] if TASKS[task].is_choice else re.sub(r"<<[^>]*>>", "", item["worked"])
        blocks.append(f"Question: {item['question']}\nAnswer: {answer}\n")
    return "\n".join(blocks)
