"""From a choice to a judged plan: measured once on the test rows, beside what anybody could have done with the same room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bitatlas.errors import UserError
from bitatlas.plan.baselines import RANDOM_PLANS, baselines, outside_uniform
from bitatlas.plan.budget import check_budget, costs_of, resolve_budget
from bitatlas.plan.search import Candidate, PlannerHooks, PlanningProblem, Scores, damage_tables, search
from bitatlas.records import Atlas, Baseline, Budget, CurvePoint, Measured, Plan, PlanDamage, PlanModel
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.formats import FORMATS, by_width
from bitatlas.records.plan import Workload
from bitatlas.records.sizes import assignment_of, size_of
from bitatlas.records.text import byte_size, given, interval, listed, number, rows_of
from bitatlas.stats.bootstrap import Blocks, independent, measured, percentile_interval, resample_means

NOT_A_CANDIDATE = "not in --formats"

Assignment = dict[str, str]
MeasureRows = Callable[[Mapping[str, Assignment], str], dict[str, np.ndarray]]  # (plans by name, split) -> damage [rows]


CURVE = "curve"  # kind of a point of the atlas's curve: a plan at another size


@dataclass(frozen=True)
class JudgedPlan:
    """The plan with its verdict, and every plan that was measured on the test rows."""

    plan: Plan
    curve: list[CurvePoint]


def unverified_plan(subject: PlanningProblem, budget: Budget, found: Candidate) -> Plan:
    """A plan whose damage is predicted."""
    info, modules = subject.info, subject.modules
    assignment = assignment_of(subject.units, subject.formats, found.choice)
    return Plan(
        model=PlanModel(info.name, info.revision, info.weights_sha256),
        formats={name: FORMATS[name] for name in subject.formats},
        quantizer=subject.quantizer,
        modules=assignment,
        budget=budget,
        size=size_of(modules, assignment, info),
        damage=PlanDamage(found.predicted, None),
        solver={**found.solver, "seed": subject.seed},
        codes=subject.codes,
    )


def judge(
    subject: PlanningProblem,
    budget: Budget,
    found: Candidate,
    measure: MeasureRows,
    most_critical: Sequence[int] = (),
    random: int = RANDOM_PLANS,
) -> JudgedPlan:
    """Measure the plan and the baselines of at most its budget on the test rows. `most_critical`: layers, worst first; `random`: plans."""
    plan = unverified_plan(subject, budget, found)
    cost = costs_of(budget, subject.units, subject.formats, subject.info).cost
    rules = baselines(subject.units, cost, found.limit, subject.seed, subject.formats, most_critical, random)
    others = {name: assignment_of(subject.units, subject.formats, choice) for name, choice in rules}
    outside = outside_uniform(budget, subject.units, subject.formats, subject.info, found.limit)
    if outside:
        others = {f"uniform {outside} ({NOT_A_CANDIDATE})": {m.name: outside for m in subject.modules}, **others}
    return _judged(subject, plan, others, measure({"plan": plan.modules, **others}, "test"))


def curve_point(judged: JudgedPlan) -> CurvePoint:
    """The point of a plan that was found for another size than the survey's own."""
    return replace(judged.curve[0], name=f"plan of at most {byte_size(int(judged.plan.budget.value))}", kind=CURVE)


def tolerance_text(damage: Measured, tolerated: float) -> str:
    """Whether the test rows bear out what the select rows promised; choosing among many plans on them flatters the chosen one."""
    low, high = damage.ci95 or (-np.inf, np.inf)
    if high <= tolerated:
        return f"within the tolerated {given(tolerated)} on test rows"
    shown = "above" if low > tolerated else "not shown to be within"
    return f"{shown} the tolerated {given(tolerated)} on test rows"


