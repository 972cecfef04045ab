"""Time the solvers on 500 units x 6 formats, in one run, on one thread.

    python benchmarks/solver.py [--units 500] [--repeats 5]

Instances are seeded: damages fall with the width, sizes are those of real formats (2, 3 and 4 bits, groups of 32 and 64).
*knapsack*: `solve_knapsack` on matrices of random sizes; *tied*: on four sizes that repeat, as in a language model; *correlated*: damage nearly
proportional to bytes saved, the hardest kind. HiGHS (`scipy.optimize.milp`) solves the same three, with its default settings and a limit of a minute.
*quadratic*: interactions of rank 96, with the lower bound; *step*: the same within a tenth of the units around that plan, without a bound.
Prints medians (seconds of one thread, waiting left out), the share of the bar of 5 s, and the ratio to HiGHS; writes benchmarks/results/solver.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, kron

from bitatlas.plan.knapsack import solve_knapsack
from bitatlas.plan.quadratic import Quadratic, solve_quadratic

RESULTS = Path(__file__).parent / "results"
BAR_SECONDS = 5.0
BITS = np.array([2, 2, 3, 3, 4, 4])
EXTRA_BITS = np.array([1.0, 0.5] * 3)  # scales and zero-points, a weight
SHAPES = (4096 * 4096, 1024 * 4096, 11008 * 4096, 4096 * 11008)
RANK = 96
TOKENS = 10
HIGHS_SECONDS = 60.0


def instance(kind: str, units: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (damage [units, 6], bytes [units, 6], limit): 40 % of the way from the least to the most."""
    generator = np.random.default_rng(seed)
    weights = np.resize(SHAPES, units) if kind == "tied" else 256 * generator.integers(4_000, 170_000, units)
    cost = (weights[:, None] * (BITS + EXTRA_BITS) / 8).astype(np.int64)
    if kind == "correlated":
        damage = -cost / 1e9 + generator.uniform(0, 1e-3, cost.shape)
    else:
        scatter = generator.lognormal(0, 1, (units, 1)) * generator.uniform(0.9, 1.1, cost.shape)
        damage = 2.0 ** (-2 * BITS) * (1 + 0.2 * (EXTRA_BITS < 1)) * scatter
    return damage, cost, int(0.6 * cost.min(1).sum() + 0.4 * cost.max(1).sum())


def interactions(damage: np.ndarray, seed: int) -> Quadratic:
    """Scores with a direction in common, as large as the damages."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(RANK, *damage.shape)) + 0.5 * generator.normal(size=(RANK, 1, 1))
    scores = (np.sqrt(damage) * noise).reshape(RANK, -1)
    return Quadratic(damage, scores.T @ scores / (2 * TOKENS * RANK))


def highs(damage: np.ndarray, cost: np.ndarray, limit: int) -> float | None:
    """Return the value that HiGHS reaches, None where it reaches none."""
    units, formats = damage.shape
    rows = [LinearConstraint(kron(csr_matrix(np.eye(units)), np.ones((1, formats))), 1, 1)]
    rows.append(LinearConstraint(cost.reshape(1, -1) / limit, -np.inf, 1))
    solution = milp(damage.ravel(), constraints=rows, integrality=1, bounds=Bounds(0, 1), options={"time_limit": HIGHS_SECONDS})
    return None if solution.x is None else float(solution.fun)


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    lines: dict[str, dict[str, float | None]] = {}
    for kind in ("knapsack", "tied", "correlated"):
        times: list[tuple[float, float]] = []
        for seed in range(args.repeats):
            problem = instance(kind, args.units, seed)
            times.append(tuple(timed(lambda s=s, problem=problem: s(*problem)) for s in (solve_knapsack, highs)))
        solution, other = solve_knapsack(*problem), highs(*problem)
        lines[kind] = {
            "seconds": statistics.median(ours for ours, _ in times),
            "ratio_to_highs": statistics.median(ours / theirs for ours, theirs in times),
            "gap_relative": solution.gap / abs(solution.value),
            "above_highs_relative": None if other is None else (solution.value - other) / abs(other),
        }
    damage, cost, limit = instance("knapsack", args.units, 0)
    problem = interactions(damage, 0)
    plan = solve_quadratic(problem, cost, limit)
    runs = {
        "quadratic": lambda: solve_quadratic(problem, cost, limit),
        "step": lambda: solve_quadratic(problem, cost, limit, plan.choice, args.units // 10, bounded=False),
    }
    for name, run in runs.items():
        lines[name] = {"seconds": statistics.median(timed(run) for _ in range(args.repeats))}
    lines["quadratic"]["gap_relative"] = plan.gap / abs(plan.value)
    for line in lines.values():
        line["share_of_the_bar"] = float(line["seconds"] or 0.0) / BAR_SECONDS
    report = {
        "benchmark": f"solvers on {args.units} units x {len(BITS)} formats",
        "machine": f"{platform.machine()}, numpy {np.__version__}, scipy {scipy.__version__}, one thread",
        "date": date.today().isoformat(),
        "bar_seconds": BAR_SECONDS,
        "repeats": args.repeats,
        "results": lines,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "solver.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
