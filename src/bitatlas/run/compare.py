"""Compare files of one model with it, and with each other, on the same tokens and items: which of these should one take?

The reference is run once, and its predictions are kept on the disk (`measure.stream`); every file is then run by itself, so one model is in memory at
a time, and files can be added later. What is told of each prediction is summed up by document, with intervals; files are ranked by paired tests
(`stats.ranking`). Rounding the reference's own hidden states gives the noise floor: differences below it are not called differences.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import torch

from bitatlas.data.domains import BUNDLED_CHAT, SCORED, DomainRows, bundled_sources, domain_rows, parse_sources
from bitatlas.data.tasks import Item, chance_level, check_task_names, items_sha256, load_items
from bitatlas.errors import UserError
from bitatlas.export.card import atlas_beside
from bitatlas.measure.machine import available_bytes
from bitatlas.measure.predictions import rounded_layers
from bitatlas.measure.stream import CONTINUED, FOLDER, PROMPT, Stream, continue_greedily, is_stream, read_stream
from bitatlas.measure.tasks import right_of, score_items, with_norms
from bitatlas.model.decoder import context_length
from bitatlas.model.layerwise import batch_rows
from bitatlas.model.streaming import release_free_memory
from bitatlas.progress import Reporter
from bitatlas.records import TaskPair, TaskScore
from bitatlas.records.comparison import Comparison, Requirement
from bitatlas.records.files import to_json, write_bytes, write_text
from bitatlas.records.text import byte_size, listed
from bitatlas.report.comparison import comparison_html, comparison_markdown
from bitatlas.run.candidates import Running, Subject, plan_file_of, subjects
from bitatlas.run.options import CompareOptions, check_seed
from bitatlas.run.ranking import Measurement, assemble
from bitatlas.run.settings import check_device
from bitatlas.stats.margin import parse_points
from bitatlas.stats.paired import compare_all

NOISE = "noise"  # the folder of the reference beside itself, rounded
NOISE_WHAT = "the reference itself, with what each of its layers gives rounded to bfloat16"
ROW_LENGTH = 256  # tokens, where none is given and the context holds them
HELD = 1.8  # bytes in memory while a model is loaded and run, by those of its float32 weights: the pages of its file are counted, too
LOGIT_COPIES = 6  # of a row's logits, while its predictions are kept


def compare_models(options: CompareOptions) -> Comparison:
    """Compare files with a reference; UserError where there is nothing to compare, or nothing to compare on."""
    settings = _checked(options)
    out, reporter = Path(options.out), Reporter(options.quiet)
    folder = Path(str(options.reference)).expanduser()
    kept = read_stream(folder) if is_stream(folder) else None
    if kept and (options.tokens is not None or options.row_length is not None):
        raise UserError(f"--tokens, --row-length: {folder} holds its own rows; leave them out, or give the model itself")
    opened = subjects(str(options.reference), [str(file) for file in options.files], kept.file if kept else None)
    reference, candidates = (None, opened) if kept else (opened[0], opened[1:])
    requirements = _requirements(options.require, candidates)
    items = {
        task: load_items(
            task, Path(options.task_data) if options.task_data else None, options.limit, options.seed, options.few_shot
        )
        for task in settings.tasks
    }
    _say_memory(opened, options, settings.device, reporter)
    out.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    stream = kept or (_stream(options, reference, out, settings, notes, reporter) if reference else None)
    runs = {subject.file.name: _measure(subject, stream, out, items, settings, reporter) for subject in candidates}
    notes += _cautions(candidates, runs, stream)
    if reference and items:
        _answer_missing(reference, out, items, settings, reporter)
    scores, pairs = _tasks(reference, candidates, items, out, settings, notes)
    result = assemble(reference.file if reference else stream.file, stream, runs, NOISE, NOISE_WHAT, options.seed)  # type: ignore[union-attr]
    result = replace(
        result, tasks=scores, task_pairs=pairs, requirements=_kept(requirements, result), notes=[*notes, *result.notes],
        settings=_told(options, settings, stream),
    )  # fmt: skip
    _write(out, result)
    return result


@dataclass(frozen=True)
class _Settings:
    device: str
    tasks: list[str]
    margin: float
    sources: dict[str, str] | None  # None: no text


def _checked(options: CompareOptions) -> _Settings:
    """Return what was asked for; UserError for what makes no sense, before anything slow."""
    check_seed(options.seed)
    if not options.files:
        raise UserError("FILE: give at least one file to compare with the reference")
    if options.rows < 1:
        raise UserError(f"--rows {options.rows}: at least 1")
    if options.row_length is not None and options.row_length < 2:
        raise UserError(f"--row-length {options.row_length}: at least 2 tokens, one to read and one to predict")
    if options.score not in SCORED:
        raise UserError(f"--score {options.score}: must be {' or '.join(SCORED)}")
    tokens = options.tokens
    words = [] if tokens is None else [str(tokens)] if isinstance(tokens, str | Path) else [str(word) for word in tokens]  # type: ignore[union-attr]
    sources = None if words == ["none"] else parse_sources(words) if words else bundled_sources()
    tasks = check_task_names(options.tasks or ())
    if sources is None and not tasks:
        raise UserError("--tokens, --tasks: give a text, tasks, or both: there is nothing to compare the models on")
    if options.threads is not None:
        torch.set_num_threads(max(1, options.threads))
    return _Settings(check_device(options.device), list(tasks), parse_points(options.margin, "--margin"), sources)


def _requirements(words: Sequence[str], candidates: Sequence[Subject]) -> list[tuple[str, float]]:
    """Return (name, limit) of words like `model.gguf<=0.02`; UserError for another word, or a file that is not compared."""
    names = {subject.file.name: subject.file.name for subject in candidates} | {s.file.path: s.file.name for s in candidates}
    result = []
    for word in words:
        match = re.fullmatch(r"(.+?)\s*<=\s*([0-9.]+(?:[eE][-+]?\d+)?)", word)
        if match is None:
            raise UserError(f"--require {word}: write it like {candidates[0].file.name}<=0.02")
        if match[1] not in names:
            raise UserError(
                f"--require {word}: no such file here; there {'are' if len(candidates) > 1 else 'is'} {listed(s.file.name for s in candidates)}"
            )
        result.append((names[match[1]], float(match[2])))
    return result


def _kept(requirements: Sequence[tuple[str, float]], result: Comparison) -> list[Requirement]:
    means = {c.file.name: c.deviation.damage.mean if c.deviation else None for c in result.candidates}
    return [Requirement(name, limit, mean := means[name], mean is not None and mean <= limit) for name, limit in requirements]


def _say_memory(opened: Sequence[Subject], options: CompareOptions, device: str, reporter: Reporter) -> None:
    """Say what is needed, and refuse, with UserError, what does not fit."""
    largest = max(opened, key=lambda subject: subject.needs)
    length, vocabulary = options.row_length or ROW_LENGTH, max([1, *(subject.vocabulary for subject in opened)])
    logits = 4 * length * vocabulary * (LOGIT_COPIES + batch_rows(length, vocabulary))
    needed = psutil.Process().memory_info().rss + int(HELD * largest.needs) + logits
    free = available_bytes(device)
    if needed > free:
        raise UserError(
            f"{largest.file.path}: running it in float32 takes about {byte_size(needed)} of memory, {byte_size(free)} are free"
            + ("; --device cpu may have more" if device != "cpu" else "")
        )
    reporter.say(f"memory: at most about {byte_size(needed)}, of {byte_size(free)}")


# --- the reference -----------------------------------------------------------------------------------------------------


def _stream(
    options: CompareOptions, reference: Subject, out: Path, settings: _Settings, notes: list[str], reporter: Reporter
) -> Stream | None:
    """Return the reference's predictions, of which only what is not there yet is made; None where no text is compared on."""
    if settings.sources is None:
        return None
    with reference.opened(settings.device, options.row_length or ROW_LENGTH, True) as running:
        if running.tokenizer is None:
            raise UserError(
                f"{options.reference}: has no tokenizer, so no text can be compared on; --tokens none compares tasks alone"
            )
        stream = Stream(
            out / FOLDER, replace(reference.file, run=running.run), reference.identity, min(running.vocabulary, _tokens(running.tokenizer)),
            vocab_sha256(running.tokenizer), _domains(options, settings, running, notes), _rows_settings(options, settings),
        )  # fmt: skip
        if is_stream(out):
            before, now = read_stream(out).head(), stream.head()
            if any(before[key] != now[key] for key in ("identity", "vocabulary", "domains")):
                raise UserError(
                    f"--out {out}: holds the predictions of another reference, or on another text; choose another folder"
                )
        stream.write(running.tokenizer.get_vocab())
        with reporter.stage("reference") as progress:
            stream.keep_all(running.logits, progress)
        _continue(stream, running, notes, reporter)
        with reporter.stage("noise floor") as progress, rounded_layers(running.model):
            _deviations(stream, running, out / FOLDER / NOISE, progress)
    release_free_memory()
    return stream


