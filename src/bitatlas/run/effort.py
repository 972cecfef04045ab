"""How much a survey measures, in four levels, and how long each takes on this machine.

The unit of work is one row through the whole model and its damage: nearly all stages are rows of a model, whole or from a layer on. So the time of
a stage is a number of rows, counted from the model's shape, times what a row takes, timed when the model is open. Quantizing and tasks are timed
by themselves. Without `--time` the level depends on the model and the rows alone: the greatest that a machine of nominal speed does in
nominal time, so that the same survey measures the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitatlas.data.tasks import Item
from bitatlas.measure.machine import row_seconds
from bitatlas.measure.tasks import seconds_per_item
from bitatlas.model.checkpoint import Checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.plan.calibration import TRAINING
from bitatlas.plan.refine import EFFORTS as SEARCHES
from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.records.formats import LLAMA_CPP
from bitatlas.records.text import duration, listed
from bitatlas.run.settings import Settings

PRICED_ROWS = 16  # of the select rows, on which units are priced
SCALED_ROWS = 8  # of the select rows, on which prices are compared with damage

NOMINAL_SPEED = 1e11  # multiply-adds and additions a second: a processor core of today
NOMINAL_SECONDS = 2400.0
VERDICT_MODELS = 3  # of the verdict that are measured on all test rows: the plan, a uniform one, the reference
FIRST_PLANS = 3  # with the reference
RIVALS = 24  # that are measured on few
ROW_SHARE = 1 / 3  # of a usual row, that a row of a task's text is long
REPEATED = 32  # sequences of repeated tokens
REMOVALS = 44  # sets of heads
ORDER_PAIRS = 3
LABELS = {
    "layer_rows": "layers", "kind_rows": "kinds of modules", "order_rows": "orders of layers", "unit_rows": "units",
    "text_rows": "tasks' own text", "profiled_rows": "attention", "calibration": "check of the prediction",
}  # fmt: skip
STAGES_PART = 0.7  # of --time, where tasks get the rest
FEWEST_ITEMS = 8
GPTQ_PRODUCTS, GPTQ_MOVES, RTN_MOVES = 4.0, 4000.0, 1800.0  # operations for a weight and format, the first in units of its inputs
BLOCK_MOVES = 50_000.0  # for a weight and a format of llama.cpp, by gptq; its own codes take about a quarter
BACKWARD = 4.2  # rows forwards that a row takes which codes are fitted to, the products of its moments included
PRICED = 3.2  # that a row of the price list takes


@dataclass(frozen=True)
class Effort:
    """What is measured, as numbers of rows where nothing else is said; 0 leaves a stage out."""

    name: str
    layer_rows: int
    kind_rows: int
    order_rows: int  # for sampled orders of the layers
    unit_rows: int  # of the fit rows; swaps around plans are measured on as many
    search: str  # a key of `plan.refine.EFFORTS`
    text_rows: int  # of a task's own text
    general_rows: int  # of general text beside them
    calibration: int  # random plans that check the prediction
    profiled_rows: int  # whose attention is read
    problems: int  # word problems whose attention is read
    sequences: int  # that heads are removed on
    curve: bool = True  # a few plans at other sizes


ALL = 10**6
EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("full", ALL, 32, 8, ALL, "full", 16, 32, 50, 32, 64, 32),
        Effort("half", 32, 16, 4, 8, "half", 16, 16, 32, 16, 32, 16),
        Effort("quarter", 16, 8, 0, 4, "quarter", 8, 8, 0, 8, 16, 8),
        Effort("least", 8, 8, 0, 2, "short", 8, 8, 0, 8, 8, 8, curve=False),
    )
}


@dataclass(frozen=True)
class Shape:
    """What the time of a survey depends on beside the machine. rows: (fit, select, test)."""

    layers: int
    units: int
    kinds: int
    formats: int
    rows: tuple[int, int, int]
    row_length: int
    weights: int  # multiplied for a token, those of the head too
    tasks: int
    refine: bool
    curve: bool

    @property
    def row_operations(self) -> float:
        """Multiplications and additions of one row through the model."""
        return 2.0 * self.weights * self.row_length


def rows_by_stage(effort: Effort, shape: Shape) -> dict[str, float]:
    """Return how many rows through the whole model each stage takes, about; stages in their order."""
    fit, select, test = shape.rows
    layers, units, others = min(effort.layer_rows, test), min(effort.unit_rows, fit), shape.formats - 1
    text = ROW_SHARE * (shape.layers + shape.formats) * (shape.tasks * effort.text_rows + effort.general_rows * bool(shape.tasks))
    stages = {
        "first plan": PRICED * min(PRICED_ROWS, select) + shape.formats * min(SCALED_ROWS, select) + FIRST_PLANS * select,
        "its verdict": test * VERDICT_MODELS + RIVALS * min(8, test),
        "uniform widths": others * test,
        "layers": (shape.layers + 2) * layers,
        "kinds of modules": 2 * shape.kinds * min(effort.kind_rows, test),
        "orders of layers": 2 * ORDER_PAIRS * shape.layers * min(effort.order_rows, test),
        "units": shape.units * others * units,
        "attention": 3 * (effort.profiled_rows + ROW_SHARE * (effort.problems + REPEATED))
        + REMOVALS * ROW_SHARE * effort.sequences,
        "the plan": _search_rows(effort, shape, units) if shape.refine else 4 * select,
        "plans at other sizes": 2 * (4 * select + VERDICT_MODELS * test) * (effort.curve and shape.curve),
        "check of the prediction": _calibration_rows(effort, shape, units) * shape.refine,
        "tasks' own text": text,
    }
    return {name: float(rows) for name, rows in stages.items() if rows}


def _search_rows(effort: Effort, shape: Shape, rows: int) -> float:
    search, select = SEARCHES[effort.search], shape.rows[1]
    swaps = (
        search.swaps + (search.rounds - 1) * search.later
    ) * rows  # half a model each, on fit rows and at the end on select rows
    return swaps + (6 + search.rounds * (2 + search.pairs)) * (rows + select)


def _calibration_rows(effort: Effort, shape: Shape, rows: int) -> float:
    if not effort.calibration:
        return 0.0
    changes = 0.5 * shape.units * (shape.formats - 1) * rows
    return changes + (2 * effort.calibration + TRAINING) * rows + effort.calibration * shape.rows[1]


def nominal_effort(shape: Shape) -> Effort:
    """Return the greatest effort that a machine of nominal speed makes in nominal time, or the least."""
    return effort_within(shape, NOMINAL_SECONDS, shape.row_operations / NOMINAL_SPEED)


def effort_within(shape: Shape, seconds: float, row_seconds: float) -> Effort:
    """Return the greatest effort that takes at most `seconds`, with `row_seconds` for a row through the model; or the least."""
    fitting = [effort for effort in EFFORTS.values() if sum(rows_by_stage(effort, shape).values()) * row_seconds <= seconds]
    return (fitting or list(EFFORTS.values()))[0 if fitting else -1]


# --- time ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Seconds measured here: of a row through the model, of an answer to each task; and, of the former, of quantizing."""

    row: float
    quantizing: float
    answer: Mapping[str, float]


