"""The whole curve: verified plans from the smallest size to the largest, each found like the survey's own and judged on the test rows.

`trace_curve` searches every size like the survey searches its own. `short_curve` is what a survey adds by itself: few sizes, knapsacks
alone, and no random plans beside them, for about a tenth of the survey's time.

Sizes are evenly spaced in bytes between the narrowest and the widest format everywhere; these two are the ends of the curve and were
measured in the survey. Smaller plans come first, and each is a start for the next larger one, which it fits: what is found at a size is never
accepted with more damage on the fit and select rows than what was found below it. Everything goes through the survey's journal, so an
interrupted curve goes on where it stopped.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bitatlas.errors import UserError
from bitatlas.plan.budget import size_range
from bitatlas.plan.judge import CURVE, JudgedPlan, curve_point, judge, problem_of, scores_of
from bitatlas.plan.search import PlannerHooks, PlanningProblem, search
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Budget, Plan
from bitatlas.records.files import all_or_none, drop_other_plans, plan_place, read_record, to_json, write_plans, write_text
from bitatlas.records.text import byte_size
from bitatlas.report.html import write_reports
from bitatlas.run.planner import tools_of
from bitatlas.run.prepare import Run, reopen

MOST_POINTS = 99
SHORT_POINTS = 3  # of the curve that a survey adds, its own plan among them or near one of them


@dataclass(frozen=True)
class Curve:
    """The finished atlas, and the plans from small to large with the files they were written to."""

    atlas: Atlas
    plans: list[tuple[Plan, Path]]


def trace_curve(folder: Path, points: int, model: str | None, device: str | None, reporter: Reporter) -> Curve:
    """Find, judge and write `points` plans; the atlas and the reports in `folder` are written again with them."""
    if not 1 <= points <= MOST_POINTS:
        raise UserError(f"--points {points}: give 1 to {MOST_POINTS}")
    atlas = read_record(folder / "atlas.json", Atlas)
    run = reopen(folder, atlas, model, device, reporter)
    with closing(run.journal):
        judged = _judged_plans(run, atlas, points)
    run.checkpoint.check_unchanged()
    plans = [one.plan for one in judged]
    done = replace(
        atlas, curve=[*(point for point in atlas.curve if point.kind != CURVE), *map(curve_point, judged)], plans=plans
    )
    _write(folder, done)
    return Curve(done, [(plan, folder / plan_place(plan)) for plan in plans])


def _write(folder: Path, atlas: Atlas) -> None:
    """The plans, the atlas and the reports, together; plans of an earlier curve go."""

    with all_or_none(folder) as place:
        write_plans(place, atlas.plans)
        write_text(place / "atlas.json", to_json(atlas))
        write_reports(atlas, place)
    drop_other_plans(folder, atlas.plans)


def short_curve(run: Run, tools: PlannerHooks, most_critical: list[int], own: Plan) -> list[JudgedPlan]:
    """A few judged plans beside the survey's own, from small to large: knapsacks on the screens' scores, no random plans beside them."""
    quick = replace(tools, probe=None, on_step=None)
    judged = []
    for size in sizes_beside(own.size.total_bytes, *ends_of(run.subject)):
        run.reporter.say(f"also at {byte_size(size)}")
        budget = Budget("size", float(size))
        one = judge(run.subject, budget, search(run.subject, budget, quick), run.measure, most_critical, random=0)
        if one.plan.modules != own.modules:
            judged.append(one)
    return judged


def sizes_beside(own: int, least: int, most: int, points: int = SHORT_POINTS) -> list[int]:
    """`points` sizes evenly spaced between two ends, without these, and without the one that is nearest to `own`; bytes."""
    sizes = sorted({int(size) for size in np.linspace(least, most, points + 2)[1:-1]})
    nearest = min(sizes, key=lambda size: abs(size - own))
    return [size for size in sizes if size != nearest]


def sizes_between(atlas: Atlas, points: int) -> list[int]:
    """`points` sizes of the whole model in bytes, evenly spaced, the two ends left out; fewer where they are not a byte apart."""
    sizes = np.linspace(*ends_of(problem_of(atlas)), points + 2)[1:-1]
    return sorted({int(size) for size in sizes})


def ends_of(subject: PlanningProblem) -> tuple[int, int]:
    """Bytes of the whole model at the narrowest and at the widest format everywhere."""
    least, most = size_range("size", subject.modules, subject.formats, subject.info)
    return int(least), int(most)


def _judged_plans(run: Run, atlas: Atlas, points: int) -> list[JudgedPlan]:
    critical = [layer.layer for layer in sorted(atlas.layers, key=lambda layer: -layer.criticality.mean)]
    subject = run.subject
    starts: dict[str, np.ndarray] = {}
    judged: list[JudgedPlan] = []
    tools = tools_of(run, scores_of(atlas))
    for size in sizes_between(atlas, points):
        run.reporter.say(f"size {byte_size(size)}")
        budget = Budget("size", float(size))
        found = search(subject, budget, tools, starts)
        judged.append(judge(subject, budget, found, run.measure, critical))
        starts = {"the next smaller plan": found.choice}
    return judged
