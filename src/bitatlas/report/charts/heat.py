"""The heat maps of report.html: layers x module kinds, shaded by the plan's bits or by the damage of lowering.

Layers run across on a wide page and down on a narrow one. A cell with several modules (experts) shows their mean bits and the sum
of their units' damage. Modules that share a format are measured together, so their cells show the same damage.
Left out: one cell a module; the Parquet tables have every module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from bitatlas.records import Atlas, AttentionHead, HeadMap, Module, Plan, UnitInteractions, text
from bitatlas.records import text as words
from bitatlas.records.text import NOT_MEASURED, interval, number
from bitatlas.report import facts
from bitatlas.report.advice import Steps, steps_of
from bitatlas.report.charts.canvas import GLYPH, Canvas, bands, cut, draw, logarithmic
from bitatlas.report.facts import Table

KEPT = "kept as it is"
FAINTEST_BITS = 1.7  # a cell of so many is a tenth of the full colour


def shade(bits: float, widest: float) -> tuple[float, str]:
    """How strong a cell of so many bits is, and the class of the number on it. By the logarithm, so that 2, 3, 4 and 8 all stand apart."""
    depth = min(0.92, max(0.08, 0.1 + 0.8 * math.log2(max(1.0, bits) / FAINTEST_BITS) / math.log2(widest / FAINTEST_BITS)))
    return depth, "on-light" if depth < 0.53 else "on-middle" if depth < 0.72 else "on-dark"


def bits_text(bits: float) -> str:
    """Bits as a cell says them: 2, or 2.5 where several modules share it."""
    return words.number(bits, 0 if abs(bits - round(bits)) < 0.005 else 1)


def bits_cell(c: Canvas, x: float, y: float, width: float, height: float, bits: float, widest: float, room: float) -> None:
    """A cell, darker for more bits, with the number where it fits."""
    depth, css = shade(bits, widest)
    c.rect(x, y, width, height, "bits", f' fill-opacity="{depth:.2f}"')
    text = bits_text(bits)
    if len(text) * GLYPH <= room:
        c.text(x + width / 2, y + height / 2 + 4, text, css, "middle")


def plan_map(atlas: Atlas, width: int) -> Markup | None:
    """Layers x module kinds, shaded by the plan's bits."""
    if atlas.plan is None or not atlas.modules:
        return None
    grid = _Grid(atlas, width)
    said = cells_of(atlas)
    raises = said.raises(atlas.plan)
    for index, (layer, kind, x, y) in enumerate(grid.cells()):
        members = grid.members[layer, kind]
        bits = facts.bits_of(atlas, members)
        if bits is None:
            continue
        grid.tip(said.words(index, atlas.plan, raises), f' data-cell="{index}"')
        bits_cell(grid.canvas, x, y, grid.cell_w, grid.cell_h, bits, widest_bits(atlas), grid.cell_w - 4)
        grid.canvas.add("</g>")
    return grid.canvas.svg(f"The plan's bits for {len(grid.layers)} layers and {len(grid.kinds)} kinds of module")


def widest_bits(atlas: Atlas) -> int:
    """What the strongest shade stands for: the widest format that a plan could have, at least 4 bits."""
    return max(4, *(fmt.bits for fmt in atlas.formats.values()))


@dataclass(frozen=True)
class Cells:
    """The cells of the map in the order in which they are drawn: (layer, kind), modules. `steps`: None where units were not measured."""

    keys: list[tuple[int, str]]
    members: list[list[Module]]
    steps: Steps | None

    def words(self, index: int, plan: Plan, raises: list[tuple[str, str]]) -> str:
        """What a cell says of a plan with these `raises`: its formats, and why."""
        (layer, kind), modules = self.keys[index], self.members[index]
        names = sorted({plan.modules.get(module.name, KEPT) for module in modules})
        units, reason = {module.unit for module in modules}, ""
        if self.steps and len(units) == 1 and names[0] in self.steps.formats:
            reason = " " + self.steps.sentence(units.pop(), self.steps.formats.index(names[0]), raises)
        return f"Layer {layer}, {kind}: {', '.join(names)}.{reason}"

    def raises(self, plan: Plan) -> list[tuple[str, str]]:
        """The best uses of more bytes in a plan."""
        if self.steps is None:
            return []
        units = {module.unit: plan.modules.get(module.name, "") for modules in self.members for module in modules}
        return self.steps.raises(
            {unit: self.steps.formats.index(name) for unit, name in units.items() if name in self.steps.formats}
        )