def settle_effort(
    settings: Settings,
    checkpoint: Checkpoint,
    decoder: Decoder,
    tokenizer: Any,
    items: Mapping[str, list[Item]],
    reporter: Reporter,
) -> Settings:
    """Return the settings with what is measured: time the model, and say how long every stage takes and what is left out.

    With a time (`--time`), stages get the greatest effort within their part of it, and tasks as many items as the rest allows.
    """
    shape = shape_of_survey(settings, checkpoint, decoder)
    row = row_seconds(decoder, settings.row_length)
    answer = {task: seconds_per_item(decoder, tokenizer, task, of_task) for task, of_task in items.items()}
    operations = quantizing_operations(settings, checkpoint.modules, shape)
    speed = Speed(row, operations / (shape.row_operations / row), answer)
    if settings.effort is None:
        settings = replace(settings, effort=_effort_for(settings, shape, speed).name)
    effort = EFFORTS[settings.effort or ""]
    stages = estimate(effort, shape, speed)
    precisions = len(settings.formats) + 2  # the reference and the plan beside them
    if settings.time_seconds is not None and answer:
        rest = settings.time_seconds - sum(stages.values())
        count = max(FEWEST_ITEMS, int(rest / (precisions * sum(answer.values()))))
        if any(count < len(of_task) for of_task in items.values()):
            settings = replace(settings, limit=count)
            reporter.say(f"{count} items of each task fit into --time")
    for task, of_task in items.items():
        stages[task] = precisions * answer[task] * min(len(of_task), settings.limit or len(of_task))
    stages = {name: seconds for name, seconds in stages.items() if reporter.only is None or name in reporter.only}
    reporter.say(time_table(stages, effort, shape))
    reporter.expect(stages)
    return settings


