"""From a choice to a judged plan: measured once on the test rows, beside what anybody could have done with the same room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.errors import UserError
from bitatlas.plan.baselines import RANDOM, RANDOM_PLANS, UNIFORM, baselines, outside_uniform
from bitatlas.plan.budget import check_budget, costs_of, resolve_budget
from bitatlas.plan.looks import PLAN, UNIT, Comparison, compare_in_looks, compare_on_all
from bitatlas.plan.search import Candidate, PlannerHooks, PlanningProblem, Scores, damage_tables, search
from bitatlas.records import Atlas, Baseline, Budget, CurvePoint, Measured, Plan, PlanDamage, PlanModel, Size
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.formats import FORMATS, by_width
from bitatlas.records.sizes import assignment_of, size_of, uniform
from bitatlas.records.text import byte_size, given, interval, listed, number, rows_of
from bitatlas.stats.bootstrap import Blocks, measured

NOT_A_CANDIDATE = "not in --formats"
MOST_RECIPES = 3  # of another program, the largest that fit
CURVE = "curve"  # kind of a point of the atlas's curve: a plan at another size

Assignment = dict[str, str]


class MeasureRows(Protocol):
    """Measures plans by name on the rows of a split, or on those of the indices `rows`: name -> damage [rows], nats/token."""

    def __call__(
        self, plans: Mapping[str, Assignment], split: str, rows: Sequence[int] | None = None
    ) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class JudgedPlan:
    """The plan with its verdict, and every plan that was measured on the test rows."""

    plan: Plan
    curve: list[CurvePoint]


def unverified_plan(problem: PlanningProblem, budget: Budget, candidate: Candidate) -> Plan:
    """Return a plan whose damage is predicted."""
    info = problem.info
    assignment = assignment_of(problem.units, problem.formats, candidate.choice)
    return Plan(
        model=PlanModel(info.name, info.revision, info.weights_sha256),
        formats={name: FORMATS[name] for name in problem.every_format},
        quantizer=problem.quantizer,
        modules=assignment,
        budget=budget,
        size=size_of(problem.modules, assignment, info),
        damage=PlanDamage(candidate.predicted, None),
        solver={**candidate.solver, "seed": problem.seed},
        codes=problem.codes,
        runtime=info.file.runtime if info.file else "",
    )


def judge(
    problem: PlanningProblem,
    budget: Budget,
    candidate: Candidate,
    measure: MeasureRows,
    most_critical: Sequence[int] = (),
    random: int = RANDOM_PLANS,
) -> JudgedPlan:
    """Measure the plan on the test rows, beside baselines of at most its budget on as many of them as it takes (see `plan.looks`).

    `most_critical`: layers, worst first; `random`: how many random plans.
    """
    units, formats = problem.units, problem.formats
    plan = unverified_plan(problem, budget, candidate)
    cost = costs_of(budget, units, formats, problem.info).cost
    rules = baselines(units, cost, candidate.limit, problem.seed, formats, most_critical, random)
    others = {name: assignment_of(units, formats, choice) for name, choice in rules}
    outside = outside_uniform(budget, units, formats, problem.info, candidate.limit)
    others = {**_fitting_recipes(problem, plan), **others}
    if outside:
        others = {f"{UNIFORM} {outside} ({NOT_A_CANDIDATE})": uniform(problem.modules, outside), **others}
    whole = {name: other for name, other in others.items() if name.startswith(UNIFORM) or other == plan.modules}
    damage = dict(measure({PLAN: plan.modules, **whole}, "test"))
    plan_rows = damage.pop(PLAN)

    def measure_some(names: Sequence[str], rows: list[int]) -> Mapping[str, np.ndarray]:
        return measure({name: others[name] for name in names}, "test", rows)

    names = [name for name in others if name not in whole]
    compared = {c.name: c for c in compare_in_looks(plan_rows, damage, names, measure_some, problem.seed, problem.test_blocks)}
    return _judged(problem, plan, others, plan_rows, [compared[name] for name in others])


def _fitting_recipes(problem: PlanningProblem, plan: Plan) -> dict[str, Assignment]:
    """Return the recipes of another program that come nearest to what the plan may take, and take no more."""
    limit = plan.size.total_bytes
    if plan.budget.kind == "size":
        limit = max(limit, int(plan.budget.value))
    sizes = {name: size_of(problem.modules, dict(recipe), problem.info).total_bytes for name, recipe in problem.recipes.items()}
    fitting = sorted((name for name, size in sizes.items() if size <= limit), key=lambda name: -sizes[name])
    return {name: dict(problem.recipes[name]) for name in fitting[:MOST_RECIPES]}


def curve_point(judged: JudgedPlan) -> CurvePoint:
    """Return the point of a plan that was found for another size than the survey's own."""
    return replace(judged.curve[0], name=f"plan of at most {byte_size(int(judged.plan.budget.value))}", kind=CURVE)