def cells_of(atlas: Atlas) -> Cells:
    """The cells of an atlas: layer by layer, kinds in the order in which they come."""
    grid = _Grid(atlas, 960)
    keys = [(layer, kind) for layer, kind, _, _ in grid.cells()]
    return Cells(keys, [grid.members[key] for key in keys], steps_of(atlas))


def damage_base(atlas: Atlas) -> tuple[str, str] | None:
    """The base and format of the damage map: lowered from the high plan if that was measured, else any base's lowest."""
    choices = [f"uniform:{atlas.high}", "plan", "reference", *sorted(atlas.unit_damage)]
    for base in choices:
        formats = {name for row in atlas.unit_damage.get(base, {}).values() for name in row}
        if atlas.low in formats and base != f"uniform:{atlas.low}":
            return base, atlas.low
    return None


def _added(atlas: Atlas) -> dict[str, float]:
    """Unit -> damage that lowering it adds at `damage_base`, nats/token; negative where lowering helped."""
    chosen = damage_base(atlas)
    if chosen is None:
        return {}
    base, fmt = chosen
    before = atlas.base_damage.get(base, 0.0)
    return {unit: row[fmt] - before for unit, row in atlas.unit_damage[base].items() if fmt in row}


def damage_ends(atlas: Atlas) -> tuple[float, float]:
    """The least and the most damage that the map tells apart: at most a factor of 1000, so that noise near 0 takes no room."""
    positive = [value for value in _added(atlas).values() if value > 0] or [1.0]
    return max(min(positive), max(positive) / 1000), max(positive)


def damage_map(atlas: Atlas, width: int) -> Markup | None:
    """Layers x module kinds, shaded by the damage that lowering the module's unit adds at `damage_base`; the plan's bits as numbers."""
    chosen = damage_base(atlas)
    if chosen is None or not atlas.modules:
        return None
    base, fmt = chosen
    added = _added(atlas)
    low, high = damage_ends(atlas)
    scale = logarithmic(low, high * 1.0001, 0.04, 0.7)
    grid = _Grid(atlas, width)
    for layer, kind, x, y in grid.cells():
        values = [added[unit] for unit in dict.fromkeys(m.unit for m in grid.members[layer, kind]) if unit in added]
        if not values:
            continue
        depth, bits = scale(sum(values)), facts.bits_of(atlas, grid.members[layer, kind])
        planned = "" if bits is None else f"; plan: {words.number(bits, 1)} bits"
        grid.tip(f"Layer {layer}, {kind}: {words.number(sum(values))} nats/token added by {fmt}{planned}")
        grid.canvas.rect(x, y, grid.cell_w, grid.cell_h, "heat", f' fill-opacity="{depth:.2f}"')
        if bits is not None and grid.cell_w >= 16:
            grid.canvas.text(x + grid.cell_w / 2, y + grid.cell_h / 2 + 4, words.number(bits, 0), "on-light", "middle")
        grid.canvas.add("</g>")
    return grid.canvas.svg(f"Damage added by lowering each unit to {fmt} at base {base}")


def _short(kind: str) -> str:
    return cut(kind.removesuffix("_proj"), 10)


