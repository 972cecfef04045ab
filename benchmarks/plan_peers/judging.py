"""The one judge: exact size and damage on test rows of every plan that came back, whoever found it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from bitatlas.records.sizes import size_of
from bitatlas.stats.bootstrap import mean_interval
from plan_peers.outside import Answer
from plan_peers.problem import Problem

DIGITS = 9  # significant, of each row's damage in the file
MEAN, BEST = "random, mean of 20", "random, best of 20"

Entry = dict[str, Any]


def judge(problem: Problem, plans: Mapping[str, Mapping[str, str]], rows: Tensor) -> dict[str, Entry]:
    """Size and damage of each plan on test rows [rows, tokens]. AssertionError where one is above the budget."""
    for plan in plans.values():
        assert problem.spent(problem.choice(dict(plan))) <= problem.limit, "a plan above the budget"
    damage = problem.meter.plans(plans, rows)
    return {name: entry_of(problem, plan, damage[name]) for name, plan in plans.items()}


def entry_of(problem: Problem, plan: Mapping[str, str], damage: np.ndarray) -> Entry:
    """What the file keeps of one plan. damage: [rows], nats/token"""
    size = size_of(problem.modules, dict(plan), problem.checkpoint.info)
    return {
        "high": [name for name, fmt in plan.items() if fmt == problem.high],
        "code_bits": size.code_bits,
        "stored_bits": size.stored_bits,
        "quantized_bytes": size.quantized_bytes,
        **damage_of(damage),
    }


def damage_of(rows: np.ndarray) -> Entry:
    """rows: [rows], nats/token -> mean, 95 % interval over rows, and the rows themselves."""
    kept = np.array([float(f"{value:.{DIGITS}g}") for value in rows])
    mean, low, high = mean_interval(kept)
    return {"damage_nats": mean, "ci95": [low, high], "rows": kept.tolist()}


def entries_of(method: str, labels: tuple[str, ...], answer: Answer, judged: Mapping[str, Entry]) -> dict[str, Entry]:
    """label -> entry. Rules of thumb answer with many plans at once; every other method with one, named ""."""
    cost = {
        "method": method,
        "search_seconds": answer.seconds,
        "process_seconds": answer.process_seconds,
        "peak_bytes": answer.peak_bytes,
        "remarks": answer.remarks,
        **answer.more,
    }
    if len(labels) == 1:
        return {labels[0]: {**judged[""], **cost}}
    found = {label: {**judged[label], **cost} for label in labels if label in judged}
    drawn = [entry for name, entry in judged.items() if name.startswith("random")]
    best = min(drawn, key=lambda entry: entry["damage_nats"])
    mean = damage_of(np.mean([entry["rows"] for entry in drawn], axis=0))
    widest = max(drawn, key=lambda entry: entry["quantized_bytes"])
    sizes = {key: widest[key] for key in ("code_bits", "stored_bits", "quantized_bytes")}
    means = [entry["damage_nats"] for entry in drawn]
    found[MEAN] = {**sizes, **mean, **cost, "each_damage_nats": means, "remarks": ["the size is the largest of the 20"]}
    found[BEST] = {**best, **cost, "remarks": ["chosen by its damage on the test rows themselves, which flatters it"]}
    return found
