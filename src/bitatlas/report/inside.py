"""The tables on what is inside the layers: kinds of modules, the most critical units, and cheap measures against their damage."""

from __future__ import annotations

from bitatlas import words
from bitatlas.records import Atlas, Correlation, KindDamage, Layer, UnitDamage
from bitatlas.report import facts
from bitatlas.report.table import Table
from bitatlas.words import interval, number, percent

MOST_UNITS = 10  # that are shown; all are in the atlas
EVIDENCE = ("Damage lowered, nats/token", "Damage raised, nats/token", "Share of damage", "Criticality", "q")  # columns


def evidence(one: Layer | UnitDamage | KindDamage) -> list[str]:
    """The cells below `EVIDENCE`."""
    measured = (one.lowered, one.raised, one.share, one.criticality)
    return [*(interval(value) for value in measured), words.p_value(one.q_value, one.q_is_bound)]


def kind_table(atlas: Atlas) -> Table:
    """Every kind of module, in all layers together."""
    total = sum(kind.weights for kind in atlas.kinds) or 1
    rows = [
        [
            kind.kind,
            str(kind.modules),
            percent(kind.weights / total),
            *evidence(kind),
        ]
        for kind in atlas.kinds
    ]
    note = (
        f"All modules of a kind together. Lowered: at {atlas.low}, all others at {atlas.high}; raised: the reverse. Share and criticality: "
        f"{facts.basis([kind.share for kind in atlas.kinds])}. q: criticality = 1, two-sided, Benjamini-Hochberg over kinds."
    )
    head = ["Kind", "Modules", "Weights", *EVIDENCE]
    return Table("kinds", "Kinds of modules", note, head, rows, "Not measured.")


def unit_table(atlas: Atlas) -> Table:
    """The most critical units, worst first."""
    total = sum(unit.weights for unit in atlas.units) or 1
    worst = sorted(atlas.units, key=lambda unit: (-unit.criticality.mean, unit.unit))[:MOST_UNITS]
    rows = [
        [
            unit.unit,
            str(unit.layer),
            percent(unit.weights / total, 2),
            *evidence(unit),
        ]
        for unit in worst
    ]
    note = (
        f"The {len(rows)} with the highest criticality of {len(atlas.units)} units (modules that share one format); all are in atlas.json. "
        f"Share and criticality: {facts.basis([unit.share for unit in worst])}. q: Benjamini-Hochberg over all units."
    )
    head = ["Unit", "Layer", "Weights", *EVIDENCE]
    return Table("units", "Most critical units", note, head, rows, "Not measured.")


def correlation_table(atlas: Atlas) -> Table:
    """Every cheap measure against measured damage, over layers and over units."""
    layers = {one.measure: one for one in atlas.correlations}
    units = {one.measure: one for one in atlas.unit_correlations}
    rows = [
        [name, _rho(layers.get(name)), _chance(layers.get(name)), _rho(units.get(name))]
        for name in dict.fromkeys([*layers, *units])
    ]
    note = (
        "Spearman's ρ of a cheap measure with criticality (layers) or with the share of the damage (units). Intervals are over rows, for these "
        "layers and units; they say nothing about other layers. q: against measures as smooth over depth that have nothing to do with damage, "
        "Benjamini-Hochberg over all measures; the findings and the folk rules rest on it. Units differ in size, so there the number of "
        "weights is itself a measure to beat."
    )
    head = [
        "Measure",
        f"ρ over {_count(atlas.correlations)} layers",
        "q over layers",
        f"ρ over {_count(atlas.unit_correlations)} units",
    ]
    return Table("correlations", "Cheap measures against damage", note, head, rows)


def _count(found: list[Correlation]) -> str:
    return str(found[0].n) if found else "0"


def _chance(one: Correlation | None) -> str:
    if one is None:
        return words.NOT_MEASURED
    return "not tested" if one.q_value is None else words.p_value(one.q_value, one.q_is_bound)


def _rho(one: Correlation | None) -> str:
    if one is None:
        return words.NOT_MEASURED
    ends = f"[{number(one.ci95[0], 2)}, {number(one.ci95[1], 2)}]" if one.ci95 else "[no interval]"
    return f"{number(one.rho, 2)} {ends}"
