"""Another budget from a finished survey: the atlas holds the measured damage of every unit, so no model is needed.

Solved on the scores whose plan was the best one measured in the survey. The damage is predicted and says so; `verify` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitatlas.errors import UserError
from bitatlas.formats import by_width
from bitatlas.planning.budget import check_budget, costs_of, units_of
from bitatlas.planning.choose import Scores, candidates, choose_smallest, damage_tables
from bitatlas.planning.judge import unverified_plan
from bitatlas.records import Atlas, Budget, Plan, read_record, to_json, write_text


def replan(folder: Path, budget: Budget) -> Plan:
    """The plan under `budget`; UserError where no plan can be that small, or the tolerated damage cannot be met."""
    atlas = read_record(folder / "atlas.json", Atlas)
    formats = by_width(list(atlas.formats))
    check_budget(budget, atlas.modules, formats, atlas.model)
    units = units_of(atlas.modules)
    scores = _scores_used(atlas, [unit.name for unit in units], formats)
    costs = costs_of(budget, units, formats, atlas.model)
    if costs.limit is None:
        best = choose_smallest(scores, costs.cost, budget.value, lambda plans: predicted(scores, plans))[0]
    else:
        best = candidates(scores, costs.cost, costs.limit)[0]
    seed = int(atlas.settings["seed"])
    return unverified_plan(atlas.model, atlas.modules, formats, atlas.quantizer, budget, best, None, {}, seed)


def _scores_used(atlas: Atlas, units: list[str], formats: list[str]) -> Scores:
    scores = damage_tables(units, formats, atlas.unit_damage, atlas.base_damage)
    used = atlas.plan.solver.get("scores") if atlas.plan else None
    name = used if used in scores.tables else "mean of both"
    return Scores({name: scores.tables[name]}, scores.at_high)


def predicted(scores: Scores, plans: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Damage of choices by the (one) table, nats/token."""
    (table,) = scores.tables.values()
    return {name: scores.at_high + float(table[np.arange(len(table)), choice].sum()) for name, choice in plans.items()}


def write_plan(plan: Plan, folder: Path, out: Path | None) -> Path:
    """Write the plan to `out`, or to the survey's folder under a name that says its budget."""
    file = out or folder / f"plan-{plan.budget.kind}-{plan.budget.value:g}.json"
    if file.resolve() == (folder / "plan.json").resolve():
        raise UserError(f"--out {file}: that is the survey's own, verified plan; choose another name")
    write_text(file, to_json(plan))
    return file
