"""The main job: every stage in order, from an opened checkpoint to a report.

Each stage measures, journals and returns its record of evidence; stages know nothing of each other, and what one hands to the next stands
in `_survey`. An interrupted run goes on where it stopped; the files are written at the end, from the finished atlas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from bitatlas.data.rows import cut_rows
from bitatlas.data.tasks import TASKS, chance_level, load_items, task_text
from bitatlas.errors import UserError
from bitatlas.findings.ablation import ablation_record
from bitatlas.findings.conclude import AttentionEvidence, DamageEvidence, Evidence, PlanEvidence, TaskEvidence
from bitatlas.findings.shares import LayerRows, layer_records
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
    uniform,
)
from bitatlas.measure.tasks import right_of, with_norms
from bitatlas.measure.weights import weight_profile
from bitatlas.plan.baselines import most_critical_first
from bitatlas.plan.calibration import calibrate
from bitatlas.plan.expansion import Floats
from bitatlas.plan.judge import curve_point, judge
from bitatlas.plan.search import PlannerHooks, Scores, damage_tables, scores_of_bases, search
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Calibration, CurvePoint, JointDamage, Plan, WeightProfile
from bitatlas.records.files import to_json, write_text
from bitatlas.records.journal import content_key
from bitatlas.records.sizes import assignment_of
from bitatlas.records.text import interval
from bitatlas.run.assemble import Screens, assemble, tables_of, uniform_records, write_outputs
from bitatlas.run.curve import short_curve
from bitatlas.run.planner import drafted, on_select, probe, tools_of
from bitatlas.run.prepare import Run, peak_text, prepare
from bitatlas.run.protect import check_protected, protect_plan
from bitatlas.run.ray.scheduler import hired
from bitatlas.run.settings import Settings
from bitatlas.stats.paired import compare_all

FOCUS_PROBLEMS = 64
PROFILED_ROWS = 32


def run_survey(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None = None) -> Atlas:
    """Measure, plan, verify and write; returns the finished atlas. `ray`: auto or a cluster's address, whose workers measure."""
    with _opened(settings, out, resume, reporter, ray) as run:
        return _survey(run)


@contextmanager
def _opened(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None) -> Iterator[Run]:
    """An opened run with every module in every format at hand."""
    with hired(ray, reporter) as crew:
        run = prepare(settings, out, resume, reporter, crew)
        with closing(run.journal):
            check_protected(run)
            with reporter.stage(f"quantizing ({settings.quantizer})") as progress:
                run.bank.fill(settings.formats, progress)
            yield run


def _finish(run: Run) -> None:
    run.checkpoint.check_unchanged()
    run.reporter.say(peak_text(run))


def _survey(run: Run) -> Atlas:
    weights = profile_weights(run)
    screens = screen_damage(run)
    attention = read_attention(run)
    plan = find_plan(run, screens)
    tasks = ask_tasks(run, plan.plan)
    evidence = Evidence(screens.damage, weights, attention, plan, tasks)
    atlas = assemble(run, evidence, screens)
    _finish(run)
    with run.reporter.stage("writing the report"):
        write_outputs(run.out, atlas, tables_of(atlas, evidence, screens))
    return atlas


# --- weights ---------------------------------------------------------------------------------------------------------------


def profile_weights(run: Run) -> list[WeightProfile]:
    """Profile every module's weights, one at a time."""
    profiles = []
    adapter = TypeAdapter(WeightProfile)
    modules, formats = run.checkpoint.modules, run.settings.formats
    with run.reporter.stage("weights") as progress:
        for done, module in enumerate(modules, start=1):
            key = content_key("weights", run.meter.identity, module.name, list(formats))
            value = run.journal.get(key)
            if value is None:
                quantized = {name: run.bank.codes(module.name, name).weight() for name in formats}
                value = asdict(weight_profile(module, run.bank.reference(module.name), quantized))
                run.journal.put(key, "weights", value)
            profiles.append(adapter.validate_python(value))
            progress(done, len(modules))
    return profiles


# --- damage ----------------------------------------------------------------------------------------------------------------


