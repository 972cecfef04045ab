"""The heat maps of report.html: layers x module kinds (the plan's bits, the damage of lowering), attention heads, pairs of units.

Layers run across on a wide page and down on a narrow one. A cell with several modules (experts) shows their mean bits and the sum
of their units' damage. Modules that share a format are measured together, so their cells show the same damage.
Left out: one cell a module; the Parquet tables have every module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from bitatlas.records import Atlas, AttentionHead, HeadMap, Module, Plan, UnitInteractions
from bitatlas.records.sizes import inner
from bitatlas.records.text import NOT_MEASURED, interval, number
from bitatlas.report import facts
from bitatlas.report.advice import Steps, steps_of
from bitatlas.report.charts.canvas import GLYPH, Canvas, bands, cut, draw_shades, logarithmic
from bitatlas.report.facts import Table

KEPT = "kept as it is"
FAINTEST_BITS = 1.7  # a cell of so many is a tenth of the full colour


def shade(bits: float, widest: float) -> tuple[float, str]:
    """Return the strength of a cell of so many bits, and the class of the number on it. By the logarithm, so that 2, 3, 4 and 8 stand apart."""
    depth = min(0.92, max(0.08, 0.1 + 0.8 * math.log2(max(1.0, bits) / FAINTEST_BITS) / math.log2(widest / FAINTEST_BITS)))
    return depth, "on-light" if depth < 0.53 else "on-middle" if depth < 0.72 else "on-dark"


def bits_text(bits: float) -> str:
    """Return bits as a cell says them: 2, or 2.5 where several modules share it."""
    return number(bits, 0 if abs(bits - round(bits)) < 0.005 else 1)


def bits_cell(c: Canvas, x: float, y: float, width: float, height: float, bits: float, widest: float, room: float) -> None:
    """Draw a cell, darker for more bits, with the number where it fits."""
    depth, css = shade(bits, widest)
    c.rect(x, y, width, height, "bits", f' fill-opacity="{depth:.2f}"')
    text = bits_text(bits)
    if len(text) * GLYPH <= room:
        c.text(x + width / 2, y + height / 2 + 4, text, css, "middle")


def plan_map(atlas: Atlas, width: int) -> Markup | None:
    """Draw layers x module kinds, shaded by the plan's bits."""
    if atlas.plan is None or not atlas.modules:
        return None
    grid = _Grid(atlas, width, whole=True)
    cells = cells_of(atlas)
    raises = cells.raises(atlas.plan)
    for index, (layer, kind, x, y) in enumerate(grid.cells()):
        bits = facts.mean_bits(atlas.plan, grid.members[layer, kind])
        if bits is not None:
            with grid.canvas.tip(cells.words(index, atlas.plan, raises), f' data-cell="{index}"'):
                bits_cell(grid.canvas, x, y, grid.cell_w, grid.cell_h, bits, widest_bits(atlas), grid.cell_w - 4)
    outside = ", embedding and head" if any(module.part for module in atlas.modules) else ""
    kinds = len({module.kind for module in inner(atlas.modules)})
    return grid.canvas.svg(f"The plan's bits for {len(grid.layers)} layers and {kinds} kinds of module{outside}")


def widest_bits(atlas: Atlas) -> int:
    """Return what the strongest shade stands for: the widest format that a plan could have, at least 4 bits."""
    return max(4, *(fmt.bits for fmt in atlas.formats.values()))


