"""The large figures of report.html: each chart drawn for a desk and for a phone, with its title, caption and legend.

A figure that an atlas has nothing for is left out here; the page says elsewhere what was not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from markupsafe import Markup

from bitatlas.records import Atlas
from bitatlas.records.text import listed, number
from bitatlas.report import facts
from bitatlas.report.budget import reasons
from bitatlas.report.charts import charts, heat, pairs, prediction
from bitatlas.report.task_tables import WIDTHS_TITLE, held_chart

WIDE, HALF, NARROW = 960, 460, 350  # px of a chart across the page, of one of two, and on a phone

Keys = list[tuple[str, str, str]]  # (shape, css class, meaning)
VERDICTS: Keys = [
    ("◆", "v-critical", "critical"),
    ("●", "v-safe", "safe"),
    ("■", "v-light", "light"),
    ("▲", "v-uncertain", "uncertain"),
]
PLANS: Keys = [
    ("◆", "c-plan", "plan"),
    ("■", "c-ink", "uniform"),
    ("▲", "c-baseline", "baseline"),
    ("●", "c-muted", "random plans"),
]
HELD: Keys = [("●", "v-safe", "held"), ("◆", "v-critical", "lost"), ("▲", "v-uncertain", "inconclusive, at or below chance")]
PAIRS: Keys = [("■", "c-heat", "worse together than apart"), ("■", "c-bits", "they spare each other")]
AROUND: Keys = [("●", "c-high", "random plan"), ("◆", "c-plan", "the plan")]


@dataclass(frozen=True)
class Figure:
    """A chart in both widths, with its words."""

    title: str
    caption: str
    wide: Markup
    narrow: Markup
    keys: Keys


@dataclass(frozen=True)
class Sketch:
    """What a figure is drawn from."""

    draw: Callable[[Atlas, int], Markup | None]
    title: str
    caption: str
    keys: Keys = field(default_factory=list)
    width: int = WIDE


def figures(atlas: Atlas) -> dict[str, Figure]:
    """The figures that this atlas has, by the name that the template uses."""
    made = {}
    for key, sketch in {**_layers(atlas), **_plan(atlas), **_others(atlas)}.items():
        wide, narrow = sketch.draw(atlas, sketch.width), sketch.draw(atlas, NARROW)
        if wide is not None and narrow is not None:
            made[key] = Figure(sketch.title, sketch.caption, wide, narrow, sketch.keys)
    return made


def _layers(atlas: Atlas) -> dict[str, Sketch]:
    low, high = facts.width_of(atlas, atlas.low), facts.width_of(atlas, atlas.high)
    rests = facts.basis(record.criticality for record in atlas.layers)
    harm = f"Above the dashed line at 1 a layer does more harm than its size explains. Bars: 95% intervals ({rests})."
    lowered = f"All others at {high}. Far above the dashed line (none lowered): lowering it hurts."
    raised = f"All others at {low}. Far below the dashed line (none raised): raising it helps."
    return {
        "criticality": Sketch(charts.criticality, "Which layers carry the damage", harm, VERDICTS),
        "damage": Sketch(heat.damage_map, "What lowering costs", _costs(atlas)),
        "lowered": Sketch(charts.lowered, f"One layer lowered to {low}", lowered, width=HALF),
        "raised": Sketch(charts.raised, f"One layer raised to {high}", raised, width=HALF),
    }


def _costs(atlas: Atlas) -> str:
    chosen = heat.damage_base(atlas)
    if chosen is None:
        return ""
    least, most = (number(end) for end in heat.damage_ends(atlas))
    return (
        f"Damage that lowering one unit to {chosen[1]} adds at base {chosen[0]}, on fit rows (one number, no interval). "
        f"Faintest {least}, strongest {most} nats/token, log scale. Numbers: the plan's bits."
    )


def _plan(atlas: Atlas) -> dict[str, Sketch]:
    outside = facts.outside_formats(point.name for point in atlas.curve)
    added = f" Not in --formats, so not open to the plan: {listed(outside)}." if outside else ""
    lines = "the line joins the uniform formats"
    if any(point.kind == "curve" for point in atlas.curve):
        lines = "one line joins the uniform formats, the other the plans found at each size"
    size = f"Lower left is better. Bars: 95% intervals; {lines}.{added}"
    others = "None of them is larger than the plan. Bars: 95% intervals."
    bits = "Layers and kinds of module; the stronger the colour, the more bits. Each cell says why."
    bits += f" {reasons.basis(atlas)}" if atlas.units or atlas.unit_damage else ""
    return {
        "size": Sketch(charts.size_damage, "Damage against size", size, PLANS),
        "baselines": Sketch(charts.baselines, "The plan and plans that anybody could have made", others),
        "prediction": Sketch(prediction.scatter, prediction.TITLE, prediction.caption(atlas), AROUND, HALF),
        "plan": Sketch(heat.plan_map, "Bits of each module", bits),
    }


def _others(atlas: Atlas) -> dict[str, Sketch]:
    held = "Difference from the reference on the same items. Bars: 95% intervals; dashed: the margin of loss that is ruled out where a task is held."
    earns = "Rank correlation over layers; intervals are over rows, for these layers. Whether a measure beats chance over layers: q in the table."
    together = pairs.caption(atlas)
    return {
        "pairs": Sketch(pairs.matrix, "Which units hurt together", together, PAIRS, HALF),
        "tasks": Sketch(charts.tasks, "Accuracy", "Bars: 95% Wilson intervals; the dotted tick is chance."),
        "widths": Sketch(held_chart, WIDTHS_TITLE, held, HELD),
        "correlations": Sketch(charts.correlations, "Do cheap measures foretell damage?", earns),
    }
