"""What all forms of the report say alike: numbers as text, the layers that a drawing shows, and what a table is.

Reads the atlas record and nothing else, so that the Mermaid overview, report.md and report.html cannot disagree.
Left out: any new estimate. A figure that is not in the atlas, or plain arithmetic on it, is "not measured" here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bitatlas.records import (
    Atlas,
    AttentionLayer,
    Correlation,
    Finding,
    Layer,
    Measured,
    Module,
    Plan,
    TaskPair,
    TaskScore,
    TokensInfo,
    WeightProfile,
    Zone,
)
from bitatlas.records.formats import by_width
from bitatlas.records.sizes import file_bytes, inner, kept_bytes
from bitatlas.records.text import NOT_MEASURED, byte_size, interval, listed, named_layers, number, p_is, percent, runs

LAYERS, EXPERTS, OTHERS = "decoder layers", "experts", "everything else"  # parts of a file, beside embedding and head
SHOWN_LAYERS = 8  # of a drawing with one box a layer; the tables list all
OUTSIDE = " (not in --formats)"  # ends the name of a uniform baseline whose format the plan could not choose


@dataclass(frozen=True)
class Table:
    """A table as plain text, before any markup. `note` and `points` (sentences) stand above the rows, `empty` in their place."""

    key: str
    title: str
    note: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    empty: str = "Not measured."
    points: list[str] = field(default_factory=list)


# --- numbers as text -------------------------------------------------------------------------------------------------


def basis(measured: Iterable[Measured | None]) -> str:
    """Return what a column of numbers rests on: base, rows, count. Two bases are both named, many are each row's own."""
    groups: dict[tuple[str, str], list[str]] = {}  # (rows, count) -> bases
    for m in measured:
        if m is not None:
            rows = f"{m.rows} rows" if m.rows in ("fit", "select", "test") else m.rows.replace("items:", "items of ")
            count = f"{m.n}" if m.blocks is None else f"{m.n} in {m.blocks} blocks"
            bases = groups.setdefault((rows, count), [])
            bases += [] if m.base in bases else [m.base]
    names = [" and ".join(bases) if len(bases) <= 2 else "each row's own" for bases in groups.values()]
    parts = [f"base {name}, {rows}, n = {count}" for name, (rows, count) in zip(names, groups, strict=True)]
    return "; ".join(parts) or NOT_MEASURED


def mean_text(measured: Measured | None) -> str:
    """Return a measured number without its interval, which `ends_text` has."""
    return interval(measured).partition(" [")[0]


def ends_text(measured: Measured | None) -> str:
    """Return the unit of a damage and its interval; "" where there is none."""
    _, bracket, ends = interval(measured).partition(" [")
    return f"nats/token, 95% [{ends}" if bracket else ""


def wilson_text(score: TaskScore) -> str:
    """Return the ends of an accuracy's interval, in percent: `[41.2, 55.0]`."""
    low, high = (number(100 * end, 1) for end in score.wilson95)
    return f"[{low}, {high}]"


def correlation_text(correlation: Correlation, missing: str = " [no interval]") -> str:
    """Return `0.74 [0.39, 0.91]`; `missing` in the interval's place where there is none."""
    ends = correlation.ci95
    return number(correlation.rho, 2) + (f" [{number(ends[0], 2)}, {number(ends[1], 2)}]" if ends else missing)


def generalizes(tokens: TokensInfo) -> str:
    """Return what an interval over rows speaks of: texts like this one, where whole documents were resampled, or only this text."""
    if tokens.by_document and tokens.documents > 1:
        return f"over documents: they speak of text like this ({tokens.documents:,} documents)"
    many = "each a stretch of a document" if tokens.documents > 1 else "stretches of the one document"
    return f"over blocks of rows, {many}: they speak of this text, not of others like it"


# --- names -----------------------------------------------------------------------------------------------------------


def width_of(atlas: Atlas, name: str) -> str:
    """Return `4-bit`, or the format's whole name where high and low have the same number of bits."""
    if name not in atlas.formats:
        return name
    same = [other for other in atlas.formats.values() if other.bits == atlas.formats[name].bits]
    return name if len(same) > 1 else f"{atlas.formats[name].bits}-bit"


