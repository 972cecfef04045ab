"""Run a survey, the main job: every stage in order, from an opened checkpoint to a report.

Each stage measures, journals and returns its record of evidence; stages know nothing of each other, and what one hands to the next stands
in `_survey`. An interrupted run goes on where it stopped; the files are written at the end, from the finished atlas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from bitatlas.data.rows import cut_rows, rows_sha256
from bitatlas.data.tasks import TASKS, chance_level, load_items, task_text
from bitatlas.errors import UserError
from bitatlas.findings.conclude import AttentionEvidence, DamageEvidence, Evidence, PlanEvidence, TaskEvidence
from bitatlas.findings.shares import LayerRows, layer_records
from bitatlas.findings.statements import ablation_record
from bitatlas.findings.tasks import TaskRows
from bitatlas.findings.zones import joint_damage
from bitatlas.measure.attention.ablation import ABLATION_SEQUENCES, SHORT_SEQUENCES, ablate
from bitatlas.measure.attention.focus import Problem, problems_of
from bitatlas.measure.attention.profile import AttentionResult, AttentionTexts, attention_profile, example_maps
from bitatlas.measure.screens import (
    ROW_LENGTH,
    TASK_ROWS,
    KindScreen,
    LayerScreen,
    TextScreen,
    UnitScreen,
    general_rows,
    screen_kinds,
    screen_layers,
    screen_orders,
    screen_text,
    screen_uniform,
    screen_units,
)
from bitatlas.measure.tasks import right_of, with_norms
from bitatlas.measure.weights import weight_profile
from bitatlas.model.streaming import release_free_memory
from bitatlas.plan.baselines import most_critical_first
from bitatlas.plan.calibration import calibrate
from bitatlas.plan.judge import curve_point, judge
from bitatlas.plan.search import PlannerHooks, damage_tables, search
from bitatlas.progress import Reporter
from bitatlas.quantize.moments import FEW_TOKENS, expert_tokens
from bitatlas.records import Atlas, Calibration, CurvePoint, JointDamage, Plan, WeightProfile
from bitatlas.records.files import to_json, write_text
from bitatlas.records.journal import content_key
from bitatlas.records.sizes import candidates_of, inner, uniform
from bitatlas.records.text import interval, listed
from bitatlas.report.html import progress_html
from bitatlas.run.assemble import Screens, assemble, tables_of, uniform_records, write_outputs
from bitatlas.run.curve import short_curve
from bitatlas.run.planner import first_hooks, layers_by_score, planner_hooks
from bitatlas.run.prepare import Session, prepare, save_importance
from bitatlas.run.protect import check_protected, protect_plan
from bitatlas.run.ray.scheduler import Scheduler
from bitatlas.run.settings import Settings
from bitatlas.stats.paired import compare_all

FOCUS_PROBLEMS = 64
MOST_NAMED = 12  # experts in a line


def run_survey(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None = None) -> Atlas:
    """MeasureDamage, plan, verify and write; returns the finished atlas. `ray`: auto or a cluster's address, whose workers measure."""
    with _opened(settings, out, resume, reporter, ray) as session:
        return _survey(session)


@contextmanager
def _opened(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None) -> Iterator[Session]:
    """Open a survey, with every module in every format at hand."""
    with ExitStack() as stack:
        scheduler = stack.enter_context(closing(Scheduler(ray, reporter))) if ray is not None else None
        session = prepare(settings, out, resume, reporter, scheduler.connect if scheduler else None)
        stack.enter_context(closing(session.journal))
        if scheduler:
            scheduler.configure(session)
        check_protected(session)
        with reporter.stage(f"quantizing ({settings.quantizer})") as progress:
            session.bank.ready(candidates_of(session.checkpoint.modules, settings.formats), progress)
        reporter.passed("quantizing")
        tell_experts(session)
        save_importance(session)
        release_free_memory()
        yield session