def tolerance_text(damage: Measured, tolerated: float) -> str:
    """Say whether the test rows bear out what the select rows promised; choosing among many plans on them flatters the chosen one."""
    low, high = damage.ci95 or (-np.inf, np.inf)
    shown = "within" if high <= tolerated else "above" if low > tolerated else "not shown to be within"
    return f"{shown} the tolerated {given(tolerated)} on test rows"


def _judged(
    problem: PlanningProblem, plan: Plan, others: Mapping[str, Assignment], plan_rows: np.ndarray, compared: list[Comparison]
) -> JudgedPlan:
    """Add measured damage, baselines and the verdict."""
    sizes = {name: size_of(problem.modules, assignment, problem.info) for name, assignment in others.items()}
    bytes_of = {name: size.quantized_bytes for name, size in {PLAN: plan.size, **sizes}.items()}
    verdict = verdict_of(measured(plan_rows, UNIT, PLAN, "test", problem.seed, problem.test_blocks), compared, bytes_of)
    text = verdict.text
    if NOT_A_CANDIDATE in verdict.winner:
        text += f"; add {verdict.winner.split()[1]} to --formats"
    if plan.budget.kind == "max_damage":
        text += f"; {tolerance_text(verdict.damage, plan.budget.value)}"
    lines = [
        Baseline(other.name, sizes[other.name].code_bits, sizes[other.name].quantized_bytes, other.damage, other.difference)
        for other in compared
    ]
    done = replace(
        plan,
        damage=PlanDamage(plan.damage.predicted, verdict.damage),
        baselines=lines,
        recommended=verdict.recommended,
        verdict=text,
        standing=verdict.standing,
    )

    def point(name: str, kind: str, size: Size, damage: Measured) -> CurvePoint:
        return CurvePoint(name, kind, size.code_bits, size.stored_bits, size.total_bytes, damage)

    kinds = {line.name: "random" if line.is_random else "baseline" for line in lines}
    points = [point(line.name, kinds[line.name], sizes[line.name], line.damage) for line in lines]
    return JudgedPlan(done, [point(PLAN, PLAN, plan.size, verdict.damage), *points])


# --- verdict ---------------------------------------------------------------------------------------------------------------
#
# Is the plan worth having? Against every baseline of at most its size, on the same test rows.
#
# Three words. *Better*: the interval of the paired difference, plan minus baseline, lies below 0 for every baseline: uniform, first or last
# layers high, each of the random plans. Each must be beaten, so the best of many needs no correction (an intersection-union test): a plan
# that is no better than one of them is called better in at most 2.5 % of cases. *Worse*: for some baseline the interval lies above 0 at a
# level that is corrected for their number. Else *no worse shown*: too close for so many rows. A plan is recommended where it is better, or,
# where it is not worse, as the smallest of its equals. A baseline that happens to be the same plan is no rival.
# Rows are paired: both models read the same ones. Most baselines are decided on a few of them (see `plan.looks`).
# Sources: intersection-union test: Berger 1982; Bonferroni.

BETTER, NO_WORSE, WORSE = "better", "no worse shown", "worse"
SMALLER = 0.01  # of an equal's bytes, that a plan saves at least to be recommended for its size


