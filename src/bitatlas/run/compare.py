"""Compare any two checkpoints or plans on the same rows and the same items, paired: damage between them, and every task's difference.

Reads whatever transformers loads, quantized checkpoints included, so that a model from another tool is judged by the same rules. A plan
(its file, or its survey's folder) is its checkpoint with the weights of the survey's bank, or quantized again where no text was needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.data.rows import make_rows
from bitatlas.data.tasks import chance_level, check_task_names, load_items
from bitatlas.data.texts import read_documents
from bitatlas.errors import UserError
from bitatlas.export.card import atlas_beside
from bitatlas.export.packed import check_package, fitted
from bitatlas.export.trial import open_packed
from bitatlas.measure.damage import kl_per_row
from bitatlas.measure.tasks import right_of, score_items, with_norms
from bitatlas.model.checkpoint import check_finite, open_checkpoint, open_model
from bitatlas.model.decoder import vocabulary_size
from bitatlas.model.folder import find_folder, read_config
from bitatlas.model.layerwise import batch_rows
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import bank_of_plan
from bitatlas.records import Measured, Plan, TaskPair, TaskScore
from bitatlas.records.files import read_record
from bitatlas.run.options import CompareOptions, check_seed
from bitatlas.run.settings import check_device
from bitatlas.stats.bootstrap import measured
from bitatlas.stats.margin import parse_points
from bitatlas.stats.paired import compare_all

PACKED = "compressed-tensors"


@dataclass(frozen=True)
class Comparison:
    """`damage`: KL(first || second), None without text. `losses`: cross-entropy of each on the same rows, nats/token."""

    first: str
    second: str
    damage: Measured | None
    losses: tuple[Measured, Measured] | None
    loss_difference: Measured | None  # second minus first, paired by row
    scores: list[TaskScore]
    pairs: list[TaskPair]


def compare_models(options: CompareOptions) -> Comparison:
    """Compare two checkpoints or plans; UserError where there is nothing to compare them on."""
    check_seed(options.seed)
    margin = parse_points(options.margin, "--margin")
    first, second, reporter = str(options.first), str(options.second), Reporter(options.quiet)
    names = check_task_names(options.tasks or ())
    if not names and options.tokens is None:
        raise UserError("--tokens, --tasks: give a text, tasks, or both: there is nothing to compare the models on")
    device = check_device(options.device)
    data = Path(options.task_data) if options.task_data else None
    items = {task: load_items(task, data, options.limit, options.seed, options.few_shot) for task in names}
    models = [_open(name, other, device) for name, other in ((first, second), (second, first))]
    damage, losses, difference = None, None, None
    if options.tokens is not None:
        with reporter.stage("damage and loss") as progress:
            damage, losses, difference = _on_rows(models, options, progress)
    outcomes: dict[str, dict[str, np.ndarray]] = {task: {} for task in items}
    lines: list[dict[str, Any]] = []
    labels = _labels(first, second)
    for task, task_items in items.items():
        for label, (model, tokenizer) in zip(labels, models, strict=True):
            with reporter.stage(f"{task} ({label})"):
                answers = score_items(model, tokenizer, task, task_items)
            outcomes[task][label] = right_of(answers)
            lines += [{"task": task, "precision": label, **answer} for answer in answers]
    scores, pairs = compare_all(outcomes, {task: chance_level(task_items) for task, task_items in items.items()}, margin)
    return Comparison(*labels, damage, losses, difference, with_norms(scores, lines), pairs)


# --- what is compared --------------------------------------------------------------------------------------------------


def _open(name: str, other: str, device: str) -> tuple[Any, Any]:
    """Open (model, tokenizer) of a checkpoint, or of a plan's checkpoint with the plan's weights in it. `other`: what it is compared with."""
    plan_file = _plan_file(name)
    if plan_file is not None:
        return _open_plan(plan_file, other, device)
    folder = find_folder(name, None)
    quantization = getattr(read_config(folder, name, quantized=True), "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == PACKED:
        check_package()
        return open_packed(folder, device)
    return open_model(name, device)


def _plan_file(name: str) -> Path | None:
    """Return the plan that an argument means: a file, or a survey's folder; a folder that is a checkpoint is one."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / "plan.json").is_file() and not (path / "config.json").exists():
        return path / "plan.json"
    return path if path.is_file() else None


