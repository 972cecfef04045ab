"""`bitatlas compare`: two models, paired."""

from __future__ import annotations

from typing import Annotated

import typer

from bitatlas.cli.options import Device, FewShot, Json, Limit, Margin, Quiet, RowCounts, RowLength, Seed, TaskData, Tasks, Tokens


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
