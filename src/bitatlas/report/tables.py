"""The tables of the report, as plain text cells: report.md and report.html print the same ones, each with its own escaping.

Those on attention are in `attention_tables`, on tasks' widths in `task_tables`, beside a chart in `charts`. A table says what it rests on (base, rows, n) once in its note; where a table mixes bases, the base is a column.
A table that has nothing to show stays, with the word "not measured", so that a missing measurement is seen.
Left out: the long per-module and per-head tables; they lie beside the atlas as Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from bitatlas.records import Atlas, Correlation, KindDamage, Layer, Measured, Plan, TaskPair, UnitDamage, WeightProfile
from bitatlas.records.text import (
    NOT_MEASURED,
    against_chance,
    byte_size,
    interval,
    memory_text,
    number,
    p_is,
    p_value,
    percent,
    protect_text,
    with_fewer_rows,
)
from bitatlas.report import advice, facts
from bitatlas.report.attention_tables import ablation_table, drift_table, precision_table, profile_table
from bitatlas.report.charts.heat import interaction_table
from bitatlas.report.charts.panels import prediction_table
from bitatlas.report.facts import Table, basis, precision_name, wilson_text
from bitatlas.report.task_tables import NO_TASKS, margin_text, text_table, width_table

MOST_UNITS = 10  # that are shown; all are in the atlas
EVIDENCE = ("Damage lowered, nats/token", "Damage raised, nats/token", "Share of damage", "Criticality", "q")  # columns


def tables(atlas: Atlas) -> list[Table]:
    """Return all tables, in the order of the report."""
    makers: tuple[Callable[[Atlas], Table], ...] = (
        uniform_damage,
        layer_table,
        zone_table,
        kind_table,
        unit_table,
        interaction_table,
        plan_table,
        file_table,
        prediction_table,
        task_table,
        pair_table,
        width_table,
        text_table,
        profile_table,
        precision_table,
        drift_table,
        ablation_table,
        weight_table,
        sparsity_table,
        folk_table,
        correlation_table,
        definition_table,
        provenance_table,
    )
    return [make(atlas) for make in makers]


# --- damage ----------------------------------------------------------------------------------------------------------


def uniform_damage(atlas: Atlas) -> Table:
    """Make the table of uniform plans."""
    rows = [
        [
            u.format,
            number(u.size.code_bits, 2),
            number(u.size.stored_bits, 2),
            byte_size(u.size.quantized_bytes),
            byte_size(u.size.total_bytes),
            interval(u.damage),
        ]
        for u in atlas.uniform
    ]
    note = f"Every module of the decoder layers at one format, embedding and head at the widest of theirs. Damage: {basis(u.damage for u in atlas.uniform)}."
    head = ["Format", "Code bits", "Stored bits", "Quantized modules", "Whole model", "Damage, nats/token"]
    return Table("uniform", "Uniform damage", note, head, rows)


def file_table(atlas: Atlas) -> Table:
    """Make the table of what the parts of the file take, as it is and in the plan."""
    head = ["Part", "Formats in the plan", "In the checkpoint", "Of the file", "In the plan", "Of the file"]
    if atlas.plan is None:
        return Table("file", "What the file is made of", "", head, empty="No plan was made.")
    parts = facts.file_parts(atlas, atlas.plan)
    before, after = (sum(bytes_of) for bytes_of in zip(*((part.before, part.after) for part in parts), strict=True))
    rows = [
        [
            part.name, part.formats, byte_size(part.before), percent(part.before / before), byte_size(part.after),
            percent(part.after / after),
        ]
        for part in parts
    ]  # fmt: skip
    note = "Without headers. Everything else is what no plan touches: norms, biases, and what the runtime reads in no other form."
    return Table("file", "What the file is made of", note, head, rows)


def evidence(record: Layer | UnitDamage | KindDamage) -> list[str]:
    """Return the cells below `EVIDENCE`."""
    measured = (record.lowered, record.raised, record.share, record.criticality)
    return [*map(interval, measured), p_value(record.q_value, record.q_is_bound)]


def layer_table(atlas: Atlas) -> Table:
    """Make the table of layers."""
    total = sum(record.weights for record in atlas.layers) or 1
    rows = [
        [str(r.layer), percent(r.weights / total), *evidence(r), r.verdict, _decimals(facts.plan_bits(atlas, r.layer), 2, "")]
        for r in atlas.layers
    ]
    note = (
        f"Lowered: the layer at {atlas.low}, all others at {atlas.high} ({basis(r.lowered for r in atlas.layers)}). "
        f"Raised: the reverse ({basis(r.raised for r in atlas.layers)}). Share and criticality: "
        f"{basis(r.share for r in atlas.layers)}. q: criticality = 1, two-sided, Benjamini-Hochberg over layers."
    )
    head = ["Layer", "Weights", *EVIDENCE[:3], "Criticality (1 = as its size)", "q", "Verdict", "Plan, code bits"]
    return Table("layers", "Layers", note, head, rows)


def kind_table(atlas: Atlas) -> Table:
    """Make the table of kinds of modules, each in all layers together."""
    total = sum(kind.weights for kind in atlas.kinds) or 1
    rows = [[kind.kind, str(kind.modules), percent(kind.weights / total), *evidence(kind)] for kind in atlas.kinds]
    note = (
        f"All modules of a kind together. Lowered: at {atlas.low}, all others at {atlas.high}; raised: the reverse. Share and criticality: "
        f"{basis(kind.share for kind in atlas.kinds)}. q: criticality = 1, two-sided, Benjamini-Hochberg over kinds."
    )
    return Table("kinds", "Kinds of modules", note, ["Kind", "Modules", "Weights", *EVIDENCE], rows)


def unit_table(atlas: Atlas) -> Table:
    """Make the table of the most critical units, worst first."""
    total = sum(unit.weights for unit in atlas.units) or 1
    worst = sorted(atlas.units, key=lambda unit: (-unit.criticality.mean, unit.unit))[:MOST_UNITS]
    rows = [[unit.unit, str(unit.layer), percent(unit.weights / total, 2), *evidence(unit)] for unit in worst]
    note = (
        f"The {len(rows)} with the highest criticality of {len(atlas.units)} units (modules that share one format); all are in atlas.json. "
        f"Share and criticality: {basis(unit.share for unit in worst)}. q: Benjamini-Hochberg over all units."
    )
    return Table("units", "Most critical units", note, ["Unit", "Layer", "Weights", *EVIDENCE], rows)


def zone_table(atlas: Atlas) -> Table:
    """Make the table of zones."""
    rows = [
        [
            facts.zone_title(zone),
            f"{zone.first} [{zone.border95[0]}, {zone.border95[1]}]" if zone.border95 else str(zone.first),
            interval(zone.criticality),
            zone.verdict,
            NOT_MEASURED if zone.low_share is None else percent(zone.low_share),
        ]
        for zone in atlas.zones
    ]
    note = (
        "Contiguous runs of layers found by optimal segmentation of criticality, not fixed thirds; the interval of a zone's first layer is "
        "over rows, with as many zones. "
        f"Criticality: {basis(zone.criticality for zone in atlas.zones)}."
    )
    low = f"Weights that the plan puts at {facts.narrowest_bits(atlas)}-bit"
    head = ["Zone", "Starts at layer", "Criticality", "Verdict", low]
    return Table("zones", "Zones", note, head, rows)


def plan_table(atlas: Atlas) -> Table:
    """Make the table of the plan, then its baselines, least damage first."""
    plan = atlas.plan
    head = ["Plan", "Code bits", "Quantized modules", "Damage, nats/token", "Our plan minus this, nats/token"]
    if plan is None:
        return Table("plan", "Plan and baselines", "", head, empty="No plan was made.")
    ours = ["our plan", number(plan.size.code_bits, 2), byte_size(plan.size.quantized_bytes)]
    rows = [[*ours, interval(plan.damage.measured), ""]]
    for other in sorted(plan.baselines, key=lambda baseline: baseline.damage.mean):
        size = [number(other.code_bits, 2), byte_size(other.quantized_bytes)]
        difference = "" if other.difference is None else interval(other.difference)
        rows.append([with_fewer_rows(other.name, other.damage, plan), *size, interval(other.damage), difference])
    predicted = "" if plan.damage.predicted is None else f" Predicted damage: {number(plan.damage.predicted)} nats/token."
    damages = [plan.damage.measured, *(b.damage for b in plan.baselines)]
    note = (
        f"Plans that anybody could have made, at most as large as ours; differences paired by row. Damage: {basis(damages)}.{predicted} "
        f"Budget: {_budget_text(plan)}. {advice.plan_verdict(atlas)}"
    )
    return Table("plan", "Plan and baselines", note, head, rows)


def _budget_text(plan: Plan) -> str:
    memory = memory_text(plan)
    return f"vram. {memory}" if memory else f"{plan.budget.kind} {protect_text(plan) or number(plan.budget.value)}"


# --- tasks -----------------------------------------------------------------------------------------------------------


def task_table(atlas: Atlas) -> Table:
    """Make the table of scores."""
    rows = []
    for s in atlas.tasks:
        accuracy = f"{percent(s.correct / s.n)} {wilson_text(s)}" if s.n else NOT_MEASURED
        precision = precision_name(atlas, s.precision)
        norm = "" if s.correct_norm is None or not s.n else percent(s.correct_norm / s.n)
        rows.append([s.task, precision, f"{s.correct}/{s.n}", accuracy, norm, percent(s.chance, 0), against_chance(s)])
    note = (
        "Accuracy with its 95% Wilson interval. At chance: not above it, nor below (one-sided exact binomials, Holm over precisions). acc_norm: of "
        f"choices, by likelihood per character. {facts.few_shot_text(atlas)}"
    )
    head = ["Task", "Precision", "Correct", "Accuracy", "acc_norm", "Chance", "Against chance"]
    return Table("tasks", "Tasks", note, head, rows, NO_TASKS)


def pair_table(atlas: Atlas) -> Table:
    """Make the table of pairs of precisions, on the same items."""
    rows = [
        [
            pair.task,
            _arrow(atlas, pair),
            pair.verdict,
            interval(pair.difference),
            f"{pair.lost} lost, {pair.gained} gained",
            p_value(pair.mcnemar_p),
            p_value(pair.holm_p),
            number(pair.detectable_points, 1),
            f"about {pair.items_needed:,}" if pair.items_needed else "",
            *_no_loss_cells(pair),
        ]
        for pair in atlas.task_pairs
    ]
    note = (
        "The same items at two precisions. Difference: second minus first, in percentage points, paired 95% interval. "
        "p: exact McNemar; Holm: corrected. Detectable: the smallest difference that this many items could have shown. "
        "No loss: one-sided test that less than the margin is lost (score and exact test, Holm on its own), the 90% interval that goes with it, "
        "and about how many items would show it if nothing is lost."
    )
    head = ["Task", "Pair", "Verdict", "Difference, points", "Flips", "p", "Holm p", "Detectable, points", "Items needed"]
    head += [f"No loss{margin_text(atlas)}, Holm p", "90% interval, points", "Items for no loss"]
    points = [f"{pair.task}, {_arrow(atlas, pair)}: {pair.text}" for pair in atlas.task_pairs if pair.text]
    if any(finding.topic == "tasks" for finding in atlas.findings):  # then the findings have these sentences
        points = []
    return Table("pairs", "Task pairs", note, head, rows, NO_TASKS, points)


def _arrow(atlas: Atlas, pair: TaskPair) -> str:
    return f"{precision_name(atlas, pair.first)} → {precision_name(atlas, pair.second)}"


def _no_loss_cells(pair: TaskPair) -> list[str]:
    if pair.no_loss is None:
        return [NOT_MEASURED, "", ""]
    low, high = (number(end, 1) for end in pair.no_loss.ci90)
    return [p_value(pair.no_loss.holm_p), f"[{low}, {high}]", f"about {pair.no_loss.items_needed:,}"]


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_table(atlas: Atlas) -> Table:
    """Make the table of each layer's weights; a cell is "not measured" where a module of the layer lacks the value."""
    layers = sorted({profile.layer for profile in atlas.weights})
    formats = list(dict.fromkeys(name for profile in atlas.weights for name in profile.relative_error))
    rows = []
    for layer in layers:
        inside = [profile for profile in atlas.weights if profile.layer == layer]
        errors = [_mean(inside, lambda p, name=name: p.relative_error.get(name)) for name in formats]  # type: ignore[misc]
        sparsity, beyond = _mean(inside, lambda p: p.sparsity), _mean(inside, lambda p: p.outlier_share)
        kurtosis, outlier = _mean(inside, lambda p: p.kurtosis), max(p.outlier_ratio for p in inside)
        cells = [str(layer), _percent(sparsity, 2), _decimals(kurtosis), number(outlier), _percent(beyond, 4)]
        rows.append([*cells, *(_percent(error, 2) for error in errors)])
    note = (
        "Means over the layer's modules, weighted by their size; exact, so without intervals. Sparsity: share of weights with "
        "|w| below 1% of the module's standard deviation. Error: ‖W − Q(W)‖² / ‖W‖²."
    )
    head = ["Layer", "Sparsity", "Excess kurtosis", "Largest outlier, σ", "Weights beyond 6 σ"]
    return Table("weights", "Weights", note, [*head, *(f"Error at {name}" for name in formats)], rows)


