"""The command line: one subcommand a stage. Parses, calls, prints; no maths, and nothing heavy is imported before it is needed.

Exit codes: 0 done, 2 wrong use or an impossible request (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

from bitatlas.errors import UserError

INTERRUPTED = "bitatlas: interrupted; what was measured is kept: run the same command with --resume to go on"
try:
    import typer
except KeyboardInterrupt:  # most of the time before main() goes by here
    print(INTERRUPTED, file=sys.stderr)
    raise SystemExit(1) from None

from bitatlas.options import (  # noqa: E402  (it imports typer)
    Batch,
    CacheDtype,
    Chunk,
    CodeBits,
    Context,
    Device,
    Limit,
    Margin,
    MaxDamage,
    Protect,
    Quiet,
    Revision,
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
)

app = typer.Typer(
    help="What low-bit weights do to a language model: measured, planned, verified.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What typer raises for wrong words on the command line: click's own class, or typer's copy of it.
WrongUse: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
CANNOT_BE_USED = (
    errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
)  # fmt: skip
TYPER_INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show:
        from bitatlas import __version__

        print(f"bitatlas {__version__}")
        raise typer.Exit


@app.command()
def survey(
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub name. Default: the bundled demo model.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the run's files.")] = Path("bitatlas-out"),
    formats: Annotated[
        str | None,
        typer.Option(
            "--formats",
            callback=not_empty,
            help="Candidate formats, int{2,3,4,8}_g{32,64,128}[_sym], or llama.cpp's, like q4_0,q8_0. Default: int{2,3,4}_g64 (the demo: _g128).",
        ),
    ] = None,
    quantizer: Annotated[
        str,
        typer.Option(
            "--quantizer", help="How codes are chosen: rtn, gptq (fitted on the fit rows); hqq, autoround, llama.cpp (extras)."
        ),
    ] = "rtn",
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
    tokens: Tokens = None,
    rows: RowCounts = "24,24,64",
    row_length: RowLength = 192,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = 300,
    margin: Margin = "2pp",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="A layer is safe only if lowering it adds at most this, nats/token.")
    ] = 0.05,
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="q/k/v share a format, and gate/up (vLLM needs it; GGUF and MLX do not).")
    ] = True,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine", help="Search on from the first plans with measurements. Default: on (the demo: off)."
        ),
    ] = None,
    device: Device = "cpu",
    revision: Revision = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure a checkpoint, plan its precision, verify the plan, write the report (the main job)."""
    from bitatlas.evaluation.no_loss import parse_points
    from bitatlas.prepare import default_settings
    from bitatlas.progress import Reporter
    from bitatlas.settings import parse_budget
    from bitatlas.survey import run_survey

    budget = parse_budget(code_bits, stored_bits, size, max_damage, vram, context, cache_dtype, batch, chunk, protect or ())
    settings = default_settings(
        model=model, formats=formats, quantizer=quantizer, budget=budget, tokens=tokens, rows=rows, row_length=row_length, tasks=tasks, task_data=task_data, limit=limit, tolerance=tolerance, fuse=fuse, refine=refine, device=device,
        revision=revision, seed=seed, margin_points=parse_points(margin, "--margin"),
    )  # fmt: skip
    reporter = Reporter(quiet)
    atlas = run_survey(settings, out, resume, reporter)
    from bitatlas.terminal import show_summary

    if not quiet:
        show_summary(atlas)
    print(out / "report.html")


@app.command()
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
) -> None:
    """Another budget, from the atlas alone, in seconds: its damage is predicted, `verify` measures it. Or the whole --curve, measured."""
    from bitatlas.planning.memory import own_context_text
    from bitatlas.planning.replan import replan, write_plan
    from bitatlas.settings import parse_budget
    from bitatlas.terminal import show_plan

    budget = parse_budget(code_bits, stored_bits, size, max_damage, vram, context, cache_dtype, batch, chunk, protect or ())
    if curve:
        _plan_curve(folder, budget or out, points, model, device, quiet)
        return
    if points is not None or ((model is not None or device is not None) and not protect):
        raise UserError("--points, --model, --device: belong to --curve (the last two to --protect, too)")
    if budget is None:
        raise UserError(
            "give a budget: --code-bits, --stored-bits, --size, --vram, --max-damage or --protect; or --curve for all sizes"
        )
    found = _plan_protecting(folder, budget, model, device, quiet) if protect else replan(folder, budget)
    file = write_plan(found, folder, out)
    if found.budget.workload and context is None:
        print(own_context_text(found.budget.workload))
    show_plan(found)
    print(file)


def _plan_protecting(folder: Path, budget: Any, model: str | None, device: str | None, quiet: bool) -> Any:
    from bitatlas.progress import Reporter
    from bitatlas.protection import protect_folder

    return protect_folder(folder, budget, model, device, Reporter(quiet))