def tell_experts(session: Session) -> None:
    """Say how many tokens of the fit rows each expert of a mixture saw, and which saw too few for codes of their own."""
    modules = [module for module in inner(session.checkpoint.modules) if module.expert is not None]
    if not modules:
        return
    rows, key = session.rows.fit, content_key("experts", session.meter.identity, rows_sha256(session.rows.fit))
    counts = session.journal.get(key)
    if counts is None:
        counts = expert_tokens(session.decoder, [module.name for module in modules], rows)
        session.journal.put(key, "experts", counts)
    tokens: dict[tuple[int, int], int] = {}  # (layer, expert) -> tokens
    for module in modules:
        tokens[module.layer, module.expert or 0] = counts[module.name]
    line = experts_text(tokens, rows.numel(), session.bank.quantizer.name == "gptq")
    session.checkpoint = replace(session.checkpoint, notes=[*session.checkpoint.notes, line])
    session.reporter.say(line)


def experts_text(tokens: Mapping[tuple[int, int], int], total: int, fitted: bool) -> str:
    """Return a line on how tokens were routed. tokens: (layer, expert) -> tokens of the fit rows that it saw; fitted: codes are fitted to them."""
    counts, few = sorted(tokens.values()), [key for key, count in tokens.items() if count < FEW_TOKENS]
    line = (
        f"experts: {len(counts)} in {len({layer for layer, _ in tokens})} layers; each saw {counts[0]} to {counts[-1]} of {total} tokens "
        f"of the fit rows (median {counts[len(counts) // 2]})"
    )
    if few and fitted:
        shown, left = few[:MOST_NAMED], len(few) - MOST_NAMED
        named = listed([*(f"{layer}.{expert}" for layer, expert in shown), *([f"{left} more"] if left > 0 else [])])
        line += f"; {len(few)} saw fewer than {FEW_TOKENS} and are fitted to all of their layer's inputs (layer.expert: {named})"
    return line


def _survey(session: Session) -> Atlas:
    first = find_first_plan(session)
    show_progress(session, first, STAGES)
    weights = profile_weights(session)
    screens = screen_damage(session)
    show_progress(session, first, STAGES[1:])
    plan = find_plan(session, screens, first)
    show_progress(session, first, STAGES[2:])
    tasks = ask_tasks(session, plan.plan)
    show_progress(session, first, STAGES[3:])
    attention = read_attention(session)
    evidence = Evidence(screens.damage, weights, attention, plan, tasks)
    atlas = assemble(session, evidence, screens)
    session.finish()
    with session.reporter.stage("writing the report"):
        write_outputs(session.out, atlas, tables_of(atlas, evidence, screens))
    return atlas


# --- the first plan ------------------------------------------------------------------------------------------------------------
#
# Every survey begins with it: a plan from the price list, judged like any other and written at once. `survey --draft` ends there.


def run_draft(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None = None) -> Plan:
    """Find, judge and write the first plan alone; returns it."""
    if settings.budget.protect:
        raise UserError("--draft --protect: whether a task is held takes the survey's answers; give a size, or leave --draft out")
    reporter.only = ("quantizing", "first plan", "its verdict")
    with _opened(settings, out, resume, reporter, ray) as session:
        plan = find_first_plan(session)
        assert plan
        session.finish()
        write_text(out / "plan.json", to_json(plan))
        return plan


def find_first_plan(session: Session) -> Plan | None:
    """Find and judge a plan from prices; None under a budget of tasks, which no price knows."""
    subject, budget = session.subject, session.settings.budget
    if budget.protect:
        return None
    hooks = first_hooks(session)
    candidate = search(subject, budget, hooks)
    session.reporter.passed("first plan")
    judged = judge(subject, budget, candidate, session.measure, layers_by_score(session, hooks.scores))
    session.reporter.passed("its verdict")
    session.reporter.found("first plan", f"{interval(judged.plan.damage.measured, unit=True)} on test rows")
    session.checkpoint.check_unchanged()
    return judged.plan


STAGES = ("damage of layers, kinds and units", "the plan under the budget, and at other sizes", "tasks", "attention")


def show_progress(session: Session, first: Plan | None, waiting: Sequence[str]) -> None:
    """Write the first plan and a page of what is still being measured, in the place of the survey's own until these are there."""
    if first and not (session.out / "atlas.json").exists():
        write_text(session.out / "plan.json", to_json(first))
        write_text(session.out / "report.html", progress_html(first, session.reporter.results, waiting))


# --- weights ---------------------------------------------------------------------------------------------------------------


