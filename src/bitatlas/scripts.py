"""What a command says to a script (`--json`): one object on stdout, its schema named, records as they are in the files.

Only stdout changes: progress stays on stderr, and files, refusals and exit codes are the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitatlas.records import Atlas, Plan

if TYPE_CHECKING:
    from bitatlas.compare import Comparison
    from bitatlas.curve import Curve
    from bitatlas.verify import Verification

SURVEYED = ("model", "uniform", "layers", "zones", "tasks", "task_pairs", "plan", "findings", "notes")


def print_survey(atlas: Atlas, out: Path) -> None:
    """The main results, and where the files are; `atlas.json` there has everything."""
    files = {"atlas": out / "atlas.json", "plan": out / "plan.json", "report": out / "report.html"}
    _print("bitatlas.survey/1", files=files, **{name: getattr(atlas, name) for name in SURVEYED})


def print_plan(plan: Plan, file: Path) -> None:
    _print("bitatlas.planned/1", file=file, plan=plan)


def print_curve(curve: Curve) -> None:
    _print("bitatlas.curve/1", uniform=curve.atlas.uniform, plans=[{"file": file, "plan": plan} for plan, file in curve.plans])


def print_verification(result: Verification) -> None:
    """`kept` is the exit code's word: true means 0."""
    disk = {"what": result.disk_what, "promised": result.disk[0], "found": result.disk[1]} if result.disk else None
    promised = {"size": result.plan.size, "damage_nats": result.promised}
    found = {"size": result.size, "damage": result.damage, "disk_bytes": disk}
    tasks = [{**_plain(task), "kept": task.kept} for task in result.tasks]
    kept = {"kept": result.kept, "size_kept": result.size_kept, "damage_kept": result.damage_kept}
    _print("bitatlas.verification/1", **kept, promised=promised, found=found, tasks=tasks)


def print_comparison(result: Comparison) -> None:
    _print("bitatlas.comparison/1", **_plain(result))


def print_files(files: list[Path]) -> None:
    """Of `report`: what was written."""
    _print("bitatlas.files/1", files=files)


def _print(schema: str, **parts: Any) -> None:
    print(json.dumps({"schema": schema, **_plain(parts)}, indent=1, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """Records, paths and tuples, at any depth, as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
