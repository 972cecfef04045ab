"""The atlases that the report is tested on, hostile and empty ones among them."""

from __future__ import annotations

import dataclasses

from atlas_factory import Recipe
from bitatlas.records import Atlas

EVIL = '"]; click T0 call alert(1) <script>alert(1)</script> | `x` **b** %%{init: {"theme":"dark"}}%% #35; & \\ [a](b) end'
RECIPES = {
    "sixteen": Recipe(),
    "five, no tasks": Recipe(layers=5, tasks=(), zones=2, low="int2_g32", high="int4_g32"),
    "one layer": Recipe(layers=1, zones=1),
    "eighty": Recipe(layers=80, zones=5),
    "bare": Recipe(layers=5, tasks=(), plan=False, attention=False),
    "beaten from outside": Recipe(outside=True, zones=4),
    "hostile": Recipe(name=EVIL, tasks=(EVIL, "x" * 300), recommended=False, notes=[EVIL, "</script>"]),
}


def emptied(atlas: Atlas) -> Atlas:
    """An atlas of which nothing but the model is left: what an interrupted run could hand over."""
    lists = ["uniform", "layers", "zones", "weights", "attention", "heads", "tasks", "task_pairs", "curve"]
    nothing = {
        name: [] for name in [*lists, "correlations", "unit_correlations", "units", "kinds", "findings", "plans", "head_maps"]
    }
    return dataclasses.replace(
        atlas,
        plan=None,
        interactions=None,
        sparsity=None,
        calibration=None,
        shapley=None,
        unit_damage={},
        base_damage={},
        **nothing,
    )