def _continue(stream: Stream, running: Running, notes: list[str], reporter: Reporter) -> None:
    file = stream.folder / "continuations.safetensors"
    if file.is_file():
        return
    from safetensors.torch import save

    prompts, _ = stream.prompts()
    limit = max(0, min(CONTINUED, context_length(running.model.config) - PROMPT))
    with reporter.stage("greedy continuations"):
        try:
            tokens = continue_greedily(running.model, prompts, limit) if len(prompts) and limit else prompts
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            notes.append(
                f"greedy continuations were not compared: the reference cannot write them ({' '.join(str(error).split())[:160]})"
            )
            tokens = prompts
    write_bytes(file, save({"tokens": tokens.contiguous()}))


def _domains(options: CompareOptions, settings: _Settings, running: Running, notes: list[str]) -> list[DomainRows]:
    assert settings.sources is not None
    context = context_length(running.model.config)
    if options.row_length is not None and options.row_length > context:
        raise UserError(f"--row-length {options.row_length}: the model's context is {context} tokens; give at most that")
    sources = dict(settings.sources)
    if options.tokens is None and not getattr(running.tokenizer, "chat_template", None):
        del sources[BUNDLED_CHAT]
        notes.append("the bundled chat was left out: the model's tokenizer has no chat template")
    vocabulary = min(running.vocabulary, _tokens(running.tokenizer))
    length = options.row_length or min(ROW_LENGTH, context)
    shares = [options.rows // len(sources) + (index < options.rows % len(sources)) for index in range(len(sources))]
    domains = [
        domain_rows(label, source, running.tokenizer, max(1, count), length, options.seed, vocabulary, options.score)
        for (label, source), count in zip(sources.items(), shares, strict=True)
    ]
    if options.score == "assistant" and not any(rows.domain.chat for rows in domains):
        raise UserError("--score assistant: no text holds conversations (records with `messages`)")
    return domains


def _tokens(tokenizer: Any) -> int:
    """Return the number of tokens that a tokenizer gives, gaps counted."""
    return max(tokenizer.get_vocab().values()) + 1


def vocab_sha256(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True).encode()).hexdigest()


