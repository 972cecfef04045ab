"""Open and check everything that a survey needs: what can be refused is refused here, before anything slow or written.

Order: names of tasks, quantizer and device; the checkpoint's headers; whether the budget is possible; the tasks' items and the text;
only then the folder and its journal, and last the weights, read once for NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torch import Tensor

from bitatlas.data.rows import Rows, check_vocabulary, fit_pool, make_rows
from bitatlas.data.tasks import Item, split_items, task_text
from bitatlas.data.texts import read_documents
from bitatlas.errors import FULL, UserError
from bitatlas.export.gguf.base import BaseFile, base_of, followed, open_base
from bitatlas.export.gguf.imatrix import NAME as IMATRIX_FILE
from bitatlas.export.gguf.imatrix import read_imatrix, write_imatrix
from bitatlas.export.gguf.names import known_names
from bitatlas.export.gguf.recipes import recipes_of
from bitatlas.export.targets import with_runtime_file
from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.machine import LoadMode, choose_load_mode, estimate_memory, peak_bytes, use_threads
from bitatlas.measure.tasks import score_shards
from bitatlas.model.checkpoint import Checkpoint, check_causal, check_finite, open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.folder import free_bytes
from bitatlas.model.hidden_states import remove_leftovers
from bitatlas.model.layerwise import check_chain
from bitatlas.model.streaming import release_large_blocks
from bitatlas.plan.budget import check_budget, default_context_text, resolve_budget
from bitatlas.plan.protect import check_items
from bitatlas.plan.search import PlanningProblem
from bitatlas.progress import Reporter
from bitatlas.quantize import get_quantizer
from bitatlas.quantize.bank import BANK, Bank, disk_bytes
from bitatlas.quantize.importance import ImportanceMatrix, collect
from bitatlas.records import Atlas, Budget, Module
from bitatlas.records.formats import FORMATS, KEPT, LLAMA_CPP, stored_bytes
from bitatlas.records.journal import Journal
from bitatlas.records.runtimes import MADE_FOR
from bitatlas.records.sizes import assignment_of, check_rows, inner, kept_bytes, size_of, uniform
from bitatlas.records.text import byte_size, listed, number
from bitatlas.run.effort import EFFORTS, Effort, settle_effort
from bitatlas.run.options import SurveyOptions
from bitatlas.run.settings import Settings, check_device, held_formats, held_modules, outside_modules, widest_of

IMATRIX = "imatrix"  # the quantizer that makes the codes of llama.cpp's recipes
RECIPE = "llama.cpp's "  # what their names begin with
MOST_NAMED = 4  # modules in a line
OUTPUT_BYTES = 64 * 2**20  # journal, tables and reports of a large model

TaskItems = dict[str, list[Item]]  # task -> items


@dataclass
class Opened:
    """A model that is open and checked, with what is measured on it. `items`: those to score."""

    settings: Settings
    checkpoint: Checkpoint
    load_mode: LoadMode
    decoder: Decoder
    tokenizer: Any
    rows: Rows
    items: TaskItems
    importance: ImportanceMatrix | None  # of --imatrix
    tensor_names: Mapping[str, str]  # module -> the tensor that it is in, in llama.cpp's files, as far as these are known


@dataclass
class Session(Opened):
    """An opened survey, with its folder. `decoder` holds the reference weights between measurements."""

    out: Path
    journal: Journal
    reporter: Reporter
    bank: Bank = field(init=False)
    meter: DamageMeter = field(init=False)

    @property
    def effort(self) -> Effort:
        """How much is measured."""
        return EFFORTS[self.settings.effort or "full"]

    def __post_init__(self) -> None:
        sha, mode = self.checkpoint.info.weights_sha256, self.load_mode
        names, quantizer, folder = [module.name for module in self.checkpoint.modules], self.settings.quantizer, self.out / BANK
        fitted = self.importance or self.rows.fit
        self.bank = Bank(self.decoder, names, quantizer, rows=fitted, folder=folder, weights_sha256=sha)
        self.bank.cache_bytes = mode.cache_bytes
        self.meter = DamageMeter(self.decoder, self.bank, sha, self.bank.identity, self.journal, mode.state_budget)
        self.recipes: dict[str, dict[str, str]] = {}  # llama.cpp's own, by name
        self.recipe_meter = self.meter  # measures them
        if self.settings.runtime == LLAMA_CPP:
            found = recipes_of(self.checkpoint, self.tensor_names, imatrix=quantizer != LLAMA_CPP)
            self.recipes = {f"{RECIPE}{name}": recipe for name, recipe in found.items()}
            if quantizer not in (LLAMA_CPP, IMATRIX):
                bank = Bank(self.decoder, names, IMATRIX, rows=fitted, folder=folder, weights_sha256=sha)
                bank.cache_bytes = mode.cache_bytes // 4
                self.recipe_meter = DamageMeter(self.decoder, bank, sha, bank.identity, self.journal, mode.state_budget)

    @property
    def subject(self) -> PlanningProblem:
        """Return what plans are for."""
        settings, checkpoint = self.settings, self.checkpoint
        return PlanningProblem(
            checkpoint.info, checkpoint.modules, settings.formats, settings.quantizer, self.bank.identity, settings.seed,
            self.rows.blocks("test"), self.recipes,
        )  # fmt: skip

    def assignments(self, choices: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
        """Return the plans, module -> format, of choices by name: int64 [units] each, the index of a unit's format."""
        subject = self.subject
        return {name: assignment_of(subject.units, subject.formats, choice) for name, choice in choices.items()}

    def answers(self, task: str, items: list[Item], assignment: Mapping[str, str], precision: str) -> list[dict[str, Any]]:
        """Score items of a task with `assignment`, journaled: one record an item. `precision`: its name."""
        return score_shards(self.meter, self.tokenizer, self.reporter, task, items, assignment, precision)

    def choice(self, assignment: Mapping[str, str]) -> np.ndarray:
        """Return the choice of a plan, module -> format: int64 [units], the index of a unit's format."""
        subject, first = self.subject, [unit.modules[0] for unit in self.subject.units]
        return np.array([list(module.formats(subject.formats)).index(assignment[module.name]) for module in first])

    def measure(
        self, plans: Mapping[str, Mapping[str, str]], split: str, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Measure the damage of plans by name on the rows of a split, or on those of the indices `rows`: float64 [rows] each, nats/token."""
        tokens = getattr(self.rows, split)
        chosen = tokens if rows is None else tokens[list(rows)]
        theirs = {name: plan for name, plan in plans.items() if name in self.recipes}
        ours = {name: plan for name, plan in plans.items() if name not in theirs}
        with self.reporter.stage(f"plans on {split if rows is None else f'{len(rows)} {split}'} rows") as progress:
            damage = dict(self.meter.plans(ours, chosen, progress)) if ours else {}
            if theirs:
                damage |= self.recipe_meter.plans(theirs, chosen, progress)
            return {name: damage[name] for name in plans}

    def finish(self) -> None:
        """Refuse a checkpoint that changed meanwhile, and say what was taken at the peak, beside what was predicted."""
        self.checkpoint.check_unchanged()
        peak = byte_size(peak_bytes(str(self.decoder.device)))
        self.reporter.say(f"peak memory: {peak}, at most {byte_size(self.load_mode.predicted_bytes)} predicted")


def prepare(
    settings: Settings,
    out: Path,
    resume: bool,
    reporter: Reporter,
    connect: Callable[[Path, Checkpoint], None] | None = None,
) -> Session:
    """Open and check everything; UserError at the first thing that is wrong, with nothing written.

    `connect`: called when all else is checked and before the journal is written (see `ray.scheduler`).
    """
    opened = open_model(settings, out, resume, reporter, by_itself=not connect)
    if connect:
        connect(out, opened.checkpoint)
    journal = _open_journal(out, opened.checkpoint)
    return Session(**vars(opened), out=out, journal=journal, reporter=reporter)


def open_model(settings: Settings, out: Path, resume: bool, reporter: Reporter, by_itself: bool = True) -> Opened:
    """Open the model with all that a survey needs, check it, and settle what is measured; UserError at the first thing that is wrong.

    by_itself: this process measures, with the fastest number of threads.
    """
    get_quantizer(settings.quantizer).check(list(settings.format_table().values()))
    device = check_device(settings.device)
    with reporter.stage("opening the checkpoint"):
        checkpoint = open_planned(settings)
        check_kept(settings, checkpoint)
        experts = left_experts(checkpoint, settings)
        checkpoint = checkpoint.leaving(experts)
        asked = settings.formats
        settings = replace(settings, formats=held_formats(asked, checkpoint.modules, settings.runtime))
        if lost := [name for name in asked if name not in settings.formats]:
            reporter.say(f"no module's rows take {listed(lost)}; the formats are {', '.join(settings.formats)}")
        checkpoint = replace(checkpoint, modules=held_modules(settings, checkpoint.modules))
        checkpoint = checkpoint.planning(outside_modules(settings, checkpoint.outer, asked))
        checkpoint, base = _with_sizes(checkpoint, settings, reporter)
        tensor_names = _tensor_names(checkpoint, base)
        check_rows(checkpoint.modules, settings.formats)
        workload = settings.budget.workload
        settings = replace(settings, budget=resolve_budget(settings.budget, checkpoint.info))
        check_budget(settings.budget, checkpoint.modules, settings.formats, checkpoint.info)
        if workload and workload.context is None and settings.budget.workload:
            reporter.say(default_context_text(settings.budget.workload))
        reporter.say(sizes_text(checkpoint, settings.formats))
        for line in [
            *instead_lines(checkpoint),
            *outside_lines(checkpoint, settings),
            *expert_lines(checkpoint, experts, settings),
        ]:
            reporter.say(line)
        for note in checkpoint.notes:
            reporter.say(note)
        _check_folder(out, resume, checkpoint, settings.formats)
        tokenizer = checkpoint.load_tokenizer()
        rows, items = rows_and_items(settings, checkpoint, tokenizer)
        check_items(settings.budget, {task: len(task_items) for task, task_items in items.items()})
        importance = read_importance(settings, checkpoint, tensor_names, reporter)
    with reporter.stage("reading every weight once") as progress:
        check_finite(checkpoint, progress)
    load_mode = load_mode_of(settings, checkpoint, device, out)
    where = "" if device == "cpu" else f" of {device}"
    how = "one decoder layer's weights at a time" if load_mode.streamed else "all weights in memory"
    reporter.say(f"{how}; at most about {byte_size(load_mode.predicted_bytes)}{where}")
    decoder = load_decoder(settings, checkpoint, load_mode, device)
    if by_itself:
        use_threads(decoder, settings.threads, reporter)
    check_causal(decoder, checkpoint.info.name)
    check_chain(decoder, checkpoint.info.name)
    settled = settle_effort(settings, checkpoint, decoder, tokenizer, items, reporter)
    if settled.limit != settings.limit:
        rows, items = rows_and_items(settled, checkpoint, tokenizer)
    return Opened(settled, checkpoint, load_mode, decoder, tokenizer, rows, items, importance, tensor_names)


def _with_sizes(checkpoint: Checkpoint, settings: Settings, reporter: Reporter) -> tuple[Checkpoint, BaseFile | None]:
    """Return the checkpoint with sizes as in the runtime's files, and the GGUF of --base-gguf."""
    file = _base_file(settings)
    if file is None:
        try:
            return with_runtime_file(checkpoint, settings.runtime, settings.quantizer), None
        except UserError as error:
            reporter.say(f"only weights are counted, and no GGUF of this model is written here as it is: {error}")
            return checkpoint, None
    base = open_base(file, checkpoint)
    checkpoint, lost = followed(base, checkpoint)
    if lost:
        reporter.say(
            f"--base-gguf: holds {len(lost)} modules in a form that is not followed, so they stay as they are: "
            f"{listed([module.name for module in lost[:MOST_NAMED]])}{' and others' * (len(lost) > MOST_NAMED)}"
        )
    return checkpoint, base


def _base_file(settings: Settings) -> Path | None:
    return base_of(settings.model, settings.base_gguf) if settings.runtime == LLAMA_CPP else None


def _tensor_names(checkpoint: Checkpoint, base: BaseFile | None) -> dict[str, str]:
    modules = [*checkpoint.modules, *checkpoint.outer]
    names = known_names([module.name for module in modules], checkpoint.config.model_type, checkpoint.info.layers)
    if base:
        names |= {module: name for name, rows in reversed(list(base.rows.items())) for module in rows.modules}
    return names


def read_importance(
    settings: Settings, checkpoint: Checkpoint, names: Mapping[str, str], reporter: Reporter
) -> ImportanceMatrix | None:
    """Read the file of --imatrix; None without one. names: module -> the tensor that it is in."""
    if settings.imatrix is None:
        return None
    every = inner(checkpoint.modules)
    modules = [module for module in every if module.name in names]
    widths = {module.name: module.shape[1] for module in modules}
    names = {module.name: names[module.name] for module in modules}
    matrix, missing = read_imatrix(Path(settings.imatrix), names, experts_of(modules), widths)
    missing += len(every) - len(modules)
    if missing:
        reporter.say(f"--imatrix: has no entry for {missing} of {len(every)} modules; their inputs all count alike")
    return matrix


def open_planned(settings: Settings) -> Checkpoint:
    """Open the checkpoint with the units that a survey plans."""
    return open_checkpoint(settings.model, settings.revision, settings.fuse, settings.experts == "each")


def check_kept(settings: Settings, checkpoint: Checkpoint) -> None:
    """Refuse a format of what stays as it is that is not the checkpoint's."""
    dtype = checkpoint.info.dtype
    for flag, names in (("--formats", settings.formats), ("--embedding-formats", settings.embedding_formats or ())):
        for name in names:
            if FORMATS[name].dtype not in ("", dtype):
                right = next((kept for kept, (_, of_kept) in KEPT.items() if of_kept == dtype), "")
                advice = f"give {right}" if right else "leave it out"
                raise UserError(
                    f"{flag} {name}: stands for weights that stay as they are, and the checkpoint's are {dtype}: {advice}"
                )


def left_experts(checkpoint: Checkpoint, settings: Settings) -> list[Module]:
    """Return the experts that stay as they are, since none are written for the runtime."""
    is_held = MADE_FOR[settings.runtime].experts and (settings.runtime != LLAMA_CPP or _base_file(settings))
    return [] if is_held else [module for module in checkpoint.modules if module.expert is not None]


def expert_lines(checkpoint: Checkpoint, left: Sequence[Module], settings: Settings) -> list[str]:
    """Return lines on a mixture's experts: what share of the file they are, and what becomes of them."""
    info = checkpoint.info
    experts = [*left, *(module for module in checkpoint.modules if module.expert is not None)]
    if not experts:
        return []
    kept = sum(kept_bytes(module, info.dtype) for module in experts)
    line = f"experts, {kept / info.total_bytes:.0%} of the file, {byte_size(kept)}: "
    if left:
        other = "but with --base-gguf" if settings.runtime == LLAMA_CPP else "--for"
        return [f"{line}stay as they are, since none are written here for {settings.runtime} ({other})"]
    line += "each has a format of its own" if settings.experts == "each" else "those of one kind in a layer share a format"
    if MADE_FOR[settings.runtime].alike:
        line = f"{line.partition(': ')[0]}: all of a layer share a format, as {settings.runtime} has it"
    if settings.runtime == "transformers":
        line += "; transformers itself loads them packed only in one symmetric format for all, bitatlas.load_packed in any"
    return [line]


def experts_of(modules: Iterable[Module]) -> dict[str, int]:
    """Return module -> number of the expert, of those that are one."""
    return {module.name: module.expert for module in modules if module.expert is not None}


def load_mode_of(settings: Settings, checkpoint: Checkpoint, device: str, out: Path) -> LoadMode:
    """Return how the model is loaded, by what was asked for and what is there; UserError where neither is possible."""
    dtype, formats, rows = settings.torch_dtype(device), len(settings.formats), sum(settings.rows)
    info, modules, vocabulary = checkpoint.info, inner(checkpoint.modules), checkpoint.vocabulary
    outside = max((module.weights for module in checkpoint.modules if module.part), default=0)
    need = estimate_memory(
        info, modules, vocabulary, rows, settings.row_length, formats, dtype, device, bool(settings.tasks), outside
    )
    load_mode = choose_load_mode(need, settings.memory_bytes, device, out)
    if load_mode.streamed and get_quantizer(settings.quantizer).needs_all:
        raise UserError(
            f"--quantizer {settings.quantizer}: needs all weights in memory, {byte_size(need.whole)}; rtn and gptq go layer by layer"
        )
    return load_mode


def load_decoder(settings: Settings, checkpoint: Checkpoint, load_mode: LoadMode, device: str) -> Decoder:
    """Load the model, in memory or layer by layer."""
    release_large_blocks()
    load = checkpoint.stream_model if load_mode.streamed else checkpoint.load_model
    return load(device, settings.torch_dtype(device))


def split_tasks(settings: Settings, tasks: Iterable[str]) -> dict[str, tuple[list[Item], list[Item]]]:
    """Return, for each task, its items to score and its spare ones."""
    folder = Path(settings.task_data) if settings.task_data else None
    return {task: split_items(task, folder, settings.limit, settings.seed, settings.few_shot) for task in tasks}


def rows_and_items(settings: Settings, checkpoint: Checkpoint, tokenizer: Any) -> tuple[Rows, TaskItems]:
    """Return the rows to measure on, and every task's items to score. Without a text, rows come from the items that are not scored."""
    split = split_tasks(settings, settings.tasks)
    source, documents = _documents(settings, {task: spare for task, (_, spare) in split.items()})
    context, vocabulary = checkpoint.info.context, checkpoint.vocabulary
    counts, length, seed = settings.rows, settings.row_length, settings.seed
    rows = make_rows(documents, tokenizer, source, counts, length, context, seed, vocabulary=vocabulary)
    items = {task: scored for task, (scored, _) in split.items()}
    for task, task_items in items.items():
        check_vocabulary(tokenizer, [task_text(task, task_items)], vocabulary)
    return rows, items


def sizes_text(checkpoint: Checkpoint, formats: Sequence[str]) -> str:
    """Return what there is to quantize, and the exact size of the whole model at every uniform format."""
    modules, info = checkpoint.modules, checkpoint.info
    sizes = {name: size_of(modules, uniform(modules, name), info) for name in formats}
    texts = [f"{name} {byte_size(size.total_bytes)} ({number(size.stored_bits)} stored bits)" for name, size in sizes.items()]
    return (
        f"{info.name}: {info.layers} layers, {len(modules)} modules in {len({m.unit for m in modules})} units, "
        f"{info.quantizable_weights:,} weights; {byte_size(info.total_bytes)} as it is, {'; '.join(texts)}; "
        f"quantized weights on disk: up to {byte_size(disk_bytes(modules, formats))}"
    )


def instead_lines(checkpoint: Checkpoint) -> list[str]:
    """Return a line for each length of rows that have other formats than were asked for."""
    counts = Counter((module.shape[1], tuple(module.instead.items())) for module in checkpoint.modules if module.instead)
    lines = []
    for (width, instead), count in counts.items():
        places: dict[str, list[str]] = {}  # what stands there -> for what
        for name, other in instead:
            places.setdefault(other, []).append(name)
        texts = (f"{other} in the place of {listed(names)}" for other, names in places.items())
        lines.append(f"rows of {width} ({count} modules): {', '.join(texts)}")
    return lines


def outside_lines(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """Return a line for each module outside the decoder layers: what it may become, or that it stays as it is, and why."""
    info, planned = checkpoint.info, {module.name: module for module in checkpoint.modules if module.part}
    lines = []
    for module in checkpoint.outer:
        kept = kept_bytes(module, info.dtype)
        share = f"{module.part} ({module.name}), {kept / info.total_bytes:.0%} of the file"
        if module.name in planned:
            sizes = {name: stored_bytes(module.shape, FORMATS[name]) for name in planned[module.name].candidates}
            lines.append(f"{share}, {byte_size(kept)}: {', '.join(f'{name} {byte_size(size)}' for name, size in sizes.items())}")
        elif settings.embedding_formats == ():
            lines.append(f"{share}: stays as it is, {byte_size(kept)}")
        else:
            lines.append(
                f"{share}: stays as it is, {byte_size(kept)}, since {settings.runtime} reads none in other formats (--for)"
            )
    return lines


def _documents(settings: Settings, spare: TaskItems) -> tuple[str, list[str]]:
    """Return (source, documents) to measure on: what was given, else the text of the chosen tasks' items that are not scored."""
    if settings.tokens:
        name = Path(settings.tokens).name if Path(settings.tokens).is_file() else settings.tokens
        return name, read_documents(settings.tokens)
    if not spare:
        raise UserError("--tokens: with --tasks none there is no text to measure on; give a text file")
    documents = [task_text(task, [item]) for task, items in spare.items() for item in items]
    return f"items of {', '.join(spare)} that are not scored", documents


def save_importance(session: Session) -> None:
    """Collect the importance matrix of a survey for llama.cpp and write it into its folder, for llama-quantize; leave one that is there."""
    file, checkpoint = session.out / IMATRIX_FILE, session.checkpoint
    if session.settings.runtime != LLAMA_CPP or session.importance or file.exists():
        return
    modules = [module for module in inner(checkpoint.modules) if module.name in session.tensor_names]
    if not modules:
        session.reporter.say(
            f"no {IMATRIX_FILE} is written: what llama.cpp calls this model's tensors is not known (--base-gguf)"
        )
        return
    with session.reporter.stage("importance matrix"):
        matrix = collect(session.decoder, [module.name for module in modules], session.rows.fit)
    count, length = session.rows.fit.shape
    write_imatrix(file, matrix, session.tensor_names, experts_of(modules), session.rows.info.source, (count, length))
    session.reporter.say(f"{file}: the importance matrix of the {count} fit rows, for llama-quantize")


# --- the folder ------------------------------------------------------------------------------------------------------------


def _check_folder(out: Path, resume: bool, checkpoint: Checkpoint, formats: Sequence[str]) -> None:
    with _folder_errors(out):
        is_file, holds_run = out.exists() and not out.is_dir(), (out / "run.sqlite").exists()
    if is_file:
        raise UserError(f"--out {out}: is a file; give a folder")
    if holds_run and not resume:
        raise UserError(f"--out {out}: holds a run already; add --resume to go on with it, or choose another folder")
    if holds_run:
        _open_journal(out, checkpoint).close()
    with _folder_errors(out):
        free = free_bytes(out.absolute())
    needed = OUTPUT_BYTES + disk_bytes(
        checkpoint.modules, [*formats, widest_of(formats)]
    )  # a uniform width outside may be asked for
    if free < needed:
        raise UserError(f"--out {out}: only {free // 2**20} MiB free on that disk; about {needed // 2**20} MiB are needed")


@contextmanager
def _folder_errors(out: Path) -> Iterator[None]:
    """Say whatever the system has against the folder in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(f"--out {out}: cannot be made ({(error.strerror or 'no permission').lower()})") from None


def _open_journal(out: Path, checkpoint: Checkpoint) -> Journal:
    with _folder_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "run.sqlite")
    try:
        journal.claim(checkpoint.info.weights_sha256, checkpoint.info.name)
    except UserError:
        journal.close()
        raise
    remove_leftovers(out)
    return journal


# --- a finished survey, opened again ---------------------------------------------------------------------------------------


def settings_of(atlas: Atlas) -> Settings:
    """Return the settings that a survey was made with. Options that have gone since are left out; those that came have their defaults."""
    content = {option.name: atlas.settings[option.name] for option in fields(Settings) if option.name in atlas.settings}
    content["budget"] = TypeAdapter(Budget).validate_python(content["budget"])
    for name in ("formats", "rows", "tasks"):
        content[name] = tuple(content[name])
    return replace(Settings.of(SurveyOptions(content["model"])), **content)


def rows_of_survey(atlas: Atlas, checkpoint: Checkpoint) -> Rows:
    """Make the rows again that a survey measured on, from its settings; UserError where their hash differs."""
    rows, _ = rows_and_items(settings_of(atlas), checkpoint, checkpoint.load_tokenizer())
    if rows.info.splits != atlas.tokens.splits:
        raise UserError(f"--tokens: {atlas.tokens.source} is not what the survey measured on; its hash differs")
    return rows


def fit_pool_of_survey(atlas: Atlas, checkpoint: Checkpoint, rows: Rows) -> Tensor:
    """Return every row of what a survey's fit rows were taken from: int64 [rows, tokens]. rows: the survey's."""
    settings = settings_of(atlas)
    spare = {task: items for task, (_, items) in split_tasks(settings, settings.tasks).items()}
    return fit_pool(_documents(settings, spare)[1], checkpoint.load_tokenizer(), rows, settings.seed)


def reopen(folder: Path, atlas: Atlas, model_name: str | None, device: str | None, reporter: Reporter) -> Session:
    """Open a finished survey again to measure more plans: same rows, same journal, same bank. No tasks.

    `model_name`, `device`: where they are no longer what they were.
    """
    settings = settings_of(atlas)
    settings = replace(settings, model=model_name or settings.model, device=device or settings.device)
    device = check_device(settings.device)
    with reporter.stage("opening the checkpoint"):
        checkpoint, planned = open_planned(settings), {module.name for module in atlas.modules}
        checkpoint = checkpoint.leaving([module for module in checkpoint.modules if module.name not in planned])
        checkpoint = replace(checkpoint, modules=list(atlas.modules), info=replace(checkpoint.info, file=atlas.model.file))
        if checkpoint.info.weights_sha256 != atlas.model.weights_sha256:
            raise UserError(f"{settings.model}: these are not the weights that {folder} is a survey of ({atlas.model.name})")
        rows = rows_of_survey(atlas, checkpoint)
        check_finite(checkpoint)
        load_mode = load_mode_of(settings, checkpoint, device, folder)
        decoder = load_decoder(settings, checkpoint, load_mode, device)
    use_threads(decoder, settings.threads, reporter)
    tokenizer, journal = checkpoint.load_tokenizer(), _open_journal(folder, checkpoint)
    base_file = _base_file(settings)
    base = open_base(base_file, checkpoint) if base_file else None
    names = _tensor_names(checkpoint, base)
    importance = read_importance(settings, checkpoint, names, reporter)
    return Session(settings, checkpoint, load_mode, decoder, tokenizer, rows, {}, importance, names, folder, journal, reporter)
