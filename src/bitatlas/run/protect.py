"""Plans that protect named tasks (`--protect svamp=1pp`), in a survey or from a finished one: the search of `plan.protect`, with a model.

Candidates of a size are found like any plan. Where a protected task has items that are not scored, the one is taken that does the least
damage on their text, else the one of the least damage on the select rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitatlas.data.rows import cut_rows
from bitatlas.data.tasks import chance_level, split_items, task_text
from bitatlas.measure.screens import ROW_LENGTH, TASK_ROWS
from bitatlas.measure.tasks import right_of
from bitatlas.plan.budget import costs_of
from bitatlas.plan.judge import JudgedPlan, judge, scores_of
from bitatlas.plan.knapsack import total_cost
from bitatlas.plan.protect import CHOOSING, JUDGING, check_items, check_reference, find_protected, halves
from bitatlas.plan.search import KNAPSACK, Candidate, PlannerHooks, search_within
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Budget, Plan
from bitatlas.records.files import read_record
from bitatlas.records.sizes import assignment_of
from bitatlas.run.planner import tools_of
from bitatlas.run.prepare import Run, items_of_survey, reopen

LEAST_ROWS = 8  # of a task's spare text, below which it does not choose


def check_protected(run: Run) -> None:
    """Refuse a task that the reference does not do; before anything slow but its answers."""
    protect = run.settings.budget.protect
    if protect:
        right = {task: right_of(run.answers(task, run.items[task], {}, "reference")) for task in protect}
        check_reference(run.settings.budget, right, {task: chance_level(run.items[task]) for task in protect})


def protect_plan(run: Run, tools: PlannerHooks, most_critical: Sequence[int]) -> JudgedPlan:
    """The smallest plan found that holds the budget's tasks, judged on the test rows as well."""
    budget, subject = run.settings.budget, run.subject
    margins = budget.protect
    assert margins
    units, formats = subject.units, subject.formats
    cost = costs_of(budget, units, formats, subject.info).cost
    tools, chosen_on = _by_task_text(run, tools)

    def score(choice: np.ndarray | None, part: str) -> dict[str, np.ndarray]:
        assignment = {} if choice is None else assignment_of(units, formats, choice)
        found = {}
        for task in margins:
            items = run.items[task][halves(len(run.items[task]))[part == JUDGING]]
            found[task] = right_of(run.answers(task, items, assignment, f"{part} items"))
        return found

    def at(limit: int, last: Candidate) -> Candidate:
        found = search_within(cost, limit, tools, near=last.near)
        return replace(found, limit=total_cost(cost, found.choice))

    reference = {part: score(None, part) for part in (CHOOSING, JUDGING)}
    done = find_protected(cost, margins, _widest(cost, tools), at, score, reference)
    judged = judge(subject, budget, done.candidate, run.measure, most_critical)
    plan = judged.plan
    solver = {**plan.solver, "protect": {**done.recorded(), "chosen_on": chosen_on}}
    return replace(judged, plan=replace(plan, verdict=f"{plan.verdict}; {done.text}", solver=solver))


def _widest(cost: np.ndarray, tools: PlannerHooks) -> Candidate:
    """The widest format everywhere, as a plan."""
    choice = np.full(len(cost), cost.shape[1] - 1, dtype=np.int64)
    selected = tools.on_select({"widest": choice})["widest"]
    solver = {"method": KNAPSACK.format(tools.scores.source), "scores": "high", "gap": 0.0, "select_damage": selected}
    return Candidate(choice, tools.scores.at_high, selected, int(cost[:, -1].sum()), solver)


def _by_task_text(run: Run, tools: PlannerHooks) -> tuple[PlannerHooks, str]:
    """Tools that choose on the protected tasks' text that is not scored, where each has enough of it; and what they choose on."""
    settings, subject = run.settings, run.subject
    data = Path(settings.task_data) if settings.task_data else None
    rows = []
    for task in settings.budget.protect or {}:
        spare = split_items(task, data, settings.limit, settings.seed, settings.few_shot)[1]
        length = min(ROW_LENGTH, settings.row_length)
        if spare:
            rows.append(cut_rows([task_text(task, spare)], run.tokenizer, TASK_ROWS, length, settings.seed))
        if not spare or len(rows[-1]) < LEAST_ROWS:
            return tools, "select rows"

    def on_text(plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        named = {name: assignment_of(subject.units, subject.formats, choice) for name, choice in plans.items()}
        found = [run.meter.plans(named, own) for own in rows]
        return {name: float(np.mean([one[name].mean() for one in found])) for name in plans}

    return replace(tools, on_select=on_text), "text of items that are not scored"


def protect_folder(folder: Path, budget: Budget, model: str | None, device: str | None, reporter: Reporter) -> Plan:
    """The same from a finished survey, which must have scored the tasks; `model`, `device`: where they are now."""
    atlas = read_record(folder / "atlas.json", Atlas)
    items = items_of_survey(atlas)
    check_items(budget, {task: len(of_task) for task, of_task in items.items()})
    run = reopen(folder, atlas, model, device, reporter)
    run.settings, run.items = replace(run.settings, budget=budget), items
    critical = [layer.layer for layer in sorted(atlas.layers, key=lambda layer: -layer.criticality.mean)]
    with closing(run.journal):
        check_protected(run)
        judged = protect_plan(run, tools_of(run, scores_of(atlas)), critical)
    run.checkpoint.check_unchanged()
    return judged.plan
