"""Everything that a survey needs, opened and checked: what can be refused is refused here, before anything slow or written.

Order: names of tasks, quantizer and device; the checkpoint's headers; whether the budget is possible; the tasks' items and the text;
only then the folder and its journal, and last the weights, read once for NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitatlas.demo as demo
from bitatlas.bank import Bank
from bitatlas.checkpoint import Checkpoint, check_finite, free_bytes, open_checkpoint
from bitatlas.errors import UserError
from bitatlas.evaluation.items import Item, check_task_names, split_items, task_text
from bitatlas.formats import FORMATS
from bitatlas.journal import Journal
from bitatlas.planning.budget import check_budget, size_of
from bitatlas.progress import Reporter
from bitatlas.quantizers import get_quantizer
from bitatlas.records import Atlas, Budget
from bitatlas.sensitivity.damage import DamageMeter
from bitatlas.settings import Settings, check_device, parse_formats, parse_rows
from bitatlas.tokens import Rows, make_rows, read_documents
from bitatlas.words import byte_size, number

OUTPUT_BYTES = 64 * 2**20  # journal, tables and reports of a large model
DEMO_TASKS = "demo_problems,demo_questions"
DEFAULT_TASKS = "arc_easy,svamp"


@dataclass
class Run:
    """An opened survey. `model` holds the reference weights between measurements."""

    settings: Settings
    out: Path
    checkpoint: Checkpoint
    model: Any
    tokenizer: Any
    bank: Bank
    rows: Rows
    items: dict[str, list[Item]]  # task -> items to score
    journal: Journal
    meter: DamageMeter
    reporter: Reporter


def default_settings(
    model: str | None, formats: str, budget: Budget | None, rows: str, tasks: str | None, tokens: str | None, **others: Any
) -> Settings:
    """Settings from the command line's words. Without a model: the bundled one, its text and its tasks."""
    names = parse_formats(formats)
    if model is None:
        model, tokens = str(demo.MODEL_DIR), tokens or str(demo.TEXT_FILE)
        tasks = tasks or DEMO_TASKS
    chosen = check_task_names([name.strip() for name in (tasks or DEFAULT_TASKS).split(",") if name.strip()])
    others["tolerance_nats"] = others.pop("tolerance")
    return Settings(
        model=model,
        formats=names,
        budget=budget or default_budget(names),
        rows=parse_rows(rows),
        tasks=tuple(chosen),
        tokens=tokens,
        **others,
    )


def default_budget(formats: Sequence[str]) -> Budget:
    """Code bits half-way between the narrowest and the widest format."""
    widths = [FORMATS[name].bits for name in formats]
    return Budget("code_bits", (min(widths) + max(widths)) / 2)


def prepare(settings: Settings, out: Path, resume: bool, reporter: Reporter) -> Run:
    """Open and check everything; UserError at the first thing that is wrong, with nothing written."""
    get_quantizer(settings.quantizer)
    device = check_device(settings.device)
    with reporter.stage("opening the checkpoint"):
        checkpoint = open_checkpoint(settings.model, settings.revision, settings.fuse)
        check_budget(settings.budget, checkpoint.modules, settings.formats, checkpoint.info)
        reporter.say(sizes_text(checkpoint, settings.formats))
        _check_folder(out, resume, checkpoint)
        task_data = Path(settings.task_data) if settings.task_data else None
        split = {task: split_items(task, task_data, settings.limit, settings.seed) for task in settings.tasks}
        tokenizer = checkpoint.load_tokenizer()
        source, documents = _documents(settings, {task: spare for task, (_, spare) in split.items()})
        rows = make_rows(documents, tokenizer, source, settings.rows, settings.row_length, checkpoint.info.context, settings.seed)
    with reporter.stage("reading every weight once") as progress:
        check_finite(checkpoint, progress)
    journal = _open_journal(out, checkpoint)
    model = checkpoint.load_model(device)
    bank = Bank(model, [module.name for module in checkpoint.modules], settings.format_table(), settings.quantizer)
    meter = DamageMeter(model, bank, checkpoint.info.weights_sha256, settings.quantizer, journal)
    items = {task: scored for task, (scored, _) in split.items()}
    return Run(settings, out, checkpoint, model, tokenizer, bank, rows, items, journal, meter, reporter)


def sizes_text(checkpoint: Checkpoint, formats: Sequence[str]) -> str:
    """What there is to quantize, and the exact size of the whole model at every uniform format."""
    modules, info = checkpoint.modules, checkpoint.info
    sizes = {name: size_of(modules, {m.name: name for m in modules}, info) for name in formats}
    told = [f"{name} {byte_size(size.total_bytes)} ({number(size.stored_bits)} stored bits)" for name, size in sizes.items()]
    return (
        f"{info.name}: {info.layers} layers, {len(modules)} modules in {len({m.unit for m in modules})} units, "
        f"{info.quantizable_weights:,} weights; {byte_size(info.total_bytes)} as it is, {'; '.join(told)}"
    )


def _documents(settings: Settings, spare: dict[str, list[Item]]) -> tuple[str, list[str]]:
    """The text to measure on: what was given, else the text of the chosen tasks' items that are not scored."""
    if settings.tokens:
        name = Path(settings.tokens).name if Path(settings.tokens).is_file() else settings.tokens
        return name, read_documents(settings.tokens)
    if not spare:
        raise UserError("--tokens: with --tasks none there is no text to measure on; give a text file")
    return f"items of {', '.join(spare)} that are not scored", [task_text(task, items) for task, items in spare.items()]


def _check_folder(out: Path, resume: bool, checkpoint: Checkpoint) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if (out / "run.sqlite").exists() and not resume:
        raise UserError(f"--out {out}: holds a run already; add --resume to go on with it, or choose another folder")
    if (out / "run.sqlite").exists():
        _open_journal(out, checkpoint).close()
    free = free_bytes(out.absolute())
    if free < OUTPUT_BYTES:
        raise UserError(f"--out {out}: only {free // 2**20} MiB free on that disk; about {OUTPUT_BYTES // 2**20} MiB are needed")


def _open_journal(out: Path, checkpoint: Checkpoint) -> Journal:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({(error.strerror or 'no permission').lower()})") from None
    journal = Journal(out / "run.sqlite")
    try:
        journal.claim(checkpoint.info.weights_sha256, checkpoint.info.name)
    except UserError:
        journal.close()
        raise
    return journal


def rows_of_survey(atlas: Atlas, checkpoint: Checkpoint) -> Rows:
    """The rows that a survey measured on, made again and compared by hash."""
    settings = atlas.settings
    tokens = settings["tokens"]
    if tokens is None:
        raise UserError("--tokens: the survey used its tasks' text; give a text file to verify on")
    counts = tuple(settings["rows"])
    rows = make_rows(
        read_documents(tokens), checkpoint.load_tokenizer(), atlas.tokens.source, counts, settings["row_length"],
        checkpoint.info.context, settings["seed"],
    )  # fmt: skip
    if rows.info != atlas.tokens:
        raise UserError(f"--tokens {tokens}: is not the text that the survey measured on; its hash differs")
    return rows