def profile_weights(session: Session) -> list[WeightProfile]:
    """Profile every module's weights, one at a time."""
    profiles = []
    adapter = TypeAdapter(WeightProfile)
    modules, formats = inner(session.checkpoint.modules), session.settings.formats
    with session.reporter.stage("weights") as progress:
        for done, module in enumerate(modules, start=1):
            key = content_key("weights", session.meter.identity, module.name, list(module.formats(formats)))
            value = session.journal.get(key)
            if value is None:
                quantized = {name: session.bank.codes(module.name, module.at(name)).weight() for name in formats}
                value = asdict(weight_profile(module, session.bank.reference(module.name), quantized))
                session.journal.put(key, "weights", value)
            profiles.append(adapter.validate_python(value))
            progress(done, len(modules))
    return profiles


# --- damage ----------------------------------------------------------------------------------------------------------------


def screen_damage(session: Session) -> Screens:
    """Measure every uniform width, every layer, kind of module and unit both ways, and the layers in sampled orders."""
    settings, modules, reporter, effort = session.settings, session.checkpoint.modules, session.reporter, session.effort
    low, high, test, blocks = settings.low, settings.high, session.rows.test, session.rows.blocks("test")
    widths = screen_uniform(session.meter, modules, settings.formats, test, reporter)
    records = uniform_records(session, widths)
    for record in records:
        reporter.found(f"uniform {record.format}", interval(record.damage, unit=True))
    reporter.passed("uniform widths")
    by_layer = screen_layers(session.meter, modules, low, high, test[: effort.layer_rows], reporter)
    reporter.passed("layers")
    by_kind = screen_kinds(session.meter, modules, low, high, test[: effort.kind_rows], reporter)
    orders = screen_orders(
        session.meter, modules, low, high, test[: effort.order_rows], settings.seed, reporter, not settings.refine
    )
    reporter.passed("kinds of modules", "orders of layers")
    layers = part_rows(session, "layer", widths, by_layer, "test", blocks)
    layers = replace(layers, orders=orders.added) if orders else layers
    kinds = part_rows(session, "kind", widths, by_kind, "test", blocks)
    joint = lowered_together(session, layers)
    units = screen_units(session.meter, modules, settings.formats, session.rows.fit[: effort.unit_rows], reporter, settings.seed)
    reporter.passed("units")
    damage = DamageEvidence(layers, inner(modules), kinds, unit_rows(session, units), orders.models if orders else 0, joint)
    return Screens(damage, widths, records, units)


def part_rows(
    session: Session,
    part: str,
    widths: Mapping[str, np.ndarray],
    screen: LayerScreen | KindScreen,
    split: str,
    blocks: Sequence[int] | None,
) -> LayerRows:
    """Return the damage of each `part` ("layer", "kind" or "unit") as findings read it, on as many rows as it was measured on."""
    weights: Counter[str] = Counter()
    for module in inner(session.checkpoint.modules):
        weights[str(getattr(module, part))] += module.weights
    high, low, rows = session.settings.high, session.settings.low, screen.lowered.shape[1]
    return LayerRows(
        widths[high][:rows], widths[low][:rows], screen.lowered, screen.raised, np.array(list(weights.values()), dtype=np.float64),
        high, low, split, blocks[:rows] if blocks else None,
    )  # fmt: skip


def unit_rows(session: Session, units: UnitScreen) -> LayerRows:
    """Return the damage of the units moved between the two bases, on the fit rows."""
    high, low = session.settings.high, session.settings.low
    at_high, at_low = units.by_row[f"uniform:{high}"], units.by_row[f"uniform:{low}"]
    names = {module.unit for module in inner(session.checkpoint.modules)}
    lowered = [rows[low] for unit, rows in at_high.items() if unit in names]
    raised = [rows[high] for unit, rows in at_low.items() if unit in names]
    bases = {name: units.base_by_row[f"uniform:{name}"] for name in (high, low)}
    screen = LayerScreen(np.stack(lowered), np.stack(raised))
    return part_rows(session, "unit", bases, screen, "fit", session.rows.blocks("fit"))


def lowered_together(session: Session, layers: LayerRows) -> JointDamage | None:
    """Measure what the layers that are safe alone do together, on the select rows."""
    settings, modules = session.settings, session.checkpoint.modules
    low, high = settings.low, settings.high

    def added(lowered: Sequence[int]) -> np.ndarray:
        at_high = uniform(modules, high)
        plans = {"high": at_high, "low": at_high | {m.name: m.at(low) for m in inner(modules) if m.layer in lowered}}
        damage = session.measure(plans, "select")
        return damage["low"] - damage["high"]

    records = layer_records(layers, settings.tolerance_nats, seed=settings.seed)
    blocks = session.rows.blocks("select")
    return joint_damage(records, added, settings.tolerance_nats, f"uniform:{high}", blocks, settings.seed)


