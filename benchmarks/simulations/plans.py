"""Words on a plan: better, worse, recommended; and whether damage around it is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bitatlas.findings.reliability import calibration_verdict
from bitatlas.plan.baselines import UNIFORM
from bitatlas.plan.calibration import MEASURED, PREDICTION, calibration
from bitatlas.plan.judge import BETTER, WORSE, PlanVerdict, verdict_of
from bitatlas.plan.looks import PLAN, UNIT, compare_in_looks
from bitatlas.records import CalibrationPoint, Measured
from bitatlas.stats.bootstrap import Blocks, measured
from simulations import Simulation

ROWS, RANDOM = 64, 20
DOCUMENTS = np.repeat(np.arange(16), 4).tolist()  # block of each row
STRETCHES = np.repeat(np.arange(8), 8).tolist()


class Judged(NamedTuple):
    """`model_rows`: test rows that were measured, over all models."""

    verdict: PlanVerdict
    model_rows: int


def in_looks(plan: np.ndarray, others: Mapping[str, np.ndarray], blocks: Blocks = None) -> Judged:
    """Judge a plan as a survey does: uniform widths on all rows, the others in looks. plan: [rows]; others: name -> [rows]"""
    whole = {name: rows for name, rows in others.items() if name.startswith(UNIFORM)}
    model_rows = len(plan) * (1 + len(whole))

    def measure(names: Sequence[str], rows: list[int]) -> dict[str, np.ndarray]:
        nonlocal model_rows
        model_rows += len(names) * len(rows)
        return {name: others[name][rows] for name in names}

    names = [name for name in others if name not in whole]
    compared = compare_in_looks(plan, whole, names, measure, blocks=blocks)
    sizes = dict.fromkeys((PLAN, *others), 1000)
    return Judged(verdict_of(measured(plan, UNIT, PLAN, "test", blocks=blocks), compared, sizes), model_rows)


def judged(excess: float, seed: int, alike: bool = False) -> PlanVerdict:
    """A plan that does `excess` more than the best simple plan. `alike`: all simple plans are as good as the best."""
    rng = np.random.default_rng(seed)
    hard = rng.lognormal(-0.125, 0.5, ROWS)

    def rows(mean: float) -> np.ndarray:
        return 0.3 * mean * hard * (1 + 0.08 * rng.standard_normal(ROWS))

    worse = {"uniform": 3.0, "first layers high": 1.7, "last layers high": 1.0, "most critical layers high": 1.2}
    worse |= {f"random {number}": 1.4 + 0.05 * number for number in range(RANDOM)}
    others = {name: rows(1.0 if alike else mean) for name, mean in worse.items()}
    return in_looks(rows(1 + excess), others).verdict


def beats_an_equal(seed: int, blocks: list[int]) -> bool:
    """One rival as good as the plan, in looks; heavy-tailed damage (Student's t, 3) that rows of a block share half of."""
    rng = np.random.default_rng(seed)
    hard = rng.lognormal(-0.125, 0.5, ROWS)

    def rows() -> np.ndarray:
        noise = rng.standard_t(3, max(blocks) + 1)[blocks] + rng.standard_t(3, ROWS)  # [rows]
        return 0.3 * hard * (1 + 0.05 * noise)

    return in_looks(rows(), {"first layers high": rows()}, blocks).verdict.standing == BETTER


def real_model(seed: int, uniform: float = 0.49) -> Judged:
    """A plan of 0.42 nats/token beside rivals with the numbers of a real model: other rules of 0.9 to 1.6, random plans of 0.9 to 5."""
    rng = np.random.default_rng(seed)
    means = {f"{UNIFORM} int3_g64": uniform, "first layers high": 0.9, "last layers high": 1.6, "most critical layers high": 1.1}
    means |= {f"random {number}": mean for number, mean in enumerate(np.geomspace(0.9, 5, RANDOM))}
    hard = rng.lognormal(-0.03, 0.25, ROWS)
    rows = {name: mean * hard * (1 + 0.12 * rng.standard_normal(ROWS)) for name, mean in {PLAN: 0.42, **means}.items()}
    return in_looks(rows.pop(PLAN), rows)


def predicted(seed: int) -> bool:
    """Predicted and measured damage of 50 plans with a true rank correlation of 0.9."""
    rng = np.random.default_rng(seed)
    true = rng.standard_normal(50)
    rho = 2 * np.sin(np.pi / 6 * 0.9)  # of normal variables with that rank correlation
    guess = rho * true + np.sqrt(1 - rho**2) * rng.standard_normal(50)
    points = [
        CalibrationPoint(1, float(g), Measured(float(t), None, "nats/token", "plan", "select", 24))
        for g, t in zip(guess, true, strict=True)
    ]
    record = calibration({PREDICTION: guess, MEASURED: true}, points, points[0], 0.5, 16, seed)
    return calibration_verdict(record) == "holds"


SIMULATIONS = [
    Simulation("plan recommended", "truly 2 % worse than the best simple plan", lambda seed: judged(0.02, seed).recommended),
    Simulation(
        "plan recommended", "truly as good as the best simple plan, no smaller", lambda seed: judged(0.0, seed).recommended
    ),
    Simulation(
        "plan better", "truly as good as all 24 simple plans", lambda seed: judged(0.0, seed, alike=True).standing == BETTER
    ),
    Simulation(
        "plan worse", "truly as good as all 24 simple plans", lambda seed: judged(0.0, seed, alike=True).standing == WORSE
    ),
    Simulation(
        "plan better", "as good as its one rival, 16 documents of 4 rows", lambda seed: beats_an_equal(seed, DOCUMENTS), 0.025
    ),
    Simulation(
        "plan better", "as good as its one rival, 8 stretches of 8 rows", lambda seed: beats_an_equal(seed, STRETCHES), 0.025
    ),
    Simulation("the damage of plans around this one is predicted", "true rank correlation 0.9", predicted),
]
