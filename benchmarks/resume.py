"""Measure what resuming at the swapped layer saves: the screen of layers with it against the same screen in full passes, in one run.

    python benchmarks/resume.py [MODEL] [--rows 16] [--repeats 5]

The floor is arithmetic: multiply-adds of the matrices that have to run (every layer from the swapped one on, the head, and per batch one
reference pass and one base pass), at the matrix rate that this machine reaches on the model's own largest shape.
Prints medians and ratios and writes benchmarks/results/resume.json. Results must be equal to the last bit, or it stops.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

import bitatlas.data as demo
from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.measure.screens import uniform
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import split_rows
from bitatlas.quantize.bank import Bank
from bitatlas.records import Module
from bitatlas.records.journal import Journal

LOW, HIGH = "int2_g64", "int4_g64"
RESULTS = Path(__file__).parent / "results"


def matrix_rate(rows: int, inner: int, columns: int) -> float:
    """Return multiply-adds a second of a float32 product of this shape: the median of 20."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return rows * inner * columns / statistics.median(times)


def floor_seconds(decoder: Decoder, modules: Sequence[Module], rows: int, length: int) -> float:
    """Return the least seconds of the screen: multiply-adds of what has to run, at the rate of the model's largest matrix."""
    layers = len(decoder.layers)
    per_layer = [sum(m.weights for m in modules if m.layer == i) for i in range(layers)]
    head = decoder.vocabulary * decoder.width
    batches = len(split_rows(decoder, torch.zeros(rows, length)))
    tokens = rows * length
    work = tokens * (sum(sum(per_layer[i:]) + head for i in range(layers)) + 2 * (sum(per_layer) + head))
    widest = max(modules, key=lambda m: m.weights).shape
    return work / matrix_rate(-(-tokens // batches), widest[1], widest[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(demo.MODEL_DIR))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    decoder = checkpoint.load_model()
    modules = checkpoint.modules
    names = [module.name for module in modules]
    bank = Bank(decoder, names, "rtn")
    meter = DamageMeter(decoder, bank, checkpoint.info.weights_sha256, "rtn", Journal(None))
    ids = torch.randint(0, decoder.vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    base = uniform(modules, HIGH)
    swaps = {str(i): Swap(i, {m.name: LOW for m in modules if m.layer == i}) for i in range(checkpoint.info.layers)}
    whole = {name: {**base, **swap.assignment} for name, swap in swaps.items()}
    bank.weights(base), bank.weights(uniform(modules, LOW))  # quantize before the clock starts
    times: dict[str, list[float]] = {"resumed": [], "full": []}
    for _ in range(args.repeats):
        results = {}
        for name, measure in (("resumed", lambda: meter.swaps(base, swaps, ids)), ("full", lambda: meter.plans(whole, ids))):
            meter.journal = Journal(None)
            start = time.perf_counter()
            results[name] = measure()
            times[name].append(time.perf_counter() - start)
        assert all(np.array_equal(results["resumed"][key], results["full"][key]) for key in swaps), "results differ"
    floor = floor_seconds(decoder, modules, args.rows, args.length)
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = {
        "benchmark": "screen of layers, resumed against full passes",
        "model": checkpoint.info.name,
        "layers": checkpoint.info.layers,
        "rows": [args.rows, args.length],
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "median_ratio_resumed_to_full": statistics.median(a / b for a, b in zip(times["resumed"], times["full"], strict=True)),
        "ratios": [a / b for a, b in zip(times["resumed"], times["full"], strict=True)],
        "resumed_to_floor": medians["resumed"] / floor,
        "equal_to_the_last_bit": True,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "resume.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