def shape_of_survey(settings: Settings, checkpoint: Checkpoint, decoder: Decoder) -> Shape:
    """Return what the time of a survey depends on."""
    modules, info = checkpoint.modules, checkpoint.info
    return Shape(
        layers=info.layers,
        units=len({module.unit for module in modules}),
        kinds=len({module.kind for module in modules}),
        formats=len(settings.formats),
        rows=settings.rows,
        row_length=settings.row_length,
        weights=info.quantizable_weights + decoder.vocabulary * decoder.width,
        tasks=len(settings.tasks),
        refine=settings.refine,
        curve=settings.curve,
    )


def quantizing_operations(settings: Settings, modules: Sequence[Module], shape: Shape) -> float:
    """Return multiplications and additions that take as long as quantizing does, about; 0 for quantizers of other packages."""
    weights, formats = sum(module.weights for module in modules), len(settings.formats)
    if settings.runtime == LLAMA_CPP:
        blocks = sum(module.weights * len(set(module.formats(settings.formats))) for module in modules)
        backward = BACKWARD * shape.rows[0] * shape.row_operations
        return BLOCK_MOVES * blocks + backward if settings.quantizer == "gptq" else BLOCK_MOVES / 4 * blocks
    if settings.quantizer == "gptq":
        rounding = sum(module.weights * (GPTQ_PRODUCTS * 2 * module.shape[1] + GPTQ_MOVES) for module in modules)
        return formats * rounding + BACKWARD * shape.rows[0] * shape.row_operations
    return RTN_MOVES * weights * formats if settings.quantizer == "rtn" else 0.0


def estimate(effort: Effort, shape: Shape, speed: Speed) -> dict[str, float]:
    """Return the seconds of every stage but tasks, about; stages in their order."""
    stages = {name: rows * speed.row for name, rows in rows_by_stage(effort, shape).items()}
    return {"quantizing": speed.quantizing, **stages}


def _effort_for(settings: Settings, shape: Shape, speed: Speed) -> Effort:
    if settings.time_seconds is None:
        return nominal_effort(shape)
    part = STAGES_PART if settings.tasks else 1.0
    return effort_within(shape, part * settings.time_seconds - speed.quantizing, speed.row)


def time_table(stages: Mapping[str, float], effort: Effort, shape: Shape) -> str:
    """Return the stages with their times, their sum, and what an effort below the full one leaves out."""
    lines = [f"  {name:<26}{duration(seconds):>8}" for name, seconds in stages.items()]
    left_out = left_out_text(effort, shape)
    more = [f"{effort.name} effort: {left_out} (--time)"] if effort.name != "full" else []
    return "\n".join([f"about {duration(sum(stages.values()))}, by what a row takes here:", *lines, *more])


def left_out_text(effort: Effort, shape: Shape) -> str:
    """Return what is measured on fewer rows than a full effort would, and what is left out; "none" where nothing is."""
    full = EFFORTS["full"]
    most = {"layer_rows": shape.rows[2], "unit_rows": shape.rows[0]}
    texts = []
    for name, label in LABELS.items():
        value, usual = (min(getattr(which, name), most.get(name, ALL)) for which in (effort, full))
        if value < usual:
            texts.append(f"{label} on {value} of {usual} rows" if value else f"no {label}")
    return listed(texts)
