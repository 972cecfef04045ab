"""`survey --draft`: a first plan, judged like any other, from the curvature instead of a measured swap for every unit and format.

Passes over the fit rows: one forwards and a few backwards at each uniform end and around each better plan, and those of the plans
that are measured; a survey needs several for each unit. What it finds is often worse than what a survey finds (docs/method.md
has figures), and says nothing of layers, attention or tasks. The folder is a run's: a survey with `--resume` goes on in it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitatlas.crew.crew import hired
from bitatlas.errors import UserError
from bitatlas.files import to_json, write_text
from bitatlas.planning.baselines import most_critical_first
from bitatlas.planning.choose import Scores, scores_of_ends
from bitatlas.planning.expansion import Floats
from bitatlas.planning.judge import judge
from bitatlas.planning.search import Tools, search
from bitatlas.prepare import Run, on_select, peak_text, prepare, probe, tools_of
from bitatlas.progress import Reporter
from bitatlas.records import Plan
from bitatlas.sensitivity.probe import drafted
from bitatlas.settings import Settings

SOURCE = "single-unit damage to second order"


def run_draft(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None = None) -> Plan:
    """Write plan.json into `out`, and return it."""
    if settings.budget.protect:
        raise UserError("--draft --protect: whether a task is held takes the survey's answers; give a size, or leave --draft out")
    with hired(ray, reporter) as crew:
        run = prepare(settings, out, resume, reporter, crew)
        with closing(run.journal):
            return _draft(run)


def _draft(run: Run) -> Plan:
    settings, subject, reporter = run.settings, run.subject, run.reporter
    with reporter.stage(f"quantizing ({settings.quantizer})") as progress:
        run.bank.fill(settings.formats, progress)
    tools = draft_tools(run)
    found = search(subject, settings.budget, tools)
    judged = judge(subject, settings.budget, found, run.measure, by_criticality(run, tools.scores))
    run.checkpoint.check_unchanged()
    reporter.say(peak_text(run))
    write_text(run.out / "plan.json", to_json(judged.plan))
    return judged.plan


def draft_tools(run: Run) -> Tools:
    """The planner's ways to the model without measured swaps; the curvature at both ends is measured here."""
    subject = run.subject
    units, formats = len(subject.units), len(subject.formats)
    around = drafted(probe(run), run.meter, run.rows, subject.modules, subject.formats, subject.seed, run.reporter)

    def table(end: int) -> Floats:
        changes = [(unit, fmt) for unit in range(units) for fmt in range(formats) if fmt != end]
        found = np.zeros((units, formats))
        found[tuple(np.array(changes).T)] = around.swaps(np.full(units, end), changes, "fit").added
        return found

    widest = on_select(run)({"widest": np.full(units, formats - 1)})["widest"]
    scores = scores_of_ends(table(formats - 1), table(0), widest, SOURCE)
    tools = tools_of(run, scores)
    return replace(tools, probe=around, effort="draft") if tools.probe else tools


def by_criticality(run: Run, scores: Scores) -> list[int]:
    """Layers, that with the most damage for its weights first, as far as the scores know."""
    damage = np.bincount([unit.layer for unit in run.subject.units], scores.tables["mean of both"][:, 0])
    return most_critical_first(run.subject.modules, damage)
