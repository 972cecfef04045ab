"""`bitatlas compare`: two models, paired."""

from __future__ import annotations

from typing import Annotated

import typer

from bitatlas.options import Device, FewShot, Json, Limit, Margin, Quiet, RowCounts, RowLength, Seed, TaskData, Tasks, Tokens


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
    from bitatlas.compare import compare_models
    from bitatlas.evaluation.no_loss import parse_points
    from bitatlas.progress import Reporter
    from bitatlas.scripts import print_comparison
    from bitatlas.settings import check_seed, parse_rows
    from bitatlas.terminal import show_comparison

    check_seed(seed)
    points = parse_points(margin, "--margin")
    counts = parse_rows(rows)
    result = compare_models(
        first, second, tokens, counts, row_length, tasks, task_data, limit, device, seed, Reporter(quiet), points, few_shot
    )
    print_comparison(result) if as_json else show_comparison(result)
