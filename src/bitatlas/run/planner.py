"""How the planner reaches the model: prices, measured swaps and measured plans, journaled and shown; and a survey's first plan.

The first plan comes from the price list (`measure.prices`): one pass forwards and one backwards for all units and formats. A few measured models say
what a price is worth in nats/token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitatlas.measure.damage import Swap
from bitatlas.measure.interactions import Interactions, swap_interactions
from bitatlas.measure.prices import price_units
from bitatlas.model.streaming import release_free_memory
from bitatlas.plan.baselines import most_critical_first
from bitatlas.plan.calibration import LEAST
from bitatlas.plan.knapsack import Floats, Ints
from bitatlas.plan.refine import Change, Probe, step_text
from bitatlas.plan.search import MeasureDamage, PlannerHooks, Scores
from bitatlas.records import Atlas
from bitatlas.records.sizes import Unit, assignment_of, inner, uniform
from bitatlas.records.text import number
from bitatlas.run.effort import PRICED_ROWS, SCALED_ROWS
from bitatlas.run.prepare import Session

SOURCE = "second-order prices"


def critical_first(atlas: Atlas) -> list[int]:
    """Return the layers of a finished survey, the most critical first."""
    return [layer.layer for layer in sorted(atlas.layers, key=lambda layer: -layer.criticality.mean)]


def planner_hooks(session: Session, scores: Scores) -> PlannerHooks:
    """Return the planner's ways to the model: fit and select rows, never the test rows."""
    if not session.settings.refine:
        return PlannerHooks(scores, on_select(session))
    say = session.reporter.say
    return PlannerHooks(
        scores, on_select(session), probe(session), lambda step: say(step_text(step)), effort=session.effort.search
    )


def on_select(session: Session) -> MeasureDamage:
    """Return a function that measures choices by name on the select rows: mean damage, nats/token."""

    def measure(plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        by_row = session.measure(session.assignments(plans), "select")
        damage = {name: float(rows.mean()) for name, rows in by_row.items()}
        session.reporter.found("best of the last plans, select rows", f"{number(min(damage.values()))} nats/token")
        return damage

    return measure


def probe(session: Session) -> Probe:
    """Return what a refinement asks of the model, on the fit and select rows; test rows are out of its reach."""
    meter, subject, count = session.meter, session.subject, session.effort.unit_rows
    rows = {"fit": session.rows.fit[:count], "select": session.rows.select[:count]}
    units, formats = subject.units, subject.formats

    def swaps(base: Ints, changes: Sequence[Change], split: str) -> Interactions:
        single = [
            Swap(units[u].layer, {module.name: module.formats(formats)[f] for module in units[u].modules}) for u, f in changes
        ]
        with session.reporter.stage(f"{len(single)} swaps around a plan ({split} rows)") as progress:
            return swap_interactions(meter, assignment_of(units, formats, base), single, rows[split], subject.seed, progress)

    def damage(plans: Mapping[str, Ints]) -> dict[str, float]:
        named = session.assignments(plans)
        fit, select = (meter.plans(named, part) for part in (rows["fit"], session.rows.select))
        return {name: float(np.concatenate([fit[name], select[name]]).mean()) for name in plans}

    return Probe(swaps, damage, [index for index, unit in enumerate(units) if unit.part])


def first_hooks(session: Session) -> PlannerHooks:
    """Return the planner's ways to the model for a first plan: the price list, and measured plans."""
    settings, subject = session.settings, session.subject
    with session.reporter.stage("pricing every unit in every format") as progress:
        rows = session.rows.select[:PRICED_ROWS]
        prices = price_units(session.meter, inner(subject.modules), settings.formats, rows, settings.seed, progress)
    release_free_memory()
    return PlannerHooks(_price_scores(session, prices), on_select(session))


def _outside_damage(session: Session, units: Sequence[Unit]) -> Floats:
    """Return the damage of each unit outside the layers in each of its formats, alone: float64 [units, formats], nats/token.

    Measured, not priced: these are few, and the change of an embedding is felt at two ends.
    """
    rows, formats = session.rows.select[:SCALED_ROWS], session.settings.formats
    plans = {
        f"{unit.name} {name}": {module.name: name for module in unit.modules} for unit in units for name in unit.formats(formats)
    }
    with session.reporter.stage("embedding and head in every format") as progress:
        damage = session.meter.plans(plans, rows, progress)
    return np.array([[damage[f"{unit.name} {name}"].mean() for name in unit.formats(formats)] for unit in units])


def _price_scores(session: Session, prices: Floats) -> Scores:
    """Return the prices [units in layers, formats] as damage: times the factor by which uniform widths do more than the sum of their prices.

    Units outside the layers have their measured damage.
    """
    formats, rows, subject = session.settings.formats, session.rows.select[:SCALED_ROWS], session.subject
    layers = inner(subject.modules)
    damage = session.meter.plans({name: uniform(layers, name) for name in formats}, rows)
    measured = np.array([damage[name].mean() for name in formats])
    factor = float(np.exp(np.log(measured.clip(LEAST) / prices.sum(axis=0).clip(LEAST)).mean()))
    session.reporter.say(f"uniform widths do {number(factor)} times the damage of their prices' sum")
    outside = [unit for unit in subject.units if unit.part]
    beside = _outside_damage(session, outside) if outside else np.zeros((0, len(formats)))
    rows_of = iter(factor * prices), iter(beside)
    table = np.array([next(rows_of[bool(unit.part)]) for unit in subject.units])
    return Scores({"prices": table - table[:, -1:]}, float(measured[-1] + beside[:, -1].sum()), SOURCE)


def layers_by_score(session: Session, scores: Scores) -> list[int]:
    """Return the layers, that with the most damage for its weights first, as far as the scores know."""
    (table,) = scores.tables.values()
    units = session.subject.units
    inside = [index for index, unit in enumerate(units) if not unit.part]
    damage = np.bincount([units[index].layer for index in inside], table[inside, 0])
    return most_critical_first(session.subject.modules, damage)
