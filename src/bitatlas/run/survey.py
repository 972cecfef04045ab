"""The main job: every stage in order, from an opened checkpoint to a report.

Stages know nothing of each other; what one hands to the next stands here. Each measures and journals, so an interrupted run goes on
where it stopped; the files are written at the end, from the finished atlas.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torch import Tensor

from bitatlas.data.rows import cut_rows
from bitatlas.data.tasks import TASKS, chance_level, load_items, task_text
from bitatlas.errors import UserError
from bitatlas.findings.shares import LayerRows, layer_records
from bitatlas.findings.zones import joint_damage
from bitatlas.measure.attention.ablation import ABLATION_SEQUENCES, SHORT_SEQUENCES, Removal, ablate
from bitatlas.measure.attention.focus import Problem, problems_of
from bitatlas.measure.attention.profile import AttentionResult, attention_profile, example_maps
from bitatlas.measure.screens import (
    ROW_LENGTH,
    TASK_ROWS,
    LayerScreen,
    OrderScreen,
    TaskScreen,
    general_places,
    general_rows,
    screen_kinds,
    screen_layers,
    screen_orders,
    screen_tasks,
    screen_text,
    screen_uniform,
    screen_units,
    uniform,
)
from bitatlas.measure.tasks import right_of
from bitatlas.measure.weights import weight_profile
from bitatlas.plan.baselines import most_critical_first
from bitatlas.plan.calibration import calibrate
from bitatlas.plan.expansion import Floats
from bitatlas.plan.judge import Judged, judge
from bitatlas.plan.search import Scores, Tools, damage_tables, scores_of_ends, search
from bitatlas.progress import Reporter
from bitatlas.records import Atlas, Calibration, JointDamage, Module, Plan, WeightProfile
from bitatlas.records.files import to_json, write_text
from bitatlas.records.journal import content_key
from bitatlas.records.sizes import assignment_of
from bitatlas.records.text import interval
from bitatlas.run.assemble import Lines, Measurements, assemble, damage_lines, write_outputs
from bitatlas.run.curve import short_curve
from bitatlas.run.planner import drafted, on_select, probe, tools_of
from bitatlas.run.prepare import Run, peak_text, prepare
from bitatlas.run.protect import check_protected, protect_plan
from bitatlas.run.ray.scheduler import hired
from bitatlas.run.settings import Settings
from bitatlas.stats.bootstrap import measured

FOCUS_PROBLEMS = 64
PROFILED_ROWS = 32
LIBRARIES = ("bitatlas", "torch", "transformers", "lm_eval", "numpy", "scipy")

Assignments = dict[str, dict[str, str]]  # precision -> module -> format


def run_survey(settings: Settings, out: Path, resume: bool, reporter: Reporter, ray: str | None = None) -> Atlas:
    """Measure, plan, verify and write; returns the finished atlas. `ray`: auto or a cluster's address, whose workers measure."""
    with hired(ray, reporter) as crew:
        run = prepare(settings, out, resume, reporter, crew)
        with closing(run.journal):
            return _survey(run)


