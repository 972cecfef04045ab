"""Does a plan keep its promise? Its size recomputed, its damage measured again, both against what the plan says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitatlas.bank import Bank
from bitatlas.checkpoint import Checkpoint, check_finite, open_checkpoint
from bitatlas.errors import UserError
from bitatlas.evaluation.bootstrap import measured
from bitatlas.files import read_record
from bitatlas.journal import Journal
from bitatlas.planning.budget import size_of
from bitatlas.prepare import BANK, rows_of_survey
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Measured, Plan, Size
from bitatlas.sensitivity.damage import DamageMeter
from bitatlas.settings import check_device
from bitatlas.tokens import Rows, make_rows, read_documents


@dataclass(frozen=True)
class Verification:
    """`kept`: the size is to the byte what was promised, and the damage is not above the promise beyond its interval."""

    plan: Plan
    size: Size
    damage: Measured
    promised: float | None  # nats/token
    size_kept: bool
    damage_kept: bool

    @property
    def kept(self) -> bool:
        return self.size_kept and self.damage_kept


def verify_plan(
    model_name: str,
    plan_file: Path,
    tokens: str | None,
    rows: tuple[int, int, int],
    row_length: int,
    device: str,
    seed: int,
    reporter: Reporter,
) -> Verification:
    """Measure `plan_file` on `model_name`. Without `tokens`, the rows of the survey that lies beside the plan are used again."""
    plan = read_record(plan_file, Plan)
    checkpoint = open_checkpoint(model_name, plan.model.revision, fuse=False)
    _check_fits(plan, checkpoint)
    test = _rows(plan_file, checkpoint, tokens, rows, row_length, seed)
    check_finite(checkpoint)
    model = checkpoint.load_model(check_device(device))
    bank = _bank(plan, plan_file, model)
    meter = DamageMeter(model, bank, checkpoint.info.weights_sha256, bank.identity, Journal(None))
    with reporter.stage("damage of the plan") as progress:
        damage = measured(meter.plans({"plan": plan.modules}, test.test, progress)["plan"], "nats/token", "plan", "test", seed)
    size = size_of(checkpoint.modules, plan.modules, checkpoint.info)
    promise = plan.damage.measured.mean if plan.damage.measured else plan.damage.predicted
    lowest = damage.ci95[0] if damage.ci95 else damage.mean
    return Verification(plan, size, damage, promise, size == plan.size, promise is None or lowest <= promise)


def _bank(plan: Plan, plan_file: Path, model: Any) -> Bank:
    """The weights that the plan is about: from the bank of its survey, or quantized again where they depend on the model alone."""
    places = [folder / BANK for folder in (plan_file.parent, plan_file.parent.parent) if (folder / BANK).is_dir()]
    bank = Bank(
        model,
        list(plan.modules),
        plan.quantizer,
        plan.formats,
        folder=places[0] if places else None,
        weights_sha256=plan.model.weights_sha256,
        identity=plan.codes or None,
    )
    if bank.quantizer.uses_rows and not bank.holds(plan.modules):
        raise UserError(
            f"{plan_file}: {plan.quantizer} weights depend on the text they were fitted on, so the survey's folder {BANK!r} must lie "
            "beside the plan, whole; or run the survey again with --resume"
        )
    return bank


def _check_fits(plan: Plan, checkpoint: Checkpoint) -> None:
    if plan.model.weights_sha256 != checkpoint.info.weights_sha256:
        raise UserError(f"{checkpoint.info.name}: these are not the weights that the plan was made for ({plan.model.name})")
    unknown = sorted(set(plan.modules) - {module.name for module in checkpoint.modules})
    if unknown:
        raise UserError(f"the plan names {unknown[0]}, which the checkpoint lacks")


def _rows(
    plan_file: Path, checkpoint: Checkpoint, tokens: str | None, rows: tuple[int, int, int], row_length: int, seed: int
) -> Rows:
    if tokens is None:
        atlas_file = plan_file.parent / "atlas.json"
        if not atlas_file.is_file():
            raise UserError(f"--tokens: no atlas.json lies beside {plan_file}, so its text is not known; give a text file")
        return rows_of_survey(read_record(atlas_file, Atlas), checkpoint)
    vocabulary = int(checkpoint.config.get_text_config().vocab_size)
    tokenizer, context = checkpoint.load_tokenizer(), checkpoint.info.context
    return make_rows(read_documents(tokens), tokenizer, tokens, rows, row_length, context, seed, vocabulary=vocabulary)
