"""From measurements to the atlas, and from the atlas to files. No model, no torch: numbers in, records and files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bitatlas.data.tasks import TASKS
from bitatlas.findings.ablation import ablation_record
from bitatlas.findings.conclude import TaskEvidence, conclude
from bitatlas.findings.reliability import shapley_check
from bitatlas.findings.shares import LayerRows
from bitatlas.findings.tasks import TaskRows
from bitatlas.findings.units import insides
from bitatlas.measure.attention.ablation import Removal
from bitatlas.measure.screens import PairScreen, TaskScreen
from bitatlas.measure.tasks import with_norms
from bitatlas.plan.judge import Judged, curve_point
from bitatlas.records import (
    Atlas,
    AttentionHead,
    AttentionLayer,
    Calibration,
    CurvePoint,
    HeadMap,
    JointDamage,
    ModelInfo,
    Module,
    TokensInfo,
    Uniform,
    UnitInteractions,
    UnitPair,
    WeightProfile,
)
from bitatlas.records.files import all_or_none, drop_other_plans, to_json, write_plans, write_text, writing
from bitatlas.records.formats import stored_bytes
from bitatlas.records.sizes import size_of
from bitatlas.report.html import write_reports
from bitatlas.run.settings import Settings
from bitatlas.stats.bootstrap import measured
from bitatlas.stats.paired import compare_all

Lines = list[dict[str, Any]]
UnitRows = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]  # base -> unit -> format -> [rows]


@dataclass(frozen=True)
class Measurements:
    """What the stages measured. Damage arrays are float64, nats/token, on the test rows."""

    weights: list[WeightProfile]
    widths: dict[str, np.ndarray]  # format -> [rows]
    lowered: np.ndarray  # [layers, rows]
    raised: np.ndarray  # [layers, rows]
    kinds: list[str]  # in the order in which they come among the modules
    kinds_lowered: np.ndarray  # [kinds, rows]
    kinds_raised: np.ndarray  # [kinds, rows]
    unit_rows: UnitRows  # on the fit rows
    base_rows: dict[str, np.ndarray]  # base -> [rows], of the fit rows
    unit_damage: dict[str, dict[str, dict[str, float]]]
    base_damage: dict[str, float]
    attention: list[AttentionLayer]
    heads: list[AttentionHead]
    judged: Judged
    outcomes: dict[str, dict[str, np.ndarray]]  # task -> precision -> bool [items]
    chance: dict[str, float]  # task -> 0..1
    items: Lines  # one line a task, precision and item
    notes: list[str]
    calibration: Calibration | None = None
    task_screens: Mapping[str, TaskScreen] = field(default_factory=dict)
    general_screen: TaskScreen | None = None  # of test rows cut to the length of the tasks' rows
    orders: np.ndarray | None = None  # [pairs, rows, layers]: what each layer adds in sampled orders, on the first test rows
    order_models: int = 0  # that were measured for it
    joint: JointDamage | None = None
    removals: Sequence[Removal] = ()  # of heads from the reference
    pairs: PairScreen | None = None
    head_maps: Sequence[HeadMap] = ()
    others: Sequence[Judged] = ()  # plans at other sizes, from small to large


def assemble(
    info: ModelInfo, modules: list[Module], tokens: TokensInfo, settings: Settings, versions: dict[str, str], found: Measurements
) -> Atlas:
    """The finished atlas: records from arrays, and the conclusions drawn from them."""
    scores, pairs = compare_all(found.outcomes, found.chance, settings.margin_points)
    scores = with_norms(scores, found.items)
    rows = layer_rows(modules, settings, found, tokens)
    math_tasks = [task for task in found.outcomes if not TASKS[task].is_choice]
    kinds = kind_rows(modules, settings, found, tokens)
    inside = insides(modules, found.weights, unit_rows(modules, settings, found, tokens), kinds, settings.seed)
    shapley = None if found.orders is None else shapley_check(found.orders, found.order_models, rows, settings.seed)
    ablations = [ablation_record(removal, settings.seed) for removal in found.removals]
    conclusions = conclude(
        rows,
        settings.tolerance_nats,
        modules=modules,
        weights=found.weights,
        attention=found.attention,
        plan=found.judged.plan,
        calibration=found.calibration,
        kinds=kinds,
        shapley=shapley,
        ablations=ablations,
        joint=found.joint,
        tested=TaskEvidence(scores, pairs, found.outcomes, math_tasks, *text_rows(modules, settings, found)),
        seed=settings.seed,
    )
    uniform = uniform_records(info, modules, found.widths, tokens.blocks("test"), settings.seed)
    return Atlas(
        model=info,
        settings=settings.recorded(),
        versions=versions,
        formats=settings.format_table(),
        quantizer=settings.quantizer,
        high=settings.high,
        low=settings.low,
        tokens=tokens,
        modules=modules,
        module_bytes={
            m.name: {name: stored_bytes(m.shape, fmt) for name, fmt in settings.format_table().items()} for m in modules
        },
        unit_damage=found.unit_damage,
        base_damage=found.base_damage,
        uniform=uniform,
        layers=conclusions.layers,
        zones=conclusions.zones,
        weights=found.weights,
        attention=found.attention,
        heads=found.heads,
        tasks=scores,
        task_pairs=pairs,
        plan=found.judged.plan,
        curve=[*uniform_points(uniform), *found.judged.curve, *map(curve_point, found.others)],
        correlations=conclusions.correlations,
        findings=conclusions.findings,
        notes=found.notes,
        calibration=found.calibration,
        task_damage=conclusions.task_damage,
        units=inside.units,
        kinds=inside.kinds,
        unit_correlations=inside.unit_correlations,
        shapley=shapley,
        ablations=ablations,
        interactions=interactions_of(modules, settings, found.pairs, tokens.blocks("fit")),
        head_maps=list(found.head_maps),
        joint=found.joint,
        plans=[other.plan for other in found.others],
        sparsity=conclusions.sparsity,
    )


def text_rows(modules: Sequence[Module], settings: Settings, found: Measurements) -> tuple[dict[str, TaskRows], LayerRows | None]:
    """The damage of layers on each task's own text, and on general text of the same length."""
    weights = layer_rows(modules, settings, found).weights
    high, low = settings.high, settings.low

    def of(screen: TaskScreen, name: str) -> LayerRows:
        layers, widths = screen.layers, screen.widths
        return LayerRows(widths[high], widths[low], layers.lowered, layers.raised, weights, high, low, name, screen.blocks)

    texts: dict[str, TaskRows] = {
        task: (screen.widths, of(screen, f"text:{task}")) for task, screen in found.task_screens.items()
    }
    return texts, of(found.general_screen, "test, cut to the tasks' length") if found.general_screen else None


