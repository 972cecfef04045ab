"""One rule in one process: the plans that a method of this benchmark's own finds, and how long it took after the model was read.

    python -m plan_peers.own METHOD QUESTION.json ANSWER.json

`RULES` is the table of methods. Each gets a problem and returns choices by name ([units], 1 for the high format) and remarks; the
clock runs over the rule alone, with the model loaded and both formats quantized.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitatlas.plan.baselines import baselines
from bitatlas.plan.knapsack import solve_knapsack
from plan_peers.problem import Problem, Question
from plan_peers.rules import exllamav3_greedy, exllamav3_groups, greedy_per_bit, mlx_threshold
from plan_peers.scores import gradient_scores, mlx_sensitivity, raised_groups, relative_errors, single_swaps
from plan_peers.search import swap_search

Ints = NDArray[np.int64]
Choices = dict[str, NDArray[Any]]
Rule = Callable[[Problem, dict[str, Any]], tuple[Choices, list[str]]]

OVERRAN = "its own threshold was above the budget; the tighter end of its bisection was taken"


def rules_of_thumb(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    """One width everywhere, the first and the last layers high, 20 random plans."""
    plans = baselines(problem.units, problem.cost, problem.limit, problem.question.seed)
    return dict(plans), []


def relative_error(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    errors = relative_errors(problem)
    return {"": greedy_per_bit(errors[:, 0] - errors[:, 1], problem.extra, problem.room)}, []


def mlx(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    found = mlx_threshold(mlx_sensitivity(problem), problem.extra, problem.room)
    return {"": found.raised}, [OVERRAN] if found.overran else []


def knapsack(scores: NDArray[np.float64], problem: Problem) -> Ints:
    """The choice of least summed score within the budget, proven. scores: [units, formats] -> [units]"""
    return solve_knapsack(scores, problem.cost, problem.limit).choice


def swaps_at_reference(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    return {"": knapsack(single_swaps(problem, None), problem)}, []


def swaps_at_high(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    return {"": knapsack(single_swaps(problem, problem.high), problem)}, []


def hawq(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    return {"": knapsack(gradient_scores(problem, squared=True), problem)}, []


def absolute_gradient(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    return {"": knapsack(gradient_scores(problem, squared=False), problem)}, []


def exllamav3(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    groups = exllamav3_groups([unit.modules[0].name for unit in problem.units])
    extra = np.array([[problem.extra[group].sum()] for group in groups], dtype=np.int64)
    levels = exllamav3_greedy(raised_groups(problem, groups), extra, problem.room)
    choice = np.zeros(len(problem.units), dtype=np.int64)
    for group, level in zip(groups, levels, strict=True):
        choice[group] = level
    return {"": choice}, []


def search(problem: Problem, options: dict[str, Any]) -> tuple[Choices, list[str]]:
    """options: `start` (module -> format), `seconds`."""
    start = problem.choice(options["start"])

    def damage(choice: Ints) -> float:
        return float(problem.meter.plans({"plan": problem.assignment(choice)}, problem.rows)["plan"].mean())

    found = swap_search(start, problem.extra, problem.room, damage, options["seconds"], problem.question.seed)
    end = "nothing better is left" if found.finished else "the time was over"
    return {"": found.choice}, [f"{found.measured} plans measured; {end}; {found.damage:.4f} nats/token on the rows searched"]


RULES: dict[str, Rule] = {
    "rules of thumb": rules_of_thumb,
    "relative error": relative_error,
    "mlx-lm": mlx,
    "KL swaps (reference)": swaps_at_reference,
    "KL swaps (high)": swaps_at_high,
    "g2dW2": hawq,
    "|g dW|": absolute_gradient,
    "exllamav3": exllamav3,
    "search": search,
}


def main() -> None:
    method, question, answer = sys.argv[1:4]
    content = json.loads(Path(question).read_text())
    options = content.pop("options", {})
    problem = Problem(Question.of(content))
    if method != "rules of thumb":  # which look at no weights
        _ = problem.meter
    start = time.perf_counter()
    choices, remarks = RULES[method](problem, options)
    seconds = time.perf_counter() - start
    plans = {name: problem.assignment(choice) for name, choice in choices.items()}
    content = {"plans": plans, "seconds": seconds, "remarks": remarks, "threads": torch.get_num_threads()}
    Path(answer).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