class _Grid:
    """Cells of layers x kinds: layers across on a wide page, down on a narrow one."""

    def __init__(self, atlas: Atlas, width: int) -> None:
        self.layers = sorted({m.layer for m in atlas.modules})
        self.kinds = list(dict.fromkeys(m.kind for m in atlas.modules))
        self.members: dict[tuple[int, str], list[Module]] = {}
        for module in atlas.modules:
            self.members.setdefault((module.layer, module.kind), []).append(module)
        self.across = width >= 500
        rows, columns = len(self.kinds), len(self.layers)
        if not self.across:
            rows, columns = columns, rows
        self.pitch_y = 27.5 if self.across else 25.0 if rows <= 24 else 15.0
        longest = max(len(kind) for kind in self.kinds)
        left = min(150.0, GLYPH * longest + 12) if self.across else 34.0
        top, bottom = (8.0, 40.0) if self.across else (62.0, 8.0)
        right = 4.0 if self.across else max(8.0, 0.8 * GLYPH * len(_short(self.kinds[-1])) - 14)  # its slanted name
        height = int(top + self.pitch_y * rows + bottom)
        self.canvas = Canvas(width, height, left=left, right=right, top=top, bottom=bottom)
        self.pitch_x = (self.canvas.x1 - left) / columns
        self.cell_w, self.cell_h = self.pitch_x - (1.5 if self.pitch_x > 6 else 0.5), self.pitch_y - 1.5
        if self.across:
            self._labels_across()
        else:
            self._labels_down()

    def _labels_across(self) -> None:
        c = self.canvas
        for place, kind in enumerate(self.kinds):
            c.text(c.left - 8, c.top + self.pitch_y * (place + 0.5) + 4, cut(kind, 22), "tick", "end")
        c.layer_axis(bands(len(self.layers), c.x0, c.x1)[0], self.layers)

    def _labels_down(self) -> None:
        c, every = self.canvas, 1 if self.pitch_y > 16 else 2
        for place, layer in enumerate(self.layers):
            if place % every == 0:
                c.text(c.left - 8, c.top + self.pitch_y * (place + 0.5) + 4, str(layer), "tick", "end")
        c.text(2, c.top - 6, "layer", "axis")
        for place, kind in enumerate(self.kinds):
            c.add(f'<g transform="translate({c.left + self.pitch_x * (place + 0.5) + 4:.1f} 56) rotate(-38)">')
            c.text(0, 0, _short(kind), "tick")
            c.add("</g>")

    def cells(self) -> list[tuple[int, str, float, float]]:
        """(layer, kind, x, y) of every cell that has modules."""
        found = []
        for i, layer in enumerate(self.layers):
            for j, kind in enumerate(self.kinds):
                if (layer, kind) in self.members:
                    column, row = (i, j) if self.across else (j, i)
                    x, y = self.canvas.left + column * self.pitch_x, self.canvas.top + row * self.pitch_y
                    found.append((layer, kind, x, y))
        return found

    def tip(self, words: str, extra: str = "") -> None:
        """Open a cell's group with its words; the caller closes it."""
        self.canvas.add(f'<g class="tip"{extra}><title>{escape(words)}</title>')


# --- heads -----------------------------------------------------------------------------------------------------------------

# Attention heads as small multiples: for each role all heads of all layers, and example maps of those whose role is clearest.

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


def head_grids(atlas: Atlas) -> list[Small]:
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


def head_examples(atlas: Atlas) -> list[Small]:
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


# --- pairs -----------------------------------------------------------------------------------------------------------------

# Units that hurt together: the matrix of interactions, ordered so that those which do are neighbours, and its strongest pairs.
#
# Second order: what two units lowered together add beyond both alone, from the curvature of the damage between their measured changes of the
# logits (`sensitivity.interactions`). Order: leaves of an average-linkage tree on the interactions (scipy), so it carries no judgement.
# With more units than can be seen, the matrix is of layers: the sums over their units.

MOST_CELLS = 200  # units or layers along a side
NAMED = 40  # of which so many get their names
PARTNERS = 3  # that a row's words name

Floats = NDArray[np.float64]


def names_of(found: UnitInteractions, layer_of: dict[str, int]) -> list[str]:
    """`layer 3 qkv` for every unit."""
    return [f"layer {layer_of[unit]} {unit.rpartition('.')[2]}" for unit in found.units]


def matrix_of(found: UnitInteractions, layer_of: dict[str, int]) -> tuple[list[str], Floats]:
    """Names and the symmetric matrix, nats/token: of units, or of layers where there are too many units (their sums, diagonal 0)."""
    count = len(found.units)
    full = np.zeros((count, count))
    for place, row in enumerate(found.extra):
        full[place, :place] = full[:place, place] = row
    names = names_of(found, layer_of)
    if count <= MOST_CELLS:
        return names, full
    layers = sorted(set(layer_of.values()))
    member = np.array([[layer_of[unit] == layer for unit in found.units] for layer in layers], dtype=np.float64)
    summed = member @ full @ member.T
    np.fill_diagonal(summed, 0.0)
    return [f"layer {layer}" for layer in layers], summed


