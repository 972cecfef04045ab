"""Damage on a task's own text: the questions of its items with their right answers, as the model reads them when it is asked.

General text may miss what a task needs. So every uniform width and every layer, lowered alone and raised alone, is measured again on a few
short rows of each task's text. What is early in a row hurts otherwise than what is late, so the general text that they are compared with is
cut to the same length: the beginnings of test rows, spread evenly over them, measured in the same way. These rows describe; they do not
choose a plan, since they may hold items that are scored.
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
GENERAL_ROWS = 32  # one comparison serves all tasks, so it is the surer side


@dataclass(frozen=True)
class TaskScreen:
    """`widths`: format -> damage of every module at it, float64 [rows]."""

    widths: dict[str, np.ndarray]
    layers: LayerScreen
    blocks: list[int] | None = None  # of the rows (see `evaluation.bootstrap`)


def screen_tasks(
    meter: DamageMeter, modules: list[Module], formats: tuple[str, ...], rows: Mapping[str, Tensor], reporter: Reporter
) -> dict[str, TaskScreen]:
    """Both screens on each task's rows, by task. `formats`: narrowest first."""
    return {task: screen_text(meter, modules, formats, own, f"{task}: its own text", reporter) for task, own in rows.items()}


def screen_text(
    meter: DamageMeter, modules: list[Module], formats: tuple[str, ...], rows: Tensor, name: str, reporter: Reporter
) -> TaskScreen:
    """Both screens on one text's rows: int64 [rows, length]."""
    reporter.say(f"{name}, {len(rows)} rows of {rows.shape[1]} tokens")
    widths = screen_uniform(meter, modules, formats, rows, reporter)
    return TaskScreen(widths, screen_layers(meter, modules, formats[0], formats[-1], rows, reporter))


def general_rows(test: Tensor, length: int) -> Tensor:
    """The first `length` tokens of test rows, spread over all of them; all rows where they are no longer (they were measured already)."""
    if test.shape[1] <= length:
        return test
    return test[general_places(len(test)), :length]


def general_places(rows: int) -> list[int]:
    """Which of so many test rows are cut for `general_rows`."""
    return [int(place) for place in np.unique(np.linspace(0, rows - 1, min(GENERAL_ROWS, rows)).round())]
