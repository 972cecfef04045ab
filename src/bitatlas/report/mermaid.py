"""The overview as Mermaid source: `graph TD`, five groups, links and class definitions, in the form that users asked for.

Text is data: every label is quoted, and every character that could mean something to Mermaid or to HTML is written as a
numeric entity (`#60;`); node names are ours alone. So a model named like a script or like Mermaid syntax is only a name.
What the boxes and links mean is told in `cards`. Left out: themes, directives, and a `direction` for the outer group: Mermaid 11
then lays it out across, which stays readable on a page (1,800 px wide, not 7,000).
"""

from __future__ import annotations

import re

from bitatlas.records import Atlas
from bitatlas.report.overview import Card, Overview, overview_of

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
    """Text as a part of a quoted Mermaid label: one line, cut at LONGEST, special characters as numeric entities."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    line = _ESCAPED.sub(lambda match: match[1] or f"#{ord(match[2])};", line)
    return line.replace("%%", "%#37;").replace("__", "_#95;")


def overview(atlas: Atlas) -> str:
    """The Mermaid source of the overview, ending in a newline; same atlas, same text."""
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
