"""`bitatlas plan`: other budgets from a finished survey."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitatlas.cli.options import (
    Batch,
    CacheDtype,
    Chunk,
    CodeBits,
    Context,
    Json,
    MaxDamage,
    Protect,
    Quiet,
    SizeText,
    StoredBits,
    Vram,
    not_empty,
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
    from bitatlas.plan.memory import own_context_text
    from bitatlas.plan.replan import replan, write_plan
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