def screen_damage(run: Run) -> Screens:
    """Measure every uniform width, every layer, kind of module and unit both ways, and the layers in sampled orders."""
    settings, modules, reporter = run.settings, run.checkpoint.modules, run.reporter
    low, high, test, blocks = settings.low, settings.high, run.rows.test, run.rows.blocks("test")
    widths = screen_uniform(run.meter, modules, settings.formats, test, reporter)
    records = uniform_records(run, widths)
    for record in records:
        reporter.found(f"uniform {record.format}", interval(record.damage, unit=True))
    by_layer = screen_layers(run.meter, modules, low, high, test, reporter)
    by_kind = screen_kinds(run.meter, modules, low, high, test, reporter)
    orders = screen_orders(run.meter, modules, low, high, test, settings.seed, reporter, not settings.refine)
    layers = part_rows(run, "layer", widths, by_layer, "test", blocks)
    layers = replace(layers, orders=orders.added) if orders else layers
    kinds = part_rows(run, "kind", widths, by_kind, "test", blocks)
    joint = lowered_together(run, layers)
    units = screen_units(run.meter, modules, settings.formats, run.rows.fit, reporter, settings.seed)
    damage = DamageEvidence(layers, modules, kinds, unit_rows(run, units), orders.models if orders else 0, joint)
    return Screens(damage, widths, records, units)


def part_rows(
    run: Run,
    part: str,
    widths: Mapping[str, np.ndarray],
    screen: LayerScreen | KindScreen,
    split: str,
    blocks: Sequence[int] | None,
) -> LayerRows:
    """Return the damage of each `part` ("layer", "kind" or "unit") as findings read it, on as many rows as it was measured on."""
    weights: Counter[str] = Counter()
    for module in run.checkpoint.modules:
        weights[str(getattr(module, part))] += module.weights
    high, low, rows = run.settings.high, run.settings.low, screen.lowered.shape[1]
    return LayerRows(
        widths[high][:rows], widths[low][:rows], screen.lowered, screen.raised, np.array(list(weights.values()), dtype=np.float64),
        high, low, split, blocks[:rows] if blocks else None,
    )  # fmt: skip


def unit_rows(run: Run, units: UnitScreen) -> LayerRows:
    """Return the damage of the units moved between the two bases, on the fit rows."""
    high, low = run.settings.high, run.settings.low
    at_high, at_low = units.by_row[f"uniform:{high}"], units.by_row[f"uniform:{low}"]
    lowered, raised = [rows[low] for rows in at_high.values()], [rows[high] for rows in at_low.values()]
    bases = {name: units.base_by_row[f"uniform:{name}"] for name in (high, low)}
    screen = LayerScreen(np.stack(lowered), np.stack(raised))
    return part_rows(run, "unit", bases, screen, "fit", run.rows.blocks("fit"))


def lowered_together(run: Run, layers: LayerRows) -> JointDamage | None:
    """Measure what the layers that are safe alone do together, on the select rows."""
    settings, modules = run.settings, run.checkpoint.modules
    low, high = settings.low, settings.high

    def added(lowered: Sequence[int]) -> np.ndarray:
        plans = {"high": uniform(modules, high), "low": {m.name: low if m.layer in lowered else high for m in modules}}
        damage = run.measure(plans, "select")
        return damage["low"] - damage["high"]

    records = layer_records(layers, settings.tolerance_nats, seed=settings.seed)
    blocks = run.rows.blocks("select")
    return joint_damage(records, added, settings.tolerance_nats, f"uniform:{high}", blocks, settings.seed)


# --- attention -------------------------------------------------------------------------------------------------------------


def read_attention(run: Run) -> AttentionEvidence:
    """Read attention at the reference and at both uniform ends, and remove heads by role from the reference, where heads were read."""
    settings, modules = run.settings, run.checkpoint.modules
    bases: dict[str, dict[str, str]] = {"reference": {}}  # -> module -> format
    bases |= {f"uniform:{name}": uniform(modules, name) for name in (settings.high, settings.low)}
    results = [profile_attention(run, base, assignment) for base, assignment in bases.items()]
    heads = results[0].heads
    with run.reporter.stage("removing heads") as progress:
        removals = ablate(
            run.decoder, run.tokenizer, heads, run.meter.identity, run.journal, seed=settings.seed, progress=progress,
            sequences=ABLATION_SEQUENCES if settings.refine else SHORT_SEQUENCES,
        )  # fmt: skip
    return AttentionEvidence(
        attention=[layer for result in results for layer in result.layers],
        heads=[head for result in results for head in result.heads],
        ablations=[ablation_record(removal, settings.seed) for removal in removals],
        head_maps=example_maps(run.decoder, run.tokenizer, heads, settings.seed),
        notes=list(dict.fromkeys([*run.checkpoint.notes, *(note for result in results for note in result.notes)])),
    )