def precision_name(atlas: Atlas, precision: str) -> str:
    """Return a `precision` or `base` string for people: `uniform:int4_g64` is `4-bit`, or its format name where two share a width."""
    if precision == "plan" and atlas.plan is not None:
        return f"plan ({number(atlas.plan.size.code_bits, 2)}-bit)"
    kind, _, name = precision.partition(":")
    return width_of(atlas, name) if kind == "uniform" and name in atlas.formats else name or precision


def precision_mark(atlas: Atlas, precision: str) -> tuple[str, str]:
    """Return colour class and shape of a precision, the same in every chart that compares precisions."""
    marks = {"reference": ("c-ink", "circle"), "plan": ("c-plan", "diamond")}
    marks |= {f"uniform:{atlas.high}": ("c-high", "square"), f"uniform:{atlas.low}": ("c-low", "triangle")}
    return marks.get(precision, ("c-muted", "circle"))


def title_of(atlas: Atlas) -> str:
    """Return the widths of this run: `4-bit vs 2-bit`."""
    return f"{width_of(atlas, atlas.high)} vs {width_of(atlas, atlas.low)}"


def formats_text(atlas: Atlas) -> str:
    """Return the candidate formats, narrowest first: `int2_g64, int3_g64 and int4_g64`."""
    return listed(by_width(list(atlas.formats)))


def outside_formats(names: Iterable[str]) -> list[str]:
    """Return formats of the uniform baselines that the plan could not choose, from the names of plans; each once."""
    formats = (name.removeprefix("uniform ").removesuffix(OUTSIDE) for name in names if name.endswith(OUTSIDE))
    return list(dict.fromkeys(formats))


# --- layers ----------------------------------------------------------------------------------------------------------


def zone_title(zone: Zone) -> str:
    """Return `Early layers (0–5)`; `Zone 2 (layers 4–7)` where the name says no place."""
    span = runs(range(zone.first, zone.last + 1))
    name = " ".join(zone.name.split())
    name = f"{name[:1].upper()}{name[1:]}"
    named = name in ("Early", "Middle", "Late")
    return f"{name} layers ({span})" if named else f"{name} ({named_layers(range(zone.first, zone.last + 1))})"


def select_layers(atlas: Atlas) -> list[int]:
    """Return the layers that a drawing shows, in order: all if there are at most `SHOWN_LAYERS`.

    Otherwise the first, the last, the most critical and the safest, the most critical of each zone, then, one after the other,
    the layer furthest from those chosen until there are as many. Of equals always the lower number.
    """
    if len(atlas.layers) <= SHOWN_LAYERS:
        return [record.layer for record in atlas.layers]
    by_harm = sorted(atlas.layers, key=lambda record: (-record.criticality.mean, record.layer))
    safest = min(atlas.layers, key=lambda record: (record.criticality.mean, record.layer))
    chosen = {atlas.layers[0].layer, atlas.layers[-1].layer, by_harm[0].layer, safest.layer}
    for zone in atlas.zones:
        if not any(zone.first <= layer <= zone.last for layer in chosen):
            chosen |= {next(r.layer for r in by_harm if zone.first <= r.layer <= zone.last)}
    while len(chosen) < SHOWN_LAYERS:
        left = [record.layer for record in atlas.layers if record.layer not in chosen]
        chosen.add(max(left, key=lambda layer: (min(abs(layer - other) for other in chosen), -layer)))
    return sorted(chosen)


def with_verdict(atlas: Atlas, verdict: str) -> list[int]:
    """Return the layers with a verdict, in order."""
    return [record.layer for record in atlas.layers if record.verdict == verdict]


def most_critical(layers: Iterable[Layer], count: int = 3) -> list[Layer]:
    """Return the critical layers with the highest criticality, at most `count`, the worst first."""
    critical = [layer for layer in layers if layer.verdict == "critical"]
    return sorted(critical, key=lambda record: (-record.criticality.mean, record.layer))[:count]


def critical_lines(atlas: Atlas) -> list[str]:
    """Return a sentence for each of the most critical layers, at most `SHOWN_LAYERS`, the worst first; one more counts the rest."""
    if not atlas.layers:
        return [f"Layers: {NOT_MEASURED}"]
    critical = most_critical(atlas.layers, len(atlas.layers))
    lines = []
    for record in critical[:SHOWN_LAYERS]:
        sparsity = sparsity_of(atlas, record.layer)
        sparse = "" if sparsity is None else f", {percent(sparsity)} sparsity"
        share = f"{interval(record.share)} of the damage"
        lines.append(f"Layer {record.layer}: criticality {interval(record.criticality)}, {share}{sparse}")
    if more := [record.layer for record in critical[SHOWN_LAYERS:]]:
        lines.append(f"and {len(more)} more: {named_layers(more)}")
    return lines or ["None: no layer's interval lies above 1"]


