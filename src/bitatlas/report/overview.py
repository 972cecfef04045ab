"""The overview: its boxes and arrows (five groups, their cards, their links) for the page, and the same as Mermaid source.

Links: a solid link means "belongs to" or "leads to": a layer or its attention to the zone it lies in, a zone to the part of the
strategy that its verdict asks for. A dotted link says what follows from a task's score: to the most critical layers drawn (at most
three) where the score is shown to fall, because wider formats would be spent there first (it does not say that those layers gave the
wrong answers); else to the strategy's card on tasks, labelled with the reason why no bits follow.
What was not measured has a card that says so. Left out: layers beyond those of `facts.select_layers`; the tables list all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bitatlas.records import Atlas, AttentionLayer, Layer, TaskScore, Zone
from bitatlas.records.text import NOT_MEASURED, against_chance, interval, number, percent
from bitatlas.report import advice, facts
from bitatlas.report.facts import wilson_text

CLASS_OF = {"critical": "critical", "safe": "safe", "light": "light", "uncertain": "warning"}
LINK_NOTE = (
    "A solid arrow means “belongs to” or “leads to”. A dotted arrow says what follows from a task's score: it goes to the most "
    "critical layers where that score is shown to fall (wider formats would be spent there first), else to the strategy's "
    "line on tasks, with the reason."
)


@dataclass(frozen=True)
class Card:
    """A box: its node name, title, lines of text, class (one of six, or none) and verdict as words."""

    key: str
    title: str
    lines: list[str] = field(default_factory=list)
    css: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Link:
    start: str
    end: str
    label: str = ""
    dotted: bool = False


@dataclass(frozen=True)
class Overview:
    """The diagram. Groups in the order of the form; `layers` are those drawn."""

    title: str
    datasets: list[Card]
    layers: list[Card]
    attention: list[Card]
    effects: list[Card]
    strategy: list[Card]
    links: list[Link]
    chosen: list[int]


def overview_of(atlas: Atlas) -> Overview:
    """Return the boxes and arrows of one atlas."""
    chosen = facts.select_layers(atlas)
    layers = [record for record in atlas.layers if record.layer in chosen]
    attention = {record.layer: record for record in facts.attention_at(atlas)}
    lowered = {record.layer: record for record in facts.attention_at(atlas, f"uniform:{atlas.low}")}
    low = facts.width_of(atlas, atlas.low)
    with_attention = chosen if attention else []
    return Overview(
        f"{facts.title_of(atlas).upper().replace(' VS ', ' vs ')} QUANTIZATION ANALYSIS",
        [_task(atlas, i, score) for i, score in enumerate(atlas.tasks)] or [Card("NOTASKS", "Tasks", [NOT_MEASURED])],
        [_layer(atlas, record) for record in layers] or [Card("NOLAYERS", "Layer criticality", [NOT_MEASURED])],
        [_attention(layer, attention.get(layer), lowered.get(layer), low) for layer in with_attention]
        or [Card("NOATTENTION", "Attention", [NOT_MEASURED])],
        [_zone(atlas, i, zone) for i, zone in enumerate(atlas.zones)] or [Card("NOZONES", "Zones", [NOT_MEASURED])],
        [Card(part.key, part.title, part.lines, "recommendation") for part in advice.strategy(atlas)],
        [*_task_links(atlas, layers), *_zone_links(atlas, layers, with_attention)],
        chosen,
    )


def _task(atlas: Atlas, index: int, score: TaskScore) -> Card:
    accuracy = percent(score.correct / score.n) if score.n else NOT_MEASURED
    lines = [
        f"{facts.precision_name(atlas, score.precision)}: {accuracy} accuracy",
        f"{score.correct}/{score.n} correct",
        f"95%: {wilson_text(score)}",
    ]
    chance = [] if score.above_chance else [f"{against_chance(score)} ({percent(score.chance, 0)})"]
    return Card(f"T{index}", f"{score.task.replace('_', ' ')} dataset", lines + chance)


def _layer(atlas: Atlas, record: Layer) -> Card:
    sparsity, bits = facts.sparsity_of(atlas, record.layer), facts.plan_bits(atlas, record.layer)
    lines = [
        f"Sparsity: {NOT_MEASURED if sparsity is None else percent(sparsity, 2)}",
        f"Criticality: {interval(record.criticality)}",
    ]
    planned = [] if bits is None else [f"Plan: {number(bits, 1)} code bits"]
    css = CLASS_OF.get(record.verdict, "warning")
    return Card(f"L{record.layer}", f"Layer {record.layer}", lines + planned, css, record.verdict.upper())


def _attention(layer: int, record: AttentionLayer | None, lowered: AttentionLayer | None, low: str) -> Card:
    """Return the attention of a layer; `lowered` is the same in the whole model at the low width, beside it where both were measured."""
    title = f"Layer {layer} attention"
    if record is None:
        return Card(f"ATT{layer}", title, [NOT_MEASURED], "attention")
    lines = [
        f"Entropy: {interval(record.entropy)}",
        f"Head spec: {interval(record.specialization_percent)}",
        f"Reasoning: {interval(record.focus_percent)}",
    ]
    if lowered is not None and record.base == "reference":
        lines.insert(1, f"at {low}: {interval(lowered.entropy)}")
        lines.insert(3, f"at {low}: {interval(lowered.specialization_percent)}")
    return Card(f"ATT{layer}", title, lines, "attention")


def _zone(atlas: Atlas, index: int, zone: Zone) -> Card:
    high, low = facts.width_of(atlas, atlas.high), facts.width_of(atlas, atlas.low)
    marks = {
        "safe": f"Safe for {low}",
        "critical": f"Preserve {high}",
        "light": "Light: mixed precision",
        "uncertain": "Uncertain: mixed precision",
    }
    lines = [f"Criticality: {interval(zone.criticality)}"]
    if zone.low_share is not None:
        lines.append(f"Plan: {percent(zone.low_share, 0)} at {facts.narrowest_bits(atlas)}-bit")
    css = CLASS_OF.get(zone.verdict, "warning")
    return Card(f"Z{index}", facts.zone_title(zone), lines, css, marks.get(zone.verdict, zone.verdict))


def task_conclusion(atlas: Atlas, score: TaskScore) -> tuple[str, bool]:
    """Return what follows from a score: the label of its dotted link, and whether the link goes to layers."""
    if score.precision == "reference":
        return "reference", False
    pair = facts.comparison(atlas, score.task, score.precision)
    if pair is not None and pair.verdict == "falls":
        return ("falls" if score.above_chance else f"falls to {against_chance(score).removeprefix('at ')}"), True
    if not score.above_chance:
        return against_chance(score), False
    return ("not compared" if pair is None else pair.verdict), False


def _task_links(atlas: Atlas, layers: list[Layer]) -> list[Link]:
    targets = [f"L{record.layer}" for record in facts.most_critical(layers)]
    links = []
    for index, score in enumerate(atlas.tasks):
        label, to_layers = task_conclusion(atlas, score)
        ends = targets if to_layers and targets else ["TASKS"]
        links += [Link(f"T{index}", end, label, dotted=True) for end in ends]
    return links or [Link("NOTASKS", "TASKS", dotted=True)]


def _zone_links(atlas: Atlas, layers: list[Layer], attention: list[int]) -> list[Link]:
    members = [(f"L{r.layer}", r.layer) for r in layers] + [(f"ATT{layer}", layer) for layer in attention]
    zone_of = {layer: i for i, zone in enumerate(atlas.zones) for layer in range(zone.first, zone.last + 1)}
    links = [Link(key, f"Z{zone_of[layer]}") for key, layer in members if layer in zone_of]
    parts = advice.strategy(atlas)
    links += [Link(f"Z{i}", part.key) for i, zone in enumerate(atlas.zones) for part in parts if zone.verdict in part.follows]
    return links


# --- Mermaid: `graph TD`, five groups, links and class definitions ---------------------------------------------------
#
# Text is data: every label is quoted, and every character that could mean something to Mermaid or to HTML is written as a
# numeric entity (`#60;`); node names are ours alone. So a model named like a script or like Mermaid syntax is only a name.
# Left out: themes, directives, and a `direction` for the outer group: Mermaid 11
# then lays it out across, which stays readable on a page (1,800 px wide, not 7,000).

CLASSES = {
    "critical": "fill:#ff6b6b,stroke:#d63031,stroke-width:2px,color:#fff",
    "safe": "fill:#00b894,stroke:#00a085,stroke-width:2px,color:#fff",
    "light": "fill:#5f4bb6,stroke:#341f97,stroke-width:2px,color:#fff",
    "warning": "fill:#fdcb6e,stroke:#e17055,stroke-width:2px,color:#333",
    "attention": "fill:#74b9ff,stroke:#0984e3,stroke-width:2px,color:#fff",
    "recommendation": "fill:#a29bfe,stroke:#6c5ce7,stroke-width:2px,color:#fff",
}
SIGNS = {"critical": "🔴", "safe": "✅", "light": "🟣", "warning": "⚠️"}
GROUPS = (
    ("DATASETS", "📊 Dataset Performance"),
    ("LAYERS", "🧠 Layer Criticality Analysis"),
    ("ATTENTION", "🎯 Attention Pattern Analysis"),
    ("EFFECTS", "⚡ Quantization Effects"),
    ("RECOMMENDATIONS", "💡 Optimization Strategy"),
)
LONGEST = 240  # characters of one line of a label: longer text is cut; the tables have it whole

# an interval of numbers stays readable; every other character outside the list becomes an entity
_ESCAPED = re.compile(r"(\[[−0-9., ]+\])|([^\w .,:()%+=/?×–—…\-−✅⚠️🔴🟣🎯])")


def escape(text: str) -> str:
    """Return text as a part of a quoted Mermaid label: one line, cut at LONGEST, special characters as numeric entities."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    line = _ESCAPED.sub(lambda match: match[1] or f"#{ord(match[2])};", line)
    return line.replace("%%", "%#37;").replace("__", "_#95;")