@dataclass(frozen=True)
class Cells:
    """The cells of the map in the order in which they are drawn: (layer, kind), modules. `steps`: None where units were not measured."""

    keys: list[tuple[int, str]]
    members: list[list[Module]]
    steps: Steps | None

    def words(self, index: int, plan: Plan, raises: list[tuple[str, str]]) -> str:
        """Return what a cell says of a plan with these `raises`: its formats, and why."""
        modules = self.members[index]
        names = sorted({plan.modules.get(module.name, KEPT) for module in modules})
        units, reason = {module.unit for module in modules}, ""
        if self.steps and len(units) == 1 and not modules[0].part and names[0] in self.steps.formats:
            reason = " " + self.steps.sentence(units.pop(), self.steps.formats.index(names[0]), raises)
        return f"{self.where(index)}: {', '.join(names)}.{reason}"

    def where(self, index: int) -> str:
        """Return what a cell is of."""
        (layer, kind), (module, *_) = self.keys[index], self.members[index]
        return f"{module.part.capitalize()} ({kind})" if module.part else f"Layer {layer}, {kind}"

    def raises(self, plan: Plan) -> list[tuple[str, str]]:
        """Return the best uses of more bytes in a plan."""
        if self.steps is None:
            return []
        units = {m.unit: plan.modules.get(m.name, "") for modules in self.members for m in modules if not m.part}
        return self.steps.raises(
            {unit: self.steps.formats.index(name) for unit, name in units.items() if name in self.steps.formats}
        )


def cells_of(atlas: Atlas) -> Cells:
    """Return the cells of an atlas: layer by layer, kinds in the order in which they come."""
    grid = _Grid(atlas, 960, whole=True)
    keys = [(layer, kind) for layer, kind, _, _ in grid.cells()]
    return Cells(keys, [grid.members[key] for key in keys], steps_of(atlas))


def damage_base(atlas: Atlas) -> tuple[str, str] | None:
    """Return the base and format of the damage map: lowered from the high plan if that was measured, else any base's lowest."""
    choices = [f"uniform:{atlas.high}", "plan", "reference", *sorted(atlas.unit_damage)]
    for base in choices:
        formats = {name for row in atlas.unit_damage.get(base, {}).values() for name in row}
        if atlas.low in formats and base != f"uniform:{atlas.low}":
            return base, atlas.low
    return None


def _added(atlas: Atlas) -> dict[str, float]:
    """Return unit -> damage that lowering it adds at `damage_base`, nats/token; negative where lowering helped."""
    chosen = damage_base(atlas)
    if chosen is None:
        return {}
    base, fmt = chosen
    before = atlas.base_damage.get(base, 0.0)
    return {unit: row[fmt] - before for unit, row in atlas.unit_damage[base].items() if fmt in row}


def damage_ends(atlas: Atlas) -> tuple[float, float]:
    """Return the least and the most damage that the map tells apart: at most a factor of 1000, so that noise near 0 takes no room."""
    positive = [value for value in _added(atlas).values() if value > 0] or [1.0]
    return max(min(positive), max(positive) / 1000), max(positive)


def damage_map(atlas: Atlas, width: int) -> Markup | None:
    """Draw layers x module kinds, shaded by the damage that lowering the module's unit adds at `damage_base`; the plan's bits as numbers."""
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
        depth, bits = scale(sum(values)), facts.mean_bits(atlas.plan, grid.members[layer, kind])
        planned = "" if bits is None else f"; plan: {number(bits, 1)} bits"
        with grid.canvas.tip(f"Layer {layer}, {kind}: {number(sum(values))} nats/token added by {fmt}{planned}"):
            grid.canvas.rect(x, y, grid.cell_w, grid.cell_h, "heat", f' fill-opacity="{depth:.2f}"')
            if bits is not None and grid.cell_w >= 16:
                grid.canvas.text(x + grid.cell_w / 2, y + grid.cell_h / 2 + 4, number(bits, 0), "on-light", "middle")
    return grid.canvas.svg(f"Damage added by lowering each unit to {fmt} at base {base}")


def _short(kind: str) -> str:
    return cut(kind.removesuffix("_proj"), 10)


