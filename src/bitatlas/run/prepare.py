"""Everything that a survey needs, opened and checked: what can be refused is refused here, before anything slow or written.

Order: names of tasks, quantizer and device; the checkpoint's headers; whether the budget is possible; the tasks' items and the text;
only then the folder and its journal, and last the weights, read once for NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter

from bitatlas.data.rows import Rows, check_vocabulary, make_rows
from bitatlas.data.tasks import Item, load_items, split_items, task_text
from bitatlas.data.texts import read_documents
from bitatlas.errors import FULL, UserError
from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.memory_need import LoadMode, choose_load_mode, memory_need, peak_bytes
from bitatlas.measure.tasks import score_shards
from bitatlas.measure.workers import Progress, Workers
from bitatlas.model.checkpoint import Checkpoint, check_causal, check_finite, open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.folder import free_bytes
from bitatlas.model.hidden_states import sweep
from bitatlas.model.layerwise import check_chain
from bitatlas.model.streaming import return_large
from bitatlas.plan.budget import check_budget, own_context_text, settled
from bitatlas.plan.protect import check_items
from bitatlas.plan.search import Subject
from bitatlas.progress import Reporter
from bitatlas.quantize import get_quantizer
from bitatlas.quantize.bank import BANK, Bank, disk_bytes
from bitatlas.records import Atlas, Budget
from bitatlas.records.formats import check_rows
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import size_of
from bitatlas.records.text import byte_size, number
from bitatlas.run.options import SurveyOptions
from bitatlas.run.settings import Settings, check_device

OUTPUT_BYTES = 64 * 2**20  # journal, tables and reports of a large model


class Crew(Workers, Protocol):
    """Workers for one survey, before they know it."""

    def join(self, out: Path, checkpoint: Checkpoint) -> None:
        """Connect, and ask every host whether it can take part; UserError naming the first that cannot."""

    def brief(self, run: Run) -> None:
        """Tell what is measured; UserError where no host has the memory for it."""

    def make_codes(self, missing: Mapping[str, list[str]], progress: Progress | None = None) -> None:
        """Quantize what is missing of the bank (module -> formats) into its folder."""


@dataclass
class Run:
    """An opened survey. `decoder` holds the reference weights between measurements."""

    settings: Settings
    out: Path
    checkpoint: Checkpoint
    load_mode: LoadMode
    decoder: Decoder
    tokenizer: Any
    bank: Bank
    rows: Rows
    items: dict[str, list[Item]]  # task -> items to score
    journal: Journal
    meter: DamageMeter
    reporter: Reporter
    workers: Workers | None = None

    @property
    def subject(self) -> Subject:
        """What plans are for."""
        settings, checkpoint = self.settings, self.checkpoint
        return Subject(
            checkpoint.info, checkpoint.modules, settings.formats, settings.quantizer, self.bank.identity, settings.seed,
            self.rows.blocks("test"),
        )  # fmt: skip

    def answers(self, task: str, items: list[Item], assignment: Mapping[str, str], precision: str) -> list[dict[str, Any]]:
        """Score items of a task with `assignment`, journaled: one record an item. `precision`: its name."""
        return score_shards(self.meter, self.tokenizer, self.reporter, task, items, assignment, precision)

    def measure(self, plans: Mapping[str, Mapping[str, str]], split: str) -> dict[str, np.ndarray]:
        """Damage of plans by name on the rows of a split: float64 [rows] each, nats/token."""
        with self.reporter.stage(f"plans on {split} rows") as progress:
            return self.meter.plans(plans, getattr(self.rows, split), progress)


def prepare(settings: Settings, out: Path, resume: bool, reporter: Reporter, crew: Crew | None = None) -> Run:
    """Open and check everything; UserError at the first thing that is wrong, with nothing written. A crew joins and is briefed."""
    get_quantizer(settings.quantizer).check(list(settings.format_table().values()))
    device = check_device(settings.device)
    with reporter.stage("opening the checkpoint"):
        checkpoint = open_checkpoint(settings.model, settings.revision, settings.fuse)
        check_rows(checkpoint.modules, settings.formats)
        asked = settings.budget.workload
        settings = replace(settings, budget=settled(settings.budget, checkpoint.info))
        check_budget(settings.budget, checkpoint.modules, settings.formats, checkpoint.info)
        if asked and asked.context is None and settings.budget.workload:
            reporter.say(own_context_text(settings.budget.workload))
        reporter.say(sizes_text(checkpoint, settings.formats))
        for note in checkpoint.notes:
            reporter.say(note)
        _check_folder(out, resume, checkpoint, settings.formats)
        tokenizer = checkpoint.load_tokenizer()
        rows, items = rows_and_items(settings, checkpoint, tokenizer)
        check_items(settings.budget, {task: len(of_task) for task, of_task in items.items()})
    with reporter.stage("reading every weight once") as progress:
        check_finite(checkpoint, progress)
    load_mode = load_mode_of(settings, checkpoint, device, out)
    reporter.say(load_mode_text(load_mode, device))
    decoder = model_of(settings, checkpoint, load_mode, device)
    check_causal(decoder, checkpoint.info.name)
    check_chain(decoder, checkpoint.info.name)
    if crew:
        crew.join(out, checkpoint)
    run = run_of(settings, out, checkpoint, load_mode, decoder, tokenizer, rows, items, _open_journal(out, checkpoint), reporter)
    if crew:
        crew.brief(run)
        run.workers = run.meter.workers = crew
        run.bank.helper = crew.make_codes
    return run


def load_mode_of(settings: Settings, checkpoint: Checkpoint, device: str, out: Path) -> LoadMode:
    """In memory or layer by layer, by what was asked for and what is there; UserError where neither is possible."""
    vocabulary = checkpoint.vocabulary
    dtype, formats = settings.torch_dtype(device), len(settings.formats)
    needed = memory_need(
        checkpoint.info, checkpoint.modules, vocabulary, sum(settings.rows), settings.row_length, formats, dtype, device
    )
    load_mode = choose_load_mode(needed, settings.memory_bytes, device, out)
    if load_mode.streamed and get_quantizer(settings.quantizer).needs_all:
        raise UserError(
            f"--quantizer {settings.quantizer}: needs all weights in memory, {byte_size(needed.whole)}; rtn and gptq go layer by layer"
        )
    return way


def load_mode_text(load_mode: LoadMode, device: str) -> str:
    where = "" if device == "cpu" else f" of {device}"
    how = "one decoder layer's weights at a time" if load_mode.streamed else "all weights in memory"
    return f"{how}; at most about {byte_size(load_mode.predicted_bytes)}{where}"


def peak_text(run: Run) -> str:
    """What the run took at its peak, beside what it was to take."""
    return (
        f"peak memory: {byte_size(peak_bytes(str(run.decoder.device)))}, at most {byte_size(run.load_mode.predicted_bytes)} predicted"
    )


def model_of(settings: Settings, checkpoint: Checkpoint, load_mode: LoadMode, device: str) -> Decoder:
    """The model, opened that load_mode."""
    if load_mode.streamed:
        return_large()
    opened = checkpoint.stream_model if load_mode.streamed else checkpoint.load_model
    return opened(device, settings.torch_dtype(device))


def run_of(
    settings: Settings, out: Path, checkpoint: Checkpoint, load_mode: LoadMode, decoder: Decoder, tokenizer: Any, rows: Rows, items: dict[str, list[Item]], journal: Journal, reporter: Reporter,
) -> Run:  # fmt: skip
    """A run with its bank and its meter."""
    names, sha = [module.name for module in checkpoint.modules], checkpoint.info.weights_sha256
    bank = Bank(
        decoder, names, settings.quantizer, rows=rows.fit, folder=out / BANK, weights_sha256=sha, kept_bytes=load_mode.kept_bytes
    )
    meter = DamageMeter(decoder, bank, sha, bank.identity, journal, load_mode.state_budget)
    return Run(settings, out, checkpoint, load_mode, decoder, tokenizer, bank, rows, items, journal, meter, reporter)


def rows_and_items(settings: Settings, checkpoint: Checkpoint, tokenizer: Any) -> tuple[Rows, dict[str, list[Item]]]:
    """The rows to measure on, and every task's items to score. Without a text, rows come from the items that are not scored."""
    task_data = Path(settings.task_data) if settings.task_data else None
    split = {task: split_items(task, task_data, settings.limit, settings.seed, settings.few_shot) for task in settings.tasks}
    source, documents = _documents(settings, {task: spare for task, (_, spare) in split.items()})
    vocabulary = checkpoint.vocabulary
    rows = make_rows(
        documents,
        tokenizer,
        source,
        settings.rows,
        settings.row_length,
        checkpoint.info.context,
        settings.seed,
        vocabulary=vocabulary,
    )
    items = {task: scored for task, (scored, _) in split.items()}
    for task, of_task in items.items():
        check_vocabulary(tokenizer, [task_text(task, of_task)], vocabulary)
    return rows, items


