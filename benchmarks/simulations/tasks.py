"""Tasks: texts that hurt the same layers, precision that costs all tasks the same, widths that lose just the margin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitatlas.findings.folk import MATH, math_needs_more
from bitatlas.findings.shares import HOLDS
from bitatlas.findings.tasks import HELD, task_damages, task_text_findings, task_widths
from bitatlas.stats.paired import compare_all
from simulations import Simulation
from simulations.layers import rows_of

HIGH, LOW = "uniform:int4_g64", "uniform:int2_g64"
PROFILE = [2.0, 1.0, 0.5, 0.6, 0.9, 1.0]
MARGIN = 5.0  # points
ITEMS = 400


def text_differs(tasks: int) -> Callable[[int], bool]:
    """Tasks of 16 rows, general text of 32, the same layers critical in all: is any said to differ?"""

    def wrong(seed: int) -> bool:
        texts = {f"task {i}": ({}, rows_of(PROFILE, 16, 100_000 + 10 * seed + i)) for i in range(tasks)}
        return any(finding.verdict == HOLDS for finding in task_text_findings(task_damages(texts, rows_of(PROFILE, 32, seed))))

    return wrong


def answers(rng: np.random.Generator, n: int, known: float, lost: float, chance: float) -> dict[str, np.ndarray]:
    """Outcomes of items of which so many are known at the high width, a share `lost` of these forgotten at the low one, the rest guessed."""
    knows, keeps = rng.random(n) < known, rng.random(n) >= lost
    return {HIGH: knows | (rng.random(n) < chance), LOW: (knows & keeps) | (rng.random(n) < chance)}


def math_said(n: int, chance: float) -> Callable[[int], bool]:
    """Written answers against choices, the same share of what is known lost in both: does math need more?"""

    def wrong(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        outcomes = {"problems": answers(rng, n, 0.7, 0.4, 0.0), "choices": answers(rng, n, 0.7, 0.4, chance)}
        scores, _ = compare_all(outcomes, {"problems": 0.0, "choices": chance})
        return math_needs_more(outcomes, {"problems"}, scores, HIGH, LOW).verdict == HOLDS

    return wrong


def held(seed: int) -> bool:
    """Every width truly loses the margin: is any called held?"""
    rng = np.random.default_rng(seed)
    right = rng.random(ITEMS) < 0.8
    outcomes = {"reference": right}
    for name in ("int4_g64", "int3_g64", "int2_g64"):
        change = rng.random(ITEMS)  # of the items, 6 % are lost and 1 % gained
        outcomes[f"uniform:{name}"] = np.where(right, change >= 0.06 / 0.8, change < 0.01 / 0.2)
    _, pairs = compare_all({"t": outcomes}, {"t": 0.25}, MARGIN)
    return any(width.verdict == HELD for width in task_widths(pairs)["t"])


SIMULATIONS = [
    Simulation("a task's own text weighs the layers differently (any of 3)", "equal criticality, 6 layers", text_differs(3)),
    Simulation("a task's own text weighs the layers differently", "equal criticality, 6 layers", text_differs(1)),
    Simulation(MATH, "equal loss, chance 0 and 1/4, 128 items", math_said(128, 0.25)),
    Simulation(MATH, "equal loss, chance 0 and 1/2, 64 items", math_said(64, 0.5)),
    Simulation("a width holds a task", "each of three widths loses the margin, 400 items", held),
]