def _judged(subject: PlanningProblem, plan: Plan, others: Mapping[str, Assignment], rows: Mapping[str, np.ndarray]) -> JudgedPlan:
    """Add measured damage, baselines and the verdict."""
    sizes = {name: size_of(subject.modules, assignment, subject.info) for name, assignment in others.items()}
    bytes_of = {"plan": plan.size.quantized_bytes} | {name: size.quantized_bytes for name, size in sizes.items()}
    blocks = subject.test_blocks
    verdict = verdict_on_plan(rows["plan"], {name: rows[name] for name in others}, "test", subject.seed, blocks, bytes_of)
    damage = measured(rows["plan"], "nats/token", "plan", "test", subject.seed, blocks)
    text = verdict.text
    if NOT_A_CANDIDATE in verdict.winner:
        text += f"; add {verdict.winner.split()[1]} to --formats"
    if plan.budget.kind == "max_damage":
        text += f"; {tolerance_text(damage, plan.budget.value)}"
    lines = [
        Baseline(name, sizes[name].code_bits, sizes[name].quantized_bytes, one, difference)
        for name, one, difference in verdict.baselines
    ]
    done = replace(
        plan,
        damage=PlanDamage(plan.damage.predicted, damage),
        baselines=lines,
        recommended=verdict.recommended,
        verdict=text,
        standing=verdict.standing,
    )
    size = plan.size
    curve = [CurvePoint("plan", "plan", size.code_bits, size.stored_bits, size.total_bytes, damage)]
    for line in lines:
        own = sizes[line.name]
        kind = "random" if line.is_random else "baseline"
        curve.append(CurvePoint(line.name, kind, own.code_bits, own.stored_bits, own.total_bytes, line.damage))
    return JudgedPlan(done, curve)


# --- verdict ---------------------------------------------------------------------------------------------------------------

# Is the plan worth having? Against every baseline of at most its size, on the same test rows.
#
# Three words. *Better*: the interval of the paired difference, plan minus baseline, lies below 0 for every baseline: uniform, first or last
# layers high, each of the random plans. Each must be beaten, so the best of many needs no correction (an intersection-union test): a plan
# that is no better than one of them is called better in at most 2.5 % of cases. *Worse*: for some baseline the interval lies above 0 at a
# level that is corrected for their number. Else *no worse shown*: too close for so many rows. A plan is recommended where it is better, or,
# where it is not worse, as the smallest of its equals. A baseline that happens to be the same plan is no rival.
# Rows are paired: both models read the same ones.
# Sources: intersection-union test: Berger 1982; Bonferroni.

UNIT = "nats/token"
PLAN = "plan"
RANDOM = "random"  # baselines whose names start so are told together
BETTER, NO_WORSE, WORSE = "better", "no worse shown", "worse"
LEVEL = 0.05
SMALLER = 0.01  # of an equal's bytes, that a plan saves at least to be recommended for its size

Compared = tuple[str, Measured, Measured]  # name, damage, plan minus baseline


class PlanVerdict(NamedTuple):
    """`baselines` in the given order. `standing`: one of the three words; `winner`: "plan", or the baseline of less and least damage."""

    baselines: list[Compared]
    standing: str
    recommended: bool
    winner: str
    text: str


def verdict_on_plan(
    plan: ArrayLike,
    others: Mapping[str, ArrayLike],
    split: str = "test",
    seed: int = 0,
    blocks: Blocks = None,
    sizes: Mapping[str, int] | None = None,
) -> PlanVerdict:
    """plan: [rows] damage in nats/token; others: name -> [rows] of the same rows; blocks: [rows]; sizes: bytes by name, "plan" among them."""
    ours = np.asarray(plan, dtype=np.float64)
    rows = {name: np.asarray(values, dtype=np.float64) for name, values in others.items()}
    compared = [
        (name, measured(values, UNIT, name, split, seed, blocks), measured(ours - values, UNIT, PLAN, split, seed, blocks))
        for name, values in rows.items()
    ]
    rivals = [one for one in compared if not np.array_equal(rows[one[0]], ours)]
    least = min(rivals, key=lambda one: one[1].mean, default=None)
    winner = least[0] if least is not None and least[2].mean > 0 else PLAN
    standing = _standing(ours, [rows[name] for name, *_ in rivals], rivals, seed, blocks)
    recommended = standing == BETTER or (standing == NO_WORSE and _smallest(rivals, sizes))
    damage = measured(ours, UNIT, PLAN, split, seed, blocks)
    text = _worse_text(damage, rivals, winner) if standing == WORSE else _text(damage, compared, rivals, standing, recommended)
    return PlanVerdict(compared, standing, recommended, winner, text)


def _standing(ours: np.ndarray, values: list[np.ndarray], rivals: list[Compared], seed: int, blocks: Blocks) -> str:
    if not rivals:
        return NO_WORSE
    if all(relation(difference) == "beats" for *_, difference in rivals):
        return BETTER
    resampled = resample_means(ours[:, None] - np.stack(values, axis=1), seed=seed, blocks=blocks)  # [resamples, rivals]
    low, _ = percentile_interval(resampled, independent(len(ours), blocks), 1 - LEVEL / len(rivals))
    return WORSE if (low > 0).any() else NO_WORSE


