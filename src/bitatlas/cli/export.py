"""`bitatlas apply` and `bitatlas export`: what other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitatlas.cli.options import RUNTIME_NAMES, Quiet, not_empty, one_of


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
