"""The commands: each calls and prints. What they take stands in `bitatlas.run.options`; nothing heavy is imported before it is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bitatlas.cli.options import Json
from bitatlas.errors import UserError
from bitatlas.run.options import (
    ApplyOptions,
    CompareOptions,
    ExportOptions,
    Option,
    PlanOptions,
    QuantizeOptions,
    ReportOptions,
    SurveyOptions,
    TuneOptions,
    VerifyOptions,
)

Draft = Annotated[
    bool,
    Option(
        "Only the first plan: plan.json, judged; no report. --resume without it goes on.",
        ("--draft",),
        before="device",
    ),
]
DryRun = Annotated[
    bool, Option("Only check everything and say how long the survey takes, stage by stage.", ("--dry-run",), before="device")
]


def survey(options: SurveyOptions, draft: Draft = False, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Measure a checkpoint, plan its precision, verify the plan, write the report (the main job)."""
    from bitatlas.cli import show
    from bitatlas.progress import Reporter
    from bitatlas.run.prepare import open_model
    from bitatlas.run.settings import Settings
    from bitatlas.run.survey import run_draft, run_survey

    if draft and options.tokens and options.tasks is None:
        options = replace(options, tasks=())
    out, reporter = Path(options.out), Reporter(options.quiet)
    inputs = Settings.of(options), out, options.resume, reporter, options.ray
    if dry_run:
        open_model(inputs[0], out, options.resume, reporter)
        return
    if draft:
        plan, file = run_draft(*inputs), out / "plan.json"
        if as_json:
            show.print_plan(plan, file)
            return
        if not options.quiet:
            show.show_draft(plan)
        print(file)
        return
    atlas = run_survey(*inputs)
    if as_json:
        show.print_survey(atlas, out)
        return
    if not options.quiet:
        show.show_summary(atlas)
    print(out / "report.html")


def plan(options: PlanOptions, as_json: Json = False) -> None:
    """Another budget, from the atlas alone, in seconds: its damage is predicted, `verify` measures it.
    Or the whole --curve, measured.
    """
    from bitatlas.cli.show import print_plan, show_plan
    from bitatlas.plan.budget import default_context_text
    from bitatlas.plan.judge import replan, write_plan
    from bitatlas.progress import Reporter
    from bitatlas.run.protect import protect_folder
    from bitatlas.run.settings import parse_budget

    folder, model, device = Path(options.folder), options.model, options.device
    budget = parse_budget(options)
    if options.curve:
        _plan_curve(options, budget or options.out, as_json)
        return
    if options.points is not None or ((model is not None or device is not None) and not options.protect):
        raise UserError("--points, --model, --device: belong to --curve (the last two to --protect, too)")
    if budget is None:
        raise UserError(
            "give a budget: --code-bits, --stored-bits, --size, --vram, --max-damage or --protect; or --curve for all sizes"
        )
    reporter = Reporter(options.quiet)
    result = protect_folder(folder, budget, model, device, reporter) if options.protect else replan(folder, budget)
    file = write_plan(result, folder, Path(options.out) if options.out else None)
    if as_json:
        print_plan(result, file)
        return
    if result.budget.workload and options.context is None:
        print(default_context_text(result.budget.workload))
    show_plan(result)
    print(file)


def _plan_curve(options: PlanOptions, other: Any, as_json: bool) -> None:
    from bitatlas.cli.show import print_curve, show_curve
    from bitatlas.progress import Reporter
    from bitatlas.records.files import CURVE_FOLDER
    from bitatlas.run.curve import trace_curve

    if other is not None:
        raise UserError("--curve: covers all sizes and writes its own files; give no budget and no --out beside it")
    folder, points = Path(options.folder), options.points if options.points is not None else 7
    curve = trace_curve(folder, points, options.model, options.device, Reporter(options.quiet))
    if as_json:
        print_curve(curve)
        return
    show_curve(curve)
    print(folder / CURVE_FOLDER)


def verify(options: VerifyOptions, as_json: Json = False) -> None:
    """Measure a plan, a packed checkpoint, or a GGUF in llama.cpp, against what it promises: size and damage;
    exit code 1 if it does worse.
    """
    from bitatlas.cli.show import print_verification, show_verification
    from bitatlas.run.verify import verify_plan

    result = verify_plan(options)
    print_verification(result) if as_json else show_verification(result)
    if not result.kept:
        raise typer.Exit(1)


def compare(options: CompareOptions, as_json: Json = False) -> None:
    """Which of these files of a model should I take? Every file beside the reference and each other, on the same tokens and items, ranked;
    exit code 1 if one does worse than required.
    """
    from bitatlas.cli.show import print_comparison, show_comparison
    from bitatlas.run.compare import compare_models

    result = compare_models(options)
    if as_json:
        print_comparison(result)
    else:
        show_comparison(result)
        print(Path(options.out) / "compare.html")
    if not result.kept:
        raise typer.Exit(1)


def quantize(options: QuantizeOptions, as_json: Json = False) -> None:
    """The best file of a size, in one command: a plan, the file, the file measured in its runtime, beside what others of its size do;
    exit code 1 if it does worse than promised.
    """
    from bitatlas.cli import show
    from bitatlas.run.quantize import quantize_model

    result = quantize_model(options)
    show.print_quantized(result) if as_json else show.show_quantized(result)
    if result.verification and not result.verification.kept:
        raise typer.Exit(1)


def apply(options: ApplyOptions) -> None:
    """Write the packed checkpoint of a plan, which transformers loads (compressed-tensors, pack-quantized)."""
    from bitatlas.cli.show import show_applied, show_plan
    from bitatlas.run.tune import apply_tuned

    applied, tuned = apply_tuned(options)
    if tuned:
        show_plan(tuned.plan)
    show_applied(applied)
    print(options.out)


def tune(options: TuneOptions, as_json: Json = False) -> None:
    """Train a plan's codes on the reference's own predictions: less damage in the same bytes, in a plan of its own."""
    from bitatlas.cli import show
    from bitatlas.run.tune import tune_plan

    tuned = tune_plan(options)
    if as_json:
        show.print_plan(tuned.plan, tuned.file)
        return
    show.show_plan(tuned.plan)
    print(tuned.file)


def export(options: ExportOptions) -> None:
    """Write what another runtime reads of a plan: its own settings, or its own weights, and a script that uses them."""
    from bitatlas.cli.show import show_exported
    from bitatlas.export.targets import export_plan
    from bitatlas.progress import Reporter

    out = Path(options.out)
    base = Path(options.base_gguf) if options.base_gguf else None
    show_exported(export_plan(Path(options.plan), options.to, out, options.model, Reporter(options.quiet), base))
    print(out)


def report(options: ReportOptions, as_json: Json = False) -> None:
    """Write report.md and report.html again from atlas.json."""
    from bitatlas.cli.show import print_files
    from bitatlas.records import Atlas
    from bitatlas.records.files import all_or_none, read_record
    from bitatlas.report.charts.figures import write_figures
    from bitatlas.report.html import write_reports

    folder = Path(options.folder)
    atlas = read_record(folder / "atlas.json", Atlas)
    with all_or_none(folder) as target:
        figures = write_figures(atlas, target) if options.figures else []
        write_reports(atlas, target)
    files = [folder / "report.html", folder / "report.md", *(folder / file.relative_to(target) for file in figures)]
    if as_json:
        print_files(files)
        return
    print(*([files[0], files[-1].parent] if figures else files[:1]), sep="\n")