def _rows_settings(options: CompareOptions, settings: _Settings) -> dict[str, Any]:
    return {
        "tokens": settings.sources, "rows": options.rows, "row_length": options.row_length or ROW_LENGTH, "score": options.score, "seed": options.seed,
        "prompt_tokens": PROMPT, "continued_tokens": CONTINUED,
    }  # fmt: skip


# --- a file ------------------------------------------------------------------------------------------------------------


def _measure(
    subject: Subject, stream: Stream | None, out: Path, items: Mapping[str, list[Item]], settings: _Settings, reporter: Reporter
) -> Measurement:
    """Run a file on what is not known of it yet, text first."""
    key = hashlib.sha256(f"{subject.identity} {stream.key if stream else ''}".encode()).hexdigest()[:16]
    folder, note = out / "files" / key, out / "files" / key / "run.json"
    if stream is not None and not note.is_file():
        with subject.opened(settings.device, stream.longest, False) as running:
            refused = _refusal(stream, running)
            if refused and not items:
                raise UserError(f"{subject.file.path}: {refused}; tasks can be compared all the same (--tasks)")
            if not refused:
                with reporter.stage(subject.file.name) as progress:
                    _deviations(stream, running, folder, progress)
            if running.model is not None:
                _answer(running, subject, out, items, reporter)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps({"run": running.run, "refused": refused}, ensure_ascii=False) + "\n")
        release_free_memory()
    told = json.loads(note.read_text(encoding="utf-8")) if stream else {"run": "", "refused": "no text was compared on"}
    run = _answer_missing(subject, out, items, settings, reporter)
    how = "; tasks: ".join(filter(None, dict.fromkeys([told["run"], run])))
    return Measurement(replace(subject.file, run=how), folder, told["refused"])


