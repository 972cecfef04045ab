"""The verdict on a plan: what it loses to is named, and a tolerance is judged on the test rows."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.plan.judge import judge, tolerance_text
from bitatlas.plan.search import PlannerHooks, PlanningProblem, Scores, search
from bitatlas.records import Budget, Measured, ModelInfo, Module
from bitatlas.records.sizes import assignment_of

MODULES = [Module(f"layers.{i}.up_proj", i, "up_proj", (64, 64), f"layers.{i}.up_proj") for i in range(4)]
INFO = ModelInfo("m", None, "0" * 64, "LlamaForCausalLM", 4, 4, 128, "float32", 4 * 64 * 64, 0, 4 * 64 * 64 * 4)
HARM = {"int2_g64": 1.0, "int3_g64": 0.2, "int4_g64": 0.01}  # of a layer, times its weight below
LAYER = np.array([1.0, 0.5, 0.3, 0.2])


def damage(assignment: dict[str, str], harm: dict[str, float]) -> np.ndarray:
    """An additive damage with a little noise a row, the same for every plan."""
    rows = 1 + 0.05 * np.random.default_rng(0).standard_normal(16)
    return rows * sum(LAYER[m.layer] * harm[assignment[m.name]] for m in MODULES)


def judged(harm: dict[str, float]):
    formats = ["int2_g64", "int4_g64"]
    table = np.array([[LAYER[i] * (harm[name] - harm["int4_g64"]) for name in formats] for i in range(4)])
    scores = Scores({"mean of both": table}, at_high=float(LAYER.sum() * harm["int4_g64"]))

    def measure(plans, split, rows=None):
        return {name: damage(plan, harm)[slice(None) if rows is None else rows] for name, plan in plans.items()}

    subject = PlanningProblem(INFO, MODULES, formats, "rtn")
    units, budget = subject.units, Budget("code_bits", 3.0)

    def on_select(plans):
        found = measure({name: assignment_of(units, formats, choice) for name, choice in plans.items()}, "select")
        return {name: float(rows.mean()) for name, rows in found.items()}

    found = search(subject, budget, PlannerHooks(scores, on_select))
    return judge(subject, budget, found, measure, [0, 1, 2, 3]).plan


def test_a_plan_that_loses_to_a_width_outside_the_candidates_is_not_recommended():
    plan = judged(HARM)
    assert plan.recommended is False
    assert plan.verdict.startswith("uniform int3_g64 (not in --formats)")
    assert plan.verdict.endswith("add int3_g64 to --formats")
    assert plan.baselines[0].code_bits == 3.0


def test_a_plan_that_beats_it_is():
    plan = judged({**HARM, "int3_g64": 0.9})
    assert plan.recommended is True
    assert {b.name for b in plan.baselines} >= {"uniform int3_g64 (not in --formats)", "most critical layers high"}
    assert [plan.modules[m.name] for m in MODULES] == ["int4_g64", "int4_g64", "int2_g64", "int2_g64"]


@pytest.mark.parametrize(
    ("ci95", "said"),
    [((0.1, 0.3), "within"), ((0.1, 0.6), "not shown to be within"), ((0.51, 0.6), "above"), (None, "not shown to be within")],
)
def test_a_tolerance_is_judged_on_the_test_rows(ci95: tuple[float, float] | None, said: str):
    damage = Measured(0.3, ci95, "nats/token", "plan", "test", 8)
    assert tolerance_text(damage, 0.5) == f"{said} the tolerated 0.5 on test rows"