def _survey(run: Run) -> Atlas:
    settings, out, reporter = run.settings, run.out, run.reporter  # the settings with the budget in full
    low, high = settings.low, settings.high
    modules, rows, meter = run.checkpoint.modules, run.rows, run.meter
    check_protected(run)
    with reporter.stage(f"quantizing ({settings.quantizer})") as progress:
        run.bank.fill(settings.formats, progress)
    weights = profile_weights(run)
    widths = screen_uniform(meter, modules, settings.formats, rows.test, reporter)
    for name, nats in widths.items():
        damage = measured(nats, "nats/token", "reference", "test", settings.seed, rows.blocks("test"))
        reporter.found(f"uniform {name}", interval(damage, unit=True))
    layers = screen_layers(meter, modules, low, high, rows.test, reporter)
    kinds = screen_kinds(meter, modules, low, high, rows.test, reporter)
    orders = screen_orders(meter, modules, low, high, rows.test, settings.seed, reporter, not settings.refine)
    joint = lowered_together(run, widths, layers, orders)
    units = screen_units(meter, modules, settings.formats, rows.fit, reporter, settings.seed)
    precisions: Assignments = {"reference": {}} | {f"uniform:{name}": uniform(modules, name) for name in (high, low)}
    attention = [profile_attention(run, base, assignment) for base, assignment in precisions.items()]
    removals = remove_heads(run, attention[0])
    names = [unit.name for unit in run.subject.units]
    tools = tools_of(run, damage_tables(names, settings.formats, units.damage, units.base))
    most_critical = by_criticality(modules, widths[high], widths[low], layers)
    judged = find_plan(run, tools, most_critical)
    reporter.found("plan", f"{interval(judged.plan.damage.measured, unit=True)} on test rows")
    others = short_curve(run, tools, most_critical, judged.plan) if settings.curve else []
    calibration = check_prediction(run, tools, judged.plan.modules)
    screens, general = screen_texts(run)
    every = {f"uniform:{name}": uniform(modules, name) for name in reversed(settings.formats)}
    outcomes, items = run_tasks(run, {"reference": {}, **every, "plan": judged.plan.modules})
    found = Measurements(
        weights=weights,
        widths=widths,
        lowered=layers.lowered,
        raised=layers.raised,
        kinds=kinds.kinds,
        kinds_lowered=kinds.lowered,
        kinds_raised=kinds.raised,
        unit_rows=units.by_row,
        base_rows=units.base_by_row,
        unit_damage=units.damage,
        base_damage=units.base,
        attention=[layer for result in attention for layer in result.layers],
        heads=[head for result in attention for head in result.heads],
        judged=judged,
        outcomes=outcomes,
        chance={task: chance_level(of_task) for task, of_task in run.items.items()},
        items=items,
        notes=list(dict.fromkeys([*run.checkpoint.notes, *(note for result in attention for note in result.notes)])),
        calibration=calibration,
        task_screens=screens,
        general_screen=general,
        orders=orders.added if orders else None,
        order_models=orders.models if orders else 0,
        joint=joint,
        removals=removals,
        pairs=units.pairs,
        head_maps=example_maps(run.decoder, run.tokenizer, attention[0].heads, settings.seed),
        others=others,
    )
    atlas = assemble(run.checkpoint.info, modules, rows.info, settings, versions(), found)
    run.checkpoint.check_unchanged()
    reporter.say(peak_text(run))
    with reporter.stage("writing the report"):
        write_outputs(out, atlas, tables_of(atlas, found))
    return atlas


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def tables_of(atlas: Atlas, found: Measurements) -> dict[str, Lines]:
    """The long tables beside the atlas."""
    return {
        "damage": damage_lines(found, atlas.low, atlas.high),
        "weights": [asdict(profile) for profile in atlas.weights],
        "heads": [asdict(head) for head in atlas.heads],
        "items": found.items,
    }


def profile_weights(run: Run) -> list[WeightProfile]:
    """Every module's weights, one at a time."""
    found = []
    adapter = TypeAdapter(WeightProfile)
    modules = run.checkpoint.modules
    with run.reporter.stage("weights") as progress:
        for done, module in enumerate(modules, start=1):
            key = content_key("weights", run.meter.identity, module.name, list(run.settings.formats))
            value = run.journal.get(key)
            if value is None:
                quantized = {name: run.bank.codes(module.name, name).weight() for name in run.settings.formats}
                value = asdict(weight_profile(module, run.bank.reference(module.name), quantized))
                run.journal.put(key, "weights", value)
            found.append(adapter.validate_python(value))
            progress(done, len(modules))
    return found


def profile_attention(run: Run, base: str, assignment: Mapping[str, str]) -> AttentionResult:
    """Attention at one base, with its drift from the reference."""
    problems = focus_problems(run)
    rows, blocks = run.rows.test[:PROFILED_ROWS], run.rows.blocks("test")[:PROFILED_ROWS]
    key = content_key(
        "attention",
        run.meter.identity,
        dict(assignment),
        base,
        rows.tolist(),
        blocks,
        [asdict(p) for p in problems],
        run.settings.seed,
    )
    adapter = TypeAdapter(AttentionResult)
    with run.reporter.stage(f"attention ({base})") as progress:
        value = run.journal.get(key)
        if value is None:
            result = attention_profile(
                run.decoder, run.tokenizer, run.checkpoint.modules, rows, problems, base=base,
                changed=run.bank.weights(assignment) if assignment else None, seed=run.settings.seed, progress=progress,
                blocks=blocks,
            )  # fmt: skip
            value = asdict(result)
            run.journal.put(key, "attention", value)
    return adapter.validate_python(value)


def remove_heads(run: Run, reference: AttentionResult) -> list[Removal]:
    """Heads removed by role from the reference, where heads were read."""
    with run.reporter.stage("removing heads") as progress:
        return ablate(
            run.decoder, run.tokenizer, reference.heads, run.meter.identity, run.journal, seed=run.settings.seed, progress=progress,
            sequences=ABLATION_SEQUENCES if run.settings.refine else SHORT_SEQUENCES,
        )  # fmt: skip


def focus_problems(run: Run) -> list[Problem]:
    """Word problems with solutions, of the scored tasks; of the bundled demo where no scored task has any."""
    worked = {task: items for task, items in run.items.items() if not TASKS[task].is_choice}
    worked = worked or {"demo_problems": load_items("demo_problems", None, FOCUS_PROBLEMS, run.settings.seed)}
    found = [replace(problem, source=task) for task, items in worked.items() for problem in problems_of(items)]
    return found[:FOCUS_PROBLEMS]


