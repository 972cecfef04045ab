"""Measure what a draft costs and what it is worth: `survey --draft` and the survey beside it, on given checkpoints and sizes.

    python benchmarks/draft.py MODEL:TEXT [MODEL:TEXT ...]

Both find a plan under the same budget and judge it on the same test rows; tasks and the curve are left out. Seconds are of the processor,
one thread, everything included. Damage is on the test rows, nats/token. Writes benchmarks/results/draft.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "draft.json"
BITS = (2.5, 3.0)
FORMATS = "int2_g32,int4_g32"


def main() -> None:
    results = []
    for word in sys.argv[1:]:
        model, _, text = word.partition(":")
        for bits in BITS:
            results.append(compare(model, text, bits))
            print(result_line(results[-1]), flush=True)
    report = {
        "benchmark": "draft against survey",
        "machine": platform.machine(),
        "date": date.today().isoformat(),
        "found": results,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def compare(model: str, text: str, bits: float) -> dict[str, Any]:
    words = [model, "--tokens", text, "--tasks", "none", "--no-curve", "--formats", FORMATS, "--code-bits", str(bits)]
    draft, survey = (run([*words, *more]) for more in (["--draft"], []))
    return {"model": Path(model).name, "code_bits": bits, "draft": draft, "survey": survey}


def run(words: list[str]) -> dict[str, Any]:
    """Return seconds of the processor, the plan's damage, and that of the best plan anybody could have made."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as out:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-m", "bitatlas", "survey", *words, "--out", f"{out}/run", "--quiet"], env=environment, stdout=subprocess.PIPE, check=True)  # fmt: skip
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        plan = json.loads(Path(out, "run", "plan.json").read_text(encoding="utf-8"))
    simple = min(baseline["damage"]["mean"] for baseline in plan["baselines"])
    return {
        "seconds": seconds,
        "damage": plan["damage"]["measured"],
        "best_simple_plan": simple,
        "recommended": plan["recommended"],
    }


def result_line(result: dict[str, Any]) -> str:
    draft, survey = result["draft"], result["survey"]
    damages = f"{draft['damage']['mean']:.3f} against {survey['damage']['mean']:.3f} (best simple plan {survey['best_simple_plan']:.3f})"
    times = f"{draft['seconds']:.0f} s against {survey['seconds']:.0f} s, {survey['seconds'] / draft['seconds']:.1f}x"
    return f"{result['model']} at {result['code_bits']:g} code bits: damage {damages}; {times}"


if __name__ == "__main__":
    main()