class _Grid:
    """Cells of layers x kinds: layers across on a wide page, down on a narrow one.

    whole: embedding and head have rows, too, with a cell at the first layer and at the last.
    """

    def __init__(self, atlas: Atlas, width: int, whole: bool = False) -> None:
        modules = inner(atlas.modules)
        self.layers = sorted({m.layer for m in modules})
        modules += [module for module in atlas.modules if module.part] if whole else []
        self.kinds = list(dict.fromkeys(m.kind for m in modules))
        self.members: dict[tuple[int, str], list[Module]] = {}
        for module in modules:
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
        for row, kind in enumerate(self.kinds):
            c.text(c.left - 8, c.top + self.pitch_y * (row + 0.5) + 4, cut(kind, 22), "tick", "end")
        c.layer_axis(bands(len(self.layers), c.x0, c.x1)[0], self.layers)

    def _labels_down(self) -> None:
        c, every = self.canvas, 1 if self.pitch_y > 16 else 2
        for row in range(0, len(self.layers), every):
            c.text(c.left - 8, c.top + self.pitch_y * (row + 0.5) + 4, str(self.layers[row]), "tick", "end")
        c.text(2, c.top - 6, "layer", "axis")
        for column, kind in enumerate(self.kinds):
            c.turned(f"{c.left + self.pitch_x * (column + 0.5) + 4:.1f}", "56", -38, _short(kind), "tick")

    def cells(self) -> list[tuple[int, str, float, float]]:
        """Return (layer, kind, x, y) of every cell that has modules."""
        result = []
        for layer, kind in sorted(self.members, key=lambda key: (key[0], self.kinds.index(key[1]))):
            i = self.layers.index(min(max(layer, self.layers[0]), self.layers[-1]))
            column, row = (i, self.kinds.index(kind)) if self.across else (self.kinds.index(kind), i)
            x, y = self.canvas.left + column * self.pitch_x, self.canvas.top + row * self.pitch_y
            result.append((layer, kind, x, y))
        return result


# --- attention heads: for each role all heads of all layers, and example maps of those whose role is clearest ------------