def _mean(profiles: list[WeightProfile], value: Callable[[WeightProfile], float | None]) -> float | None:
    """Return the mean weighted by size; None if a profile has no value."""
    return None if any(value(profile) is None for profile in profiles) else facts.weighted_mean(profiles, value)


def _percent(share: float | None, decimals: int) -> str:
    return NOT_MEASURED if share is None else percent(share, decimals)


def _decimals(value: float | None, decimals: int | None = None, missing: str = NOT_MEASURED) -> str:
    return missing if value is None else number(value, decimals)


def sparsity_table(atlas: Atlas) -> Table:
    """Make the table of weights near 0: the curve over thresholds beside a Gaussian's."""
    curve = atlas.sparsity
    head = ["Threshold, σ", "Weights below it", "Of a Gaussian", "Times a Gaussian's", "Verdict"]
    if curve is None:
        return Table("sparsity", "Weights near 0", "", head)
    rows = [
        [
            percent(point.threshold),
            percent(point.share, 3),
            percent(point.gaussian, 3),
            interval(Measured(point.share / point.gaussian, point.ratio95, "ratio", "reference", "weights", 0)),
            {"as many": "as a Gaussian's", "inconclusive": "inconclusive"}.get(
                point.verdict, f"{point.verdict} than a Gaussian's"
            ),
        ]
        for point in curve.curve
    ]
    note = (
        "All modules, each by its own standard deviation; intervals are those of so many independent weights. More or fewer: beyond 10 %. Layers "
        f"{'differ' if curve.differ else 'do not differ'} at 1 % of σ: {percent(min(curve.layers), 2)} to {percent(max(curve.layers), 2)}, chi-squared "
        f"{p_is(curve.p_value)}, standard deviation between them beyond chance {percent(curve.spread)} of the mean (5 % count)."
    )
    return Table("sparsity", "Weights near 0", note, head, rows)


