"""`bitatlas plan`: other budgets from a finished survey."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitatlas.cli.options import (
    RUNTIME_NAMES,
    Batch,
    CacheDtype,
    Chunk,
    CodeBits,
    Context,
    Device,
    FewShot,
    Json,
    Limit,
    Margin,
    MaxDamage,
    Protect,
    Quiet,
    RowCounts,
    RowLength,
    Seed,
    SizeText,
    StoredBits,
    TaskData,
    Tasks,
    Tokens,
    Vram,
    not_empty,
    one_of,
)
from bitatlas.errors import UserError


def plan(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished survey.")],
    code_bits: CodeBits = None,
    stored_bits: StoredBits = None,
    size: SizeText = None,
    vram: Vram = None,
    context: Context = None,
    cache_dtype: CacheDtype = None,
    batch: Batch = None,
    chunk: Chunk = None,
    max_damage: MaxDamage = None,
    protect: Protect = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for the plan. Default: FOLDER/plan-<budget>.json.")] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Verified plans at sizes from the smallest to the largest; needs the model.")
    ] = False,
    points: Annotated[int | None, typer.Option("--points", help="Plans on the curve. Default: 7.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", callback=not_empty, help="Where the model is now, for --curve and --protect.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", callback=not_empty, help="For --curve and --protect; cpu, cuda, ...")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Another budget, from the atlas alone, in seconds: its damage is predicted, `verify` measures it. Or the whole --curve, measured."""
    from bitatlas.cli.show import print_plan, show_plan
    from bitatlas.plan.budget import own_context_text
    from bitatlas.plan.judge import replan, write_plan
    from bitatlas.run.settings import parse_budget

    budget = parse_budget(code_bits, stored_bits, size, max_damage, vram, context, cache_dtype, batch, chunk, protect or ())
    if curve:
        _plan_curve(folder, budget or out, points, model, device, quiet, as_json)
        return
    if points is not None or ((model is not None or device is not None) and not protect):
        raise UserError("--points, --model, --device: belong to --curve (the last two to --protect, too)")
    if budget is None:
        raise UserError(
            "give a budget: --code-bits, --stored-bits, --size, --vram, --max-damage or --protect; or --curve for all sizes"
        )
    found = _plan_protecting(folder, budget, model, device, quiet) if protect else replan(folder, budget)
    file = write_plan(found, folder, out)
    if as_json:
        print_plan(found, file)
        return
    if found.budget.workload and context is None:
        print(own_context_text(found.budget.workload))
    show_plan(found)
    print(file)


def _plan_protecting(folder: Path, budget: Any, model: str | None, device: str | None, quiet: bool) -> Any:
    from bitatlas.progress import Reporter
    from bitatlas.run.protect import protect_folder

    return protect_folder(folder, budget, model, device, Reporter(quiet))


def _plan_curve(
    folder: Path, other: Any, points: int | None, model: str | None, device: str | None, quiet: bool, as_json: bool
) -> None:
    from bitatlas.cli.show import print_curve, show_curve
    from bitatlas.progress import Reporter
    from bitatlas.records.files import CURVE_FOLDER
    from bitatlas.run.curve import trace_curve

    if other is not None:
        raise UserError("--curve: covers all sizes and writes its own files; give no budget and no --out beside it")
    found = trace_curve(folder, points if points is not None else 7, model, device, Reporter(quiet))
    if as_json:
        print_curve(found)
        return
    show_curve(found)
    print(folder / CURVE_FOLDER)


# --- verify ----------------------------------------------------------------------------------------------------------------

# `bitatlas verify`: is it what it promises?


