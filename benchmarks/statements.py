"""Count, for every sentence that can say "holds", how often it is said where it is false; write the table of `docs/words.md`.

    python benchmarks/statements.py [--runs 500] [--only WORD]

Runs are independent worlds with seeds 0, 1, ...; results go to `benchmarks/results/statements.json`. Ends with 1 where a rate is above its
promise by more than two standard errors.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import simulations
from simulations import Rate, Simulation, rate_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "statements.json"
PAGE = HERE.parent / "docs" / "words.md"
BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"


def all_simulations() -> list[tuple[str, int, Simulation]]:
    """Return (module, index, simulation) of every module of the package `simulations`, in alphabetical order."""
    result = []
    for info in sorted(pkgutil.iter_modules(simulations.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"simulations.{info.name}")
        result += [(info.name, index, simulation) for index, simulation in enumerate(module.SIMULATIONS)]
    return result


def count(name: str, index: int, runs: int) -> Rate:
    """Run one simulation; a function of picklable arguments, for a pool of processes."""
    return rate_of(importlib.import_module(f"simulations.{name}").SIMULATIONS[index], runs)


def table(rows: list[tuple[Simulation, Rate]]) -> str:
    """Return the Markdown table of `docs/words.md`."""
    lines = ["| sentence or interval | simulated world | wrong, of runs | promised at most |", "|---|---|---|---|"]
    for simulation, rate in rows:
        lines.append(
            f"| {simulation.sentence} | {simulation.truth} | {100 * rate.rate:.1f} % of {rate.runs} | {100 * rate.nominal:g} % |"
        )
    return "\n".join(lines)


def write(rows: list[tuple[Simulation, Rate]]) -> None:
    """Write the results, and the table between its two marks in the page."""
    content = [
        {"sentence": s.sentence, "truth": s.truth, "wrong": r.wrong, "runs": r.runs, "nominal": r.nominal} for s, r in rows
    ]
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--only", help="only sentences that hold this word; nothing is written")
    args = parser.parse_args()
    chosen = [entry for entry in all_simulations() if not args.only or args.only in entry[2].sentence]
    rows = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rates = [pool.submit(count, name, index, args.runs) for name, index, _ in chosen]
        for (_, _, simulation), future in zip(chosen, rates, strict=True):
            rate = future.result()
            rows.append((simulation, rate))
            mark = "" if rate.kept else "   <-- above its promise"
            print(
                f"{100 * rate.rate:5.1f} % of {rate.runs}  (at most {100 * rate.nominal:g} %)  {simulation.sentence}{mark}",
                flush=True,
            )
    if not args.only:
        write(rows)
    return 0 if all(rate.kept for _, rate in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