# --- measures and rules ----------------------------------------------------------------------------------------------


def correlation_table(atlas: Atlas) -> Table:
    """Make the table of every cheap measure against measured damage, over layers and over units."""
    layers = {record.measure: record for record in atlas.correlations}
    units = {record.measure: record for record in atlas.unit_correlations}
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
    counts = [records[0].n if records else 0 for records in (atlas.correlations, atlas.unit_correlations)]
    head = ["Measure", f"ρ over {counts[0]} layers", "q over layers", f"ρ over {counts[1]} units"]
    return Table("correlations", "Cheap measures against damage", note, head, rows)


def _chance(record: Correlation | None) -> str:
    if record is None:
        return NOT_MEASURED
    return "not tested" if record.q_value is None else p_value(record.q_value, record.q_is_bound)


def _rho(record: Correlation | None) -> str:
    return facts.correlation_text(record) if record else NOT_MEASURED


def folk_table(atlas: Atlas) -> Table:
    """Make the table of rules of thumb."""
    rows = [
        [f.claim, f.verdict, f.text, interval(f.evidence, unit=True) if f.evidence else "", p_value(f.p_value, f.p_is_bound)]
        for f in atlas.findings
        if f.topic == "folk"
    ]
    note = (
        "Rules of thumb, taken as hypotheses and tested on this checkpoint. Intervals are over rows. p of a measure that marks layers: "
        "q over all measures, the same as among the cheap measures."
    )
    return Table("folk", "Folk rules", note, ["Rule", "Verdict", "What was seen", "Evidence", "p"], rows, "None was tested.")


