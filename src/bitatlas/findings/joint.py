"""Which layers that are safe alone are safe together, measured: lowered at once, on rows that did not call them safe.

A layer's word comes from the test rows, with the layer lowered alone. Layers that hurt little alone may hurt much together, so the safe ones,
the least harmful first, are lowered together, all at once and then as many of them as the tolerance allows, found by bisection, on the
select rows. What n layers together stay within, fewer of them do as well (up to noise), so looking at several groups on the same rows
makes a wrong group hardly more likely than looking at one.
Left out: groups that are not the least harmful layers; they may be larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bitatlas.findings.folk import FAILS, HOLDS, OPEN
from bitatlas.findings.shares import SAFE
from bitatlas.records import Finding, JointDamage, Layer, Measured
from bitatlas.records.text import interval, named_layers, number
from bitatlas.stats.bootstrap import Blocks, measured

CLAIM = "the safe layers are safe together"

MeasureLowered = Callable[[Sequence[int]], np.ndarray]  # layers that are low -> damage added to uniform high, [rows]


def joint_damage(
    layers: Sequence[Layer], measure: MeasureLowered, tolerance: float, base: str, blocks: Blocks = None, seed: int = 0
) -> JointDamage | None:
    """Measure the safe layers together; None where fewer than two are safe. `tolerance`: nats/token; blocks: of the rows measured on."""
    safe = [one for one in layers if one.verdict == SAFE]
    order = [one.layer for one in sorted(safe, key=lambda one: (one.lowered.mean, one.layer))]
    if len(order) < 2:
        return None

    def added(count: int) -> Measured:
        return measured(measure(order[:count]), "nats/token", base, "select", seed, blocks)

    all_of_them = added(len(order))
    known = {len(order): all_of_them}
    fits, fails = 0, len(order) + 1
    while fails - fits > 1:
        count = len(order) if fails > len(order) else (fits + fails) // 2
        if count not in known:
            known[count] = added(count)
        if within(known[count], tolerance):
            fits = count
        else:
            fails = count
    return JointDamage(sorted(order), all_of_them, sorted(order[:fits]), known[fits] if fits else None)


def within(added: Measured, tolerance: float) -> bool:
    """Whether the whole interval is within the tolerance."""
    return added.ci95 is not None and added.ci95[1] <= tolerance


def joint_findings(joint: JointDamage | None, tolerance: float) -> list[Finding]:
    """One statement; none where fewer than two layers are safe."""
    if joint is None:
        return []
    low = joint.added.ci95[0] if joint.added.ci95 else -np.inf
    verdict = HOLDS if within(joint.added, tolerance) else FAILS if low > tolerance else OPEN
    text = (
        f"{named_layers(joint.layers).capitalize()}, each safe alone, add {interval(joint.added, unit=True)} lowered together (on select rows); "
        f"the tolerance is {number(tolerance)}."
    )
    if verdict != HOLDS:
        if len(joint.together) > 1:
            text += f" Safe together: {named_layers(joint.together)}, adding {interval(joint.added_together)}."
        else:
            text += " No two of them, from the least harmful up, are shown to be safe together."
    return [Finding("layers", CLAIM, verdict, text, joint.added)]
