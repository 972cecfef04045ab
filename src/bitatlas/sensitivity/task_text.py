"""Damage on a task's own text: the questions of its items with their right answers, as the model reads them when it is asked.

General text may miss what a task needs. So every uniform width and every layer, lowered alone and raised alone, is measured again on a few
short rows of each task's text. These rows describe; they do not choose a plan, since they may hold items that are scored.
Left out: single modules and units (the rows are too few), and damage on the answers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.sensitivity.damage import DamageMeter
from bitatlas.sensitivity.screens import LayerScreen, screen_layers, screen_uniform

ROWS = 16
ROW_LENGTH = 64  # tokens, at most: a few questions


@dataclass(frozen=True)
class TaskScreen:
    """`widths`: format -> damage of every module at it, float64 [rows]."""

    widths: dict[str, np.ndarray]
    layers: LayerScreen


def screen_tasks(
    meter: DamageMeter, modules: list[Module], formats: tuple[str, ...], rows: Mapping[str, Tensor], reporter: Reporter
) -> dict[str, TaskScreen]:
    """Both screens on each task's rows, by task. `formats`: narrowest first."""
    found = {}
    for task, own in rows.items():
        reporter.say(f"{task}: its own text, {len(own)} rows of {own.shape[1]} tokens")
        widths = screen_uniform(meter, modules, formats, own, reporter)
        found[task] = TaskScreen(widths, screen_layers(meter, modules, formats[0], formats[-1], own, reporter))
    return found