def _plan_curve(folder: Path, other: Any, points: int | None, model: str | None, device: str | None, quiet: bool) -> None:
    from bitatlas.curve import FOLDER, trace_curve
    from bitatlas.progress import Reporter
    from bitatlas.terminal import show_curve

    if other is not None:
        raise UserError("--curve: covers all sizes and writes its own files; give no budget and no --out beside it")
    show_curve(trace_curve(folder, points if points is not None else 7, model, device, Reporter(quiet)))
    print(folder / FOLDER)


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="The checkpoint that the plan was made for.")],
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the packed checkpoint.")],
    quiet: Quiet = False,
) -> None:
    """Write the packed checkpoint of a plan, which transformers loads (compressed-tensors, pack-quantized)."""
    from bitatlas.apply import apply_plan
    from bitatlas.progress import Reporter
    from bitatlas.terminal import show_applied

    show_applied(apply_plan(model, plan_file, out, Reporter(quiet)))
    print(out)


@app.command()
def export(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", callback=not_empty, help="The runtime: mlx, vllm, torchao, gptqmodel, ...; docs/runtimes.md has them all."
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
    from bitatlas.export.targets import export_plan
    from bitatlas.progress import Reporter
    from bitatlas.terminal import show_exported

    show_exported(export_plan(plan_file, to, out, model, Reporter(quiet)))
    print(out)


@app.command()
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
) -> None:
    """Measure a plan, a packed checkpoint, or a GGUF in llama.cpp, against what it promises: size and damage; exit code 1 if it does worse."""
    from bitatlas.progress import Reporter
    from bitatlas.settings import check_seed, parse_rows
    from bitatlas.terminal import show_verification
    from bitatlas.verify import verify_plan

    check_seed(seed)
    result = verify_plan(model, plan_file, tokens, parse_rows(rows), row_length, device, seed, Reporter(quiet), tasks, card)
    show_verification(result)
    if not result.kept:
        raise typer.Exit(1)


@app.command("bench-model")
def bench_model(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF.")],
    reference: Annotated[Path | None, typer.Option("--reference", help="Another GGUF to compare with.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", callback=not_empty, help="Or a checkpoint: compare with a float16 GGUF of it.")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt.")] = 128,
    generate: Annotated[int, typer.Option("--generate", help="Tokens generated after it.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Repeats that count.")] = 11,
    threads: Annotated[int | None, typer.Option("--threads", help="Default: all processors that may be used.")] = None,
    quiet: Quiet = False,
) -> None:
    """Tokens a second and memory of a GGUF in llama.cpp on this machine's CPU, against another one in the same runtime."""
    from bitatlas.llamacpp.bench import bench_beside
    from bitatlas.progress import Reporter
    from bitatlas.terminal import show_benchmark

    show_benchmark(bench_beside(file, reference, model, prompt, generate, repeats, threads, Reporter(quiet)))


@app.command()
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
    margin: Margin = "2pp",
    device: Device = "cpu",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Two checkpoints or plans on the same rows and items, paired."""
    from bitatlas.compare import compare_models
    from bitatlas.evaluation.no_loss import parse_points
    from bitatlas.progress import Reporter
    from bitatlas.settings import check_seed, parse_rows
    from bitatlas.terminal import show_comparison

    check_seed(seed)
    points = parse_points(margin, "--margin")
    counts = parse_rows(rows)
    show_comparison(
        compare_models(first, second, tokens, counts, row_length, tasks, task_data, limit, device, seed, Reporter(quiet), points)
    )


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a finished survey.")]) -> None:
    """Write report.md and report.html again from atlas.json."""
    from bitatlas.files import read_record
    from bitatlas.records import Atlas
    from bitatlas.report.html import write_reports

    write_reports(read_record(folder / "atlas.json", Atlas), folder)
    print(folder / "report.html")


def main() -> None:
    """The entry point: a user's mistake is one line and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False) or 0
    except (UserError, WrongUse) as error:
        _end(f"bitatlas: {_told(error)}", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = TYPER_INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of the output went away, like `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        if error.errno not in CANNOT_BE_USED:
            raise
        _end(f"bitatlas: {error.filename or 'a file'}: {(error.strerror or 'cannot be used').lower()}", 2)
    if code == TYPER_INTERRUPTED:
        _end(INTERRUPTED if sys.argv[1:2] == ["survey"] else "bitatlas: interrupted", 1)
    raise SystemExit(code)


def _told(error: Any) -> str:
    """What is wrong; for wrong words on the command line, also where the right ones are listed."""
    if isinstance(error, UserError):
        return str(error)
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already, or is the message
        print(error.format_message(), end="", file=sys.stderr)
        raise SystemExit(2)
    hint = f" (see {context.command_path} --help)" if context else ""
    return f"{error.format_message().strip().rstrip('.')}{hint}"


def _end(line: str, code: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(code)