# --- attention -------------------------------------------------------------------------------------------------------------


def read_attention(session: Session) -> AttentionEvidence:
    """Read attention at the reference and at both uniform ends, and remove heads by role from the reference, where heads were read."""
    settings, modules = session.settings, inner(session.checkpoint.modules)
    bases: dict[str, dict[str, str]] = {"reference": {}}  # -> module -> format
    bases |= {f"uniform:{name}": uniform(modules, name) for name in (settings.high, settings.low)}
    results = [profile_attention(session, base, assignment) for base, assignment in bases.items()]
    heads = results[0].heads
    with session.reporter.stage("removing heads") as progress:
        removals = ablate(
            session.decoder, session.tokenizer, heads, session.meter.identity, session.journal, seed=settings.seed, progress=progress,
            sequences=min(session.effort.sequences, ABLATION_SEQUENCES if settings.refine else SHORT_SEQUENCES),
        )  # fmt: skip
    return AttentionEvidence(
        attention=[layer for result in results for layer in result.layers],
        heads=[head for result in results for head in result.heads],
        ablations=[ablation_record(removal, settings.seed) for removal in removals],
        head_maps=example_maps(session.decoder, session.tokenizer, heads, settings.seed),
        notes=list(dict.fromkeys([*session.checkpoint.notes, *(note for result in results for note in result.notes)])),
    )


def profile_attention(session: Session, base: str, assignment: Mapping[str, str]) -> AttentionResult:
    """Profile attention at one base, with its drift from the reference."""
    problems, seed, count = focus_problems(session), session.settings.seed, session.effort.profiled_rows
    rows, blocks = session.rows.test[:count], session.rows.blocks("test")[:count]
    asked = [asdict(problem) for problem in problems]
    key = content_key("attention", session.meter.identity, dict(assignment), base, rows.tolist(), blocks, asked, seed)
    adapter = TypeAdapter(AttentionResult)
    with session.reporter.stage(f"attention ({base})") as progress:
        value = session.journal.get(key)
        if value is None:
            result = attention_profile(
                session.decoder, session.tokenizer, inner(session.checkpoint.modules), AttentionTexts(rows, problems, blocks), base=base,
                changed=session.bank.weights(assignment) if assignment else None, seed=seed, progress=progress,
            )  # fmt: skip
            value = asdict(result)
            session.journal.put(key, "attention", value)
    return adapter.validate_python(value)


def focus_problems(session: Session) -> list[Problem]:
    """Return word problems with solutions, of the scored tasks; of the bundled demo where no scored task has any."""
    worked = {task: items for task, items in session.items.items() if not TASKS[task].is_choice}
    worked = worked or {"demo_problems": load_items("demo_problems", None, FOCUS_PROBLEMS, session.settings.seed)}
    problems = [replace(problem, source=task) for task, items in worked.items() for problem in problems_of(items)]
    return problems[: session.effort.problems]


# --- plan ------------------------------------------------------------------------------------------------------------------


def find_plan(session: Session, screens: Screens, first: Plan | None) -> PlanEvidence:
    """Find the plan under the budget, with the first one as a start, judge it on the test rows, and verify a few plans at other sizes and its prediction."""
    settings, subject, units = session.settings, session.subject, screens.units
    names = [unit.name for unit in subject.units]
    hooks = planner_hooks(session, damage_tables(names, settings.formats, units.damage, units.base, subject.outside))
    most_critical = most_critical_first(subject.modules, screens.damage.layers.values.mean(axis=0))
    if settings.budget.protect:
        judged = protect_plan(session, hooks, most_critical)
    else:
        starts = {"first plan": session.choice(first.modules)} if first else {}
        candidate = search(subject, settings.budget, hooks, starts)
        judged = judge(subject, settings.budget, candidate, session.measure, most_critical)
    session.reporter.found("plan", f"{interval(judged.plan.damage.measured, unit=True)} on test rows")
    session.reporter.passed("the plan")
    others = short_curve(session, hooks, most_critical, judged.plan) if settings.curve and session.effort.curve else []
    points = [
        CurvePoint(f"uniform {u.format}", "uniform", u.size.code_bits, u.size.stored_bits, u.size.total_bytes, u.damage)
        for u in screens.uniform
    ]
    session.reporter.passed("plans at other sizes")
    calibration = check_prediction(session, hooks, judged.plan.modules)
    session.reporter.passed("check of the prediction")
    return PlanEvidence(
        plan=judged.plan,
        curve=[*points, *judged.curve, *map(curve_point, others)],
        plans=[other.plan for other in others],
        calibration=calibration,
    )


