"""Who does the damage inside the layers: every unit, and every kind of module in all layers together.

Shares and criticality are those of `shares`, with units or kinds in the place of layers; what holds for a layer's share holds for theirs.
Units are measured on the fit rows, where plans are found, and kinds on the test rows. Cheap measures are compared with the damage of
units too: there are many more units than layers, so chance has less room, but they differ in size, and size alone foretells much.
Left out: verdicts on units (the planner decides by damage, not by words).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.findings.correlations import Floats, correlations
from bitatlas.findings.shares import LayerRows, part_records, shares_of
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
    """`units` and `kinds`: rows in the order in which they first come among the modules."""
    of_units = shares_of(units, seed)
    names = list(dict.fromkeys(module.unit for module in modules))
    groups = {name: [module for module in modules if module.unit == name] for name in names}
    found = [
        UnitDamage(
            name, group[0].layer, list(dict.fromkeys(m.kind for m in group)), sum(m.weights for m in group),
            **part._asdict(),
        )
        for (name, group), part in zip(groups.items(), part_records(units, of_units, seed), strict=True)
    ]  # fmt: skip
    measures = unit_measures(groups, weights, units.low_name)
    return UnitRecords(found, correlations(measures, of_units) if of_units.defined else [], kind_records(modules, kinds, seed))


def kind_records(modules: Sequence[Module], rows: LayerRows, seed: int = 0) -> list[KindDamage]:
    """One record a kind, in order."""
    names = list(dict.fromkeys(module.kind for module in modules))
    count = [sum(module.kind == name for module in modules) for name in names]
    return [
        KindDamage(name, count[place], int(rows.weights[place]), **part._asdict())
        for place, (name, part) in enumerate(zip(names, part_records(rows, shares_of(rows, seed), seed), strict=True))
    ]


def unit_measures(groups: Mapping[str, Sequence[Module]], weights: Sequence[WeightProfile], low: str) -> dict[str, Floats]:
    """Cheap measures of every unit: name -> [units]; of several modules their means, weighted by size. Not whole ones are left out.

    "relative error x weights" and "squared error" are the sums that a planner without a model would use.
    """
    own = {profile.module: profile for profile in weights}
    size = np.array([sum(m.weights for m in group) for group in groups.values()], dtype=np.float64)
    found = {"weights": size, "depth": np.array([group[0].layer for group in groups.values()], dtype=np.float64)}
    if all(module.name in own for group in groups.values() for module in group):
        read = {
            "sparsity": lambda p: p.sparsity,
            "kurtosis": lambda p: p.kurtosis,
            "outlier ratio": lambda p: p.outlier_ratio,
            "relative error": lambda p: p.relative_error.get(low, math.nan),
            "squared error": lambda p: p.relative_error.get(low, math.nan) * p.std**2,
        }
        for name, value in read.items():
            found[name] = np.array(
                [np.average([value(own[m.name]) for m in group], weights=[m.weights for m in group]) for group in groups.values()]
            )
        found["relative error × weights"] = found["relative error"] * size
        found["squared error"] *= size
    return {name: values for name, values in found.items() if np.isfinite(values).all()}
