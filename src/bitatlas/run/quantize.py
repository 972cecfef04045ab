"""One command for people who want the file: a plan, the file of it, the file measured, and what others of its size would do.

The plan is the first one of a survey (`--draft`), or that of a survey which lies in the folder already; the file is `apply`'s or `export`'s, the
proof `verify`'s. Each part that is there is not made again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from bitatlas.errors import UserError
from bitatlas.export.gguf.base import base_of
from bitatlas.export.gguf.run import find_library
from bitatlas.export.gguf.write import with_gguf
from bitatlas.export.packed import apply_plan
from bitatlas.export.targets import TARGETS, export_plan
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.plan.judge import replan, write_plan
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Baseline, Plan
from bitatlas.records.files import read_record
from bitatlas.records.formats import LLAMA_CPP
from bitatlas.records.runtimes import MADE_FOR
from bitatlas.run.options import QuantizeOptions, SurveyOptions, VerifyOptions
from bitatlas.run.prepare import RECIPE
from bitatlas.run.settings import Settings, parse_budget
from bitatlas.run.survey import run_draft
from bitatlas.run.verify import Verification, verify_plan

PACKED = ("transformers", "bitatlas")  # runtimes that read what `apply` writes
DEFAULT_FORMATS = {LLAMA_CPP: ("gguf",), "vllm": ("int2_g64_sym", "int3_g64_sym", "int4_g64_sym", "int8_g64_sym")}


@dataclass(frozen=True)
class Quantized:
    """What was made. `notes`: lines about the file; `verification`: None where its runtime is not at hand."""

    plan: Plan
    plan_file: Path
    out: Path  # the file, or the folder of a packed checkpoint
    notes: list[str]
    verification: Verification | None

    @property
    def recipes(self) -> list[tuple[Baseline, int]]:
        """Return llama.cpp's recipes that were measured beside the plan, with the bytes that their file would have."""
        size = self.plan.size
        return [
            (baseline, size.total_bytes - size.quantized_bytes + baseline.quantized_bytes)
            for baseline in self.plan.baselines
            if baseline.name.startswith(RECIPE)
        ]


def quantize_model(options: QuantizeOptions) -> Quantized:
    """Plan, write and measure; see the module."""
    runtime, out, reporter = options.runtime or LLAMA_CPP, Path(options.out), Reporter(options.quiet)
    if runtime not in PACKED and runtime not in TARGETS:
        raise UserError(f"--for {runtime}: unknown; one of {', '.join((*PACKED, *TARGETS))}")
    survey = survey_options(options, runtime)
    if parse_budget(survey) is None and not (out / "atlas.json").is_file():
        raise UserError("give a budget, like --size 2GiB (or --stored-bits, --code-bits, --vram, --max-damage)")
    if options.tokens is None and not (out / "atlas.json").is_file():
        raise UserError("--tokens: give a text to measure on, best one like what the model will read")
    if runtime == LLAMA_CPP and base_of(str(options.model), options.base_gguf) is None:
        with_gguf(open_checkpoint(str(options.model), options.revision))  # refuses a model of which none is written
    plan, plan_file = _plan(survey, out, reporter)
    if (plan.runtime or runtime) != runtime:
        raise UserError(f"--for {runtime}: the survey in {out} is for {plan.runtime}; choose another folder")
    folder = out / runtime.replace(".", "-")
    notes = _write(options, runtime, plan_file, folder, reporter)
    file = next(iter(sorted(folder.glob("*.gguf"))), folder)
    return Quantized(plan, plan_file, file, notes, _verify(options, runtime, file, reporter))


def survey_options(options: QuantizeOptions, runtime: str) -> SurveyOptions:
    """Return the options of the survey whose first plan is taken."""
    shared = {field.name for field in fields(SurveyOptions)} & {field.name for field in fields(QuantizeOptions)}
    values = {name: getattr(options, name) for name in shared}
    values["formats"] = options.formats or DEFAULT_FORMATS.get(runtime)
    return SurveyOptions(
        **{**values, "runtime": runtime, "tasks": ("none",), "resume": True, "curve": False, "fuse": MADE_FOR[runtime].fused}
    )


def _plan(options: SurveyOptions, out: Path, reporter: Reporter) -> tuple[Plan, Path]:
    """Return the plan and its file: of a survey that is there, another budget's of it, or a new first plan."""
    if not (out / "atlas.json").is_file():
        return run_draft(Settings.of(options), out, True, reporter), out / "plan.json"
    atlas, budget = read_record(out / "atlas.json", Atlas), parse_budget(options)
    if atlas.plan and (budget is None or budget == atlas.plan.budget):
        return atlas.plan, out / "plan.json"
    if budget is None:
        raise UserError(f"{out}: the survey there has no plan; give a budget, like --size 2GiB")
    plan = replan(out, budget)
    return plan, write_plan(plan, out, None)


def _write(options: QuantizeOptions, runtime: str, plan_file: Path, folder: Path, reporter: Reporter) -> list[str]:
    """Write the runtime's files, unless those of this very plan are there; returns lines about them."""
    if (folder / "plan.json").is_file():
        if (folder / "plan.json").read_bytes() == plan_file.read_bytes():
            return [f"{folder}: holds this plan's files already"]
        raise UserError(f"{folder}: holds the files of another plan; move it away, or choose another --out")
    model = str(options.model)
    if runtime in PACKED:
        return list(apply_plan(model, plan_file, folder, reporter, runtime=runtime).notes)
    base = Path(options.base_gguf) if options.base_gguf else None
    notes = list(export_plan(plan_file, runtime, folder, model, reporter, base).notes)
    if runtime == LLAMA_CPP and not list(folder.glob("*.gguf")):
        raise UserError(f"{folder}: {notes[-1]}")
    return notes


def _verify(options: QuantizeOptions, runtime: str, file: Path, reporter: Reporter) -> Verification | None:
    """Measure the file in its runtime on the test rows; None where that is not at hand."""
    if runtime not in (*PACKED, LLAMA_CPP) or (runtime == LLAMA_CPP and find_library() is None):
        return None
    return verify_plan(
        VerifyOptions(
            options.model, file, tokens=options.tokens, rows=options.rows, row_length=options.row_length,
            device=options.device, seed=options.seed, quiet=options.quiet,
        )
    )  # fmt: skip