def profile_attention(run: Run, base: str, assignment: Mapping[str, str]) -> AttentionResult:
    """Profile attention at one base, with its drift from the reference."""
    problems, seed = focus_problems(run), run.settings.seed
    rows, blocks = run.rows.test[:PROFILED_ROWS], run.rows.blocks("test")[:PROFILED_ROWS]
    asked = [asdict(problem) for problem in problems]
    key = content_key("attention", run.meter.identity, dict(assignment), base, rows.tolist(), blocks, asked, seed)
    adapter = TypeAdapter(AttentionResult)
    with run.reporter.stage(f"attention ({base})") as progress:
        value = run.journal.get(key)
        if value is None:
            result = attention_profile(
                run.decoder, run.tokenizer, run.checkpoint.modules, AttentionTexts(rows, problems, blocks), base=base,
                changed=run.bank.weights(assignment) if assignment else None, seed=seed, progress=progress,
            )  # fmt: skip
            value = asdict(result)
            run.journal.put(key, "attention", value)
    return adapter.validate_python(value)


def focus_problems(run: Run) -> list[Problem]:
    """Return word problems with solutions, of the scored tasks; of the bundled demo where no scored task has any."""
    worked = {task: items for task, items in run.items.items() if not TASKS[task].is_choice}
    worked = worked or {"demo_problems": load_items("demo_problems", None, FOCUS_PROBLEMS, run.settings.seed)}
    problems = [replace(problem, source=task) for task, items in worked.items() for problem in problems_of(items)]
    return problems[:FOCUS_PROBLEMS]


# --- plan ------------------------------------------------------------------------------------------------------------------


def find_plan(run: Run, screens: Screens) -> PlanEvidence:
    """Find the plan under the budget, judge it on the test rows, and verify a few plans at other sizes and its prediction."""
    settings, subject, units = run.settings, run.subject, screens.units
    names = [unit.name for unit in subject.units]
    tools = tools_of(run, damage_tables(names, settings.formats, units.damage, units.base))
    most_critical = most_critical_first(subject.modules, screens.damage.layers.values.mean(axis=0))
    if settings.budget.protect:
        judged = protect_plan(run, tools, most_critical)
    else:
        judged = judge(subject, settings.budget, search(subject, settings.budget, tools), run.measure, most_critical)
    run.reporter.found("plan", f"{interval(judged.plan.damage.measured, unit=True)} on test rows")
    others = short_curve(run, tools, most_critical, judged.plan) if settings.curve else []
    points = [
        CurvePoint(f"uniform {u.format}", "uniform", u.size.code_bits, u.size.stored_bits, u.size.total_bytes, u.damage)
        for u in screens.uniform
    ]
    return PlanEvidence(
        plan=judged.plan,
        curve=[*points, *judged.curve, *map(curve_point, others)],
        plans=[other.plan for other in others],
        calibration=check_prediction(run, tools, judged.plan.modules),
    )


def check_prediction(run: Run, tools: PlannerHooks, assignment: Mapping[str, str]) -> Calibration | None:
    """Compare predicted with measured damage of random plans around a refined plan; None where the units are too few for that."""
    units, formats = run.subject.units, run.settings.formats
    if tools.probe is None:
        return None

    def measure(plans: Mapping[str, np.ndarray], split: str) -> dict[str, np.ndarray]:
        return run.measure({name: assignment_of(units, formats, choice) for name, choice in plans.items()}, split)

    base = np.array([formats.index(assignment[unit.modules[0].name]) for unit in units])
    return calibrate(base, len(formats), tools.probe, tools.scores, measure, run.settings.seed, run.rows.blocks("select"))


# --- tasks -----------------------------------------------------------------------------------------------------------------


