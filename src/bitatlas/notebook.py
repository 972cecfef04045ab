"""A plan and an atlas as a notebook shows them: small tables in plain HTML, from records alone.

Left out: charts; `report.html` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bitatlas.records import Atlas, Plan
from bitatlas.words import byte_size, interval, number

COLOURS = {"critical": "#b42318", "safe": "#18794e", "light": "#7030d0", "uncertain": "#8a6100"}


def plan_html(plan: Plan) -> str:
    """Size, damage, simple plans beside it, and how many modules have which format."""
    damage = interval(plan.damage.measured, unit=True)
    if plan.damage.measured is None and plan.damage.predicted is not None:
        damage = f"{number(plan.damage.predicted)} nats/token (predicted)"
    rows = [["this plan", byte_size(plan.size.total_bytes), number(plan.size.code_bits), damage]]
    rows += [
        [baseline.name, "", number(baseline.code_bits), interval(baseline.damage, unit=True)]
        for baseline in plan.baselines
        if not baseline.is_random
    ]
    counts = {name: sum(given == name for given in plan.modules.values()) for name in plan.formats}
    used = ", ".join(f"{name} × {count}" for name, count in counts.items() if count)
    title = f"Plan for {plan.model.name} ({plan.quantizer}): {used}"
    return _table(title, ["", "size", "code bits", "damage"], rows) + (f"<p>{escape(plan.verdict)}</p>" if plan.verdict else "")


def atlas_html(atlas: Atlas) -> str:
    """The uniform widths, the layers with their verdicts, and the plan."""
    widths = [
        [u.format, byte_size(u.size.total_bytes), number(u.size.code_bits), interval(u.damage, unit=True)] for u in atlas.uniform
    ]
    layers = [[str(layer.layer), interval(layer.share), interval(layer.criticality), layer.verdict] for layer in atlas.layers]
    parts = [
        _table(f"Atlas of {atlas.model.name}: every module at one format", ["format", "size", "code bits", "damage"], widths),
        _table("Layers", ["layer", "share of damage", "criticality", "verdict"], layers),
    ]
    return "".join(parts) + (plan_html(atlas.plan) if atlas.plan else "")


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(text: str) -> str:
    style = f' style="color:{COLOURS[text]}"' if text in COLOURS else ""
    return f"<td{style}>{escape(text)}</td>"
