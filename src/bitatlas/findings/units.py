"""Who does the damage inside the layers: every unit, and every kind of module in all layers together.

Shares and criticality are those of `findings.shares`, with units or kinds in the place of layers; what holds for a layer's share holds for theirs.
Units are measured on the fit rows, where plans are found, and kinds on the test rows. Cheap measures are compared with the damage of
units too: there are many more units than layers, so chance has less room, but they differ in size, and size alone foretells much.
Left out: verdicts on units (the planner decides by damage, not by words).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.findings.correlations import correlations, weight_measures
from bitatlas.findings.shares import Floats, LayerRows, part_records, shares_of
from bitatlas.records import Correlation, KindDamage, Module, UnitDamage, WeightProfile


@dataclass(frozen=True)
class UnitRecords:
    """Units and kinds of one model."""

    units: list[UnitDamage]
    unit_correlations: list[Correlation]
    kinds: list[KindDamage]


def unit_records(
    modules: Sequence[Module], weights: Sequence[WeightProfile], units: LayerRows, kinds: LayerRows, seed: int = 0
) -> UnitRecords:
    """Return the records of units and kinds. `units` and `kinds`: rows in the order in which they first come among the modules."""
    shares = shares_of(units, seed)
    groups = _grouped(modules, "unit")
    records = [
        UnitDamage(name, group[0].layer, list(_grouped(group, "kind")), sum(m.weights for m in group), **part._asdict())
        for (name, group), part in zip(groups.items(), part_records(units, shares, seed), strict=True)
    ]
    measures = _unit_measures(list(groups.values()), weights, units.low_name)
    return UnitRecords(records, correlations(measures, shares) if shares.defined else [], kind_records(modules, kinds, seed))


def kind_records(modules: Sequence[Module], rows: LayerRows, seed: int = 0) -> list[KindDamage]:
    """Return one record a kind, in order."""
    parts = part_records(rows, shares_of(rows, seed), seed)
    return [
        KindDamage(name, len(group), int(weights), **part._asdict())
        for (name, group), weights, part in zip(_grouped(modules, "kind").items(), rows.weights, parts, strict=True)
    ]


def _grouped(modules: Sequence[Module], attribute: str) -> dict[str, list[Module]]:
    """Return modules by their unit or kind, in the order in which these come."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(getattr(module, attribute), []).append(module)
    return groups


def _unit_measures(groups: Sequence[Sequence[Module]], weights: Sequence[WeightProfile], low: str) -> dict[str, Floats]:
    """Return cheap measures of every unit: name -> [units]. What some unit lacks is left out.

    "relative error × weights" and "squared error" are the sums that a planner without a model would use.
    """
    profiles = {profile.module: profile for profile in weights}
    size = np.array([sum(module.weights for module in group) for group in groups], dtype=np.float64)
    measures = {"weights": size, "depth": np.array([group[0].layer for group in groups], dtype=np.float64)}
    if all(module.name in profiles for group in groups for module in group):
        measures |= weight_measures([[profiles[module.name] for module in group] for group in groups], low)
        measures["relative error × weights"] = measures["relative error"] * size
        measures["squared error"] *= size
    return {name: values for name, values in measures.items() if np.isfinite(values).all()}