def overview(atlas: Atlas) -> str:
    """Return the Mermaid source of the overview, ending in a newline; the same atlas gives the same text."""
    view = overview_of(atlas)
    lines = ["graph TD", f'    subgraph QUANT ["{escape(f"🎯 {view.title}: {atlas.model.name}")}"]']
    for (key, title), cards in zip(GROUPS, _groups(view), strict=True):
        lines.append(f'        subgraph {key} ["{title}"]')
        lines += [f"            {_node(card)}" for card in cards]
        lines.append("        end")
    lines += ["    end", "", "    %% Connections"]
    for link in view.links:
        arrow = "-.->" if link.dotted else "-->"
        label = f'|"{escape(link.label)}"|' if link.label else ""
        lines.append(f"    {link.start} {arrow}{label} {link.end}")
    lines += ["", "    %% Styling", *(f"    classDef {name} {style}" for name, style in CLASSES.items()), ""]
    for name in CLASSES:
        keys = [card.key for cards in _groups(view) for card in cards if card.css == name]
        lines += [f"    class {','.join(keys)} {name}"] if keys else []
    return "\n".join(lines) + "\n"


def _groups(view: Overview) -> tuple[list[Card], ...]:
    return view.datasets, view.layers, view.attention, view.effects, view.strategy


def _node(card: Card) -> str:
    mark = [f"{SIGNS.get(card.css, '')} {card.mark}".strip()] if card.mark else []
    parts = [card.title, *mark, *card.lines] if card.key.startswith("Z") else [card.title, *card.lines, *mark]
    return f'{card.key}["{"<br/>".join(escape(part) for part in parts)}"]'