class PlanVerdict(NamedTuple):
    """`baselines` in the given order. `standing`: one of the three words; `winner`: "plan", or the baseline of less and least damage."""

    damage: Measured
    baselines: list[Comparison]
    standing: str
    recommended: bool
    winner: str
    text: str


def verdict_on_plan(
    plan: ArrayLike,
    others: Mapping[str, ArrayLike],
    seed: int = 0,
    blocks: Blocks = None,
    sizes: Mapping[str, int] | None = None,
) -> PlanVerdict:
    """Judge damage on all test rows, nats/token. plan: [rows]; others: name -> [rows]; blocks: [rows]; sizes: bytes by name, "plan" among them."""
    return verdict_of(measured(plan, UNIT, PLAN, "test", seed, blocks), compare_on_all(plan, others, seed, blocks), sizes)


def verdict_of(damage: Measured, compared: list[Comparison], sizes: Mapping[str, int] | None = None) -> PlanVerdict:
    """Judge a plan of this damage by its comparisons. sizes: bytes by name, "plan" among them."""
    rivals = [rival for rival in compared if not rival.same]
    nearest = max(rivals, key=lambda rival: rival.difference.mean, default=None)  # paired: means of other rows are no match
    winner = nearest.name if nearest is not None and nearest.difference.mean > 0 else PLAN
    standing = _standing(rivals)
    recommended = standing == BETTER or (standing == NO_WORSE and _smallest(rivals, sizes))
    text = _worse_text(rivals, winner) if standing == WORSE else _text(damage, compared, rivals, standing, recommended)
    return PlanVerdict(damage, compared, standing, recommended, winner, text)


def _standing(rivals: list[Comparison]) -> str:
    if rivals and all(rival.relation == "beats" for rival in rivals):
        return BETTER
    return WORSE if any(rival.worse for rival in rivals) else NO_WORSE


def _smallest(rivals: list[Comparison], sizes: Mapping[str, int] | None) -> bool:
    """Return whether the plan is smaller than every baseline that it is not shown to beat."""
    equals = [rival.name for rival in rivals if rival.relation != "beats"]
    return not equals or (sizes is not None and all(sizes[PLAN] <= (1 - SMALLER) * sizes[name] for name in equals))


def _worse_text(rivals: list[Comparison], winner: str) -> str:
    losses = [rival for rival in rivals if rival.relation == "loses to"] or rivals
    best = max(losses, key=lambda rival: (rival.name == winner, rival.difference.mean))
    ours = best.damage.mean + best.difference.mean  # on the rows that both were measured on
    return (
        f"{best.name}, no larger, does less damage on {rows_of(best.damage)}: {number(best.damage.mean)} against {number(ours)} {UNIT} "
        f"(plan minus {best.name}: {interval(best.difference)})"
    )


def _text(damage: Measured, compared: list[Comparison], rivals: list[Comparison], standing: str, recommended: bool) -> str:
    parts = [f"{interval(damage, unit=True)} on {rows_of(damage)}"]
    equals = [rival for rival in rivals if rival.relation != "beats"]
    if not compared:
        return f"{parts[0]}; compared with nothing"
    if standing == BETTER:
        parts.insert(0, f"{BETTER} than every plan of its size that was tried")
    elif equals:
        nearest = max(equals, key=lambda rival: rival.difference.mean)
        more = f" and {len(equals) - 1} other{'s' if len(equals) > 2 else ''}" if len(equals) > 1 else ""
        difference = f"plan minus {nearest.name}: {interval(nearest.difference)}"
        parts.insert(0, f"{NO_WORSE}, and no better, than {nearest.name}{more} ({difference})")
    random = [rival for rival in rivals if rival.name.startswith(RANDOM)]
    for word in ("beats", "ties with", "loses to"):
        named = [rival for rival in rivals if rival.relation == word and rival not in random]
        parts += [f"{word} {listed([f'{rival.name} ({number(rival.damage.mean)})' for rival in named])}"] if named else []
    same = [other.name for other in compared if other not in rivals]
    parts += [f"the same plan as {listed(same)}"] if same else []
    if random:
        beaten = sum(rival.relation == "beats" for rival in random)
        best = max(random, key=lambda rival: rival.difference.mean)
        parts.append(f"beats {beaten} of {len(random)} random plans (the best of them {number(best.damage.mean)})")
    parts += _fewer_rows(damage, rivals)
    if standing == NO_WORSE and equals:
        parts.append("recommended as the smallest of these" if recommended else "more rows (--rows) would tell")
    return "; ".join(parts)


