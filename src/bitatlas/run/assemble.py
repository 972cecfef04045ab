"""Assemble the atlas of the evidence, and write its files. Nothing is measured here: numbers in, records and files out."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bitatlas.findings.conclude import DamageEvidence, Evidence, conclude
from bitatlas.measure.screens import PairScreen, UnitScreen
from bitatlas.records import Atlas, Module, Uniform, UnitInteractions, UnitPair
from bitatlas.records.files import all_or_none, drop_other_plans, to_json, write_plans, write_text, writing
from bitatlas.records.formats import FORMATS, stored_bytes
from bitatlas.records.sizes import size_of, uniform
from bitatlas.report.html import write_reports
from bitatlas.run.prepare import Session
from bitatlas.stats.bootstrap import measured

LIBRARIES = ("bitatlas", "torch", "transformers", "lm_eval", "numpy", "scipy")

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Screens:
    """The screens of true damage: what findings read of them, and what else goes into the atlas and its tables."""

    damage: DamageEvidence
    widths: dict[str, np.ndarray]  # format -> [rows], nats/token, on the test rows
    uniform: list[Uniform]  # the same as records
    units: UnitScreen


def assemble(session: Session, evidence: Evidence, screens: Screens) -> Atlas:
    """Return the finished atlas: the evidence, and the conclusions drawn from it."""
    settings, modules, tasks = session.settings, session.checkpoint.modules, evidence.tasks
    formats = settings.format_table()
    conclusions = conclude(evidence, settings.tolerance_nats, settings.seed)
    return Atlas(
        model=session.checkpoint.info,
        settings=settings.recorded(),
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        formats=formats,
        quantizer=settings.quantizer,
        high=settings.high,
        low=settings.low,
        tokens=session.rows.info,
        modules=modules,
        module_bytes={m.name: _bytes_by_format(m, list(formats)) for m in modules},
        unit_damage=screens.units.damage,
        base_damage=screens.units.base,
        uniform=screens.uniform,
        joint=evidence.damage.joint,
        interactions=interactions_of(session, screens.units.pairs),
        weights=evidence.weights,
        tasks=tasks.scores,
        task_pairs=tasks.pairs,
        **vars(evidence.attention),
        **vars(evidence.plan),
        **vars(conclusions),
    )


def _bytes_by_format(module: Module, formats: Sequence[str]) -> dict[str, int]:
    """Return a module's bytes by the names of the survey's formats, outside the layers by those of its own."""
    names = {name: name for name in module.candidates} if module.part else {name: module.at(name) for name in formats}
    return {name: stored_bytes(module.shape, FORMATS[held]) for name, held in names.items()}


def interactions_of(session: Session, pairs: PairScreen | None) -> UnitInteractions | None:
    """Return the pairs of units as a record, numbers cut to three digits; None of a single unit."""
    if pairs is None:
        return None
    units, base = [unit.name for unit in session.subject.units], f"uniform:{session.settings.high}"
    blocks = session.rows.blocks("fit")[: len(pairs.by_row)]
    named = [
        UnitPair(units[u], units[v], measured(rows, "nats/token", base, "fit", session.settings.seed, blocks))
        for (u, v), rows in zip(pairs.pairs, pairs.by_row.T, strict=True)
    ]
    below = [[float(f"{value:.2e}") for value in row[:index]] for index, row in enumerate(pairs.extra)]
    return UnitInteractions(base, session.settings.low, units, below, named)


def uniform_records(session: Session, widths: Mapping[str, np.ndarray]) -> list[Uniform]:
    """Return size and damage of every uniform width; widths: format -> [test rows], nats/token."""
    modules, info, seed, blocks = (
        session.checkpoint.modules,
        session.checkpoint.info,
        session.settings.seed,
        session.rows.blocks("test"),
    )
    return [
        Uniform(
            name,
            size_of(modules, uniform(modules, name), info),
            measured(rows, "nats/token", f"uniform:{name}", "test", seed, blocks),
        )
        for name, rows in widths.items()
    ]


# --- files -----------------------------------------------------------------------------------------------------------------


def write_outputs(out: Path, atlas: Atlas, tables: Mapping[str, Lines]) -> None:
    """Write all files of a finished survey, together: where one cannot be written, those of an earlier run stay as they were."""
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


def tables_of(atlas: Atlas, evidence: Evidence, screens: Screens) -> dict[str, Lines]:
    """Return the long tables by name."""
    return {
        "damage": damage_lines(screens),
        "weights": [asdict(profile) for profile in atlas.weights],
        "heads": [asdict(head) for head in atlas.heads],
        "items": evidence.tasks.items,
    }


def damage_lines(screens: Screens) -> Lines:
    """Return every row's damage: of uniform widths, and of every layer, kind of module and unit both ways."""
    layers, kinds = screens.damage.layers, screens.damage.kinds
    targets = [(f"layer:{layer}", layers, layer) for layer in range(layers.layers)]
    if kinds:
        names = dict.fromkeys(module.kind for module in screens.damage.modules)
        targets += [(f"kind:{name}", kinds, index) for index, name in enumerate(names)]
    damage = [("reference", f"uniform:{name}", name, "test", rows) for name, rows in screens.widths.items()]
    damage += [(layers.high_base, target, layers.low_name, "test", part.lowered[index]) for target, part, index in targets]
    damage += [(layers.low_base, target, layers.high_name, "test", part.raised[index]) for target, part, index in targets]
    damage += [
        (base, f"unit:{unit}", name, "fit", rows)
        for base, units in screens.units.by_row.items()
        for unit, formats in units.items()
        for name, rows in formats.items()
    ]
    return [
        {"base": base, "target": target, "format": name, "split": split, "row": row, "damage_nats": float(value)}
        for base, target, name, split, rows in damage
        for row, value in enumerate(rows)
    ]


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
