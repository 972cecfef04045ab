"""Time swap measurements on one and on two Ray workers of this machine, one thread each, and without Ray, in one run.

    python benchmarks/distributed.py [MODEL] [--rows 16] [--repeats 5]

Every unit of the model is measured in its narrow format around the wide one (`DamageMeter.swaps`), again and again in turns: without Ray,
with one worker, with two. Workers are warm: their processes have opened the model and hold its codes, as they do in a survey but for
its first stage. "One worker" is the same cluster with pieces that take both processors each. Results must be equal to the last bit, or
it stops. Prints medians and ratios and writes benchmarks/results/distributed.json. Run it on a quiet machine, or with real-time
priority (`chrt -r 10 python benchmarks/distributed.py`); which it was stands in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitatlas.data as demo
from bitatlas.measure.damage import Swap
from bitatlas.measure.screens import uniform
from bitatlas.progress import Reporter
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import units_of
from bitatlas.run.options import SurveyOptions
from bitatlas.run.prepare import Session, prepare
from bitatlas.run.ray.scheduler import Scheduler
from bitatlas.run.settings import Settings

LOW, HIGH = "int2_g64", "int4_g64"
WORKERS = 2
RESULTS = Path(__file__).parent / "results"


def opened(model: str, rows: int, out: Path, scheduler: Scheduler) -> Session:
    options = SurveyOptions(
        model, tokens=demo.TEXT_FILE, formats=(LOW, HIGH), rows=(rows, 2, 2), tasks=(), limit=None, refine=False
    )
    session = prepare(Settings.of(options), out, False, Reporter(quiet=True), scheduler.connect)
    scheduler.configure(session)
    return session


def only(scheduler: Scheduler, task: Any, workers: int) -> None:
    """Run so many pieces at once: each takes its share of the processors. `task`: the scheduler's own."""
    scheduler.slots = workers
    scheduler._work = task.options(num_cpus=WORKERS // workers)


def measured(session: Session, swaps: dict[str, Swap], scheduler: Scheduler | None) -> tuple[float, np.ndarray]:
    """Return seconds, and the damage of every swap on every row."""
    session.journal = session.meter.journal = Journal(None)
    session.meter.workers = scheduler
    start = time.perf_counter()
    damage = session.meter.swaps(uniform(session.checkpoint.modules, HIGH), swaps, session.rows.fit)
    return time.perf_counter() - start, np.stack([damage[name] for name in swaps])


def timed(session: Session, scheduler: Scheduler, swaps: dict[str, Swap], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"without Ray": [], "1 worker": [], "2 workers": []}
    task = scheduler._work
    for repeat in range(-1, repeats):
        results = []
        for name, workers in (("without Ray", 0), ("1 worker", 1), ("2 workers", WORKERS)):
            only(scheduler, task, workers or 1)
            seconds, values = measured(session, swaps, scheduler if workers else None)
            results.append(values)
            if repeat >= 0:  # the first round warms up
                times[name].append(seconds)
        assert all(np.array_equal(results[0], other) for other in results[1:]), "results differ"
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(demo.MODEL_DIR))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, closing(Scheduler("auto", Reporter(quiet=True))) as scheduler:
        session = opened(args.model, args.rows, Path(folder) / "out", scheduler)
        assert scheduler.slots == WORKERS, f"this machine offers {scheduler.slots} workers"
        with closing(session.journal):
            session.bank.fill((LOW, HIGH))
            units = units_of(session.checkpoint.modules)
            swaps = {unit.name: Swap(unit.layer, {m.name: LOW for m in unit.modules}) for unit in units}
            times = timed(session, scheduler, swaps, args.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [first / second for first, second in zip(times["1 worker"], times["2 workers"], strict=True)]
    report = {
        "benchmark": "swap measurements on one and two Ray workers, one thread each",
        "model": session.checkpoint.info.name,
        "swaps": len(swaps),
        "rows": list(session.rows.fit.shape),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}",
        "load_before": load,
        "real_time_priority": os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO),
        "date": date.today().isoformat(),
        "median_seconds": medians,
        "median_speedup_2_workers_over_1": statistics.median(ratios),
        "speedups_2_workers_over_1": ratios,
        "median_speedup_2_workers_over_none": statistics.median(
            none / second for none, second in zip(times["without Ray"], times["2 workers"], strict=True)
        ),
        "equal_to_the_last_bit": True,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "distributed.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
