"""The ways by which `planning.refine` reaches the model: curvature, measured swaps and measured plans, journaled and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitatlas.planning.budget import assignment_of, units_of
from bitatlas.planning.expansion import Expansion
from bitatlas.planning.refine import Change, Ints, Probe
from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.sensitivity.curvature import expand
from bitatlas.sensitivity.damage import DamageMeter, Swap
from bitatlas.sensitivity.interactions import Interactions, swap_interactions
from bitatlas.tokens import Rows


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
