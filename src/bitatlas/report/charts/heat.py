"""The heat maps of report.html: layers x module kinds, shaded by the plan's bits or by the damage of lowering.

Layers run across on a wide page and down on a narrow one. A cell with several modules (experts) shows their mean bits and the sum
of their units' damage. Modules that share a format are measured together, so their cells show the same damage.
Left out: one cell a module; the Parquet tables have every module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

from bitatlas.records import Atlas, Module, Plan
from bitatlas.records import text as words
from bitatlas.report import facts
from bitatlas.report.budget.reasons import Steps, steps_of
from bitatlas.report.charts.canvas import GLYPH, Canvas, bands, cut, logarithmic

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
    for number, (layer, kind, x, y) in enumerate(grid.cells()):
        members = grid.members[layer, kind]
        bits = facts.bits_of(atlas, members)
        if bits is None:
            continue
        grid.tip(said.words(number, atlas.plan, raises), f' data-cell="{number}"')
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

    def words(self, number: int, plan: Plan, raises: list[tuple[str, str]]) -> str:
        """What a cell says of a plan with these `raises`: its formats, and why."""
        (layer, kind), modules = self.keys[number], self.members[number]
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