def sparsity_of(atlas: Atlas, layer: int) -> float | None:
    """Return the share of a layer's weights below the threshold: its modules' shares, weighted by their size."""
    return weighted_mean((p for p in atlas.weights if p.layer == layer), lambda profile: profile.sparsity)


def weighted_mean(profiles: Iterable[WeightProfile], value: Callable[[WeightProfile], float | None]) -> float | None:
    """Return the mean over modules that have a value, weighted by their size; None where none has."""
    known = [(v, profile.weights) for profile in profiles if (v := value(profile)) is not None]
    return sum(v * weights for v, weights in known) / sum(weights for _, weights in known) if known else None


def mean_bits(plan: Plan | None, modules: Iterable[Module]) -> float | None:
    """Return the mean code bits that a plan gives to these modules, per weight; None without a plan, or where it lists none of them."""
    if plan is None:
        return None
    bits = weights = 0
    for module in modules:
        name = plan.modules.get(module.name, "")
        if name in plan.formats:
            bits += module.weights * plan.formats[name].bits
            weights += module.weights
    return bits / weights if weights else None


@dataclass(frozen=True)
class Part:
    """A part of the file: bytes in the checkpoint and in a plan, and the formats that the plan gives it."""

    name: str
    before: int
    after: int
    formats: str


def file_parts(atlas: Atlas, plan: Plan) -> list[Part]:
    """Return the parts of the file, which add up to the whole: decoder layers, their experts, embedding and head, and all that no plan touches."""
    groups: dict[str, list[Module]] = {}
    for module in [*inner(atlas.modules), *(module for module in atlas.modules if module.part)]:
        name = module.part or (LAYERS if module.expert is None else EXPERTS)
        groups.setdefault(name, []).append(module)
    parts = []
    for name, modules in groups.items():
        given = [plan.modules.get(module.name) for module in modules]
        after = sum(
            file_bytes(module, plan.formats[fmt], atlas.model) if fmt else kept_bytes(module, atlas.model.dtype)
            for module, fmt in zip(modules, given, strict=True)
        )
        before = sum(kept_bytes(module, atlas.model.dtype) for module in modules)
        formats = sorted({fmt or atlas.model.dtype for fmt in given})
        parts.append(Part(name, before, after, formats[0] if len(formats) == 1 else "mixed"))
    other = atlas.model.total_bytes - sum(part.before for part in parts)
    return [*parts, Part(OTHERS, other, plan.size.total_bytes - sum(part.after for part in parts), "as in the checkpoint")]


def parts_text(atlas: Atlas, plan: Plan) -> str:
    """Return what the parts of the file take in a plan."""
    return ", ".join(f"{part.name} {byte_size(part.after)}" for part in file_parts(atlas, plan) if part.after)


def plan_bits(atlas: Atlas, layer: int) -> float | None:
    """Return the mean code bits that the plan gives to a layer."""
    return mean_bits(atlas.plan, (module for module in atlas.modules if module.layer == layer))


def narrowest_bits(atlas: Atlas) -> int:
    """Return the bits of the narrowest format that the plan could choose (of `low` without a plan)."""
    formats = atlas.plan.formats if atlas.plan and atlas.plan.formats else {atlas.low: atlas.formats[atlas.low]}
    return min(fmt.bits for fmt in formats.values())


def low_share(atlas: Atlas, layers: Iterable[int]) -> float | None:
    """Return the share of these layers' weights that the plan puts at its narrowest format."""
    if atlas.plan is None or not atlas.plan.formats:
        return None
    fewest = narrowest_bits(atlas)
    narrow = {name for name, fmt in atlas.plan.formats.items() if fmt.bits == fewest}
    inside = [module for module in atlas.modules if module.layer in set(layers)]
    total = sum(module.weights for module in inside)
    return sum(m.weights for m in inside if atlas.plan.modules.get(m.name) in narrow) / total if total else None


