"""Scores a model that is in memory on items, through lm-evaluation-harness, one record an item.

The harness does what it is trusted for: prompts, tokenization at the border of prompt and answer, batching, log-likelihoods,
stopping, metrics. This file hands it the items in memory and the model as it is now, so that a caller may swap weights, score a
shard, swap back; beside the model's own work that costs about 20 ms a call and 2 ms an item. Nothing is written and nothing is
fetched: the harness's `evaluate` is called, not `simple_evaluate`, which would reset random seeds and collect the environment.

Left out: chat templates (base-model prompts throughout, as for the published numbers of these tasks); several devices a call.
Source: lm-evaluation-harness (EleutherAI), version 0.4.13.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitatlas.data.numbers import plain_number, read_number, same_answer
from bitatlas.data.tasks import TASKS, Item, Task, items_sha256
from bitatlas.errors import UserError
from bitatlas.measure.damage import DamageMeter
from bitatlas.model.decoder import Decoder
from bitatlas.progress import Reporter
from bitatlas.records import TaskScore
from bitatlas.records.journal import content_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_ITEMS = 50  # of a task, between two entries of the journal
TIMING_SECONDS = 1.5  # of the items of a timing, enough to tell them from what a call costs
SHORT_SECONDS = 5.0  # of all items of a task, whose time need not be known better
TASK_FILES = Path(__file__).parent / "harness"


def score_items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, items: Sequence[Item], batch_size: int = SHARD_ITEMS
) -> list[dict[str, Any]]:
    """Return the answers of the model, with the weights it has now and where it is now, to `items` of `task`: records in their order.

    A record: {"item": id, "correct": bool, "answer": str, "expected": str, "truncated": bool}, and of a task that writes also
    "output", the text (of a short answer the line that is read); of choices also "correct_norm": right by log-likelihood per character ("acc_norm"). `answer` is the choice's text,
    or the number that was read ("" if none). `truncated`: the prompt did not fit into the model's context and lost its beginning.
    The `examples` that items carry stand before every prompt, with their answers. Writing is greedy, whatever the checkpoint's generation
    settings say.

    Model and tokenizer are as before on return. Raises UserError where the tokenizer has no token to pad or to stop with, or where a
    choice is longer than the model's context or no tokens.
    """
    if not items:
        return []
    import torch
    from lm_eval.evaluator import evaluate

    from bitatlas.measure.scorer import Scorer, greedy_alone

    spec = TASKS[task]
    with _quiet(), greedy_alone(model, tokenizer), _special_tokens(tokenizer), torch.no_grad():
        lm = Scorer(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
        if spec.form == "problem":
            lm.decided = line_decided
        harness_task = _harness_task(spec, items, lm.max_length)
        results = evaluate(lm=lm, task_dict={spec.name: harness_task}, bootstrap_iters=0, log_samples=True)
        samples = sorted(results["samples"][spec.name], key=lambda sample: sample["doc_id"])
        return [_record(spec, item, sample, lm) for item, sample in zip(items, samples, strict=True)]


def seconds_per_item(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, task: str, items: Sequence[Item]) -> float:
    """Return how long another item of `task` takes with the weights that the model has now: seconds of wall-clock time.

    Timed on one item, and on 4, 8, ... of the first until a timing takes `TIMING_SECONDS`, or all items would take little: the difference, since
    what a call costs beside its items is paid once a shard. The first call of all, which loads the harness, does not count. A shard's
    larger batches cost less an item: rather an upper estimate. Raises what `score_items` does.
    """

    def seconds_of(count: int) -> float:
        start = time.perf_counter()
        score_items(decoder.model, tokenizer, task, items[:count])
        return time.perf_counter() - start

    seconds_of(1)
    alone, count, most = seconds_of(1), 4, min(SHARD_ITEMS, len(items))
    if most < count:
        return alone
    while True:
        each = max(0.0, seconds_of(count) - alone) / (count - 1)
        if 2 * count > most or each * count >= TIMING_SECONDS or each * len(items) <= SHORT_SECONDS:
            return each
        count *= 2


def _harness_task(spec: Task, items: Sequence[Item], context: int) -> Any:
    """Return the harness's task: the task file with these items and their examples in it."""
    import yaml
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((TASK_FILES / f"{spec.form}.yaml").read_text(encoding="utf-8"))
    config["task"] = spec.name
    examples = items[0].get("examples", [])
    documents = [{name: value for name, value in item.items() if name != "examples"} for item in items]
    config["custom_dataset"] = lambda **_: {"items": Dataset.from_list(documents)}
    config["num_fewshot"] = len(examples)
    config["fewshot_config"]["samples"] = [dict(example) for example in examples]
    if not spec.is_choice:
        config["process_results"] = functools.partial(number_right, spec.form)
        # a prompt must have room beside what is written
        generation = config["generation_kwargs"]
        generation["max_gen_toks"] = min(generation["max_gen_toks"], context // 2)
    return ConfigurableTask(config=config)


# --- what was answered ---------------------------------------------------------------------------------------------------


def number_right(form: str, item: Item, outputs: Sequence[str]) -> dict[str, float]:
    """Return the harness's `process_results`: 1 where the number that is read equals the answer."""
    return {"exact_match": float(same_answer(read_number(form, outputs[0]), float(item["answer"])))}


def first_line(output: str) -> str:
    """Return the first line that is not empty, which alone `read_number` reads of a short answer; "" if none."""
    return next((line for line in output.splitlines() if line.strip()), "")


def line_decided(output: str) -> bool:
    """Return whether the first line that is not empty is complete, so that no further text changes it."""
    line = first_line(output)
    return bool(line) and first_line(output + "x") == line


def _record(spec: Task, item: Item, sample: dict[str, Any], lm: Any) -> dict[str, Any]:
    """Return the record of the harness's sample; "truncated" repeats its rule for what fits."""
    prompt = sample["arguments"][0][0]
    if spec.is_choice:
        likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]  # [choices], summed, nats
        longest = max(len(lm.tok_encode(prompt + ending)) for _, ending in sample["arguments"])
        return {
            "item": item["id"],
            "correct": bool(sample["acc"]),
            "correct_norm": bool(sample["acc_norm"]),
            "answer": item["choices"][int(np.argmax(likelihoods))],
            "expected": item["choices"][item["gold"]],
            "truncated": longest > lm.max_length + 1,  # the last token is scored, not read
        }
    output = sample["filtered_resps"][0]
    number = read_number(spec.form, output)
    room = lm.max_length - sample["arguments"][0][1]["max_gen_toks"]
    return {
        "item": item["id"],
        "correct": bool(sample["exact_match"]),
        "answer": "" if number is None else plain_number(number),
        "expected": item["answer"],
        "truncated": len(lm.tok_encode(prompt)) > room,
        "output": first_line(output) if spec.form == "problem" else output,
    }


