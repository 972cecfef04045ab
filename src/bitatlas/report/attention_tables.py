"""The tables on attention: the reference in full, every measured precision side by side, and the drift between them.

Each measure rests on its own rows (entropy on text, head specialization also on repeated random tokens, reasoning focus on
problems), so the notes say the basis measure by measure. Left out: a row a head; the Parquet tables have every head.
"""

from __future__ import annotations

from bitatlas.findings.ablation import ablation_verdict, head_names
from bitatlas.records import Atlas, AttentionLayer, Measured
from bitatlas.records.text import NOT_MEASURED, interval, listed, number
from bitatlas.report import facts
from bitatlas.report.facts import Table


def profile_table(atlas: Atlas) -> Table:
    """Everything that was measured at the first base, one row a layer."""
    records = facts.attention_at(atlas)
    nulls = ", ".join(dict.fromkeys(record.focus_null for record in records if record.focus_null))
    note = (
        f"{_bases(records)} Sink keys removed, sink mass beside. "
        f"Reasoning focus: 0 is chance{', corrected by ' + nulls if nulls else ''}. These describe; they set no bits."
    )
    head = ["Layer", "Entropy, 0..1", "Entropy, nats", "Sink mass", "Head specialization"]
    head += ["at other κ", "Heads by role", "Reasoning focus"]
    return Table("attention", "Attention", note, head, [_profile_row(record) for record in records])


def _profile_row(record: AttentionLayer) -> list[str]:
    roles = ", ".join(f"{name} {count}" for name, count in sorted(record.roles.items()) if count) or "none"
    at = ", ".join(f"κ {kappa}: {number(value, 0)}%" for kappa, value in sorted(record.specialization_at.items()))
    return [
        str(record.layer),
        interval(record.entropy),
        interval(record.entropy_nats),
        interval(record.sink_mass),
        interval(record.specialization_percent),
        at,
        roles,
        interval(record.focus_percent),
    ]


def _bases(records: list[AttentionLayer]) -> str:
    """What each measure rests on, a sentence each; measures with the same basis share one."""
    measures: dict[str, list[Measured] | list[Measured | None]] = {
        "Entropy": [record.entropy for record in records],
        "sink mass": [record.sink_mass for record in records],
        "head specialization": [record.specialization_percent for record in records],
        "reasoning focus": [record.focus_percent for record in records],
    }
    said: dict[str, list[str]] = {}
    for name, values in measures.items():
        said.setdefault(facts.basis(values), []).append(name)
    sentences = (f"{listed(names)}: {basis}." for basis, names in said.items())
    return " ".join(f"{sentence[:1].upper()}{sentence[1:]}" for sentence in sentences)


def precision_table(atlas: Atlas) -> Table:
    """The same measures at every base, one row a layer and base; nothing where only one base was measured."""
    bases = facts.attention_bases(atlas)
    head = ["Layer", "Precision", "Entropy, 0..1", "Head specialization", "Reasoning focus", "Sink mass", "Cumulative drift"]
    if len(bases) < 2:
        empty = "Not measured: attention was read at one precision only." if bases else "Not measured."
        return Table("precisions", "Attention at each precision", "", head, empty=empty)
    records = sorted(atlas.attention, key=lambda a: (a.layer, bases.index(a.base)))
    rows = [
        [
            str(a.layer),
            facts.precision_name(atlas, a.base),
            interval(a.entropy),
            interval(a.specialization_percent),
            interval(a.focus_percent),
            interval(a.sink_mass),
            "0 by definition" if a.base == "reference" else interval(a.drift_cumulative),
        ]
        for a in records
    ]
    note = (
        "The whole model at each precision, on the same rows and problems, so the intervals of one layer are not independent. "
        f"{_bases(records)} Drift, as Jensen-Shannon distance to the reference's maps, 0..1: "
        f"{facts.basis(a.drift_cumulative for a in records)}."
    )
    return Table("precisions", "Attention at each precision", note, head, rows)


def drift_table(atlas: Atlas) -> Table:
    """How far the maps move from the reference's, one row a base and layer."""
    records = [a for a in atlas.attention if a.drift_local or a.drift_cumulative]
    order = facts.attention_bases(atlas)
    rows = [
        [
            facts.precision_name(atlas, a.base),
            str(a.layer),
            interval(a.drift_local),
            interval(a.drift_cumulative),
            interval(a.drift_noise),
        ]
        for a in sorted(records, key=lambda a: (order.index(a.base), a.layer))
    ]
    note = (
        "Row-wise Jensen-Shannon distance (base 2, 0..1) between the reference's attention maps and the quantized model's: "
        "local (reference inputs) and cumulative. Noise: bfloat16 against float32, same weights."
    )
    head = ["Model", "Layer", "Local drift", "Cumulative drift", "Noise floor"]
    return Table("drift", "Attention drift", note, head, rows)


def ablation_table(atlas: Atlas) -> Table:
    """What removing the heads of a role does to repetition, one row a role."""
    rows = [
        [
            one.role,
            head_names(one.heads) or "none",
            interval(one.second_half),
            interval(one.added),
            interval(one.added_by_chance),
            f"{one.as_harmful} of {one.draws}" if one.draws else NOT_MEASURED,
            interval(one.effect),
            ablation_verdict(one) if one.effect else f"not tested: {one.not_tested}",
        ]
        for one in atlas.ablations
    ]
    effects = [one.effect for one in atlas.ablations if one.effect]
    basis = f"; {facts.basis(effects)}" if effects else ""
    note = (
        "Loss on the second half of a random block of tokens twice (not the sequences that the roles were found on), in nats/token, and what "
        "is added where the heads of a role put out zero, beside as many random other heads. Difference: paired by sequence, interval "
        f"over sequences and random sets{basis}. Holds: all of it above 0."
    )
    head = ["Role", "Heads, layer.head", "Loss with all heads", "Added without them", "Added without random others"]
    head += ["Random sets as harmful", "Difference", "Repeats worse without them than without others"]
    return Table("ablation", "Heads removed", note, head, rows)
