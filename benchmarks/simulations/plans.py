"""Words on a plan: better, worse, recommended; and whether damage around it is predicted."""

from __future__ import annotations

import numpy as np

from bitatlas.findings.reliability import calibration_verdict
from bitatlas.plan.calibration import MEASURED, PREDICTION, calibration
from bitatlas.plan.judge import BETTER, WORSE, PlanVerdict, verdict_on_plan
from bitatlas.records import CalibrationPoint, Measured
from simulations import Simulation

ROWS, RANDOM = 64, 20


def judged(excess: float, seed: int, alike: bool = False) -> PlanVerdict:
    """A plan that does `excess` more than the best simple plan. `alike`: all simple plans are as good as the best."""
    rng = np.random.default_rng(seed)
    hard = rng.lognormal(-0.125, 0.5, ROWS)

    def rows(mean: float) -> np.ndarray:
        return 0.3 * mean * hard * (1 + 0.08 * rng.standard_normal(ROWS))

    worse = {"uniform": 3.0, "first layers high": 1.7, "last layers high": 1.0, "most critical layers high": 1.2}
    worse |= {f"random {number}": 1.4 + 0.05 * number for number in range(RANDOM)}
    others = {name: rows(1.0 if alike else mean) for name, mean in worse.items()}
    sizes = dict.fromkeys(("plan", *others), 1000)
    return verdict_on_plan(rows(1 + excess), others, seed=seed, sizes=sizes)


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
    Simulation("the damage of plans around this one is predicted", "true rank correlation 0.9", predicted),
]