def verify(
    model: Annotated[str, typer.Argument(help="The checkpoint that the plan was made for.")],
    plan_file: Annotated[
        Path, typer.Argument(metavar="PLAN_OR_CHECKPOINT", help="A plan.json, a folder that apply wrote, or a GGUF.")
    ],
    tokens: Tokens = None,
    rows: RowCounts = "24,24,64",
    row_length: RowLength = 192,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", callback=not_empty, help="Of a folder: score these of the survey's tasks again. Default: none."),
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Of a folder: put what was found into its README.md.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a plan, a packed checkpoint, or a GGUF in llama.cpp, against what it promises: size and damage; exit code 1 if it does worse."""
    from bitatlas.cli.show import print_verification, show_verification
    from bitatlas.progress import Reporter
    from bitatlas.run.settings import check_seed, parse_rows
    from bitatlas.run.verify import verify_plan

    check_seed(seed)
    result = verify_plan(model, plan_file, tokens, parse_rows(rows), row_length, device, seed, Reporter(quiet), tasks, card)
    print_verification(result) if as_json else show_verification(result)
    if not result.kept:
        raise typer.Exit(1)


# --- compare ---------------------------------------------------------------------------------------------------------------

# `bitatlas compare`: two models, paired.


def compare(
    first: Annotated[
        str,
        typer.Argument(metavar="MODEL_A", help="A checkpoint, quantized or not, a plan.json, or a survey's folder (its plan)."),
    ],
    second: Annotated[str, typer.Argument(metavar="MODEL_B", help="Another one, or another plan.")],
    tokens: Tokens = None,
    rows: RowCounts = "2,2,64",
    row_length: RowLength = 192,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = 300,
    few_shot: FewShot = 0,
    margin: Margin = "2pp",
    device: Device = "cpu",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Two checkpoints or plans on the same rows and items, paired."""
    from bitatlas.cli.show import print_comparison, show_comparison
    from bitatlas.progress import Reporter
    from bitatlas.run.compare import compare_models
    from bitatlas.run.settings import check_seed, parse_rows
    from bitatlas.stats.margin import parse_points

    check_seed(seed)
    points = parse_points(margin, "--margin")
    counts = parse_rows(rows)
    result = compare_models(
        first, second, tokens, counts, row_length, tasks, task_data, limit, device, seed, Reporter(quiet), points, few_shot
    )
    print_comparison(result) if as_json else show_comparison(result)


# --- export ----------------------------------------------------------------------------------------------------------------

# `bitatlas apply` and `bitatlas export`: what other programs load.


def apply(
    model: Annotated[str, typer.Argument(help="The checkpoint that the plan was made for.")],
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the packed checkpoint.")],
    quiet: Quiet = False,
) -> None:
    """Write the packed checkpoint of a plan, which transformers loads (compressed-tensors, pack-quantized)."""
    from bitatlas.cli.show import show_applied
    from bitatlas.export.packed import apply_plan
    from bitatlas.progress import Reporter

    show_applied(apply_plan(model, plan_file, out, Reporter(quiet)))
    print(out)


def export(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            callback=not_empty,
            autocompletion=one_of(RUNTIME_NAMES),
            help="The runtime: mlx, vllm, torchao, gptqmodel, ...; docs/runtimes.md has them all.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="A new folder for what the runtime reads.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", callback=not_empty, help="The checkpoint that the plan was made for; needed where weights are written."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write what another runtime reads of a plan: its own settings, or its own weights, and a script that uses them."""
    from bitatlas.cli.show import show_exported
    from bitatlas.export.targets import export_plan
    from bitatlas.progress import Reporter

    show_exported(export_plan(plan_file, to, out, model, Reporter(quiet)))
    print(out)


# --- report ----------------------------------------------------------------------------------------------------------------

# `bitatlas report`: the pages again, from the atlas.


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished survey.")],
    with_figures: Annotated[
        bool, typer.Option("--figures", help="Also every figure as SVG and PNG, into FOLDER/figures (extra: figures).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write report.md and report.html again from atlas.json."""
    from bitatlas.cli.show import print_files
    from bitatlas.records import Atlas
    from bitatlas.records.files import all_or_none, read_record
    from bitatlas.report.charts.figures import write_figures
    from bitatlas.report.html import write_reports

    atlas = read_record(folder / "atlas.json", Atlas)
    with all_or_none(folder) as place:
        figures = write_figures(atlas, place) if with_figures else []
        write_reports(atlas, place)
    files = [folder / "report.html", folder / "report.md", *(folder / file.relative_to(place) for file in figures)]
    if as_json:
        print_files(files)
        return
    print(*([files[0], files[-1].parent] if figures else files[:1]), sep="\n")