def order_of(matrix: Floats) -> list[int]:
    """Places in the order of the tree's leaves: what hurts most together is joined first."""
    if len(matrix) < 3:
        return list(range(len(matrix)))
    apart = matrix.max() - matrix
    np.fill_diagonal(apart, 0.0)
    return [int(place) for place in leaves_list(linkage(squareform(apart, checks=False), "average", optimal_ordering=True))]


def interaction_matrix(atlas: Atlas, width: int) -> Markup | None:
    """The matrix in the tree's order: one colour where two hurt together, the other where they spare each other."""
    if atlas.interactions is None or len(atlas.interactions.units) < 2:
        return None
    names, values = matrix_of(atlas.interactions, {m.unit: m.layer for m in atlas.modules})
    order = order_of(values)
    names, values = [names[place] for place in order], values[np.ix_(order, order)]
    named = len(names) <= NAMED and width > 400
    left = 12 + 0.92 * GLYPH * max(len(name) for name in names) if named else 26.0
    side = min(width - left - 8, 620.0)
    c = Canvas(width, int(side + 56), left=left, right=8, top=8, bottom=40)
    scale = float(np.abs(values).max()) or 1.0
    for key, css, sign in (("more", "heat", 1.0), ("less", "bits", -1.0)):
        draw(c, f"pairs-{key}-{width}", left, c.top, side, side, np.sqrt(np.clip(sign * values / scale, 0, 1)).tolist(), css)
    step = side / len(names)
    for place, name in enumerate(names):
        worst = [int(i) for i in np.argsort(-values[place])[:PARTNERS] if values[place, i] > 0]
        partners = "; ".join(f"{names[i]} {number(float(values[place, i]))}" for i in worst)
        tip = f"{name}: hurts most with {partners} nats/token" if partners else f"{name}: hurts with none"
        c.add(f'<g class="tip"><title>{escape(tip)}</title>')
        c.rect(left, c.top + step * place, side, step, "row")
        c.add("</g>")
        if named:
            c.text(left - 6, c.top + step * (place + 0.5) + 4, name, "tick", "end")
    what = "units" if names[0].count(" ") > 1 else "layers"
    c.text(left + side / 2, c.top + side + 18, f"{what}, those that hurt together side by side", "axis", "middle")
    if not named:
        c.add(f'<g transform="translate(16 {c.top + side / 2:g}) rotate(-90)">')
        c.text(0, 0, f"the same {what}", "axis", "middle")
        c.add("</g>")
    return c.svg(f"Interactions between {len(names)} {what}, nats/token, strongest {number(scale)}")


def interaction_caption(atlas: Atlas) -> str:
    """What the matrix shows, and what it rests on."""
    found = atlas.interactions
    if found is None:
        return ""
    _, values = matrix_of(found, {m.unit: m.layer for m in atlas.modules})
    return (
        f"What two units lowered to {found.format} together do beyond both alone, base {found.base}, fit rows, second order (one number, "
        f"no interval; the table has intervals). Strongest shade: {number(float(np.abs(values).max()))} nats/token, shades by square root. "
        "A row says its worst partners."
    )


def interaction_table(atlas: Atlas) -> Table:
    """The strongest pairs, with intervals over rows, beside what each unit does alone."""
    found = atlas.interactions
    head = ["Pair", "Beyond both alone, nats/token", "Each alone"]
    if found is None:
        return Table("together", "Units that hurt together", "", head, empty="Not measured.")
    called = dict(zip(found.units, names_of(found, {m.unit: m.layer for m in atlas.modules}), strict=True))
    alone, before = atlas.unit_damage.get(found.base, {}), atlas.base_damage.get(found.base, 0.0)

    def added(unit: str) -> str:
        value = alone.get(unit, {}).get(found.format)
        return NOT_MEASURED if value is None else number(value - before)

    rows = [
        [f"{called[p.first]} + {called[p.second]}", interval(p.extra), f"{added(p.first)} + {added(p.second)}"]
        for p in found.pairs
    ]
    count = len(found.units) * (len(found.units) - 1) // 2
    n = found.pairs[0].extra.n if found.pairs else 0
    note = (
        f"The {len(rows)} strongest of {count:,} pairs, both lowered to {found.format}, base {found.base}: second order, fit rows, n = {n}; intervals "
        "over rows. They are the largest because chance helped, too: expect less of the first ones. Each alone: the damage it adds."
    )
    return Table("together", "Units that hurt together", note, head, rows)