def attention_bases(atlas: Atlas) -> list[str]:
    """Return the bases that attention was measured at, the reference first."""
    return sorted({a.base: None for a in atlas.attention}, key=lambda base: base != "reference")


def attention_at(atlas: Atlas, base: str | None = None) -> list[AttentionLayer]:
    """Return the attention of all layers at one base (the first of `attention_bases`)."""
    bases = attention_bases(atlas)
    wanted = base or (bases[0] if bases else "")
    return sorted((a for a in atlas.attention if a.base == wanted), key=lambda a: a.layer)


# --- tasks and text -----------------------------------------------------------------------------------------------------------


def comparison(atlas: Atlas, task: str, precision: str) -> TaskPair | None:
    """Return how a precision compares with the reference on a task, else with the high uniform plan; None where it was not compared."""
    pairs = {(pair.first, pair.second): pair for pair in atlas.task_pairs if pair.task == task}
    return pairs.get(("reference", precision)) or pairs.get((f"uniform:{atlas.high}", precision))


def task_names(atlas: Atlas) -> list[str]:
    """Return the tasks that were scored, each once, in the atlas's order."""
    return list(dict.fromkeys(score.task for score in atlas.tasks))


def few_shot_text(atlas: Atlas) -> str:
    """Return how many examples stand before each question, and how many do in the published numbers."""
    count = int(atlas.settings.get("few_shot", 0))
    published = " (the harness's own GSM8K has 5)" if "gsm8k" in task_names(atlas) and count != 5 else ""
    return f"{count or 'No'} example{'' if count == 1 else 's'} before each question{published}."


def text_facts(tokens: TokensInfo) -> str:
    """Return documents, blocks and what was dropped, in one line; "" of an atlas that does not say."""
    blocks = {name: len(set(split.blocks)) for name, split in tokens.splits.items()}
    if not all(blocks.values()):
        return ""
    unit = (
        "documents" if tokens.by_document else "stretches of documents" if tokens.documents > 1 else "stretches of one document"
    )
    shared = "no document in two sets" if tokens.separate_documents else "sets share documents, but no stretch of one"
    dropped = {"documents": tokens.repeated_documents, "rows": tokens.repeated_rows}
    repeats = " and ".join(f"{count:,} {what}" for what, count in dropped.items() if count)
    parts = [
        f"{tokens.documents:,} document{'' if tokens.documents == 1 else 's'}; rows from {', '.join(map(str, blocks.values()))} {unit} "
        f"({', '.join(blocks)}), which intervals resample: they speak of {'text like this' if tokens.by_document else 'this text'}",
        shared,
        f"{repeats} dropped that repeat earlier text" if repeats else "",
    ]
    return "; ".join(part for part in parts if part)


# --- findings --------------------------------------------------------------------------------------------------------

TOPICS = {"layers": "Layers", "zones": "Zones", "folk": "Folk rules", "tasks": "Tasks", "attention": "Attention", "plan": "Plan"}


def findings_by_topic(atlas: Atlas) -> dict[str, list[Finding]]:
    """Return topic's title -> its findings, without those on critical layers, which `critical_lines` has already."""
    others = [finding for finding in atlas.findings if (finding.topic, finding.verdict) != ("layers", "critical")]
    topics = dict.fromkeys([*TOPICS, *(finding.topic for finding in others)])
    grouped = {TOPICS.get(topic, topic): [finding for finding in others if finding.topic == topic] for topic in topics}
    return {title: findings for title, findings in grouped.items() if findings}


def comparisons_at_chance(atlas: Atlas) -> list[Finding]:
    """Return the comparisons that claim nothing since the task's score is no better than guessing; that it is has a finding of its own."""
    return [
        finding for finding in atlas.findings if finding.topic == "tasks" and finding.verdict in ("at chance", "below chance")
    ]


_INTERVAL = re.compile(r"\[[−\d., ]+\]")
_P_VALUE = re.compile(r"\bp [=<] ")


def evidence(finding: Finding) -> list[str]:
    """Return interval and p of a finding; not the interval where its sentence has one, nor p where it has that."""
    parts = []
    if finding.evidence is not None and not _INTERVAL.search(finding.text):
        parts.append(interval(finding.evidence, unit=True))
    if finding.p_value is not None and not _P_VALUE.search(finding.text):
        parts.append(p_is(finding.p_value, finding.p_is_bound))
    return parts