def layer_rows(modules: Sequence[Module], settings: Settings, found: Measurements, tokens: TokensInfo | None = None) -> LayerRows:
    """The damage of layers as the findings read it; `tokens` have the blocks of the rows."""
    layers = sorted({module.layer for module in modules})
    weights = np.array([sum(m.weights for m in modules if m.layer == layer) for layer in layers], dtype=np.float64)
    return LayerRows(
        high=found.widths[settings.high],
        low=found.widths[settings.low],
        lowered=found.lowered,
        raised=found.raised,
        weights=weights,
        high_name=settings.high,
        low_name=settings.low,
        blocks=tokens.blocks("test") if tokens else None,
        orders=found.orders,
    )


def kind_rows(modules: Sequence[Module], settings: Settings, found: Measurements, tokens: TokensInfo) -> LayerRows:
    """The same for kinds of modules, in the order in which they come."""
    kinds = list(dict.fromkeys(module.kind for module in modules))
    weights = np.array([sum(m.weights for m in modules if m.kind == kind) for kind in kinds], dtype=np.float64)
    rows = found.kinds_lowered.shape[1]  # the first of the test rows
    high, low = found.widths[settings.high][:rows], found.widths[settings.low][:rows]
    names, blocks = (settings.high, settings.low, "test"), tokens.blocks("test")
    return LayerRows(high, low, found.kinds_lowered, found.kinds_raised, weights, *names, blocks[:rows] if blocks else None)