WIDTH = 300  # px of one small chart
ROLES = {  # role -> what such a head looks at
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
    """Draw one chart a measure: layers across, heads down, the stronger the more. Reference weights."""
    heads = [head for head in atlas.heads if head.base == "reference"]
    if not heads:
        return []
    layers = sorted({head.layer for head in heads})
    result = []
    for role, target in ROLES.items():
        if any(role in head.scores for head in heads):
            count = sum(head.role == role for head in heads)
            caption = f"Looks at {target}. {count} of {len(heads)} heads have this role (outlined); shade: κ, 0 to 1."
            drawing = _grid(heads, layers, role, lambda head, role=role: head.scores.get(role, 0.0))  # type: ignore[misc]
            result.append(Small(role.capitalize(), caption, drawing))
    caption = "How evenly it looks at all keys, sinks removed; shade: entropy, 0 to 1."
    result.append(Small("Entropy", caption, _grid(heads, layers, "entropy", lambda head: head.entropy)))
    if any(head.focus_percent is not None for head in heads):
        caption = "From a result to its operands, above chance; shade: 0 to 100%."
        drawing = _grid(heads, layers, "focus", lambda head: (head.focus_percent or 0.0) / 100)
        result.append(Small("Reasoning focus", caption, drawing))
    return result


def _grid(heads: list[AttentionHead], layers: list[int], key: str, value: Callable[[AttentionHead], float]) -> Markup:
    count = 1 + max(head.head for head in heads)
    c = Canvas(WIDTH, 62 + min(180, max(48, 14 * count)), left=34, right=6, top=20, bottom=36)
    shades = [[0.0] * len(layers) for _ in range(count)]
    column = {layer: index for index, layer in enumerate(layers)}
    for head in heads:
        shades[head.head][column[head.layer]] = value(head)
    across, down = (c.x1 - c.x0) / len(layers), (c.y0 - c.y1) / count
    c.rect(c.x0, c.y1, c.x1 - c.x0, c.y0 - c.y1, "zone zone-1")
    draw_shades(c, f"heads-{key}", c.x0, c.y1, c.x1 - c.x0, c.y0 - c.y1, shades, "bits")
    for head in heads:
        if head.role == key:
            x, y = c.x0 + across * column[head.layer] + 0.75, c.y1 + down * head.head + 0.75
            with c.tip(f"Layer {head.layer}, head {head.head}: {key}, κ {number(head.scores[key], 2)}"):
                c.rect(x, y, across - 1.5, down - 1.5, "outlined")
    for row in range(0, count, max(1, -(-count // 8))):
        c.text(c.x0 - 6, c.y1 + down * (row + 0.5) + 4, str(row), "tick", "end")
    c.text(2, 11, "head", "axis")
    c.layer_axis(bands(len(layers), c.x0, c.x1)[0], layers)
    return c.svg(f"{key} of {len(heads)} heads by layer")


def head_examples(atlas: Atlas) -> list[Small]:
    """Draw where the clearest heads look in a random block of tokens twice."""
    return [_example(index, head_map) for index, head_map in enumerate(atlas.head_maps)]


def _example(index: int, head_map: HeadMap) -> Small:
    tokens = len(head_map.percent)
    c = Canvas(220, 236, left=30, right=6, top=20, bottom=34)
    side = c.x1 - c.x0
    c.rect(c.x0, c.y1, side, side, "zone zone-1")
    shades = [[value / 100 for value in row] + [0.0] * (tokens - len(row)) for row in head_map.percent]
    draw_shades(c, f"map-{index}", c.x0, c.y1, side, side, shades, "bits")
    step = side / tokens
    for token in range(0, tokens, 6):
        c.text(c.x0 - 5, c.y1 + step * (token + 0.5) + 4, str(token), "tick", "end")
        c.text(c.x0 + step * (token + 0.5), c.y1 + side + 14, str(token), "tick", "middle")
    c.text(2, 11, "query, token", "axis")
    c.text(c.x0 + side / 2, c.y1 + side + 29, "key, token", "axis", "middle")
    drawing = c.svg(f"Attention map of layer {head_map.layer}, head {head_map.head}: {head_map.role}")
    return Small(f"Layer {head_map.layer}, head {head_map.head}", f"{head_map.role}, κ {number(head_map.score, 2)}", drawing)


# --- units that hurt together: the matrix of interactions, ordered so that those which do are neighbours -----------------
#
# Second order: what two units lowered together add beyond both alone, from the curvature of the damage between their measured changes of the
# logits (`measure.interactions`). Order: leaves of an average-linkage tree on the interactions (scipy), so it carries no judgement.
# With more units than can be seen, the matrix is of layers: the sums over their units.

MOST_CELLS = 200  # units or layers along a side
NAMED = 40  # the most that get their names
PARTNERS = 3  # that a row's tooltip names

Floats = NDArray[np.float64]


def _names_of(interactions: UnitInteractions, layer_of: dict[str, int]) -> list[str]:
    """Return `layer 3 qkv` for every unit."""
    return [f"layer {layer_of[unit]} {unit.rpartition('.')[2]}" for unit in interactions.units]


def matrix_of(interactions: UnitInteractions, layer_of: dict[str, int]) -> tuple[list[str], Floats]:
    """Return names and the symmetric matrix, nats/token: of units, or of layers where there are too many (their sums, diagonal 0)."""
    count = len(interactions.units)
    full = np.zeros((count, count))
    for index, row in enumerate(interactions.extra):
        full[index, :index] = full[:index, index] = row
    names = _names_of(interactions, layer_of)
    if count <= MOST_CELLS:
        return names, full
    layers = sorted(set(layer_of.values()))
    member = np.array(
        [[layer_of[unit] == layer for unit in interactions.units] for layer in layers], dtype=np.float64
    )  # [layers, units]
    summed = member @ full @ member.T
    np.fill_diagonal(summed, 0.0)
    return [f"layer {layer}" for layer in layers], summed


def order_of(matrix: Floats) -> list[int]:
    """Return the indices in the order of the tree's leaves: what hurts most together is joined first."""
    if len(matrix) < 3:
        return list(range(len(matrix)))
    apart = matrix.max() - matrix
    np.fill_diagonal(apart, 0.0)
    return [int(leaf) for leaf in leaves_list(linkage(squareform(apart, checks=False), "average", optimal_ordering=True))]


def interaction_matrix(atlas: Atlas, width: int) -> Markup | None:
    """Draw the matrix in the tree's order: one colour where two hurt together, the other where they spare each other."""
    if atlas.interactions is None or len(atlas.interactions.units) < 2:
        return None
    names, values = matrix_of(atlas.interactions, {m.unit: m.layer for m in atlas.modules})
    order = order_of(values)
    names, values = [names[index] for index in order], values[np.ix_(order, order)]
    named = len(names) <= NAMED and width > 400
    left = 12 + 0.92 * GLYPH * max(len(name) for name in names) if named else 26.0
    side = min(width - left - 8, 620.0)
    c = Canvas(width, int(side + 56), left=left, right=8, top=8, bottom=40)
    scale = float(np.abs(values).max()) or 1.0
    for key, css, sign in (("more", "heat", 1.0), ("less", "bits", -1.0)):
        draw_shades(
            c, f"pairs-{key}-{width}", left, c.top, side, side, np.sqrt(np.clip(sign * values / scale, 0, 1)).tolist(), css
        )
    step = side / len(names)
    for index, name in enumerate(names):
        worst = [int(i) for i in np.argsort(-values[index])[:PARTNERS] if values[index, i] > 0]
        partners = "; ".join(f"{names[i]} {number(float(values[index, i]))}" for i in worst)
        with c.tip(f"{name}: hurts most with {partners} nats/token" if partners else f"{name}: hurts with none"):
            c.rect(left, c.top + step * index, side, step, "row")
        if named:
            c.text(left - 6, c.top + step * (index + 0.5) + 4, name, "tick", "end")
    what = "units" if names[0].count(" ") > 1 else "layers"
    c.text(left + side / 2, c.top + side + 18, f"{what}, those that hurt together side by side", "axis", "middle")
    if not named:
        c.turned("16", f"{c.top + side / 2:g}", -90, f"the same {what}", "axis", "middle")
    return c.svg(f"Interactions between {len(names)} {what}, nats/token, strongest {number(scale)}")


def interaction_caption(atlas: Atlas) -> str:
    """Return what the matrix shows, and what it rests on."""
    interactions = atlas.interactions
    if interactions is None:
        return ""
    _, values = matrix_of(interactions, {m.unit: m.layer for m in atlas.modules})
    return (
        f"What two units lowered to {interactions.format} together do beyond both alone, base {interactions.base}, fit rows, second order (one number, "
        f"no interval; the table has intervals). Strongest shade: {number(float(np.abs(values).max()))} nats/token, shades by square root. "
        "A row says its worst partners."
    )


def interaction_table(atlas: Atlas) -> Table:
    """Make the table of the strongest pairs, with intervals over rows, beside what each unit does alone."""
    interactions = atlas.interactions
    head = ["Pair", "Beyond both alone, nats/token", "Each alone"]
    if interactions is None:
        return Table("together", "Units that hurt together", "", head)
    names = dict(zip(interactions.units, _names_of(interactions, {m.unit: m.layer for m in atlas.modules}), strict=True))
    alone, before = atlas.unit_damage.get(interactions.base, {}), atlas.base_damage.get(interactions.base, 0.0)

    def added(unit: str) -> str:
        value = alone.get(unit, {}).get(interactions.format)
        return NOT_MEASURED if value is None else number(value - before)

    rows = [
        [f"{names[p.first]} + {names[p.second]}", interval(p.extra), f"{added(p.first)} + {added(p.second)}"]
        for p in interactions.pairs
    ]
    count = len(interactions.units) * (len(interactions.units) - 1) // 2
    n = interactions.pairs[0].extra.n if interactions.pairs else 0
    note = (
        f"The {len(rows)} strongest of {count:,} pairs, both lowered to {interactions.format}, base {interactions.base}: second order, fit rows, n = {n}; intervals "
        "over rows. They are the largest because chance helped, too: expect less of the first ones. Each alone: the damage it adds."
    )
    return Table("together", "Units that hurt together", note, head, rows)