def sizes_text(checkpoint: Checkpoint, formats: Sequence[str]) -> str:
    """What there is to quantize, and the exact size of the whole model at every uniform format."""
    modules, info = checkpoint.modules, checkpoint.info
    sizes = {name: size_of(modules, {m.name: name for m in modules}, info) for name in formats}
    told = [f"{name} {byte_size(size.total_bytes)} ({number(size.stored_bits)} stored bits)" for name, size in sizes.items()]
    return (
        f"{info.name}: {info.layers} layers, {len(modules)} modules in {len({m.unit for m in modules})} units, "
        f"{info.quantizable_weights:,} weights; {byte_size(info.total_bytes)} as it is, {'; '.join(told)}; "
        f"quantized weights on disk: up to {byte_size(disk_bytes(modules, formats))}"
    )


def _documents(settings: Settings, spare: dict[str, list[Item]]) -> tuple[str, list[str]]:
    """The text to measure on: what was given, else the text of the chosen tasks' items that are not scored."""
    if settings.tokens:
        name = Path(settings.tokens).name if Path(settings.tokens).is_file() else settings.tokens
        return name, read_documents(settings.tokens)
    if not spare:
        raise UserError("--tokens: with --tasks none there is no text to measure on; give a text file")
    return f"items of {', '.join(spare)} that are not scored", [
        task_text(task, [item]) for task, items in spare.items() for item in items
    ]


