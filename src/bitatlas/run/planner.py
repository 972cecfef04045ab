"""How the planner reaches the model: curvature, measured swaps and measured plans, journaled and shown.

A draft has the curvature in the place of measured swaps: one pass with a few backwards for all changes, instead of a pass for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitatlas.measure.curvature import expand
from bitatlas.measure.damage import Swap
from bitatlas.measure.interactions import Interactions, swap_interactions
from bitatlas.plan.expansion import Expansion, Quadratic, quadratic_model
from bitatlas.plan.knapsack import Floats, Ints
from bitatlas.plan.refine import Change, Probe, step_text
from bitatlas.plan.search import MeasureDamage, PlannerHooks, Scores
from bitatlas.records import Atlas
from bitatlas.records.sizes import assignment_of
from bitatlas.records.text import number
from bitatlas.run.prepare import Session

CURVATURE = "the curvature around a plan"


@dataclass(frozen=True)
class Expanded:
    """Changes around a base to second order: damage added [changes], half the curvature between them [changes, changes]; nats/token."""

    added: Floats
    together: Floats


def expanded(model: Quadratic, changes: Sequence[Change]) -> Expanded:
    """Return what the quadratic model says of `changes`."""
    index = np.array([unit * model.first.shape[1] + fmt for unit, fmt in changes])
    return Expanded(model.first.ravel()[index] + np.diag(model.matrix)[index], model.matrix[np.ix_(index, index)])


def critical_first(atlas: Atlas) -> list[int]:
    """Return the layers of a finished survey, the most critical first."""
    return [layer.layer for layer in sorted(atlas.layers, key=lambda layer: -layer.criticality.mean)]


def planner_hooks(session: Session, scores: Scores) -> PlannerHooks:
    """Return the planner's ways to the model: fit and select rows, never the test rows."""
    if not session.settings.refine:
        return PlannerHooks(scores, on_select(session))
    return PlannerHooks(scores, on_select(session), probe(session), lambda step: session.reporter.say(step_text(step)))


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
    meter, rows, reporter, subject = session.meter, session.rows, session.reporter, session.subject
    units, formats, seed = subject.units, subject.formats, subject.seed

    def assignment(choice: Ints | None) -> dict[str, str]:
        return {} if choice is None else assignment_of(units, formats, choice)

    def curvature(base: Ints | None) -> Expansion:
        with reporter.stage("curvature at the reference" if base is None else "curvature at a plan") as progress:
            return expand(meter, subject.modules, formats, assignment(base), rows.fit, seed, progress=progress)

    def swaps(base: Ints, changes: Sequence[Change], split: str) -> Interactions:
        single = [Swap(units[u].layer, {module.name: formats[f] for module in units[u].modules}) for u, f in changes]
        with reporter.stage(f"{len(single)} swaps around a plan ({split} rows)") as progress:
            return swap_interactions(meter, assignment(base), single, getattr(rows, split), seed, progress)

    def damage(plans: Mapping[str, Ints]) -> dict[str, float]:
        named = session.assignments(plans)
        fit, select = (meter.plans(named, part) for part in (rows.fit, rows.select))
        return {name: float(np.concatenate([fit[name], select[name]]).mean()) for name in plans}

    return Probe(curvature, swaps, damage)


def draft_probe(session: Session) -> Probe:
    """Return the probe of a draft: curvature in the place of measured swaps."""
    subject = session.subject

    def swaps(base: Ints, changes: Sequence[Change], split: str) -> Expanded:
        with session.reporter.stage(f"curvature around a plan ({split} rows)") as progress:
            assignment, rows = assignment_of(subject.units, subject.formats, base), getattr(session.rows, split)
            expansion = expand(session.meter, subject.modules, subject.formats, assignment, rows, subject.seed, progress=progress)
        return expanded(quadratic_model(expansion), changes)

    return replace(probe(session), swaps=swaps, rounds_of=CURVATURE)