# --- words and provenance --------------------------------------------------------------------------------------------

DEFINITIONS = {
    "damage": "KL(reference ‖ quantized) of the next-token distribution, mean over tokens, in nats/token",
    "base": "the model around which a measurement is made: one 2-bit module in a 16-bit model behaves unlike the same one "
    "in a 2-bit model",
    "criticality": "a layer's share of the damage ÷ its share of the weights; 1 means as harmful as its size",
    "critical": "the interval of the criticality lies above 1",
    "safe": "the interval lies below 1, and the damage of lowering the layer alone is within the tolerance that the user set; which of these "
    "layers are safe together was measured, too",
    "light": "the interval lies below 1, but the damage is not shown to be within the tolerance: less harmful than its size, not harmless",
    "uncertain": "the interval holds 1",
    "zone": "critical, where its interval lies above 1 and its layers are critical or uncertain; safe, where all its layers are safe together; "
    "light, where they are safe or light",
    "code bits": "bits of the codes alone, per quantized weight",
    "stored bits": "all bytes of the quantized modules × 8 / their weights: codes, scales, zero-points, padding",
    "interval": "95%, by bootstrap over sequences or problems, never over tokens or heads, and over blocks of rows where rows of one text "
    "depend on each other; Wilson for k/n",
    "better, no worse shown, worse": "a plan beside the simple plans of its size: the interval of the paired difference lies below 0 for each; "
    "neither; above 0 for some, corrected for their number",
    "entropy": "mean over rows with at least 8 keys of H(A)/ln n, sink keys removed, 0..1",
    "head specialization": "share of heads with a recognized role (previous token, duplicate, induction, retrieval): "
    "κ ≥ 0.3 and p < 5% after Benjamini-Hochberg",
    "reasoning focus": "100(m − e)/(1 − e): attention from answer tokens to the operands of that step, against chance e; "
    "0 is chance, negative is possible",
}


