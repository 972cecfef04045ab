"""`bitatlas survey`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitatlas.cli.options import (
    QUANTIZER_NAMES,
    Batch,
    CacheDtype,
    Chunk,
    CodeBits,
    Context,
    Device,
    Dtype,
    FewShot,
    Json,
    Limit,
    Margin,
    MaxDamage,
    Memory,
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
    one_of,
    some_of,
)
from bitatlas.records.formats import FORMATS


def survey(
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub name. Default: the bundled demo model.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the run's files.")] = Path("bitatlas-out"),
    formats: Annotated[
        str | None,
        typer.Option(
            "--formats",
            callback=not_empty,
            autocompletion=some_of(FORMATS),
            help="Candidate formats, int{2,3,4,8}_g{32,64,128}[_sym], or llama.cpp's, like q4_0,q8_0. Default: int{2,3,4}_g64 (the demo: _g128).",
        ),
    ] = None,
    quantizer: Annotated[
        str,
        typer.Option(
            "--quantizer",
            autocompletion=one_of(QUANTIZER_NAMES),
            help="How codes are chosen: rtn, gptq (fitted on the fit rows); hqq, autoround, llama.cpp (extras).",
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
    few_shot: FewShot = 0,
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
    curve: Annotated[
        bool, typer.Option("--curve/--no-curve", help="Also a few verified plans at other sizes, for the report's slider.")
    ] = True,
    draft: Annotated[
        bool,
        typer.Option(
            "--draft", help="Only a first plan, from curvature: plan.json, judged; no report. --resume without it goes on."
        ),
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    memory: Memory = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            callback=not_empty,
            help="Measure on a Ray cluster: auto (a running one, else this machine's processors), host:port or ray://host:port.",
        ),
    ] = None,
    revision: Revision = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint, plan its precision, verify the plan, write the report (the main job)."""
    from bitatlas.progress import Reporter
    from bitatlas.records.sizes import parse_size
    from bitatlas.run.prepare import default_settings
    from bitatlas.run.settings import parse_budget
    from bitatlas.run.survey import run_survey
    from bitatlas.stats.margin import parse_points

    if draft and tokens:
        tasks = tasks or "none"
    budget = parse_budget(code_bits, stored_bits, size, max_damage, vram, context, cache_dtype, batch, chunk, protect or ())
    settings = default_settings(
        model=model, formats=formats, quantizer=quantizer, budget=budget, tokens=tokens, rows=rows, row_length=row_length, tasks=tasks, task_data=task_data, limit=limit, few_shot=few_shot, tolerance=tolerance, fuse=fuse, refine=refine, curve=curve, device=device, dtype=dtype, memory_bytes=parse_size(memory, "--memory") if memory else None,
        revision=revision, seed=seed, margin_points=parse_points(margin, "--margin"),
    )  # fmt: skip
    reporter = Reporter(quiet)
    if draft:
        _draft(settings, out, resume, reporter, ray, as_json, quiet)
        return
    atlas = run_survey(settings, out, resume, reporter, ray)
    if as_json:
        from bitatlas.cli.show import print_survey

        print_survey(atlas, out)
        return
    from bitatlas.cli.show import show_summary

    if not quiet:
        show_summary(atlas)
    print(out / "report.html")


def _draft(settings: Any, out: Path, resume: bool, reporter: Any, ray: str | None, as_json: bool, quiet: bool) -> None:
    from bitatlas.cli.show import print_plan, show_draft
    from bitatlas.run.survey import run_draft

    plan = run_draft(settings, out, resume, reporter, ray)
    if as_json:
        print_plan(plan, out / "plan.json")
        return
    if not quiet:
        show_draft(plan)
    print(out / "plan.json")
