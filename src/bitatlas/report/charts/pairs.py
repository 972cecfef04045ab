"""Units that hurt together: the matrix of interactions, ordered so that those which do are neighbours, and its strongest pairs.

Second order: what two units lowered together add beyond both alone, from the curvature of the damage between their measured changes of the
logits (`sensitivity.interactions`). Order: leaves of an average-linkage tree on the interactions (scipy), so it carries no judgement.
With more units than can be seen, the matrix is of layers: the sums over their units.
"""

from __future__ import annotations

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from bitatlas.records import Atlas, UnitInteractions
from bitatlas.records.text import NOT_MEASURED, interval, number
from bitatlas.report.charts.canvas import GLYPH, Canvas, draw
from bitatlas.report.facts import Table

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


def matrix(atlas: Atlas, width: int) -> Markup | None:
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


def caption(atlas: Atlas) -> str:
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


def table(atlas: Atlas) -> Table:
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