def _deviations(stream: Stream, running: Running, folder: Path, progress: Callable[[int, int], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stream.deviations(running.logits, folder, progress)
    stream.agreements(running.logits, folder, progress)


def _refusal(stream: Stream, running: Running) -> str:
    """Return why a file cannot be compared on the reference's tokens; "" where it can."""
    if running.vocabulary < stream.vocabulary:
        return (
            f"it has {running.vocabulary:,} tokens, the reference {stream.vocabulary:,}, so their predictions cannot be compared"
        )
    if running.tokenizer is None or vocab_sha256(running.tokenizer) == stream.vocab_sha256:
        return ""
    known, other = stream.vocab(), running.tokenizer.get_vocab()
    differ, missing = (
        sum(other.get(token, index) != index for token, index in known.items()),
        sum(token not in other for token in known),
    )
    if differ or missing > len(known) // 100:
        return f"its tokenizer is not the reference's ({differ + missing:,} of {len(known):,} tokens differ)"
    return ""


def _cautions(candidates: Sequence[Subject], runs: Mapping[str, Measurement], stream: Stream | None) -> list[str]:
    """Return lines on what makes a comparison less fair than it looks."""
    notes, sources = [], set(stream.settings["tokens"].values()) if stream else set()
    for subject in candidates:
        plan_file = plan_file_of(subject.file.path)
        atlas = atlas_beside(plan_file.absolute()) if plan_file else None
        fitted = str(atlas.settings.get("tokens")) if atlas else ""
        if fitted and any(Path(fitted).name == Path(source).name for source in sources):
            notes.append(
                f"{subject.file.name}: its survey used the text {Path(fitted).name}, which is compared on here: that flatters it"
            )
    if any(measurement.file.run.startswith("in llama.cpp") for measurement in runs.values()):
        notes.append(
            "what runs in llama.cpp is measured with what llama.cpp rounds: inputs of its quantized weights to 8 bits, its cache to float16"
        )
    return notes


# --- tasks -------------------------------------------------------------------------------------------------------------


def _answers_file(out: Path, subject: Subject, task: str, items: Sequence[Item]) -> Path:
    return out / "tasks" / f"{subject.identity}-{task}-{items_sha256(items)[:12]}.json"


def _answer(running: Running, subject: Subject, out: Path, items: Mapping[str, list[Item]], reporter: Reporter) -> None:
    """Let a model answer the items that it has not answered yet."""
    for task, of_task in items.items():
        file = _answers_file(out, subject, task, of_task)
        if not file.is_file():
            if running.tokenizer is None:
                raise UserError(f"{subject.file.path}: has no tokenizer, so it cannot answer {task}")
            with reporter.stage(f"{task} ({subject.file.name})"):
                answers = score_items(running.model, running.tokenizer, task, of_task)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"run": running.run, "answers": answers}, ensure_ascii=False) + "\n")


def _answer_missing(subject: Subject, out: Path, items: Mapping[str, list[Item]], settings: _Settings, reporter: Reporter) -> str:
    """Let a file answer what it has not answered yet; return how it was run for it, "" where there are no tasks."""
    files = [_answers_file(out, subject, task, of_task) for task, of_task in items.items()]
    if not all(file.is_file() for file in files):
        with subject.opened(settings.device, PROMPT, True) as running:
            _answer(running, subject, out, items, reporter)
        release_free_memory()
    return str(json.loads(files[0].read_text(encoding="utf-8"))["run"]) if files else ""


def _tasks(
    reference: Subject | None,
    candidates: Sequence[Subject],
    items: Mapping[str, list[Item]],
    out: Path,
    settings: _Settings,
    notes: list[str],
) -> tuple[list[TaskScore], list[TaskPair]]:
    """Return scores, and every pair of every task."""
    if items and reference is None:
        notes.append("tasks are compared among the files alone: of the reference only its predictions on text are here")
    answers = {
        task: {
            subject.file.name: json.loads(_answers_file(out, subject, task, of_task).read_text(encoding="utf-8"))["answers"]
            for subject in ([reference] if reference else []) + list(candidates)
        }
        for task, of_task in items.items()
    }
    outcomes = {task: {name: right_of(of_model) for name, of_model in by_model.items()} for task, by_model in answers.items()}
    chance = {task: chance_level(of_task) for task, of_task in items.items()}
    scores, pairs = compare_all(outcomes, chance, settings.margin, lambda names: list(combinations(names, 2)))
    lines = [
        {"task": task, "precision": name, **answer}
        for task, by_model in answers.items()
        for name, of_model in by_model.items()
        for answer in of_model
    ]
    return with_norms(scores, lines), pairs


# --- what is written ---------------------------------------------------------------------------------------------------


def _told(options: CompareOptions, settings: _Settings, stream: Stream | None) -> dict[str, Any]:
    rows = stream.settings if stream else {}
    return {
        "reference": str(options.reference), "files": [str(file) for file in options.files], "tasks": settings.tasks, "limit": options.limit,
        "few_shot": options.few_shot, "margin_points": settings.margin, "device": settings.device, **rows,
    }  # fmt: skip


def _write(out: Path, result: Comparison) -> None:
    write_text(out / "comparison.json", to_json(result))
    write_text(out / "comparison.md", comparison_markdown(result))
    write_text(out / "compare.html", comparison_html(result))