def definition_table(atlas: Atlas) -> Table:
    """Make the table of the report's words."""
    return Table("definitions", "Definitions", "", ["Word", "Meaning"], [list(pair) for pair in DEFINITIONS.items()])


def provenance_table(atlas: Atlas) -> Table:
    """Make the table of what the numbers came from. No time, no machine: the same inputs give the same bytes."""
    model, tokens = atlas.model, atlas.tokens
    rows = [
        ["model", f"{model.name}{' @ ' + model.revision if model.revision else ''}"],
        ["weights sha256", model.weights_sha256],
        ["architecture", f"{model.architecture}, {model.layers} layers, {model.heads} heads, context {model.context:,} tokens"],
        ["weights", f"{model.quantizable_weights:,} quantizable, stored as {model.dtype}"],
        ["size", f"{byte_size(model.total_bytes)}, of which {byte_size(model.other_bytes)} stay unquantized"],
        ["quantizer", atlas.quantizer],
        ["formats", ", ".join(atlas.formats)],
        ["text", f"{tokens.source}, rows of {tokens.row_length} tokens; {facts.text_facts(tokens)}"],
        ["intervals over rows", facts.generalizes(tokens)],
    ]
    for name, split in tokens.splits.items():
        rows.append([f"{name} rows", f"{split.rows:,} rows, {split.tokens:,} tokens, sha256 {split.sha256}"])
    rows += [[f"setting {key}", _plain(value)] for key, value in sorted(atlas.settings.items())]
    if atlas.plan:
        rows += [[f"solver {key}", _plain(value)] for key, value in sorted(atlas.plan.solver.items()) if key != "steps"]
    rows += [[f"version {key}", value] for key, value in sorted(atlas.versions.items())]
    rows += [["not done", note] for note in atlas.notes]
    return Table("provenance", "Provenance", "", ["What", "Value"], rows)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
