"""The commands that go on from a plan, as text to copy: verify, apply, and every runtime whose files `bitatlas export` can write of it.

What a runtime can hold is told again here in one line each, because the export itself needs torch and a report does not; a test
compares the two for every format.
"""

from __future__ import annotations

import shlex

from bitatlas.records import Atlas, Plan
from bitatlas.records.runtimes import RUNTIMES, fits


def commands(atlas: Atlas, plan: Plan, place: str) -> list[str]:
    """Shell commands for the folder of the report. `place`: the plan's file, from there."""
    model, file = shlex.quote(str(atlas.settings.get("model", atlas.model.name))), shlex.quote(place)
    used = {name: plan.formats[name] for name in plan.modules.values()}
    found = [f"bitatlas verify {model} {file}"]
    stem = place.rpartition("/")[2].removesuffix(".json")
    if not any(fmt.runtime for fmt in used.values()):
        found.append(f"bitatlas apply {model} {file} --out {shlex.quote(f'{stem}-packed')}")
    for name, runtime in RUNTIMES.items():
        if fits(runtime, plan, atlas.modules):
            given = f" --model {model}" if runtime.model else ""
            found.append(f"bitatlas export {file} --to {name}{given} --out {shlex.quote(f'{stem}-{name}')}")
    return found
