"""Loads an exported folder in mlx-lm and compares its logits with those of our reconstruction.

python check_mlx.py FOLDER MODEL JOB.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

PASSES = 5  # timed


def tokens_per_second(model, ids) -> float:
    times = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        mx.eval(model(ids))
        times.append(time.perf_counter() - start)
    return ids.size / statistics.median(times[1:])


def levels(weight: np.ndarray, group_size: int) -> int:
    """The most distinct values in any group of `weight` [out, in]."""
    groups = np.sort(weight.reshape(-1, group_size), axis=1)
    return int(((np.diff(groups, axis=1) > 1e-3 * (groups[:, -1:] - groups[:, :1])).sum(1) + 1).max())


def main() -> None:
    folder, reference, job_file = sys.argv[1:4]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    model, _ = load_model(Path(folder))
    named = dict(model.named_modules())
    ids = mx.array(job["ids"])
    logits = np.array(model(ids).astype(mx.float32))
    found = {}
    for name, told in job["modules"].items():
        module = named[job["paths"][name]]
        weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
        found[name] = {"bits": module.bits, "group_size": module.group_size, "levels": levels(np.array(weight.astype(mx.float32)), told["group_size"])}  # fmt: skip
    for name in job["kept"]:
        found[name] = {"unchanged": not hasattr(named[job["paths"][name]], "scales")}
    result = {
        "package": f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}",
        "modules": found,
        "largest_difference": float(np.abs(logits - np.array(job["logits"], dtype=np.float32)).max()),
        "against": "our reconstruction in torch",
        "tokens_per_second": tokens_per_second(model, ids),
    }
    try:
        before, _ = load_model(Path(reference))
    except TypeError as error:  # mlx-lm does not know what transformers 5 calls the rotary settings of GPT-NeoX
        result["unquantized"] = str(error)
    else:
        clean = np.array(before(ids).astype(mx.float32))
        result["largest_difference_unquantized"] = float(np.abs(clean - np.array(job["clean"], dtype=np.float32)).max())
        result["tokens_per_second_unquantized"] = tokens_per_second(before, ids)
    print(json.dumps(result))


main()