def lowered_together(
    run: Run, widths: Mapping[str, np.ndarray], layers: LayerScreen, orders: OrderScreen | None
) -> JointDamage | None:
    """What the layers that are safe alone do together, measured on the select rows."""
    settings, modules, seed = run.settings, run.checkpoint.modules, run.settings.seed
    low, high = settings.low, settings.high
    each = np.array([sum(m.weights for m in modules if m.layer == layer) for layer in sorted({m.layer for m in modules})])
    rows = LayerRows(
        widths[high], widths[low], layers.lowered, layers.raised, each, high, low,
        blocks=run.rows.blocks("test"), orders=orders.added if orders else None,
    )  # fmt: skip

    def added(lowered: Sequence[int]) -> np.ndarray:
        plans = {"high": uniform(modules, high), "low": {m.name: low if m.layer in lowered else high for m in modules}}
        damage = run.measure(plans, "select")
        return damage["low"] - damage["high"]

    tolerance = settings.tolerance_nats
    records = layer_records(rows, tolerance, seed=seed)
    return joint_damage(records, added, tolerance, f"uniform:{high}", run.rows.blocks("select"), seed)


def by_criticality(modules: Sequence[Module], high: np.ndarray, low: np.ndarray, layers: LayerScreen) -> list[int]:
    """Layers, the most critical first: the one with the most damage for its weights (see `findings.shares`)."""
    values = ((layers.lowered - high) + (low - layers.raised)).mean(axis=1)
    return most_critical_first(modules, values)


def find_plan(run: Run, tools: Tools, most_critical: list[int]) -> Judged:
    """The plan under the budget, judged on the test rows."""
    if run.settings.budget.protect:
        return protect_plan(run, tools, most_critical)
    found = search(run.subject, run.settings.budget, tools)
    return judge(run.subject, run.settings.budget, found, run.measure, most_critical)


def check_prediction(run: Run, tools: Tools, assignment: Mapping[str, str]) -> Calibration | None:
    """Predicted against measured damage of random plans around a refined plan; None where the units are too few for that."""
    units, formats = run.subject.units, run.settings.formats
    if tools.probe is None:
        return None

    def measure(plans: Mapping[str, np.ndarray], split: str) -> dict[str, np.ndarray]:
        return run.measure({name: assignment_of(units, formats, choice) for name, choice in plans.items()}, split)

    base = np.array([formats.index(assignment[unit.modules[0].name]) for unit in units])
    return calibrate(base, len(formats), tools.probe, tools.scores, measure, run.settings.seed, run.rows.blocks("select"))


def screen_texts(run: Run) -> tuple[dict[str, TaskScreen], TaskScreen | None]:
    """Damage on each task's own text, and on general text of the same length where there is any task."""
    rows, formats = task_rows(run), run.settings.formats
    if not rows:
        return {}, None
    of_tasks = screen_tasks(run.meter, run.checkpoint.modules, formats, rows, run.reporter)
    length = next(iter(rows.values())).shape[1]  # the same for all
    test, blocks = run.rows.test, run.rows.blocks("test")
    cut = general_rows(test, length)
    screen = screen_text(run.meter, run.checkpoint.modules, formats, cut, "the general text beside them", run.reporter)
    return of_tasks, replace(screen, blocks=blocks if cut is test else [blocks[place] for place in general_places(len(test))])


def task_rows(run: Run) -> dict[str, Tensor]:
    """A few rows of each scored task's own text; a task whose text is too short for two rows is left out."""
    length = min(ROW_LENGTH, run.settings.row_length)
    found = {
        task: cut_rows([task_text(task, items)], run.tokenizer, TASK_ROWS, length, run.settings.seed)
        for task, items in run.items.items()
    }
    return {task: rows for task, rows in found.items() if len(rows) > 1}


def run_tasks(run: Run, precisions: Assignments) -> tuple[dict[str, dict[str, np.ndarray]], list[dict[str, Any]]]:
    """Every task at every precision. Returns task -> precision -> bool [items], and one record an item and precision."""
    outcomes: dict[str, dict[str, np.ndarray]] = {}
    records: list[dict[str, Any]] = []
    for task, items in run.items.items():
        outcomes[task] = {}
        for precision, assignment in precisions.items():
            answers = run.answers(task, items, assignment, precision)
            outcomes[task][precision] = right_of(answers)
            run.reporter.found(f"{task} ({precision})", f"{outcomes[task][precision].sum()}/{len(answers)} right")
            records += [{"task": task, "precision": precision, **answer} for answer in answers]
    return outcomes, records


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
    judged = judge(subject, settings.budget, found, run.measure, by_scores(run, tools.scores))
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


def by_scores(run: Run, scores: Scores) -> list[int]:
    """Layers, that with the most damage for its weights first, as far as the scores know."""
    damage = np.bincount([unit.layer for unit in run.subject.units], scores.tables["mean of both"][:, 0])
    return most_critical_first(run.subject.modules, damage)
