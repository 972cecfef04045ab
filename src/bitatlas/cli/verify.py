"""`bitatlas verify`: is it what it promises?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitatlas.cli.options import Device, Json, Quiet, RowCounts, RowLength, Seed, Tokens, not_empty


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
