"""Tune the codes of a plan on the fit text, measure them beside the untuned ones, and write a plan of its own beside the given one.

The tuned codes are a bank of their own, under the name that the new plan has for its codes, so that `apply`, `export`, `verify` and `compare`
take the new plan like any other. The number of steps is settled before the start, from the time that is given and what a step takes here;
the same number of steps gives the same bytes. Test rows are looked at once, at the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from torch import Tensor

from bitatlas.data.rows import Rows, fit_pool, rows_sha256
from bitatlas.data.texts import read_documents
from bitatlas.errors import UserError
from bitatlas.export.card import atlas_beside
from bitatlas.export.packed import Applied, apply_plan, check_package, fitted
from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.machine import LIBRARIES_BYTES, LOGIT_ARRAYS, available_bytes, use_threads
from bitatlas.model.checkpoint import Checkpoint, check_finite, open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.folder import check_out
from bitatlas.model.layerwise import LOGIT_BYTES, check_chain
from bitatlas.model.streaming import LazyMapping
from bitatlas.plan.judge import BETTER, NO_WORSE
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import BANK, TUNED, Bank, bank_of_plan
from bitatlas.quantize.codes import Codes, Kept
from bitatlas.quantize.tune import BYTES_A_WEIGHT, STATE_BYTES, STEP_ROWS, VERSION, Tuned, Tuner, Tuning
from bitatlas.records import Baseline, Measured, Module, Plan, PlanDamage
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.journal import Journal, content_key
from bitatlas.records.plan import without_kept
from bitatlas.records.sizes import inner
from bitatlas.records.text import byte_size, duration, given_size, interval, number
from bitatlas.run.options import ApplyOptions, TuneOptions, check_seed
from bitatlas.run.prepare import fit_pool_of_survey
from bitatlas.run.settings import check_device, parse_size, parse_time
from bitatlas.run.verify import rows_for
from bitatlas.stats.bootstrap import measured

SELECT_ROWS = 12  # on which the marks are measured
CODES_BYTES = 2**28  # of unpacked codes of a streamed model in memory
SCALE_BYTES = 22  # of a group: its scale, change and moments, those of the best mark, and a state that is being written
UNTUNED = "the same plan, codes not tuned"


@dataclass(frozen=True)
class TunedPlan:
    """The better plan of two, and its file: where tuning helped nothing, the one that was given. `result`: what tuning did."""

    plan: Plan
    file: Path
    result: Tuned


@dataclass(frozen=True)
class _Opened:
    """A plan with its model, its codes, and the rows to tune and to judge on.

    banks: the folder of the new codes' bank; pool: all rows of the fit text, int64 [rows, tokens]; every: the plan's modules, with those that stay
    as they are.
    """

    plan: Plan
    checkpoint: Checkpoint
    decoder: Decoder
    bank: Bank
    banks: Path
    rows: Rows
    pool: Tensor
    seed: int
    every: dict[str, str]


def tune_plan(options: TuneOptions) -> TunedPlan:
    """Tune a plan's codes and write the new plan; UserError, and nothing written, where that is impossible."""
    plan_file, reporter = Path(options.plan), Reporter(options.quiet)
    out, seconds = plan_file.with_name(f"{plan_file.stem}-tuned.json"), parse_time(options.time)
    opened = _open(plan_file, options, reporter)
    use_threads(opened.decoder, None, reporter)
    tuner = _tuner(opened, options, seconds, reporter)
    with reporter.stage("tuning") as progress:
        result = tuner.run(progress)
    marks = ", ".join(f"{number(damage)} after {step}" for step, damage in result.select.items())
    reporter.say(f"select rows, nats/token by steps: {marks}")
    if result.steps:
        write_text(out, to_json(plan := _finished(opened, tuner, result, reporter)))
    else:
        reporter.say(f"no number of steps was better than none: {plan_file} stays as it is (more text would help)")
    if tuner.state_file:
        tuner.state_file.unlink(missing_ok=True)
    return TunedPlan(plan, out, result) if result.steps else TunedPlan(opened.plan, plan_file, result)


def apply_tuned(options: ApplyOptions) -> tuple[Applied, TunedPlan | None]:
    """Write a plan's packed checkpoint, with `options.tune` after tuning its codes for so long."""
    plan_file, tuned, reporter = Path(options.plan), None, Reporter(options.quiet)
    if options.tune:
        check_package()
        check_out(Path(options.out))
        parse_time(options.tune, "--tune")
        tuned = tune_plan(TuneOptions(options.model, plan_file, time=options.tune, quiet=options.quiet))
        plan_file = tuned.file
    return apply_plan(str(options.model), plan_file, Path(options.out), reporter), tuned


# --- opening --------------------------------------------------------------------------------------------------------------