def ask_tasks(run: Run, plan: Plan | None) -> TaskEvidence:
    """Measure damage on each task's own text, and ask every task at every precision, the plan's among them."""
    texts, general = screen_texts(run)
    modules, settings = run.checkpoint.modules, run.settings
    precisions: dict[str, dict[str, str]] = {"reference": {}}  # -> module -> format
    precisions |= {f"uniform:{name}": uniform(modules, name) for name in reversed(settings.formats)}
    precisions |= {"plan": plan.modules} if plan else {}
    outcomes: dict[str, dict[str, np.ndarray]] = {task: {} for task in run.items}
    lines = []
    for task, items in run.items.items():
        for precision, assignment in precisions.items():
            answers = run.answers(task, items, assignment, precision)
            right = outcomes[task][precision] = right_of(answers)
            run.reporter.found(f"{task} ({precision})", f"{right.sum()}/{len(answers)} right")
            lines += [{"task": task, "precision": precision, **answer} for answer in answers]
    chance = {task: chance_level(items) for task, items in run.items.items()}
    scores, pairs = compare_all(outcomes, chance, settings.margin_points)
    math_tasks = [task for task in outcomes if not TASKS[task].is_choice]
    return TaskEvidence(with_norms(scores, lines), pairs, outcomes, math_tasks, lines, texts, general)


def screen_texts(run: Run) -> tuple[dict[str, TaskRows], LayerRows | None]:
    """Measure damage on each task's own text, and on general text of the same length where there is any task.

    A task whose text is too short for two rows is left out.
    """
    settings, meter, modules = run.settings, run.meter, run.checkpoint.modules
    length = min(ROW_LENGTH, settings.row_length)
    cut = {
        task: cut_rows([task_text(task, items)], run.tokenizer, TASK_ROWS, length, settings.seed)
        for task, items in run.items.items()
    }
    texts = {task: rows for task, rows in cut.items() if len(rows) > 1}
    if not texts:
        return {}, None

    def rows_of(screen: TextScreen, split: str, blocks: Sequence[int] | None = None) -> LayerRows:
        return part_rows(run, "layer", screen.widths, screen.layers, split, blocks)

    screens = {
        task: screen_text(meter, modules, settings.formats, rows, f"{task}: its own text", run.reporter)
        for task, rows in texts.items()
    }
    beside, indices = general_rows(run.rows.test, length)
    general = screen_text(meter, modules, settings.formats, beside, "the general text beside them", run.reporter)
    blocks = [run.rows.blocks("test")[index] for index in indices]
    return (
        {task: (screen.widths, rows_of(screen, f"text:{task}")) for task, screen in screens.items()},
        rows_of(general, "test, cut to the tasks' length", blocks),
    )


# --- draft -----------------------------------------------------------------------------------------------------------------

# `survey --draft`: a first plan, judged like any other, from the curvature instead of a measured swap for every unit and format.
#
# Passes over the fit rows: one forwards and a few backwards at each uniform end and around each better plan, and those of the plans
# that are measured; a survey needs several for each unit. What it finds is often worse than what a survey finds (docs/method.md
# has figures), and says nothing of layers, attention or tasks. The folder is a run's: a survey with `--resume` goes on in it.

SOURCE = "single-unit damage to second order"


def run_draft(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None = None) -> Plan:
    """Write plan.json into `out`, and return it."""
    if settings.budget.protect:
        raise UserError("--draft --protect: whether a task is held takes the survey's answers; give a size, or leave --draft out")
    with _opened(settings, out, resume, reporter, ray) as run:
        tools = draft_tools(run)
        found = search(run.subject, run.settings.budget, tools)
        judged = judge(run.subject, run.settings.budget, found, run.measure, by_scores(run, tools.scores))
        _finish(run)
        write_text(out / "plan.json", to_json(judged.plan))
        return judged.plan


def draft_tools(run: Run) -> PlannerHooks:
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
    scores = scores_of_bases(table(formats - 1), table(0), widest, SOURCE)
    tools = tools_of(run, scores)
    return replace(tools, probe=around, effort="draft") if tools.probe else tools


def by_scores(run: Run, scores: Scores) -> list[int]:
    """Layers, that with the most damage for its weights first, as far as the scores know."""
    damage = np.bincount([unit.layer for unit in run.subject.units], scores.tables["mean of both"][:, 0])
    return most_critical_first(run.subject.modules, damage)
