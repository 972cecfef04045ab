"""Attention heads as small multiples: for each role all heads of all layers, and example maps of those whose role is clearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup, escape

from bitatlas.records import Atlas, AttentionHead, HeadMap, text
from bitatlas.report.charts.canvas import Canvas, bands, draw

WIDTH = 300  # px of one small chart
ROLES = ("previous", "duplicate", "induction", "retrieval")
MEANING = {
    "previous": "the token before",
    "duplicate": "the same token earlier",
    "induction": "the token after the same one earlier",
    "retrieval": "an earlier token that comes next",
}


@dataclass(frozen=True)
class Small:
    """One small chart with its words."""

    title: str
    caption: str
    drawing: Markup


def multiples(atlas: Atlas) -> list[Small]:
    """One chart a measure: layers across, heads down, the stronger the more. Reference weights."""
    heads = [head for head in atlas.heads if head.base == "reference"]
    if not heads:
        return []
    layers = sorted({head.layer for head in heads})
    found = []
    for role in ROLES:
        if any(role in head.scores for head in heads):
            named = sum(head.role == role for head in heads)
            told = f"Looks at {MEANING[role]}. {named} of {len(heads)} heads have this role (outlined); shade: κ, 0 to 1."
            found.append(Small(role.capitalize(), told, _grid(heads, layers, role, lambda h, role=role: h.scores.get(role, 0.0))))  # type: ignore[misc]
    entropy = "How evenly it looks at all keys, sinks removed; shade: entropy, 0 to 1."
    found.append(Small("Entropy", entropy, _grid(heads, layers, "entropy", lambda head: head.entropy)))
    if any(head.focus_percent is not None for head in heads):
        focus = "From a result to its operands, above chance; shade: 0 to 100%."
        found.append(
            Small("Reasoning focus", focus, _grid(heads, layers, "focus", lambda head: (head.focus_percent or 0.0) / 100))
        )
    return found


def _grid(heads: list[AttentionHead], layers: list[int], key: str, value: Callable[[AttentionHead], float]) -> Markup:
    count = 1 + max(head.head for head in heads)
    c = Canvas(WIDTH, 62 + min(180, max(48, 14 * count)), left=34, right=6, top=20, bottom=36)
    shades = [[0.0] * len(layers) for _ in range(count)]
    column = {layer: place for place, layer in enumerate(layers)}
    for head in heads:
        shades[head.head][column[head.layer]] = value(head)
    across, down = (c.x1 - c.x0) / len(layers), (c.y0 - c.y1) / count
    c.rect(c.x0, c.y1, c.x1 - c.x0, c.y0 - c.y1, "zone zone-1")
    draw(c, f"heads-{key}", c.x0, c.y1, c.x1 - c.x0, c.y0 - c.y1, shades, "bits")
    for head in heads:
        if head.role == key:
            tip = f"Layer {head.layer}, head {head.head}: {key}, κ {text.number(head.scores[key], 2)}"
            c.add(f'<g class="tip"><title>{escape(tip)}</title>')
            c.rect(
                c.x0 + across * column[head.layer] + 0.75, c.y1 + down * head.head + 0.75, across - 1.5, down - 1.5, "outlined"
            )
            c.add("</g>")
    every = max(1, -(-count // 8))
    for place in range(0, count, every):
        c.text(c.x0 - 6, c.y1 + down * (place + 0.5) + 4, str(place), "tick", "end")
    c.text(2, 11, "head", "axis")
    c.layer_axis(bands(len(layers), c.x0, c.x1)[0], layers)
    return c.svg(f"{key} of {len(heads)} heads by layer")


def examples(atlas: Atlas) -> list[Small]:
    """Where the clearest heads look in a random block of tokens twice."""
    return [_example(number, one) for number, one in enumerate(atlas.head_maps)]


def _example(number: int, one: HeadMap) -> Small:
    tokens = len(one.percent)
    c = Canvas(220, 236, left=30, right=6, top=20, bottom=34)
    side = c.x1 - c.x0
    c.rect(c.x0, c.y1, side, side, "zone zone-1")
    shades = [[value / 100 for value in row] + [0.0] * (tokens - len(row)) for row in one.percent]
    draw(c, f"map-{number}", c.x0, c.y1, side, side, shades, "bits")
    step = side / tokens
    for place in range(0, tokens, 6):
        c.text(c.x0 - 5, c.y1 + step * (place + 0.5) + 4, str(place), "tick", "end")
        c.text(c.x0 + step * (place + 0.5), c.y1 + side + 14, str(place), "tick", "middle")
    c.text(2, 11, "query, token", "axis")
    c.text(c.x0 + side / 2, c.y1 + side + 29, "key, token", "axis", "middle")
    drawing = c.svg(f"Attention map of layer {one.layer}, head {one.head}: {one.role}")
    return Small(f"Layer {one.layer}, head {one.head}", f"{one.role}, κ {text.number(one.score, 2)}", drawing)
