"""Trace the whole curve: verified plans from the smallest size to the largest, each found like the survey's own and judged on the test rows.

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
from bitatlas.plan.judge import CURVE, JudgedPlan, curve_point, judge, scores_of
from bitatlas.plan.search import PlannerHooks, PlanningProblem, search
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Budget, Plan
from bitatlas.records.files import all_or_none, drop_other_plans, plan_place, read_record, to_json, write_plans, write_text
from bitatlas.records.text import byte_size
from bitatlas.report.html import write_reports
from bitatlas.run.planner import critical_first, planner_hooks
from bitatlas.run.prepare import Session, reopen

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
    session = reopen(folder, atlas, model, device, reporter)
    with closing(session.journal):
        judged = _judged_plans(session, atlas, points)
    session.checkpoint.check_unchanged()
    plans = [result.plan for result in judged]
    others = [point for point in atlas.curve if point.kind != CURVE]
    atlas = replace(atlas, curve=[*others, *map(curve_point, judged)], plans=plans)
    with all_or_none(folder) as target:
        write_plans(target, plans)
        write_text(target / "atlas.json", to_json(atlas))
        write_reports(atlas, target)
    drop_other_plans(folder, plans)
    return Curve(atlas, [(plan, folder / plan_place(plan)) for plan in plans])


def _judged_plans(session: Session, atlas: Atlas, points: int) -> list[JudgedPlan]:
    critical, subject = critical_first(atlas), session.subject
    starts: dict[str, np.ndarray] = {}
    judged: list[JudgedPlan] = []
    hooks = planner_hooks(session, scores_of(atlas))
    for size in sizes_between(*_end_sizes(subject), points):
        session.reporter.say(f"size {byte_size(size)}")
        budget = Budget("size", float(size))
        candidate = search(subject, budget, hooks, starts)
        judged.append(judge(subject, budget, candidate, session.measure, critical))
        starts = {"the next smaller plan": candidate.choice}
    return judged


def short_curve(session: Session, hooks: PlannerHooks, most_critical: list[int], plan: Plan) -> list[JudgedPlan]:
    """Find and judge a few plans beside the survey's own, from small to large: knapsacks on the screens' scores, no random plans beside them."""
    subject, knapsacks = session.subject, replace(hooks, probe=None, on_step=None)
    judged = []
    for size in sizes_beside(plan.size.total_bytes, *_end_sizes(subject)):
        session.reporter.say(f"also at {byte_size(size)}")
        budget = Budget("size", float(size))
        result = judge(subject, budget, search(subject, budget, knapsacks), session.measure, most_critical, random=0)
        if result.plan.modules != plan.modules:
            judged.append(result)
    return judged


def sizes_beside(size: int, least: int, most: int) -> list[int]:
    """Return the sizes of a short curve in bytes, without the one that is nearest to `size`."""
    sizes = sizes_between(least, most, SHORT_POINTS)
    nearest = min(sizes, key=lambda other: abs(other - size))
    return [other for other in sizes if other != nearest]


def sizes_between(least: int, most: int, points: int) -> list[int]:
    """Return `points` sizes in bytes, evenly spaced between two that are left out; fewer where they are not a byte apart."""
    return sorted({int(size) for size in np.linspace(least, most, points + 2)[1:-1]})


def _end_sizes(subject: PlanningProblem) -> tuple[int, int]:
    """Return the bytes of the whole model at the narrowest and at the widest format everywhere."""
    least, most = size_range("size", subject.modules, subject.formats, subject.info)
    return int(least), int(most)