# --- keeping the harness quiet and the tokenizer as it was ---------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and logs below errors: in shards, the harness would print a page for each."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    start_bar = tqdm.__init__

    def no_bar(self: Any, *args: Any, **options: Any) -> None:
        start_bar(self, *args, **{**options, "disable": True})

    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        tqdm.__init__ = no_bar  # type: ignore[assignment, method-assign]
        yield
    finally:
        tqdm.__init__ = start_bar  # type: ignore[method-assign]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Give the tokenizer a token to pad with (masked, so any will do) and one to stop at, within the block."""
    before = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token")}
    known = [tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token]
    spare = next((token for token in known if token is not None), None)
    if spare is None:
        raise UserError("--tasks: the tokenizer has no end-of-text, padding, unknown or beginning token; tasks need one of them")
    try:
        for name, token in before.items():
            if token is None:
                setattr(tokenizer, name, spare)
        yield
    finally:
        for name, token in before.items():
            if token is None:
                setattr(tokenizer, name, None)


# --- shards ----------------------------------------------------------------------------------------------------------------


def score_shards(
    meter: DamageMeter,
    tokenizer: Any,
    reporter: Reporter,
    task: str,
    items: list[Item],
    assignment: Mapping[str, str],
    precision: str,
) -> list[dict[str, Any]]:
    """Score items of a task with `assignment` in the place of the model's weights: one record an item, in their order.

    In shards, each journaled: an interrupted run goes on with the next, and no items are answered twice.

    `precision`: the assignment's name, for the reader of the progress.
    """
    answers: list[dict[str, Any]] = []
    shards = [items[start : start + SHARD_ITEMS] for start in range(0, len(items), SHARD_ITEMS)]
    keys = [content_key("task answers", meter.identity, dict(assignment), task, items_sha256(shard)) for shard in shards]
    with reporter.stage(f"{task} ({precision})") as progress:
        if meter.workers:
            missing = [shard for shard, key in zip(shards, keys, strict=True) if meter.journal.get(key) is None]
            meter.workers.share("tasks", [(task, shard, assignment) for shard in missing], progress)
        with meter.decoder.swapped(meter.bank.weights(assignment)):
            for shard, key in zip(shards, keys, strict=True):
                value = meter.journal.get(key)
                if value is None:
                    value = score_items(meter.decoder.model, tokenizer, task, shard)
                    meter.journal.put(key, "task", value)
                answers += value
                progress(len(answers), len(items))
    return answers


def with_norms(scores: Sequence[TaskScore], lines: Iterable[Mapping[str, Any]]) -> list[TaskScore]:
    """Return the scores with how many items are right by likelihood per character. lines: records with their task and precision."""
    counts: dict[tuple[str, str], int] = {}
    for line in lines:
        if "correct_norm" in line:
            key = line["task"], line["precision"]
            counts[key] = counts.get(key, 0) + line["correct_norm"]
    return [replace(score, correct_norm=counts.get((score.task, score.precision))) for score in scores]


def right_of(answers: list[dict[str, Any]]) -> np.ndarray:
    """Return which answers are right: bool [items]."""
    return np.array([answer["correct"] for answer in answers], dtype=bool)