def _smallest(rivals: list[Compared], sizes: Mapping[str, int] | None) -> bool:
    """Whether the plan is smaller than every baseline that it is not shown to beat."""
    equals = [name for name, _, difference in rivals if relation(difference) != "beats"]
    return not equals or (sizes is not None and all(sizes[PLAN] <= (1 - SMALLER) * sizes[name] for name in equals))


def relation(difference: Measured) -> str:
    """ "beats", "ties with" (the interval holds 0, or there is none) or "loses to", for plan minus baseline."""
    if difference.ci95 is None or difference.ci95[0] <= 0 <= difference.ci95[1]:
        return "ties with"
    return "beats" if difference.mean < 0 else "loses to"


def _worse_text(damage: Measured, rivals: list[Compared], winner: str) -> str:
    losses = [one for one in rivals if relation(one[2]) == "loses to"] or rivals
    name, its, difference = next((one for one in losses if one[0] == winner), min(losses, key=lambda one: one[1].mean))
    return (
        f"{name}, no larger, does less damage on {rows_of(damage)}: {number(its.mean)} against {number(damage.mean)} {UNIT} "
        f"(plan minus {name}: {interval(difference)})"
    )


def _text(damage: Measured, compared: list[Compared], rivals: list[Compared], standing: str, recommended: bool) -> str:
    said = [f"{interval(damage, unit=True)} on {rows_of(damage)}"]
    equals = [one for one in rivals if relation(one[2]) != "beats"]
    if not compared:
        return f"{said[0]}; compared with nothing"
    if standing == BETTER:
        said.insert(0, f"{BETTER} than every plan of its size that was tried")
    elif equals:
        nearest = max(equals, key=lambda one: one[2].mean)
        more = f" and {len(equals) - 1} other{'s' if len(equals) > 2 else ''}" if len(equals) > 1 else ""
        said.insert(0, f"{NO_WORSE}, and no better, than {nearest[0]}{more} (plan minus {nearest[0]}: {interval(nearest[2])})")
    for word in ("beats", "ties with", "loses to"):
        names = [
            f"{name} ({number(its.mean)})"
            for name, its, difference in rivals
            if relation(difference) == word and not _is_random(name)
        ]
        said += [f"{word} {listed(names)}"] if names else []
    same = [name for name, *_ in compared if name not in {one[0] for one in rivals}]
    said += [f"the same plan as {listed(same)}"] if same else []
    random = [(its, difference) for name, its, difference in rivals if _is_random(name)]
    if random:
        beaten = sum(relation(difference) == "beats" for _, difference in random)
        least = min(its.mean for its, _ in random)
        said.append(f"beats {beaten} of {len(random)} random plans (the best of them {number(least)})")
    if standing == NO_WORSE and equals:
        said.append("recommended as the smallest of these" if recommended else "more rows (--rows) would tell")
    return "; ".join(said)


def _is_random(name: str) -> bool:
    return name.startswith(RANDOM)


# --- replan ----------------------------------------------------------------------------------------------------------------

# Another budget from a finished survey: the atlas holds the measured damage of every unit, so no model is needed.
#
# Solved on the scores whose plan was the best one measured in the survey. The damage is predicted and says so; `verify` measures it.


def replan(folder: Path, budget: Budget) -> Plan:
    """The plan under `budget` of the survey in `folder` (see `replan_atlas`)."""
    return replan_atlas(read_record(folder / "atlas.json", Atlas), budget)


def replan_atlas(atlas: Atlas, budget: Budget) -> Plan:
    """The plan under `budget`; UserError where no plan can be that small, or the tolerated damage cannot be met."""
    subject = problem_of(atlas)
    budget = resolve_budget(budget, atlas.model)
    check_budget(budget, atlas.modules, subject.formats, atlas.model)
    scores = _scores_used(atlas, scores_of(atlas))
    tools = PlannerHooks(scores, lambda plans: predicted(scores, plans), where="are predicted to do")
    found = search(subject, budget, tools)
    only_predicted = {name: found.solver[name] for name in ("method", "scores", "gap")}
    return unverified_plan(subject, budget, replace(found, solver=only_predicted))


def problem_of(atlas: Atlas) -> PlanningProblem:
    """What the survey planned for."""
    codes = atlas.plan.codes if atlas.plan else ""
    seed = int(atlas.settings["seed"])
    return PlanningProblem(atlas.model, atlas.modules, by_width(list(atlas.formats)), atlas.quantizer, codes, seed)


def scores_of(atlas: Atlas) -> Scores:
    """The three score tables of the survey's screens."""
    subject = problem_of(atlas)
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
