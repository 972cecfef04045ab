"""Another budget from a finished survey: the atlas holds the measured damage of every unit, so no model is needed.

Solved on the scores whose plan was the best one measured in the survey. The damage is predicted and says so; `verify` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitatlas.errors import UserError
from bitatlas.plan.budget import check_budget
from bitatlas.plan.judge import unverified_plan
from bitatlas.plan.memory import settled
from bitatlas.plan.search import Scores, Subject, Tools, damage_tables, search
from bitatlas.records import Atlas, Budget, Plan
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.formats import by_width
from bitatlas.records.memory import Workload
from bitatlas.records.text import given


def replan(folder: Path, budget: Budget) -> Plan:
    """The plan under `budget` of the survey in `folder` (see `replan_atlas`)."""
    return replan_atlas(read_record(folder / "atlas.json", Atlas), budget)


def replan_atlas(atlas: Atlas, budget: Budget) -> Plan:
    """The plan under `budget`; UserError where no plan can be that small, or the tolerated damage cannot be met."""
    subject = subject_of(atlas)
    budget = settled(budget, atlas.model)
    check_budget(budget, atlas.modules, subject.formats, atlas.model)
    scores = _scores_used(atlas, scores_of(atlas))
    tools = Tools(scores, lambda plans: predicted(scores, plans), where="are predicted to do")
    found = search(subject, budget, tools)
    only_predicted = {name: found.solver[name] for name in ("method", "scores", "gap")}
    return unverified_plan(subject, budget, replace(found, solver=only_predicted))


def subject_of(atlas: Atlas) -> Subject:
    """What the survey planned for."""
    codes = atlas.plan.codes if atlas.plan else ""
    seed = int(atlas.settings["seed"])
    return Subject(atlas.model, atlas.modules, by_width(list(atlas.formats)), atlas.quantizer, codes, seed)


def scores_of(atlas: Atlas) -> Scores:
    """The three score tables of the survey's screens."""
    subject = subject_of(atlas)
    return damage_tables([unit.name for unit in subject.units], subject.formats, atlas.unit_damage, atlas.base_damage)


def _scores_used(atlas: Atlas, scores: Scores) -> Scores:
    """The one table whose plan was the best of the knapsacks in the survey."""
    used = atlas.plan.solver.get("scores") if atlas.plan else None
    name = used if used in scores.tables else "mean of both"
    return Scores({name: scores.tables[name]}, scores.at_high)


def predicted(scores: Scores, plans: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Damage of choices by the (one) table, nats/token."""
    (table,) = scores.tables.values()
    return {name: scores.predicted(table, choice) for name, choice in plans.items()}


def write_plan(plan: Plan, folder: Path, out: Path | None) -> Path:
    """Write the plan to `out`, or to the survey's folder under a name that says its budget.

    Only an earlier plan is written over: UserError for any other file, a folder, or a place that cannot be written to.
    """
    file = out or folder / f"plan-{plan.budget.kind}-{_value(plan.budget)}{_named(plan.budget.workload)}.json"
    try:
        if file.resolve() == (folder / "plan.json").resolve():
            raise UserError(f"--out {file}: that is the survey's own, verified plan; choose another name")
        if not file.parent.is_dir():
            raise UserError(f"--out {file}: there is no folder {file.parent}")
        if file.is_dir():
            raise UserError(f"--out {file}: is a folder; give a file")
        if file.exists() and not _is_plan(file):
            raise UserError(f"--out {file}: exists and is not a bitatlas plan; choose another name")
        write_text(file, to_json(plan))
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise UserError(f"--out {file}: cannot be written ({reason.lower()})") from None
    return file


def _value(budget: Budget) -> str:
    """What a file's name says of the budget: all digits, so that two budgets never share a file."""
    return (
        "-".join(f"{task}-{given(points)}" for task, points in budget.protect.items()) if budget.protect else given(budget.value)
    )


def _named(load: Workload | None) -> str:
    """What else tells budgets of memory apart: "-context-8192-float16-batch-1-chunk-512"."""
    return f"-context-{load.context}-{load.cache_dtype}-batch-{load.batch}-chunk-{load.chunk}" if load else ""


def _is_plan(file: Path) -> bool:
    try:
        return file.is_file() and bool(read_record(file, Plan))
    except UserError:
        return False
