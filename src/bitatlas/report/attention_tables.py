"""The tables on attention: the reference in full, every measured precision side by side, and the drift between them.

Each measure rests on its own rows (entropy on text, head specialization also on repeated random tokens, reasoning focus on
problems), so the notes say the basis measure by measure. Left out: a row a head; the Parquet tables have every head.
"""

from __future__ import annotations

from bitatlas.findings.statements import ablation_verdict, head_names
from bitatlas.records import Atlas, AttentionLayer
from bitatlas.records.text import NOT_MEASURED, interval, listed, number
from bitatlas.report import facts
from bitatlas.report.facts import Table, basis, precision_name


def profile_table(atlas: Atlas) -> Table:
    """Make the table of everything that was measured at the first base, one row a layer."""
    records = facts.attention_at(atlas)
    nulls = ", ".join(dict.fromkeys(record.focus_null for record in records if record.focus_null))
    note = (
        f"{_bases(records)} Sink keys removed, sink mass beside. "
        f"Reasoning focus: 0 is chance{', corrected by ' + nulls if nulls else ''}. These describe; they set no bits."
    )
    head = [
        "Layer",
        "Entropy, 0..1",
        "Entropy, nats",
        "Sink mass",
        "Head specialization",
        "at other κ",
        "Heads by role",
        "Reasoning focus",
    ]
    return Table("attention", "Attention", note, head, [_profile_row(record) for record in records])


def _profile_row(record: AttentionLayer) -> list[str]:
    roles = ", ".join(f"{name} {count}" for name, count in sorted(record.roles.items()) if count) or "none"
    at = ", ".join(f"κ {kappa}: {number(value, 0)}%" for kappa, value in sorted(record.specialization_at.items()))
    measured = (record.entropy, record.entropy_nats, record.sink_mass, record.specialization_percent)
    return [str(record.layer), *map(interval, measured), at, roles, interval(record.focus_percent)]


def _bases(records: list[AttentionLayer]) -> str:
    """Return what each measure rests on, a sentence each; measures with the same basis share one."""
    fields = {"Entropy": "entropy", "sink mass": "sink_mass", "head specialization": "specialization_percent", "reasoning focus": "focus_percent"}  # fmt: skip
    names_of: dict[str, list[str]] = {}  # basis -> measures
    for name, attribute in fields.items():
        names_of.setdefault(basis(getattr(record, attribute) for record in records), []).append(name)
    sentences = (f"{listed(names)}: {text}." for text, names in names_of.items())
    return " ".join(f"{sentence[:1].upper()}{sentence[1:]}" for sentence in sentences)


def precision_table(atlas: Atlas) -> Table:
    """Make the table of measures at every base, one row a layer and base; without rows where only one base was measured."""
    bases = facts.attention_bases(atlas)
    head = ["Layer", "Precision", "Entropy, 0..1", "Head specialization", "Reasoning focus", "Sink mass", "Cumulative drift"]
    if len(bases) < 2:
        empty = "Not measured: attention was read at one precision only." if bases else "Not measured."
        return Table("precisions", "Attention at each precision", "", head, empty=empty)
    records = sorted(atlas.attention, key=lambda a: (a.layer, bases.index(a.base)))
    rows = [
        [
            str(a.layer),
            precision_name(atlas, a.base),
            *map(interval, (a.entropy, a.specialization_percent, a.focus_percent, a.sink_mass)),
            "0 by definition" if a.base == "reference" else interval(a.drift_cumulative),
        ]
        for a in records
    ]
    note = (
        "The whole model at each precision, on the same rows and problems, so the intervals of one layer are not independent. "
        f"{_bases(records)} Drift, as Jensen-Shannon distance to the reference's maps, 0..1: "
        f"{basis(a.drift_cumulative for a in records)}."
    )
    return Table("precisions", "Attention at each precision", note, head, rows)


def drift_table(atlas: Atlas) -> Table:
    """Make the table of how far the maps move from the reference's, one row a base and layer."""
    records = [a for a in atlas.attention if a.drift_local or a.drift_cumulative]
    order = facts.attention_bases(atlas)
    rows = [
        [precision_name(atlas, a.base), str(a.layer), *map(interval, (a.drift_local, a.drift_cumulative, a.drift_noise))]
        for a in sorted(records, key=lambda a: (order.index(a.base), a.layer))
    ]
    note = (
        "Row-wise Jensen-Shannon distance (base 2, 0..1) between the reference's attention maps and the quantized model's: "
        "local (reference inputs) and cumulative. Noise: bfloat16 against float32, same weights."
    )
    head = ["Model", "Layer", "Local drift", "Cumulative drift", "Noise floor"]
    return Table("drift", "Attention drift", note, head, rows)


def ablation_table(atlas: Atlas) -> Table:
    """Make the table of what removing the heads of a role does to repetition, one row a role."""
    rows = [
        [
            a.role,
            head_names(a.heads) or "none",
            *map(interval, (a.second_half, a.added, a.added_by_chance)),
            f"{a.as_harmful} of {a.draws}" if a.draws else NOT_MEASURED,
            interval(a.effect),
            ablation_verdict(a) if a.effect else f"not tested: {a.not_tested}",
        ]
        for a in atlas.ablations
    ]
    effects = [ablation.effect for ablation in atlas.ablations if ablation.effect]
    rests = f"; {basis(effects)}" if effects else ""
    note = (
        "Loss on the second half of a random block of tokens twice (not the sequences that the roles were found on), in nats/token, and what "
        "is added where the heads of a role put out zero, beside as many random other heads. Difference: paired by sequence, interval "
        f"over sequences and random sets{rests}. Holds: all of it above 0."
    )
    head = ["Role", "Heads, layer.head", "Loss with all heads", "Added without them", "Added without random others"]
    head += ["Random sets as harmful", "Difference", "Repeats worse without them than without others"]
    return Table("ablation", "Heads removed", note, head, rows)
