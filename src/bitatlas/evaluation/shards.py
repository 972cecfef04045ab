"""Score a task in shards, each journaled: an interrupted run goes on with the next, and no items are answered twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bitatlas.evaluation.items import Item, items_sha256
from bitatlas.evaluation.run import score_items
from bitatlas.journal import content_key
from bitatlas.records import TaskScore
from bitatlas.swap import swapped

if TYPE_CHECKING:
    from bitatlas.prepare import Run

SHARD_ITEMS = 50  # of a task, between two entries of the journal


def score_shards(run: Run, task: str, items: list[Item], assignment: Mapping[str, str], precision: str) -> list[dict[str, Any]]:
    """One record an item, of the model with `assignment`; `precision`: its name, for the reader of the progress."""
    answers: list[dict[str, Any]] = []
    shards = [items[start : start + SHARD_ITEMS] for start in range(0, len(items), SHARD_ITEMS)]
    keys = [content_key("task", run.meter.identity, dict(assignment), task, items_sha256(shard)) for shard in shards]
    with run.reporter.stage(f"{task} ({precision})") as progress:
        if run.workers:
            missing = [shard for shard, key in zip(shards, keys, strict=True) if run.journal.get(key) is None]
            run.workers.share("tasks", [(task, shard, assignment) for shard in missing], progress)
        with swapped(run.model, run.bank.weights(assignment)):
            for shard, key in zip(shards, keys, strict=True):
                value = run.journal.get(key)
                if value is None:
                    value = score_items(run.model, run.tokenizer, task, shard)
                    run.journal.put(key, "task", value)
                answers += value
                progress(len(answers), len(items))
    return answers


def with_norms(scores: Sequence[TaskScore], lines: Iterable[Mapping[str, Any]]) -> list[TaskScore]:
    """The scores with how many items are right by likelihood per character. lines: records with their task and precision."""
    counts: dict[tuple[str, str], int] = {}
    for line in lines:
        if "correct_norm" in line:
            key = line["task"], line["precision"]
            counts[key] = counts.get(key, 0) + line["correct_norm"]
    return [replace(score, correct_norm=counts.get((score.task, score.precision))) for score in scores]


def right_of(answers: list[dict[str, Any]]) -> np.ndarray:
    """bool [items]"""
    return np.array([answer["correct"] for answer in answers], dtype=bool)
