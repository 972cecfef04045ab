"""The ways by which `plan.refine` reaches the model: curvature, measured swaps and measured plans, journaled and shown.

`drafted` puts the curvature in the place of measured swaps: one pass with a few backwards for all changes, instead of a pass for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitatlas.data.rows import Rows
from bitatlas.measure.curvature import expand
from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.measure.interactions import Interactions, swap_interactions
from bitatlas.plan.expansion import Expansion, Floats, Quadratic, quadratic_model
from bitatlas.plan.refine import Change, Ints, Probe, step_text
from bitatlas.plan.search import MeasureDamage, PlannerHooks, Scores
from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.records.sizes import assignment_of, units_of
from bitatlas.records.text import number
from bitatlas.run.prepare import Run

CURVATURE = "the curvature around a plan"


@dataclass(frozen=True)
class Expanded:
    """Changes around a base to second order: damage added [changes], half the curvature between them [changes, changes]; nats/token."""

    added: Floats
    together: Floats


def expanded(model: Quadratic, changes: Sequence[Change]) -> Expanded:
    """What the model says of `changes`."""
    at = np.array([unit * model.first.shape[1] + fmt for unit, fmt in changes])
    return Expanded(model.first.ravel()[at] + np.diag(model.matrix)[at], model.matrix[np.ix_(at, at)])


def probe_of(
    meter: DamageMeter, rows: Rows, modules: Sequence[Module], formats: Sequence[str], seed: int, reporter: Reporter
) -> Probe:
    """A probe on the fit and select rows; test rows are out of its reach."""
    units = units_of(modules)

    def assignment(choice: Ints | None) -> dict[str, str]:
        return {} if choice is None else assignment_of(units, formats, choice)

    def curvature(base: Ints | None) -> Expansion:
        with reporter.stage("curvature at the reference" if base is None else "curvature at a plan") as progress:
            return expand(meter, modules, formats, assignment(base), rows.fit, seed, progress=progress)

    def swaps(base: Ints, changes: Sequence[Change], split: str) -> Interactions:
        single = [Swap(units[u].layer, {module.name: formats[f] for module in units[u].modules}) for u, f in changes]
        with reporter.stage(f"{len(single)} swaps around a plan ({split} rows)") as progress:
            return swap_interactions(meter, assignment(base), single, getattr(rows, split), seed, progress)

    def damage(plans: Mapping[str, Ints]) -> dict[str, float]:
        named = {name: assignment(choice) for name, choice in plans.items()}
        fit, select = (meter.plans(named, part) for part in (rows.fit, rows.select))
        return {name: float(np.concatenate([fit[name], select[name]]).mean()) for name in plans}

    return Probe(curvature, swaps, damage)


def drafted(
    probe: Probe, meter: DamageMeter, rows: Rows, modules: Sequence[Module], formats: Sequence[str], seed: int, reporter: Reporter
) -> Probe:
    """The same probe without measured swaps."""
    units = units_of(modules)

    def swaps(base: Ints, changes: Sequence[Change], split: str) -> Expanded:
        with reporter.stage(f"curvature around a plan ({split} rows)") as progress:
            own = assignment_of(units, formats, base)
            found = expand(meter, modules, formats, own, getattr(rows, split), seed, progress=progress)
        return expanded(quadratic_model(found), changes)

    return replace(probe, swaps=swaps, rounds_of=CURVATURE)


def tools_of(run: Run, scores: Scores) -> PlannerHooks:
    """The planner's ways to the model: fit and select rows, never the test rows."""
    if not run.settings.refine:
        return PlannerHooks(scores, on_select(run))
    return PlannerHooks(scores, on_select(run), probe(run), lambda step: run.reporter.say(step_text(step)))


def on_select(run: Run) -> MeasureDamage:
    """Damage of choices on the select rows."""
    subject, units = run.subject, run.subject.units

    def measure(plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        found = run.measure({name: assignment_of(units, subject.formats, choice) for name, choice in plans.items()}, "select")
        damage = {name: float(rows.mean()) for name, rows in found.items()}
        run.reporter.found("best of the last plans, select rows", f"{number(min(damage.values()))} nats/token")
        return damage

    return measure


def probe(run: Run) -> Probe:
    """What a refinement asks of the model."""
    subject = run.subject
    return probe_of(run.meter, run.rows, subject.modules, subject.formats, subject.seed, run.reporter)
