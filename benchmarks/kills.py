"""Check that a survey killed without warning (SIGKILL) at random moments and resumed each time writes the same files, and measures nothing twice.

    python benchmarks/kills.py [MODEL] [--kills 20] [--seed 0]

One survey runs undisturbed and is timed. Another is killed `kills` times, each time at a random moment of what the first took, and
resumed; one that finishes in between starts again from nothing. Then it is left to finish. What is compared: every file that a
survey writes except the journal and the bank's own dates, byte for byte, and the journal's entries, which must be the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import bitatlas.data as demo

OPTIONS = (
    "--formats",
    "int2_g128,int4_g128",
    "--rows",
    "4,4,8",
    "--tasks",
    "demo_questions",
    "--limit",
    "20",
    "--no-refine",
    "--quiet",
)
RESULTS = Path(__file__).resolve().parent / "results" / "kills.json"


def command(model: str, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "bitatlas",
        "survey",
        model,
        "--tokens",
        str(demo.TEXT_FILE),
        "--out",
        str(out),
        "--resume",
        *OPTIONS,
    ]


def whole(model: str, out: Path) -> float:
    """Run to the end; seconds."""
    start = time.time()
    subprocess.run(command(model, out), check=True, stdout=subprocess.DEVNULL)
    return time.time() - start


def killed(model: str, out: Path, after: float) -> bool:
    """Start, and kill after so many seconds; False where it had finished."""
    process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def files(out: Path) -> dict[str, bytes]:
    """Return what a survey wrote, the journal left out."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file() and "run.sqlite" not in f.name}


def entries(out: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(out / "run.sqlite")) as database:
        return database.execute("SELECT key, value FROM measured ORDER BY key").fetchall()


def measured_again(out: Path) -> int:
    """Count entries that were written a second time: each took a new row number."""
    with closing(sqlite3.connect(out / "run.sqlite")) as database:
        last, count = database.execute("SELECT MAX(rowid), COUNT(*) FROM measured").fetchone()
    return int(last - count)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(demo.MODEL_DIR))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, out = Path(folder) / "undisturbed", Path(folder) / "killed"
        seconds = whole(args.model, undisturbed)
        kills, finished, counts = 0, 0, []
        while kills < args.kills:
            if killed(args.model, out, chance.uniform(0, seconds)):
                kills += 1
                counts.append(len(entries(out)) if (out / "run.sqlite").exists() else 0)
                print(f"kill {kills}: {counts[-1]} measurements kept", flush=True)
            else:
                finished += 1
                shutil.rmtree(out)
        last = whole(args.model, out)
        mine, other = files(out), files(undisturbed)
        differing = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
        same_entries = entries(out) == entries(undisturbed)
        result = {
            "date": time.strftime("%Y-%m-%d"), "kills": kills, "finished_between": finished, "seconds_undisturbed": round(seconds, 1),
            "seconds_last_resume": round(last, 1), "kept_after_each_kill": counts, "files": len(other), "files_that_differ": differing,
            "measurements": len(entries(undisturbed)), "same_measurements": same_entries, "measured_again": measured_again(out),
        }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