def _check_folder(out: Path, resume: bool, checkpoint: Checkpoint, formats: Sequence[str]) -> None:
    if _check_place(out, resume):
        _open_journal(out, checkpoint).close()
    with _told(out):
        free = free_bytes(out.absolute())
    needed = OUTPUT_BYTES + disk_bytes(checkpoint.modules, [*formats, formats[-1]])  # a uniform width outside may be asked for
    if free < needed:
        raise UserError(f"--out {out}: only {free // 2**20} MiB free on that disk; about {needed // 2**20} MiB are needed")


def _check_place(out: Path, resume: bool) -> bool:
    """Does the folder hold a run that may be gone on with?"""
    with _told(out):
        is_file, holds_run = out.exists() and not out.is_dir(), (out / "run.sqlite").exists()
    if is_file:
        raise UserError(f"--out {out}: is a file; give a folder")
    if holds_run and not resume:
        raise UserError(f"--out {out}: holds a run already; add --resume to go on with it, or choose another folder")
    return holds_run


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """Whatever the system says against the folder, as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(f"--out {out}: cannot be made ({(error.strerror or 'no permission').lower()})") from None


def _open_journal(out: Path, checkpoint: Checkpoint) -> Journal:
    with _told(out):
        out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "run.sqlite")
    try:
        journal.claim(checkpoint.info.weights_sha256, checkpoint.info.name)
    except UserError:
        journal.close()
        raise
    sweep(out)
    return journal


def settings_of(atlas: Atlas) -> Settings:
    """Return the settings that a survey was made with. Options that have gone since are left out; those that came have their defaults."""
    content = {field.name: atlas.settings[field.name] for field in fields(Settings) if field.name in atlas.settings}
    content["budget"] = TypeAdapter(Budget).validate_python(content["budget"])
    for name in ("formats", "rows", "tasks"):
        content[name] = tuple(content[name])
    return replace(Settings.of(SurveyOptions(content["model"])), **content)


def items_of_survey(atlas: Atlas) -> dict[str, list[Item]]:
    """Task -> the items that a survey scored."""
    settings = settings_of(atlas)
    data = Path(settings.task_data) if settings.task_data else None
    return {task: load_items(task, data, settings.limit, settings.seed, settings.few_shot) for task in settings.tasks}


def rows_of_survey(atlas: Atlas, checkpoint: Checkpoint) -> Rows:
    """The rows that a survey measured on, made again from its settings and compared by hash."""
    rows, _ = rows_and_items(settings_of(atlas), checkpoint, checkpoint.load_tokenizer())
    if rows.info.splits != atlas.tokens.splits:
        raise UserError(f"--tokens: {atlas.tokens.source} is not what the survey measured on; its hash differs")
    return rows


def reopen(folder: Path, atlas: Atlas, model_name: str | None, device: str | None, reporter: Reporter) -> Run:
    """A finished survey, opened again to measure more plans: same rows, same journal, same bank. No tasks.

    `model_name`, `device`: where they are no longer what they were.
    """
    settings = settings_of(atlas)
    settings = replace(settings, model=model_name or settings.model, device=device or settings.device)
    place = check_device(settings.device)
    with reporter.stage("opening the checkpoint"):
        checkpoint = open_checkpoint(settings.model, settings.revision, settings.fuse)
        if checkpoint.info.weights_sha256 != atlas.model.weights_sha256:
            raise UserError(f"{settings.model}: these are not the weights that {folder} is a survey of ({atlas.model.name})")
        rows = rows_of_survey(atlas, checkpoint)
        check_finite(checkpoint)
        load_mode = load_mode_of(settings, checkpoint, place, folder)
        decoder = model_of(settings, checkpoint, load_mode, place)
    tokenizer = checkpoint.load_tokenizer()
    return run_of(settings, folder, checkpoint, load_mode, decoder, tokenizer, rows, {}, _open_journal(folder, checkpoint), reporter)
