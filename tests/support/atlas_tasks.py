"""The made-up task results of `atlas_factory`: k of n, its Wilson interval, and differences from flips."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bitatlas.records import Measured, NoLoss, TaskPair, TaskScore

if TYPE_CHECKING:
    from atlas_factory import Recipe

# correct answers out of 200 at (reference, high, low, plan)
ANSWERS = {0: (141, 139, 78, 131), 1: (52, 51, 49, 50)}


def precisions(recipe: Recipe) -> list[str]:
    return ["reference", f"uniform:{recipe.high}", f"uniform:{recipe.low}"] + (["plan"] if recipe.plan else [])


def scores(recipe: Recipe, task: str) -> list[TaskScore]:
    which = recipe.tasks.index(task) % 2
    return [
        TaskScore(task, precision, correct, 200, 0.25, _wilson(correct, 200), which == 0)
        for precision, correct in zip(precisions(recipe), ANSWERS[which], strict=False)
    ]


def _wilson(correct: int, n: int) -> tuple[float, float]:
    z, p = 1.959964, correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def pairs_of(recipe: Recipe, task: str) -> list[TaskPair]:
    which = recipe.tasks.index(task) % 2
    correct = dict(zip(precisions(recipe), ANSWERS[which], strict=False))
    result = []
    for second in precisions(recipe)[1:]:
        change = correct[second] - correct["reference"]
        gained, lost = 8, 8 - change
        points, falls = 100 * change / 200, change < -20
        verdict = "at chance" if which else "falls" if falls else "inconclusive"
        half = 100 * 1.96 * math.sqrt(gained + lost) / 200
        difference = Measured(points, (points - half, points + half), "points", "reference", f"items:{task}", 200)
        text = f"{verdict}: {points:+.1f} points; {lost} of 200 items lost, {gained} gained"
        p = 1e-6 if falls else 0.4
        detectable = 2.80 * 100 * math.sqrt(gained + lost) / 200
        result.append(
            TaskPair(
                task,
                "reference",
                second,
                difference,
                lost,
                gained,
                p,
                min(1.0, 3 * p),
                detectable,
                None if falls else 2600,
                verdict,
                text,
                NoLoss(2.0, (points - 0.84 * half, points + 0.84 * half), 0.9 if falls else 0.2, 1.0, 1.0, 1300, False),
            )
        )
    return result
