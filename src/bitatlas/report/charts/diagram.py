"""The overview for the page: the cards of `overview` laid on columns, one a layer, so that the links are short and need no script.

Rows stand in the order of the form (datasets, layers, attention, effects, strategy). Between two rows lies a strip with the links as
curves; its coordinates are thousandths of the width, so the drawing follows any width. On a narrow page the strips are hidden, and
each card says in words where it leads. Left out: dotted links to the strategy's card on tasks, which would cross three rows: their
label stands on the task's card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitatlas.records import Atlas
from bitatlas.records.text import named_layers
from bitatlas.report.overview import Card, Link, Overview, overview_of

SIGNS = {"critical": "◆", "safe": "●", "light": "■", "warning": "▲"}  # the shapes of the charts
MOST_ACROSS = 8  # task cards in one row


@dataclass(frozen=True)
class Box:
    """A card as the page draws it: `lines` are (name, value), `leads` says where its links go, `span` counts columns."""

    title: str
    lines: list[tuple[str, str]]
    css: str
    sign: str
    mark: str
    leads: str
    span: int = 1
    key: str = ""  # the node's name in the Mermaid source, and where its links end there
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One group: its columns, its boxes, and the strip of links under it (curves, and where their tips stand, in %)."""

    key: str
    title: str
    columns: int
    boxes: list[Box]
    strip: Markup
    tips: list[float]


def rows(atlas: Atlas) -> list[Row]:
    """Return the five groups of the overview, each with the links that leave it."""
    view = overview_of(atlas)
    columns = max(1, len(view.chosen))
    spans = _spans(atlas, view)
    centres = _centres(view, columns, spans)
    titles = {card.key: card.title for card in (*view.layers, *view.effects, *view.strategy)}

    def boxes(cards: list[Card], sizes: Sequence[int] = ()) -> list[Box]:
        return [_box(card, view.links, titles, sizes[i] if sizes else 1) for i, card in enumerate(cards)]

    aligned = _aligned(view)
    dotted = [(centres[link.start], centres[link.end]) for link in view.links if link.dotted and link.end.startswith("L")]
    down = [(centres[card.key], centres[card.key]) for card in view.layers if view.chosen]
    to_zones = [(centres[link.start], centres[link.end]) for link in view.links if link.start.startswith("L")]
    to_strategy = [(centres[link.start], centres[link.end]) for link in view.links if link.start.startswith("Z")]
    zone_columns = columns if spans else len(view.effects)
    across = _task_columns(view)
    groups = [
        ("datasets", "Dataset performance", across, boxes(view.datasets), dotted, True),
        ("layers", "Layer criticality analysis", columns, boxes(view.layers), down, False),
        ("attention", "Attention pattern analysis", columns if aligned else 1, boxes(view.attention), to_zones, False),
        ("effects", "Quantization effects", zone_columns, boxes(view.effects, spans), to_strategy, False),
        ("strategy", "Optimization strategy", len(view.strategy), boxes(view.strategy), [], False),
    ]
    return [
        Row(key, title, n, cards, _strip(links, dots), sorted({100 * end for _, end in links}))
        for key, title, n, cards, links, dots in groups
    ]


def _aligned(view: Overview) -> bool:
    return len(view.attention) == len(view.chosen) and bool(view.chosen)


def _task_columns(view: Overview) -> int:
    """Return the columns of task cards: all in one row if they fit, else a row a task."""
    if len(view.datasets) <= MOST_ACROSS:
        return max(1, len(view.datasets))
    return max(1, min(MOST_ACROSS, sum(card.title == view.datasets[0].title for card in view.datasets)))


def _spans(atlas: Atlas, view: Overview) -> list[int]:
    """Return the columns that each zone's card spans: its layers drawn; empty where the zones do not cover the columns."""
    counts = [sum(zone.first <= layer <= zone.last for layer in view.chosen) for zone in atlas.zones]
    return counts if counts and all(counts) and sum(counts) == len(view.chosen) else []


def _centres(view: Overview, columns: int, spans: list[int]) -> dict[str, float]:
    """Return node name -> centre of its card, 0..1 of the width."""
    across = _task_columns(view)
    centres = {card.key: (i % across + 0.5) / across for i, card in enumerate(view.datasets)}
    centres |= {card.key: (i + 0.5) / columns for i, card in enumerate(view.layers)}
    centres |= {card.key: (i + 0.5) / len(view.strategy) for i, card in enumerate(view.strategy)}
    for i, card in enumerate(view.effects):
        centre = (sum(spans[:i]) + spans[i] / 2) / columns if spans else (i + 0.5) / len(view.effects)
        centres[card.key] = centre
    return centres


def _strip(links: list[tuple[float, float]], dotted: bool) -> Markup:
    """Draw curves from above to below, in a box of 1000 x 100 that is stretched to the strip."""
    paths = "".join(
        f'<path d="M{1000 * a:.1f} 0C{1000 * a:.1f} 55 {1000 * b:.1f} 45 {1000 * b:.1f} 100"/>' for a, b in dict.fromkeys(links)
    )
    css = "dotted" if dotted else "solid"
    return Markup(f'<svg class="{css}" viewBox="0 0 1000 100" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>')


def _box(card: Card, links: list[Link], titles: dict[str, str], span: int) -> Box:
    lines = []
    for line in card.lines:
        name, colon, value = line.partition(": ")
        lines.append((name, value) if colon and len(name) <= 24 else ("", line))
    ends = tuple(link.end for link in links if link.start == card.key)
    return Box(card.title, lines, card.css, SIGNS.get(card.css, ""), card.mark, _leads(card, links, titles), span, card.key, ends)


def _leads(card: Card, links: list[Link], titles: dict[str, str]) -> str:
    """Return where a card's links go, in words."""
    links = [link for link in links if link.start == card.key]
    if not links:
        return ""
    label = links[0].label
    if not links[0].dotted:
        return ", ".join(titles[link.end] for link in links)
    if links[0].end.startswith("L"):
        return f"{label}: {named_layers([int(link.end[1:]) for link in links])}"
    if label in ("falls", "falls to chance", "rises", "reference") or label.startswith("no loss"):
        return label
    return f"no claim: {label}" if label else "no claim"
