"""What the page's script needs to show another plan in the same heat map, and to hand out its plan.json: numbers and texts, as JSON.

The script computes nothing that could be wrong: texts come from here, bits are looked up by cell. A plan.json is kept without its list
of modules, which is the same names in every plan; the script puts that between `head` and `tail`, so what is copied is the file to the byte.
"""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from bitatlas.records import Atlas, Plan
from bitatlas.records.files import to_json
from bitatlas.report import facts
from bitatlas.report.budget.stops import Memory, Stop
from bitatlas.report.charts import heat

CODES = "0123456789abcdefghijklmnopqrstuvwxyz"  # one letter a format, and "-" for a module that the plan does not list


def data(atlas: Atlas, stops: list[Stop], memory: Memory) -> Markup:
    """The JSON text for the page's data block: no character of it can end the block or open another."""
    cells = heat.cells_of(atlas)
    count = len(memory.contexts)
    formats = list(dict.fromkeys(name for stop in stops for name in stop.plan.formats))
    modules = list(dict.fromkeys(name for stop in stops for name in stop.plan.modules))
    places = {name: place for place, name in enumerate(modules)}
    plans = [_plan(stop.plan, cells, formats, modules) for stop in stops]
    bits = {text for plan in plans for text in plan["bits"]}
    widest = heat.widest_bits(atlas)
    content = {
        "formats": formats,
        "modules": modules,
        "cells": [
            [f"Layer {layer}, {kind}", *_members(cells, number, places)] for number, (layer, kind) in enumerate(cells.keys)
        ],
        "units": _units(cells),
        "order": cells.steps.formats if cells.steps else [],
        "shades": {text: heat.shade(float(text), widest) for text in sorted(bits) if text},
        "plans": plans,
        "memory": [
            [[memory.total(stop.plan, cache, context) for context in range(count)] for cache in range(len(memory.caches))]
            for stop in stops
        ],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _plan(plan: Plan, cells: heat.Cells, formats: list[str], modules: list[str]) -> dict[str, Any]:
    head, tail = to_json(plan), ""
    listed = ",\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(plan.modules[name])}" for name in plan.modules)
    if list(plan.modules) == modules and listed in head:
        head, _, tail = head.partition(listed)
    own = "".join(CODES[formats.index(plan.modules[name])] if name in plan.modules else "-" for name in modules)
    mean = [facts.mean_bits(plan, members) for members in cells.members]
    return {
        "head": head,
        "tail": tail,
        "modules": own,
        "bits": ["" if bits is None else heat.bits_text(bits) for bits in mean],
        "raises": cells.raises(plan),
    }


def _members(cells: heat.Cells, number: int, places: dict[str, int]) -> tuple[list[int], str]:
    """Places of a cell's modules, and its unit where it has one alone."""
    members = cells.members[number]
    units = {module.unit for module in members}
    return [places[module.name] for module in members if module.name in places], units.pop() if len(units) == 1 else ""


def _units(cells: heat.Cells) -> dict[str, Any]:
    """Unit -> modules, and the parts of its sentences, step by step."""
    if cells.steps is None:
        return {}
    return {unit: [cells.steps.modules[unit], [step.parts for step in own]] for unit, own in cells.steps.steps.items()}