def _fewer_rows(damage: Measured, rivals: list[Comparison]) -> list[str]:
    """Say how many baselines were measured on fewer rows than the plan, and on how many."""
    counts = sorted(rival.damage.n for rival in rivals if rival.damage.n < damage.n)
    if not counts:
        return []
    rows = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return [f"{len(counts)} of these {len(rivals)} plans were measured on {rows} rows"]


# --- replan ----------------------------------------------------------------------------------------------------------------
#
# Another budget from a finished survey: the atlas holds the measured damage of every unit, so no model is needed.
# Solved on the scores whose plan was the best one measured in the survey. The damage is predicted and says so; `verify` measures it.


def replan(folder: Path, budget: Budget) -> Plan:
    """Return the plan under `budget` of the survey in `folder` (see `replan_atlas`)."""
    return replan_atlas(read_record(folder / "atlas.json", Atlas), budget)


def replan_atlas(atlas: Atlas, budget: Budget) -> Plan:
    """Return the plan under `budget`; UserError where no plan can be that small, or the tolerated damage cannot be met."""
    problem = problem_of(atlas)
    budget = resolve_budget(budget, atlas.model)
    check_budget(budget, atlas.modules, problem.formats, atlas.model)
    every = scores_of(atlas)
    used = atlas.plan.solver.get("scores") if atlas.plan else None
    name = used if used in every.tables else "mean of both"
    table = every.tables[name]
    scores = Scores({name: table}, every.at_high)

    def predict(plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {key: scores.predicted(table, choice) for key, choice in plans.items()}

    candidate = search(problem, budget, PlannerHooks(scores, predict, where="are predicted to do"))
    only_predicted = {key: candidate.solver[key] for key in ("method", "scores", "gap")}
    return unverified_plan(problem, budget, replace(candidate, solver=only_predicted))


def problem_of(atlas: Atlas) -> PlanningProblem:
    """Return what the survey planned for."""
    codes = atlas.plan.codes if atlas.plan else ""
    return PlanningProblem(
        atlas.model, atlas.modules, by_width(list(atlas.formats)), atlas.quantizer, codes, int(atlas.settings["seed"])
    )


def scores_of(atlas: Atlas) -> Scores:
    """Return the three score tables of the survey's screens."""
    problem = problem_of(atlas)
    names = [unit.name for unit in problem.units]
    return damage_tables(names, problem.formats, atlas.unit_damage, atlas.base_damage, problem.outside)


def write_plan(plan: Plan, folder: Path, out: Path | None) -> Path:
    """Write the plan to `out`, or to the survey's folder under a name that says its budget.

    Only an earlier plan is written over: UserError for any other file, a folder, or a place that cannot be written to.
    """
    file = out or folder / f"plan-{plan.budget.kind}-{_value(plan.budget)}.json"
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
    """Return what a file's name says of the budget: all digits, so that two budgets never share a file."""
    if budget.protect:
        return "-".join(f"{task}-{given(points)}" for task, points in budget.protect.items())
    load = budget.workload  # tells budgets of memory apart: "-context-8192-float16-batch-1-chunk-512"
    more = f"-context-{load.context}-{load.cache_dtype}-batch-{load.batch}-chunk-{load.chunk}" if load else ""
    return f"{given(budget.value)}{more}"


def _is_plan(file: Path) -> bool:
    try:
        return file.is_file() and bool(read_record(file, Plan))
    except UserError:
        return False
