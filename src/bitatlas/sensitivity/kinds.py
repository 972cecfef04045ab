"""True damage of every kind of module, all layers at once: lowered around uniform high, raised around uniform low.

One model a kind and direction, on half of the default test rows, so it costs a third of a screen of 16 layers. Units do not matter here: the modules of one kind are moved by themselves, also where
a runtime would have them share a format with others.
Left out: kinds within a layer; the screen of units has those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.sensitivity.damage import DamageMeter

ROWS = 32  # of the test rows, at most: whole models cannot resume at a layer, and kinds differ more than layers do


@dataclass(frozen=True)
class KindScreen:
    """float64 [kinds, rows], nats/token: the damage of the whole model on the first rows. Kinds in the order in which they come in a layer."""

    kinds: list[str]
    lowered: np.ndarray  # all modules of the kind low, the others high
    raised: np.ndarray  # all modules of the kind high, the others low


def screen_kinds(
    meter: DamageMeter, modules: Sequence[Module], low: str, high: str, rows: Tensor, reporter: Reporter
) -> KindScreen:
    """Every kind lowered alone, and raised alone."""
    kinds = list(dict.fromkeys(module.kind for module in modules))

    def only(kind: str, there: str, elsewhere: str) -> dict[str, str]:
        return {module.name: there if module.kind == kind else elsewhere for module in modules}

    with reporter.stage("kinds of modules") as progress:
        plans = {f"lowered {kind}": only(kind, low, high) for kind in kinds}
        plans |= {f"raised {kind}": only(kind, high, low) for kind in kinds}
        damage = meter.plans(plans, rows[:ROWS], progress)
    lowered, raised = (np.stack([damage[f"{way} {kind}"] for kind in kinds]) for way in ("lowered", "raised"))
    return KindScreen(kinds, lowered, raised)