def _open(plan_file: Path, options: TuneOptions, reporter: Reporter) -> _Opened:
    check_seed(options.seed)
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps {options.steps}: at least 1")
    whole_plan, device = read_record(plan_file, Plan), check_device(options.device)
    plan = without_kept(whole_plan)
    _check(plan, plan_file)
    with reporter.stage("opening the checkpoint"):
        checkpoint = open_checkpoint(str(options.model), plan.model.revision, fuse=False)
        checkpoint = fitted(plan, checkpoint)
        rows = rows_for(plan_file, checkpoint, options)
        pool = _fit_rows(plan_file, checkpoint, rows, options)
        need = _memory_need(plan, checkpoint, rows.info.row_length, len(pool), device)
        whole = _fits_whole(need, parse_size(options.memory, "--memory") if options.memory else None, device)
        check_finite(checkpoint)
        decoder = (checkpoint.load_model if whole else checkpoint.stream_model)(device)
        check_chain(decoder, checkpoint.info.name)
        bank = bank_of_plan(plan, plan_file, decoder, list(plan.modules))
        bank.cache_bytes = checkpoint.info.quantizable_weights if whole else CODES_BYTES
        bank.ready(plan.modules.items())
    if not whole:
        reporter.say(f"one decoder layer's weights at a time; at most about {byte_size(need.streamed)}")
    banks = bank.folder.parent if bank.folder else plan_file.parent / BANK
    return _Opened(plan, checkpoint, decoder, bank, banks, rows, pool, options.seed, whole_plan.modules)


def _check(plan: Plan, plan_file: Path) -> None:
    foreign = [fmt for fmt in plan.formats.values() if fmt.runtime]
    if foreign:
        raise UserError(
            f"{plan_file}: its formats ({foreign[0].name}) are of the runtime {foreign[0].runtime}, whose blocks cannot be tuned"
        )
    if TUNED in plan.codes:
        raise UserError(f"{plan_file}: its codes are tuned already; give the plan that it was made of")


def _fit_rows(plan_file: Path, checkpoint: Checkpoint, rows: Rows, options: TuneOptions) -> Tensor:
    """Return all rows of the fit text."""
    if options.tokens is not None:
        return fit_pool(read_documents(str(options.tokens)), checkpoint.load_tokenizer(), rows, options.seed)
    atlas = atlas_beside(plan_file.absolute())
    assert atlas  # `rows_for` has refused a plan without one
    return fit_pool_of_survey(atlas, checkpoint, rows)


@dataclass(frozen=True)
class _Need:
    """Bytes at the peak, with all weights in memory and layer by layer."""

    whole: int
    streamed: int


