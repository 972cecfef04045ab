"""Find plans that protect named tasks (`--protect svamp=1pp`), in a survey or from a finished one: the search of `plan.protect`, with a model.

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
from bitatlas.data.tasks import chance_level, task_text
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
from bitatlas.run.planner import critical_first, planner_hooks
from bitatlas.run.prepare import Session, reopen, settings_of, split_tasks

LEAST_ROWS = 8  # of a task's spare text, below which it does not choose


def check_protected(session: Session) -> None:
    """Refuse a task that the reference does not do; before anything slow but its answers."""
    budget, items = session.settings.budget, session.items
    if budget.protect:
        right = {task: right_of(session.answers(task, items[task], {}, "reference")) for task in budget.protect}
        check_reference(budget, right, {task: chance_level(items[task]) for task in budget.protect})


def protect_plan(session: Session, hooks: PlannerHooks, most_critical: Sequence[int]) -> JudgedPlan:
    """Return the smallest plan found that holds the budget's tasks, judged on the test rows as well."""
    budget, subject = session.settings.budget, session.subject
    margins = budget.protect
    assert margins
    units, formats = subject.units, subject.formats
    cost = costs_of(budget, units, formats, subject.info).cost  # [units, formats]
    hooks, chosen_on = _choosing_by_task_text(session, hooks)

    def score(choice: np.ndarray | None, part: str) -> dict[str, np.ndarray]:
        assignment = {} if choice is None else assignment_of(units, formats, choice)
        right = {}
        for task in margins:
            items = session.items[task][halves(len(session.items[task]))[part == JUDGING]]
            right[task] = right_of(session.answers(task, items, assignment, f"{part} items"))
        return right

    def at(limit: int, last: Candidate) -> Candidate:
        candidate = search_within(cost, limit, hooks, near=last.near)
        return replace(candidate, limit=total_cost(cost, candidate.choice))

    reference = {part: score(None, part) for part in (CHOOSING, JUDGING)}
    protected = find_protected(cost, margins, _widest(cost, hooks), at, score, reference)
    judged = judge(subject, budget, protected.candidate, session.measure, most_critical)
    plan = judged.plan
    solver = {**plan.solver, "protect": {**protected.recorded(), "chosen_on": chosen_on}}
    return replace(judged, plan=replace(plan, verdict=f"{plan.verdict}; {protected.text}", solver=solver))


def _widest(cost: np.ndarray, hooks: PlannerHooks) -> Candidate:
    """Measure the widest format everywhere, as a plan."""
    choice = np.full(len(cost), cost.shape[1] - 1, dtype=np.int64)
    selected = hooks.on_select({"widest": choice})["widest"]
    solver = {"method": KNAPSACK.format(hooks.scores.source), "scores": "high", "gap": 0.0, "select_damage": selected}
    return Candidate(choice, hooks.scores.at_high, selected, int(cost[:, -1].sum()), solver)


def _choosing_by_task_text(session: Session, hooks: PlannerHooks) -> tuple[PlannerHooks, str]:
    """Return hooks that best_knapsack on the protected tasks' text that is not scored, where each has enough of it; and what they best_knapsack on."""
    settings = session.settings
    length = min(ROW_LENGTH, settings.row_length)
    texts = []  # of each task: int64 [rows, tokens]
    for task, (_, spare) in split_tasks(settings, settings.budget.protect or ()).items():
        if spare:
            texts.append(cut_rows([task_text(task, spare)], session.tokenizer, TASK_ROWS, length, settings.seed))
        if not spare or len(texts[-1]) < LEAST_ROWS:
            return hooks, "select rows"

    def on_text(plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        damage = [session.meter.plans(session.assignments(plans), rows) for rows in texts]
        return {name: float(np.mean([of_task[name].mean() for of_task in damage])) for name in plans}

    return replace(hooks, on_select=on_text), "text of items that are not scored"


def protect_folder(folder: Path, budget: Budget, model: str | None, device: str | None, reporter: Reporter) -> Plan:
    """Find the plan from a finished survey, which must have scored the tasks; `model`, `device`: where they are now."""
    atlas = read_record(folder / "atlas.json", Atlas)
    settings = settings_of(atlas)
    items = {task: scored for task, (scored, _) in split_tasks(settings, settings.tasks).items()}
    check_items(budget, {task: len(task_items) for task, task_items in items.items()})
    session = reopen(folder, atlas, model, device, reporter)
    session.settings, session.items = replace(session.settings, budget=budget), items
    with closing(session.journal):
        check_protected(session)
        plan = protect_plan(session, planner_hooks(session, scores_of(atlas)), critical_first(atlas)).plan
    session.checkpoint.check_unchanged()
    return plan
