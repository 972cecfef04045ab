"""`bitatlas verify` and `bitatlas bench-model`: is it what it promises, and how fast is it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitatlas.options import Device, Json, Quiet, RowCounts, RowLength, Seed, Tokens, not_empty


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
    from bitatlas.progress import Reporter
    from bitatlas.scripts import print_verification
    from bitatlas.settings import check_seed, parse_rows
    from bitatlas.terminal import show_verification
    from bitatlas.verify import verify_plan

    check_seed(seed)
    result = verify_plan(model, plan_file, tokens, parse_rows(rows), row_length, device, seed, Reporter(quiet), tasks, card)
    print_verification(result) if as_json else show_verification(result)
    if not result.kept:
        raise typer.Exit(1)


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