def _open_plan(plan_file: Path, other: str, device: str) -> tuple[Any, Any]:
    """Open a plan. Its checkpoint is what it is compared with, where that is what the plan was made for; else the one that its survey names."""
    plan = read_record(plan_file, Plan)
    checkpoint = None
    if _plan_file(other) is None:
        folder = find_folder(other, None)
        if not getattr(read_config(folder, other, quantized=True), "quantization_config", None):
            checkpoint = open_checkpoint(other, None, fuse=False)
    if checkpoint is None or checkpoint.info.weights_sha256 != plan.model.weights_sha256:
        atlas = atlas_beside(plan_file.absolute())
        if atlas is None:
            raise UserError(
                f"{plan_file}: a plan of {plan.model.name}, but neither is that the other model nor does an atlas.json beside it say where "
                "it is; compare it with its checkpoint, or leave it in its survey's folder"
            )
        checkpoint = open_checkpoint(str(atlas.settings["model"]), plan.model.revision, fuse=False)
    checkpoint = fitted(plan, checkpoint)
    check_finite(checkpoint)
    decoder = checkpoint.load_model(device)
    weights = bank_of_plan(plan, plan_file, decoder, list(plan.modules)).weights(plan.modules)
    for module, weight in weights.items():
        decoder.weight(module).copy_(weight)
    return decoder.model, checkpoint.load_tokenizer()


def _labels(first: str, second: str) -> tuple[str, str]:
    """Return the folders' names, or the whole words where these are equal."""
    short = Path(first).name, Path(second).name
    return short if short[0] != short[1] else (first, second) if first != second else (f"{first} (A)", f"{second} (B)")


@torch.no_grad()
def _on_rows(
    models: list[tuple[Any, Any]], options: CompareOptions, progress: Any
) -> tuple[Measured, tuple[Measured, Measured], Measured]:
    """Measure (KL(A || B), cross-entropy of each, B minus A) on the test rows, nats/token."""
    tokens, length = str(options.tokens), options.row_length
    (model_a, tokenizer), (model_b, other) = models
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError("--tokens: the models' tokenizers differ, so their distributions cannot be compared; compare on --tasks")
    context = min(int(getattr(m.config.get_text_config(), "max_position_embeddings", length)) for m in (model_a, model_b))
    vocabulary = min(vocabulary_size(m.config) for m in (model_a, model_b))
    documents = read_documents(tokens)
    rows = make_rows(documents, tokenizer, tokens, options.rows, length, context, options.seed, vocabulary=vocabulary)
    batches = rows.test.split(batch_rows(length, len(tokenizer)))
    values: list[Tensor] = []  # of each batch: [3, rows]
    for done, batch in enumerate(batches, start=1):
        logits = [model(input_ids=batch.to(model.device), use_cache=False).logits.float() for model, _ in models]
        width = min(part.shape[-1] for part in logits)  # padded vocabularies may differ
        logits = [part[..., :width] for part in logits]  # [rows, tokens, vocabulary]
        log_p = [torch.log_softmax(part, -1) for part in logits]
        nll = [-log[:, :-1].gather(-1, batch[:, 1:, None].to(log.device)).squeeze(-1).double().mean(-1) for log in log_p]
        values.append(torch.stack([kl_per_row(log_p[0], logits[1]), *nll]))
        progress(done, len(batches))
    kl, first, second = torch.cat(values, dim=1).cpu().numpy()
    blocks = rows.blocks("test")

    def record(by_row: np.ndarray, name: str) -> Measured:
        return measured(by_row, "nats/token", name, "test", options.seed, blocks)

    return record(kl, "A"), (record(first, "A"), record(second, "B")), record(second - first, "A")
