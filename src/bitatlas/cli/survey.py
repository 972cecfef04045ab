"""`bitatlas survey`: the main job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from bitatlas.cli.options import Json
from bitatlas.run.options import Option, SurveyOptions

Draft = Annotated[
    bool,
    Option(
        "Only a first plan, from curvature: plan.json, judged; no report. --resume without it goes on.",
        ("--draft",),
        before="device",
    ),
]


def survey(options: SurveyOptions, draft: Draft = False, as_json: Json = False) -> None:
    """Measure a checkpoint, plan its precision, verify the plan, write the report (the main job)."""
    from bitatlas.cli import show
    from bitatlas.progress import Reporter
    from bitatlas.run.settings import Settings
    from bitatlas.run.survey import run_draft, run_survey

    if draft and options.tokens and options.tasks is None:
        options = replace(options, tasks=())
    out, reporter = Path(options.out), Reporter(options.quiet)
    inputs = Settings.of(options), out, options.resume, reporter, options.ray
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