def check_prediction(session: Session, hooks: PlannerHooks, assignment: Mapping[str, str]) -> Calibration | None:
    """Compare predicted with measured damage of random plans around a refined plan; None where the units are too few for that."""
    settings, probe, plans = session.settings, hooks.probe, session.effort.calibration
    if probe is None or not plans:
        return None

    fit_rows = range(min(session.effort.unit_rows, len(session.rows.fit)))

    def measure(choices: Mapping[str, np.ndarray], split: str) -> dict[str, np.ndarray]:
        return session.measure(session.assignments(choices), split, fit_rows if split == "fit" else None)

    base, blocks = session.choice(assignment), session.rows.blocks("select")
    return calibrate(base, len(settings.formats), probe, hooks.scores, measure, settings.seed, blocks, plans)


# --- tasks -----------------------------------------------------------------------------------------------------------------


def ask_tasks(session: Session, plan: Plan | None) -> TaskEvidence:
    """Measure damage on each task's own text, and ask every task at every precision, the plan's among them."""
    texts, general = screen_texts(session)
    session.reporter.passed("tasks' own text")
    modules, settings = session.checkpoint.modules, session.settings
    precisions: dict[str, dict[str, str]] = {"reference": {}}  # -> module -> format
    precisions |= {f"uniform:{name}": uniform(modules, name) for name in reversed(settings.formats)}
    precisions |= {"plan": plan.modules} if plan else {}
    outcomes: dict[str, dict[str, np.ndarray]] = {task: {} for task in session.items}
    lines = []
    for task, items in session.items.items():
        for precision, assignment in precisions.items():
            answers = session.answers(task, items, assignment, precision)
            right = outcomes[task][precision] = right_of(answers)
            session.reporter.found(f"{task} ({precision})", f"{right.sum()}/{len(answers)} right")
            lines += [{"task": task, "precision": precision, **answer} for answer in answers]
        session.reporter.passed(task)
    chance = {task: chance_level(items) for task, items in session.items.items()}
    scores, pairs = compare_all(outcomes, chance, settings.margin_points)
    math_tasks = [task for task in outcomes if not TASKS[task].is_choice]
    return TaskEvidence(with_norms(scores, lines), pairs, outcomes, math_tasks, lines, texts, general)


def screen_texts(session: Session) -> tuple[dict[str, TaskRows], LayerRows | None]:
    """Measure damage on each task's own text, and on general text of the same length where there is any task.

    A task whose text is too short for two rows is left out.
    """
    settings, meter, modules = session.settings, session.meter, session.checkpoint.modules
    length = min(ROW_LENGTH, settings.row_length)
    cut = {
        task: cut_rows(
            [task_text(task, items)], session.tokenizer, min(TASK_ROWS, session.effort.text_rows), length, settings.seed
        )
        for task, items in session.items.items()
    }
    texts = {task: rows for task, rows in cut.items() if len(rows) > 1}
    if not texts:
        return {}, None

    def rows_of(screen: TextScreen, split: str, blocks: Sequence[int] | None = None) -> LayerRows:
        return part_rows(session, "layer", screen.widths, screen.layers, split, blocks)

    screens = {
        task: screen_text(meter, modules, settings.formats, rows, f"{task}: its own text", session.reporter)
        for task, rows in texts.items()
    }
    beside, indices = general_rows(session.rows.test, length, session.effort.general_rows)
    general = screen_text(meter, modules, settings.formats, beside, "the general text beside them", session.reporter)
    blocks = [session.rows.blocks("test")[index] for index in indices]
    return (
        {task: (screen.widths, rows_of(screen, f"text:{task}")) for task, screen in screens.items()},
        rows_of(general, "test, cut to the tasks' length", blocks),
    )
