"""Compare what a survey says that it takes, in time and memory, with what it takes.

    python benchmarks/times.py MODEL --tokens TEXT [words of `bitatlas survey`]

Runs the survey in a folder of its own and reads what it prints: the table before the start, the stages' times, the peak. Results are added to
benchmarks/results/times.json by the model's name, seconds and bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "times.json"
UNITS = {"s": 1, "min": 60, "h": 3600}
SIZES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def main() -> None:
    model, words = sys.argv[1], sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bitatlas", "survey", model, *words, "--out", str(Path(folder) / "out")]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken = time.perf_counter() - begun
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[Path(model).resolve().name] = {"date": date.today().isoformat(), "words": words, **compared(done.stderr, taken)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results[Path(model).resolve().name], indent=1))


def compared(text: str, taken: float) -> dict[str, Any]:
    """Return what was said and what was taken, of a survey's standard error."""
    said = seconds(re.search(r"^about ([0-9.]+ \w+), by what a row takes here:$", text, re.MULTILINE)[1])  # type: ignore[index]
    table = {name: seconds(value) for name, value in re.findall(r"^  (\S.*?) {2,}([0-9.]+ \w+)$", text, re.MULTILINE)}
    stages = [(name, float(value)) for name, value in re.findall(r"^(.+): ([0-9.]+) s$", text, re.MULTILINE)]
    peak, predicted = re.search(r"^peak memory: (\S+ \wB), at most (\S+ \wB) predicted$", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    return {
        "said": said, "taken": round(taken, 1), "taken_by_said": round(taken / said, 3),
        "peak": size(peak), "predicted_peak": size(predicted), "peak_by_predicted": round(size(peak) / size(predicted), 3),
        "said_by_stage": table, "taken_by_stage": stages,
    }  # fmt: skip


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def size(text: str) -> float:
    number, unit = text.split()
    return float(number) * SIZES[unit]


if __name__ == "__main__":
    main()
