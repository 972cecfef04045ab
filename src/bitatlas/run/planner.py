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
from bitatlas.records.sizes import assignment_of
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
        single = [Swap(units[u].layer, {module.name: formats[f] for module in units[u].modules}) for u, f in changes]
        with session.reporter.stage(f"{len(single)} swaps around a plan ({split} rows)") as progress:
            return swap_interactions(meter, assignment_of(units, formats, base), single, rows[split], subject.seed, progress)

    def damage(plans: Mapping[str, Ints]) -> dict[str, float]:
        named = session.assignments(plans)
        fit, select = (meter.plans(named, part) for part in (rows["fit"], session.rows.select))
        return {name: float(np.concatenate([fit[name], select[name]]).mean()) for name in plans}

    return Probe(swaps, damage)


def first_hooks(session: Session) -> PlannerHooks:
    """Return the planner's ways to the model for a first plan: the price list, and measured plans."""
    settings, subject = session.settings, session.subject
    with session.reporter.stage("pricing every unit in every format") as progress:
        rows = session.rows.select[:PRICED_ROWS]
        prices = price_units(session.meter, subject.modules, settings.formats, rows, settings.seed, progress)
    release_free_memory()
    return PlannerHooks(_price_scores(session, prices), on_select(session))


def _price_scores(session: Session, prices: Floats) -> Scores:
    """Return the prices [units, formats] as damage: times the factor by which uniform widths do more than the sum of their prices."""
    formats, rows = session.settings.formats, session.rows.select[:SCALED_ROWS]
    plans = {name: np.full(len(prices), index) for index, name in enumerate(formats)}
    damage = session.meter.plans(session.assignments(plans), rows)
    measured = np.array([damage[name].mean() for name in formats])
    factor = float(np.exp(np.log(measured.clip(LEAST) / prices.sum(axis=0).clip(LEAST)).mean()))
    session.reporter.say(f"uniform widths do {number(factor)} times the damage of their prices' sum")
    return Scores({"prices": factor * (prices - prices[:, -1:])}, float(measured[-1]), SOURCE)


def layers_by_score(session: Session, scores: Scores) -> list[int]:
    """Return the layers, that with the most damage for its weights first, as far as the scores know."""
    (table,) = scores.tables.values()
    damage = np.bincount([unit.layer for unit in session.subject.units], table[:, 0])
    return most_critical_first(session.subject.modules, damage)
