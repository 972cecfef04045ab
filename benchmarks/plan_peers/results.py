"""The results file: settings, one cell for each checkpoint and budget, one entry for each method, and what they come to together.

Finished entries are kept from run to run, so that an interrupted run goes on and a subset can be measured again; a file made with other
settings is refused, never mixed. Every entry keeps its damage row by row, so that ratios to bitatlas are paired and follow from the file
alone. Nothing in it names the machine; it says how many cores there were.
"""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.errors import UserError
from bitatlas.stats.bootstrap import percentile_interval, resample_means

SCHEMA = "bitatlas.peers/1"
OURS = "bitatlas"
LIBRARIES = ("bitatlas", "torch", "transformers", "numpy", "scipy")


def open_results(path: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """The file's content, or an empty one. UserError where it was made with other settings."""
    empty = {"schema": SCHEMA, "settings": settings, "machine": {}, "versions": {}, "cells": {}, "together": {}}
    if fresh or not path.is_file():
        return empty
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("schema") != SCHEMA or content.get("settings") != settings:
        raise UserError(
            f"--results {path.name}: was made with other settings, and numbers of different settings are not mixed; "
            "give another file, or --fresh to start it again"
        )
    return content


def save_results(path: Path, content: dict[str, Any]) -> None:
    """Written beside, then renamed; comparisons are made anew."""
    content["machine"] = {"cores": os.cpu_count(), "architecture": platform.machine()}
    content["versions"] = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    for cell in content["cells"].values():
        compare(cell["methods"])
    content["together"] = together(content["cells"])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def cell_of(content: dict[str, Any], key: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The cell under `key`, made where there is none; UserError where its checkpoint or rows are not these."""
    cell: dict[str, Any] = content["cells"].setdefault(key, {**facts, "methods": {}})
    told = {name: value for name, value in cell.items() if name != "methods"}
    if told != facts:
        raise UserError(f"{key}: the results file has it from other weights or other rows; give another --results, or --fresh")
    return cell


def compare(methods: dict[str, dict[str, Any]]) -> None:
    """Add to every entry: its damage less ours, and ours divided by its, on the same rows, with intervals. Without ours: nothing."""
    ours = methods.get(OURS, {}).get("rows")
    for entry in methods.values():
        entry.pop("more_than_ours_nats", None), entry.pop("ours_to_it", None)
        if ours is None or "rows" not in entry:
            continue
        pair = resample_means(np.stack([ours, entry["rows"]], axis=1))  # [resamples, 2]
        n = len(ours)
        mine, its = float(np.mean(ours)), entry["damage_nats"]
        low, high = percentile_interval(pair[:, 1] - pair[:, 0], n)
        entry["more_than_ours_nats"] = {"mean": its - mine, "ci95": [float(low), float(high)]}
        low, high = percentile_interval(pair[:, 0] / pair[:, 1], n)
        entry["ours_to_it"] = {"ratio": mine / its, "ci95": [float(low), float(high)]}


def together(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """label -> geometric mean over cells of (our damage / its), its interval by bootstrap over rows, and over which cells.

    Cells of one checkpoint share their test rows, and the same draws: resampling keeps that.
    """
    labels = list(dict.fromkeys(label for cell in cells.values() for label in cell["methods"] if label != OURS))
    found = {}
    for label in labels:
        both = {
            key: (cell["methods"][OURS]["rows"], cell["methods"][label]["rows"])
            for key, cell in cells.items()
            if "rows" in cell["methods"].get(label, {}) and "rows" in cell["methods"].get(OURS, {})
        }
        if not both:
            continue
        logs = []
        for ours, its in both.values():
            pair = resample_means(np.stack([ours, its], axis=1))
            logs.append(np.log(pair[:, 0] / pair[:, 1]))
        exact = np.mean([math.log(np.mean(ours) / np.mean(its)) for ours, its in both.values()])
        least = min(len(ours) for ours, _ in both.values())
        low, high = percentile_interval(np.exp(np.mean(logs, axis=0)), least)
        found[label] = {"geometric_mean_ratio": math.exp(exact), "ci95": [float(low), float(high)], "cells": list(both)}
    return found
