"""Measure whether a plan keeps its promise: its size recomputed, its damage measured again, both against what the plan says.

Given a folder that `apply` wrote, the checkpoint in it is what is measured: loaded by transformers as anybody would load it, its
files' sizes taken from the disk, its tasks scored where they are asked for. Given a GGUF, it is run in llama.cpp on the test rows, beside
the reference model in transformers; its own tensors say which types and how many bytes it holds. A GGUF that llama-quantize made is
verified too, where the plan lies beside it as plan.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.data.rows import Rows, make_rows
from bitatlas.data.tasks import chance_level
from bitatlas.data.texts import read_documents
from bitatlas.errors import UserError
from bitatlas.export.blueprint import blueprint_of, promised_disk_bytes
from bitatlas.export.card import VERIFIED, atlas_beside, evidence_beside
from bitatlas.export.gguf.base import with_base
from bitatlas.export.gguf.header import PLAN_KEY, TENSORS_KEY
from bitatlas.export.gguf.names import weight_names
from bitatlas.export.gguf.run import LlamaSession, check_library, open_gguf
from bitatlas.export.packed import card_of, check_package, fitted
from bitatlas.export.targets import with_runtime_file
from bitatlas.export.trial import open_packed
from bitatlas.measure.damage import DamageMeter, kl_per_row
from bitatlas.measure.machine import use_threads
from bitatlas.measure.tasks import right_of, score_items
from bitatlas.model.checkpoint import Checkpoint, check_finite, open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.folder import weight_files
from bitatlas.model.from_gguf import open_reader
from bitatlas.model.layerwise import batch_rows, whole_logits
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import bank_of_plan
from bitatlas.quantize.ggml import check_packages
from bitatlas.records import Measured, Plan, Size, TaskScore
from bitatlas.records.files import parse_record, read_record, write_text
from bitatlas.records.formats import FORMATS, LLAMA_CPP
from bitatlas.records.journal import Journal
from bitatlas.records.plan import without_kept
from bitatlas.records.sizes import size_of
from bitatlas.run.options import StrPath, TuneOptions, VerifyOptions, check_seed
from bitatlas.run.prepare import rows_of_survey, settings_of, split_tasks
from bitatlas.run.settings import check_device
from bitatlas.stats.bootstrap import measured
from bitatlas.stats.paired import compare_all


@dataclass(frozen=True)
class TaskCheck:
    """One task again. `kept`: what was promised is not above the Wilson interval of what was found."""

    task: str
    promised: int  # right
    n: int
    found: TaskScore

    @property
    def kept(self) -> bool:
        return self.promised / self.n <= self.found.wilson95[1]


@dataclass(frozen=True)
class Verification:
    """`kept`: the size is to the byte what was promised, and the damage is not above the promise beyond its interval."""

    plan: Plan
    size: Size
    damage: Measured
    size_kept: bool
    disk: tuple[int, int] | None = None  # of a checkpoint or a GGUF: bytes that should be there, and are
    tasks: tuple[TaskCheck, ...] = ()
    disk_what: str = "weights' files, bytes"

    @property
    def promised(self) -> float | None:
        """Damage, nats/token."""
        damage = self.plan.damage
        return damage.measured.mean if damage.measured else damage.predicted

    @property
    def damage_kept(self) -> bool:
        lowest = self.damage.ci95[0] if self.damage.ci95 else self.damage.mean
        return self.promised is None or lowest <= self.promised

    @property
    def kept(self) -> bool:
        return self.size_kept and self.damage_kept and all(task.kept for task in self.tasks)


def verify_plan(options: VerifyOptions) -> Verification:
    """Measure a plan, or the checkpoint or the GGUF that was made of one. Without `tokens`, the rows of the survey beside it are used again.

    `tasks`: of the survey's, with a checkpoint alone. `card`: write what was found into the checkpoint's README.md.
    """
    check_seed(options.seed)
    plan_file, reporter = Path(options.plan_or_checkpoint), Reporter(options.quiet)
    for_folder = options.card or options.tasks
    if plan_file.suffix == ".gguf" and not plan_file.is_dir():
        if for_folder:
            raise UserError("--card, --tasks: belong to a packed checkpoint, not to a GGUF")
        return verify_gguf(options)
    folder = plan_file if plan_file.is_dir() else None
    if folder is None and for_folder:
        raise UserError("--card, --tasks: belong to a packed checkpoint; give the folder that apply wrote")
    if folder is not None:
        check_package()
        plan_file = folder / "plan.json"
    plan = read_record(plan_file, Plan)
    checkpoint, rows = _open_planned(plan, plan_file, options)
    sized = _sized(checkpoint, plan, options)
    test = rows.test
    items = _items(plan_file, plan, options.tasks or ())
    decoder = _load(checkpoint, options, reporter)
    disk: tuple[int, int] | None = None
    checks: tuple[TaskCheck, ...] = ()
    if folder is None:
        bank = bank_of_plan(plan, plan_file, decoder, list(plan.modules))
        meter = DamageMeter(decoder, bank, checkpoint.info.weights_sha256, bank.identity, Journal(None))
        with reporter.stage("damage of the plan") as progress:
            nats = meter.plans({"plan": plan.modules}, test, progress)["plan"]
    else:
        packed, tokenizer = open_packed(folder, check_device(options.device))
        promised = promised_disk_bytes(plan, blueprint_of(without_kept(plan), checkpoint, checkpoint.skeleton()))
        disk = promised, _disk_bytes(folder)
        with reporter.stage("damage of the checkpoint") as progress:
            nats = kl_between(decoder, packed, test, progress)
        checks = tuple(_check_task(packed, tokenizer, *entry, reporter) for entry in items)
    damage = measured(nats, "nats/token", "plan", "test", options.seed, rows.blocks("test"))
    size = size_of(sized.modules, plan.modules, sized.info)
    size_kept = size == plan.size and (disk is None or disk[0] == disk[1])
    result = Verification(plan, size, damage, size_kept, disk, checks)
    if folder is not None and options.card:
        _write_card(folder, checkpoint, result, options.tokens)
    return result


def _open_planned(plan: Plan, plan_file: Path, options: VerifyOptions) -> tuple[Checkpoint, Rows]:
    checkpoint = open_checkpoint(str(options.model), plan.model.revision, fuse=False)
    checkpoint = fitted(plan, checkpoint)
    return checkpoint, rows_for(plan_file, checkpoint, options)


def _sized(checkpoint: Checkpoint, plan: Plan, options: VerifyOptions) -> Checkpoint:
    """Return the checkpoint with what its modules, and all the rest, take in the files that the plan is for."""
    if plan.runtime == LLAMA_CPP:
        on_base = with_base(checkpoint, str(options.model), options.base_gguf)
        if on_base.info.file:
            return on_base
    return with_runtime_file(checkpoint, plan.runtime, plan.quantizer)


def _load(checkpoint: Checkpoint, options: VerifyOptions, reporter: Reporter) -> Decoder:
    check_finite(checkpoint)
    decoder = checkpoint.load_model(check_device(options.device))
    use_threads(decoder, None, reporter)
    return decoder


def _disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


@torch.no_grad()
def kl_between(decoder: Decoder, packed: Any, rows: Tensor, progress: Callable[[int, int], None]) -> np.ndarray:
    """Return KL(decoder || packed) of two models of one vocabulary, rows int64 [rows, tokens] -> float64 [rows], nats/token."""
    values, batches = [], rows.split(batch_rows(rows.shape[1], decoder.vocabulary))
    for done, batch in enumerate(batches, start=1):
        logits = [model(input_ids=batch.to(model.device), use_cache=False).logits.float() for model in (decoder.model, packed)]
        values.append(kl_per_row(torch.log_softmax(logits[0], -1), logits[1]).cpu())
        progress(done, len(batches))
    return torch.cat(values).numpy()


def rows_for(plan_file: Path, checkpoint: Checkpoint, options: VerifyOptions | TuneOptions) -> Rows:
    """Return the rows of the text that is given, or those of the survey in whose folder `plan_file` lies."""
    if options.tokens is None:
        atlas = atlas_beside(plan_file.absolute())
        if atlas is None or atlas.model.weights_sha256 != checkpoint.info.weights_sha256:
            raise UserError(
                f"--tokens: no atlas.json of this model lies beside {plan_file}, so its text is not known; give a text file"
            )
        return rows_of_survey(atlas, checkpoint)
    vocabulary = checkpoint.vocabulary
    tokens, tokenizer, context = str(options.tokens), checkpoint.load_tokenizer(), checkpoint.info.context
    documents, length = read_documents(tokens), options.row_length
    return make_rows(documents, tokenizer, tokens, options.rows, length, context, options.seed, vocabulary=vocabulary)


# --- tasks and the card ------------------------------------------------------------------------------------------------


def _items(plan_file: Path, plan: Plan, names: Sequence[str]) -> list[tuple[TaskScore, list[Any]]]:
    """Return what each task promised, and its items; UserError for a task that promised nothing."""
    if not names or list(names) == ["none"]:
        return []
    atlas = atlas_beside(plan_file.absolute())
    promised = {score.task: score for score in evidence_beside(plan_file, plan).tasks}
    missing = [name for name in names if name not in promised]
    if atlas is None or missing:
        known = f"it promised {', '.join(promised)}" if promised else "no survey of this plan with tasks lies beside it"
        raise UserError(f"--tasks {','.join(names)}: nothing was promised about {(missing or names)[0]}: {known}")
    split = split_tasks(settings_of(atlas), names)
    return [(promised[name], split[name][0]) for name in names]


def _check_task(model: Any, tokenizer: Any, promised: TaskScore, items: list[Any], reporter: Reporter) -> TaskCheck:
    with reporter.stage(promised.task):
        right = right_of(score_items(model, tokenizer, promised.task, items))
    scores, _ = compare_all({promised.task: {"plan": right}}, {promised.task: chance_level(items)})
    return TaskCheck(promised.task, promised.correct, promised.n, scores[0])


def _write_card(folder: Path, checkpoint: Checkpoint, result: Verification, tokens: StrPath | None) -> None:
    """Write the card again, with what was found here in the place of what the survey measured."""
    story = evidence_beside(folder / "plan.json", result.plan)
    text = Path(tokens).name if tokens else story.text
    scores = tuple(check.found for check in result.tasks)
    story = replace(story, text=text, damage=result.damage, tasks=scores, source=VERIFIED)
    write_text(folder / "README.md", card_of(result.plan, checkpoint, story, _disk_bytes(folder)))


# --- GGUF ----------------------------------------------------------------------------------------------------------------

ROW = "in the file, bytes"


def verify_gguf(options: VerifyOptions) -> Verification:
    """Measure a GGUF against what its plan promises. Without `tokens`, the rows of the survey in whose folder it lies."""
    file, reporter = Path(options.plan_or_checkpoint), Reporter(options.quiet)
    check_packages(str(file))
    check_library(str(file))
    reader = open_reader(file)
    plan = _plan_of(file, reader)
    checkpoint, rows = _open_planned(plan, file, options)
    length = rows.test.shape[1]
    context = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.context_length")
    if context is not None and length > context.contents():
        raise UserError(f"--row-length {length}: the GGUF's context is {context.contents()} tokens; give at most that")
    decoder = _load(checkpoint, options, reporter)
    with open_gguf(file, length) as session, reporter.stage("damage in llama.cpp") as progress:
        nats = damage_in_llama_cpp(decoder, session, rows.test, progress)
    damage = measured(nats, "nats/token", "plan", "test", options.seed, rows.blocks("test"))
    formats, count = _formats_and_bytes(reader, checkpoint)
    as_planned = formats == without_kept(plan).modules
    if plan.runtime == LLAMA_CPP:
        disk = plan.size.total_bytes, file.stat().st_size
        return Verification(plan, plan.size, damage, as_planned and disk[0] == disk[1], disk, disk_what="the file, bytes")
    size, promised = size_of(checkpoint.modules, formats, checkpoint.info), plan.size.quantized_bytes
    size_kept = as_planned and size == plan.size and count == promised
    return Verification(plan, size, damage, size_kept, (promised, count), disk_what=ROW)


@torch.no_grad()
def damage_in_llama_cpp(
    decoder: Decoder, session: LlamaSession, rows: Tensor, progress: Callable[[int, int], None]
) -> np.ndarray:
    """Return KL(reference || the GGUF), rows int64 [rows, tokens] -> float64 [rows], nats/token."""
    if session.vocabulary != decoder.vocabulary:
        raise UserError(f"the GGUF has {session.vocabulary} tokens, the model {decoder.vocabulary}")
    values = []
    for done, row in enumerate(rows, start=1):
        reference = whole_logits(decoder, row[None].to(decoder.device)).float().cpu()
        session.clear()
        session.decode(row.tolist())
        logits = torch.from_numpy(session.logits(len(row)))[None]  # [1, tokens, vocabulary]
        values.append(kl_per_row(torch.log_softmax(reference, -1), logits))
        progress(done, len(rows))
    return torch.cat(values).numpy()


def _plan_of(file: Path, reader: Any) -> Plan:
    entry = reader.fields.get(PLAN_KEY)
    if entry is not None:
        return parse_record(str(entry.contents()), str(file), Plan)
    if not (file.parent / "plan.json").is_file():
        raise UserError(f"{file}: holds no plan, and no plan.json lies beside it")
    return read_record(file.parent / "plan.json", Plan)


def _formats_and_bytes(reader: Any, checkpoint: Checkpoint) -> tuple[dict[str, str], int]:
    """Return (module -> format, bytes of these modules) as the file's own tensors have it."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entry = reader.fields.get(TENSORS_KEY)
    if entry is not None:
        modules_of: dict[str, list[str]] = json.loads(entry.contents())
    else:
        names = weight_names([m.name for m in checkpoint.modules], checkpoint.config.model_type, checkpoint.info.layers)
        modules_of = {name: [module] for module, name in names.items()}
    formats: dict[str, str] = {}
    count = 0
    for name, modules in modules_of.items():
        if name not in tensors:
            raise UserError(f"the GGUF lacks {name}, which {modules[0]} should be")
        kind = tensors[name].tensor_type.name.lower()
        if kind in FORMATS and not FORMATS[kind].dtype:
            formats |= dict.fromkeys(modules, kind)
            count += int(tensors[name].n_bytes)
    return formats, count
