"""The whole curve: verified plans from the smallest size to the largest, each found like the survey's own and judged on the test rows.

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
from bitatlas.files import read_record, to_json, write_text
from bitatlas.planning.budget import size_range
from bitatlas.planning.judge import Judged, judge
from bitatlas.planning.replan import scores_of
from bitatlas.planning.search import search
from bitatlas.prepare import Run, reopen, tools_of
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Budget, CurvePoint, Plan
from bitatlas.words import byte_size

FOLDER = "curve"
KIND = "curve"  # of a point of the atlas's curve
MOST_POINTS = 99


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
    (folder / FOLDER).mkdir(exist_ok=True)
    plans = [(one.plan, folder / FOLDER / f"plan-{one.plan.budget.value:.0f}.json") for one in judged]
    for old in (folder / FOLDER).glob("plan-*.json"):
        old.unlink()
    for plan, file in plans:
        write_text(file, to_json(plan))
    done = replace(atlas, curve=[*(point for point in atlas.curve if point.kind != KIND), *map(_point, judged)])
    write_text(folder / "atlas.json", to_json(done))
    from bitatlas.report.html import write_reports

    write_reports(done, folder)
    return Curve(done, plans)


def sizes_between(atlas: Atlas, points: int) -> list[int]:
    """`points` sizes of the whole model in bytes, evenly spaced, the two ends left out; fewer where they are not a byte apart."""
    least, most = size_range("size", atlas.modules, list(atlas.formats), atlas.model)
    sizes = np.linspace(least, most, points + 2)[1:-1]
    return sorted({int(size) for size in sizes})


def _judged_plans(run: Run, atlas: Atlas, points: int) -> list[Judged]:
    critical = [layer.layer for layer in sorted(atlas.layers, key=lambda layer: -layer.criticality.mean)]
    subject = run.subject
    starts: dict[str, np.ndarray] = {}
    judged: list[Judged] = []
    tools = tools_of(run, scores_of(atlas))
    for size in sizes_between(atlas, points):
        run.reporter.say(f"size {byte_size(size)}")
        budget = Budget("size", float(size))
        found = search(subject, budget, tools, starts)
        judged.append(judge(subject, budget, found, run.measure, critical))
        starts = {"the next smaller plan": found.choice}
    return judged


def _point(judged: Judged) -> CurvePoint:
    own = judged.curve[0]
    name = f"plan of at most {byte_size(int(judged.plan.budget.value))}"
    return replace(own, name=name, kind=KIND)