def _memory_need(plan: Plan, checkpoint: Checkpoint, row_length: int, rows: int, device: str) -> _Need:
    """Return what tuning takes: all weights three times, or those of one layer; what a step keeps; what is kept of the reference's rows."""
    info = checkpoint.info
    planned = [module for module in inner(checkpoint.modules) if module.name in plan.modules]
    outside = sum(4 * module.weights for module in checkpoint.modules if module.part)
    layers = [[module for module in planned if module.layer == layer] for layer in sorted({m.layer for m in planned})]
    others = 4 * info.other_numbers if info.other_numbers else info.other_bytes
    tokens, width = STEP_ROWS * row_length, checkpoint.modules[0].shape[1]
    process = psutil.Process().memory_info().rss if device == "cpu" else 0
    base = process + LIBRARIES_BYTES + others + outside + 4 * (rows + SELECT_ROWS) * row_length * width

    def kept(modules: Sequence[Module], attention_layers: int) -> int:
        """Bytes of what a pass through the modules leaves for the way back."""
        return 4 * tokens * sum(sum(module.shape) for module in modules) + 8 * attention_layers * info.heads * tokens * row_length

    def weights(modules: Sequence[Module]) -> int:
        return BYTES_A_WEIGHT * sum(module.weights for module in modules)

    groups = sum(m.shape[0] * -(-m.shape[1] // plan.formats[plan.modules[m.name]].group_size) for m in planned)
    logits = 4 * tokens * checkpoint.vocabulary
    layer = max(weights(modules) + kept(modules, 1) for modules in layers)
    states = min(STATE_BYTES, 4 * tokens * width * info.layers)
    return _Need(
        base + weights(planned) + kept(planned, info.layers) + LOGIT_ARRAYS * logits + SCALE_BYTES * groups,
        # while the model is opened, a tensor outside the layers is there twice
        base
        + max(layer + LOGIT_ARRAYS * min(logits, LOGIT_BYTES), others)
        + states
        + min(CODES_BYTES, info.quantizable_weights)
        + SCALE_BYTES * groups,
    )


def _fits_whole(need: _Need, memory_bytes: int | None, device: str) -> bool:
    """Return whether all weights fit into memory; UserError where one layer's do not either."""
    limit = available_bytes(device) if memory_bytes is None else memory_bytes
    if min(need.whole, need.streamed) > limit:
        room = f"--memory {given_size(limit)}: too little" if memory_bytes else f"{byte_size(limit)} are free here"
        raise UserError(
            f"{room}; tuning takes about {byte_size(need.whole)} with all weights in memory, {byte_size(need.streamed)} layer by layer"
        )
    return need.whole <= limit


# --- steps ----------------------------------------------------------------------------------------------------------------


def _tuner(opened: _Opened, options: TuneOptions, seconds: float, reporter: Reporter) -> Tuner:
    """Return the tuner of the plan's codes. Its steps: what was asked for, those of a run that was interrupted, or what fits into the time."""
    plan = opened.plan

    def codes_of(name: str) -> Codes:
        codes = opened.bank.codes(name, plan.modules[name])
        assert isinstance(codes, Codes)  # `_check` has refused others
        return codes

    outside = [module.name for module in opened.checkpoint.modules if module.part]
    codes = LazyMapping([name for name in plan.modules if name not in outside], codes_of)
    beside = opened.bank.weights({name: plan.modules[name] for name in outside})
    bits = {name: plan.formats[fmt].bits for name, fmt in plan.modules.items()}
    tuning = Tuning(opened.pool, opened.rows.select[:SELECT_ROWS], options.steps or 0, opened.seed)
    streamed = opened.decoder.stream is not None  # another order of sums, so other bytes
    key = content_key(
        plan.codes, plan.modules, rows_sha256(tuning.rows), rows_sha256(tuning.select), tuning.seed, VERSION, streamed
    )[:12]
    tuner = Tuner(opened.decoder, codes, bits, tuning, name=f"tuning-{key}", beside=beside)
    begun = _interrupted_steps(opened, tuner.name)
    if begun and options.steps in (None, begun):
        reporter.say(f"going on with a run of {begun} steps that was interrupted")
        tuner.tuning = replace(tuning, steps=begun)
    elif not options.steps:
        pace = tuner.pace()
        tuner.tuning = replace(tuning, steps=(steps := tuner.steps_within(seconds, pace)))
        reporter.say(
            f"{steps} steps of {STEP_ROWS} rows, {number(pace.step, 2)} s each, on {len(tuning.rows)} rows of the fit text: about "
            f"{duration(tuner.seconds(steps, pace))} with what the reference reads and the marks (--steps {steps}: the same codes again)"
        )
    tuner.name += f"-{tuner.tuning.steps}"
    tuner.state_file = opened.banks / f"{tuner.name}.safetensors"
    return tuner


def _interrupted_steps(opened: _Opened, name: str) -> int | None:
    """Return the number of steps of a run whose state lies in the bank's folder."""
    files = sorted(opened.banks.glob(f"{name}-*.safetensors"))
    numbers = [match[1] for file in files if (match := re.fullmatch(r".*-([0-9]+)", file.stem))]
    return int(numbers[-1]) if numbers else None


# --- the new plan -----------------------------------------------------------------------------------------------------------


def _finished(opened: _Opened, tuner: Tuner, result: Tuned, reporter: Reporter) -> Plan:
    """Store the codes, and return the plan with them, measured on the test rows beside the untuned ones."""
    plan, bank, sha = opened.plan, opened.bank, opened.checkpoint.info.weights_sha256
    identity = f"{bank.identity}{TUNED}{content_key(tuner.name)[:12]}"
    new = Bank(opened.decoder, list(plan.modules), plan.quantizer, plan.formats, None, opened.banks, sha, identity)
    new.put(result.codes, plan.modules)
    others = {name: bank.codes(name, plan.modules[name]) for name in plan.modules if name not in result.codes}
    new.put({name: codes for name, codes in others.items() if not isinstance(codes, Kept)}, plan.modules)
    nats = []
    for name, of_plan in (("not tuned", bank), ("tuned", new)):
        meter = DamageMeter(opened.decoder, of_plan, sha, of_plan.identity, Journal(None))
        with reporter.stage(f"test rows, {name}") as progress:
            nats.append(meter.plans({name: plan.modules}, opened.rows.test, progress)[name])
    before, after, difference = (_nats(opened, values) for values in (*nats, nats[1] - nats[0]))
    better = difference.ci95 is not None and difference.ci95[1] < 0
    tuned = {"steps": result.steps, "of": tuner.tuning.steps, "rows": STEP_ROWS}
    kept = {name: fmt for name, fmt in opened.every.items() if name not in plan.modules}
    return replace(
        plan,
        modules={name: {**plan.modules, **kept}[name] for name in opened.every},
        codes=identity,
        damage=PlanDamage(None, after),
        baselines=[Baseline(UNTUNED, plan.size.code_bits, plan.size.quantized_bytes, before, difference)],
        recommended=better,
        standing=BETTER if better else NO_WORSE,
        verdict=f"Tuned: {interval(after, unit=True)} on test rows, {interval(before)} before"
        + (f", a difference of {interval(difference)}." if better else "; they do not show that it is better."),
        solver={**plan.solver, "tuned": tuned},
    )


def _nats(opened: _Opened, values: np.ndarray) -> Measured:
    return measured(values, "nats/token", "plan", "test", opened.seed, opened.rows.blocks("test"))