def unit_rows(modules: Sequence[Module], settings: Settings, found: Measurements, tokens: TokensInfo) -> LayerRows:
    """The same for units, on the fit rows."""
    units = list(dict.fromkeys(module.unit for module in modules))
    weights = np.array([sum(m.weights for m in modules if m.unit == unit) for unit in units], dtype=np.float64)
    high, low = f"uniform:{settings.high}", f"uniform:{settings.low}"
    lowered = np.stack([found.unit_rows[high][unit][settings.low] for unit in units])
    raised = np.stack([found.unit_rows[low][unit][settings.high] for unit in units])
    bases = found.base_rows
    names, blocks = (settings.high, settings.low, "fit"), tokens.blocks("fit")
    return LayerRows(bases[high], bases[low], lowered, raised, weights, *names, blocks)


def interactions_of(
    modules: Sequence[Module], settings: Settings, pairs: PairScreen | None, blocks: Sequence[int] | None
) -> UnitInteractions | None:
    """The pairs of units as a record, numbers cut to three digits."""
    if pairs is None:
        return None
    units, base = list(dict.fromkeys(module.unit for module in modules)), f"uniform:{settings.high}"
    named = [
        UnitPair(units[u], units[v], measured(rows, "nats/token", base, "fit", settings.seed, blocks and blocks[: len(rows)]))
        for (u, v), rows in zip(pairs.pairs, pairs.by_row.T, strict=True)
    ]
    below = [[float(f"{value:.2e}") for value in row[:place]] for place, row in enumerate(pairs.extra)]
    return UnitInteractions(base, settings.low, units, below, named)


def uniform_records(
    info: ModelInfo, modules: Sequence[Module], widths: Mapping[str, np.ndarray], blocks: Sequence[int] | None, seed: int
) -> list[Uniform]:
    """Size and damage of every uniform width."""
    return [
        Uniform(
            name,
            size_of(modules, {module.name: name for module in modules}, info),
            measured(rows, "nats/token", f"uniform:{name}", "test", seed, blocks),
        )
        for name, rows in widths.items()
    ]


def uniform_points(uniform: Sequence[Uniform]) -> list[CurvePoint]:
    return [
        CurvePoint(f"uniform {u.format}", "uniform", u.size.code_bits, u.size.stored_bits, u.size.total_bytes, u.damage)
        for u in uniform
    ]


def damage_lines(found: Measurements, low: str, high: str) -> Lines:
    """Every row's damage: of uniform widths, and of every layer, kind of module and unit both ways."""
    lines = [
        _line("reference", f"uniform:{name}", name, row, value)
        for name, rows in found.widths.items()
        for row, value in enumerate(rows)
    ]
    for base, other, table, of_kinds in (
        (high, low, found.lowered, found.kinds_lowered),
        (low, high, found.raised, found.kinds_raised),
    ):
        named = {f"layer:{layer}": rows for layer, rows in enumerate(table)}
        named |= {f"kind:{kind}": rows for kind, rows in zip(found.kinds, of_kinds, strict=True)}
        for target, rows in named.items():
            lines += [_line(f"uniform:{base}", target, other, row, value) for row, value in enumerate(rows)]
    for base_name, units in found.unit_rows.items():
        for unit, formats in units.items():
            for name, rows in formats.items():
                lines += [_line(base_name, f"unit:{unit}", name, row, value, "fit") for row, value in enumerate(rows)]
    return lines


def _line(base: str, target: str, name: str, row: int, value: float, split: str = "test") -> dict[str, Any]:
    return {"base": base, "target": target, "format": name, "split": split, "row": row, "damage_nats": float(value)}


def write_outputs(out: Path, atlas: Atlas, tables: Mapping[str, Lines]) -> None:
    """All files of a finished survey, together: where one cannot be written, those of an earlier run stay as they were."""

    with all_or_none(out) as folder:
        write_tables(folder / "tables", tables)
        write_text(folder / "atlas.json", to_json(atlas))
        if atlas.plan:
            write_text(folder / "plan.json", to_json(atlas.plan))
        write_plans(folder, atlas.plans)
        write_reports(atlas, folder)
    drop_other_plans(out, atlas.plans)


# --- tables ----------------------------------------------------------------------------------------------------------------

# The long tables beside the atlas, as Parquet: one line a row, module, head or item, readable by any data tool.


def write_tables(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write `folder`/NAME.parquet for each table with lines in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        if not lines:
            continue
        columns = dict.fromkeys(column for line in lines for column in line)  # Arrow would take the first line's alone
        with writing(folder / f"{name}.parquet"):
            table = pa.table({column: [line.get(column) for line in lines] for column in columns})
            pq.write_table(table, folder / f"{name}.parquet")
