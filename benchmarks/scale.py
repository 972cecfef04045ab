"""Measure how time and memory grow with layers, width, tokens and formats, in memory and layer by layer, beside the least that they could be.

    python benchmarks/scale.py                       # random Llama-shaped checkpoints on the CPU; about ten minutes
    python benchmarks/scale.py --gpu [--folder DIR]  # Llama-3-8B and Qwen3-32B shapes: the first plan from 128 x 2048 tokens

A point is a process of its own: it opens a checkpoint of random weights (timing needs no training), fills the bank, takes one curvature
pass at the reference, and solves for a plan. Seconds are of the processor on a CPU with one thread (waiting left out), of the clock on a GPU;
memory is the most that the process had, above what it had before it opened the model.

The *floor* of the curvature pass: its matrix products (2 x weights x tokens forward; for each label draw as much again to send gradients
back, and once more to meet the changes of weights) at the rate measured on this model's own shapes, or its bytes (weights once, the
changes of every format written and read) at the bandwidth measured here, whichever is more. Attention, norms and drawing labels are above it.

Writes benchmarks/results/scale.json (or scale-gpu.json) with date and machine, and a plot each to docs/images/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
DRAWS = 4
BASE = {"layers": 12, "width": 256, "rows": 4, "row_length": 128, "formats": 3, "vocabulary": 2048}
SERIES = {"layers": [8, 18, 36, 72], "width": [128, 256, 512, 768], "rows": [2, 4, 8, 16], "formats": [2, 3, 4, 6]}
FORMATS = ("int2_g64", "int4_g64", "int3_g64", "int8_g64", "int2_g32", "int4_g32")
GPU_SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {"layers": 32, "width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "qwen3-32b": {"layers": 64, "width": 5120, "inner": 25600, "heads": 64, "kv_heads": 8, "head_dim": 128, "vocabulary": 151936},
}
GPU_ROWS = {"rows": 128, "row_length": 2048, "formats": 3}
STREAMED_BYTES = 12 * 10**9  # of the device, where the shapes go layer by layer
RANDOM = 2**24  # numbers that are drawn; larger tensors repeat them


# --- one point, in a process of its own ----------------------------------------------------------------------------------


def make(folder: Path, point: dict[str, Any]) -> None:
    """Write a Llama-shaped checkpoint of random weights: float32 for the CPU, bfloat16 for a GPU."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    width = point["width"]
    heads = point.get("heads", width // 64)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=point["layers"], num_attention_heads=heads, num_key_value_heads=point.get("kv_heads", heads // 2),
        head_dim=point.get("head_dim", width // heads), intermediate_size=point.get("inner", 3 * width), vocab_size=point["vocabulary"],
        max_position_embeddings=max(2048, point["row_length"]), architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if point["device"] != "cpu" else torch.float32)
    drawn = torch.randn(RANDOM, generator=torch.Generator().manual_seed(0)) / width**0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), RANDOM):
                flat[start : start + RANDOM] = drawn[: len(flat) - start]
    model.save_pretrained(folder)


def measure(folder: Path, point: dict[str, Any]) -> dict[str, Any]:
    """Measure the seconds of each stage, and the peaks."""
    import torch

    from bitatlas.measure.curvature import expand
    from bitatlas.measure.damage import DamageMeter
    from bitatlas.measure.machine import peak_bytes
    from bitatlas.model.checkpoint import open_checkpoint
    from bitatlas.plan.expansion import quadratic_model
    from bitatlas.plan.quadratic import solve_quadratic
    from bitatlas.quantize.bank import Bank
    from bitatlas.records.formats import by_width
    from bitatlas.records.journal import Journal

    device = point["device"]
    formats = by_width(list(FORMATS[: point["formats"]]))
    before = peak_bytes("cpu")
    clock, seconds = Clock(device), {}
    checkpoint = open_checkpoint(str(folder))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    load_mode = load_mode_of(checkpoint, point, dtype, folder)
    seconds["open"] = clock.lap()
    decoder = checkpoint.stream_model(device, dtype) if load_mode.streamed else checkpoint.load_model(device, dtype)
    seconds["load"] = clock.lap()
    names = [module.name for module in checkpoint.modules]
    bank = Bank(decoder, names, "rtn", folder=folder / "bank")
    bank.fill(formats)
    seconds["bank"] = clock.lap()
    rows = torch.randint(point["vocabulary"], (point["rows"], point["row_length"]), generator=torch.Generator().manual_seed(1))
    passes = []
    for _ in range(1 if device != "cpu" else 2):  # the first of a process also allocates
        meter = DamageMeter(decoder, bank, checkpoint.info.weights_sha256, bank.identity, Journal(None), load_mode.state_budget)
        clock.lap()
        result = expand(meter, checkpoint.modules, formats, {}, rows, draws=DRAWS)
        passes.append(clock.lap())
    seconds["curvature"] = min(passes)
    cost = unit_costs(checkpoint.modules, formats)
    solve_quadratic(quadratic_model(result), cost, int(cost.mean(1).sum()), bounded=False)
    seconds["plan"] = clock.lap()
    shapes = [list(m.shape) for m in checkpoint.modules if m.layer == 0]
    return {
        "streamed": load_mode.streamed, "predicted_bytes": load_mode.predicted_bytes,
        "modules": len(names), "weights": checkpoint.info.quantizable_weights, "bytes": checkpoint.info.total_bytes, "seconds": seconds,
        "floor": floor(shapes, point, checkpoint.info.quantizable_weights),
        "host_peak_bytes": peak_bytes("cpu"), "host_added_bytes": peak_bytes("cpu") - before,
        "device_peak_bytes": None if device == "cpu" else peak_bytes(device),
    }  # fmt: skip


def unit_costs(modules: Sequence[Any], formats: Sequence[str]) -> Any:
    """Return the bytes of each unit in each format: [units, formats]."""
    import numpy as np

    from bitatlas.records.formats import get_format, stored_bytes
    from bitatlas.records.sizes import units_of

    return np.array([[sum(stored_bytes(m.shape, get_format(f)) for m in u.modules) for f in formats] for u in units_of(modules)])


def load_mode_of(checkpoint: Any, point: dict[str, Any], dtype: Any, folder: Path) -> Any:
    """Choose as a survey would, on a GPU with what is free there or with `STREAMED_BYTES`; on a CPU as it is asked for, however small the model."""
    from bitatlas.measure.damage import StateBudget
    from bitatlas.measure.machine import LoadMode, choose_load_mode, estimate_memory

    sizes = [point[name] for name in ("vocabulary", "rows", "row_length", "formats")]
    needed = estimate_memory(checkpoint.info, checkpoint.modules, *sizes, dtype, point["device"])
    if point["device"] != "cpu":
        return choose_load_mode(needed, STREAMED_BYTES if point["streamed"] else None, point["device"], folder)
    if point["streamed"]:
        return LoadMode(True, StateBudget(2**28, 2**28, whole=False, folder=folder), 2**31, needed.streamed)
    return choose_load_mode(needed, None, "cpu", folder)


class Clock:
    """Seconds of the processor, or of the clock where a GPU works."""

    def __init__(self, device: str):
        self.device, self.last = device, 0.0
        self.lap()

    def lap(self) -> float:
        if self.device == "cpu":
            now = time.process_time()
        else:
            import torch

            torch.cuda.synchronize()
            now = time.perf_counter()
        before, self.last = self.last, now
        return now - before


def floor(shapes: list[list[int]], point: dict[str, Any], weights: int) -> dict[str, float]:
    """Return the curvature pass's least seconds by operations and by bytes, at rates measured here. shapes: of one layer's weights [out, in]."""
    import torch

    device, size = point["device"], 4 if point["device"] == "cpu" else 2
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tokens = point["rows"] * point["row_length"]
    head = point["width"] * point["vocabulary"]
    batch = min(tokens, 2048)
    operations = seconds = 0.0
    for out, inputs in shapes:
        x, w = torch.randn(batch, inputs, device=device, dtype=dtype), torch.randn(out, inputs, device=device, dtype=dtype)
        seconds += best(lambda x=x, w=w: x @ w.T, device)
        operations += 2 * batch * out * inputs
    rate = operations / seconds
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    bandwidth = 2 * len(block) / best(lambda: other.copy_(block), device)
    needed = 2 * tokens * (weights * (1 + 2 * DRAWS) + head * (1 + DRAWS))
    moved = size * weights * (1 + 2 * point["formats"])
    return {
        "operations_per_second": rate, "bytes_per_second": bandwidth, "operations": needed, "bytes": moved,
        "seconds": max(needed / rate, moved / bandwidth),
    }  # fmt: skip


def best(run: Any, device: str, repeats: int = 5) -> float:
    clock, result = Clock(device), []
    for _ in range(repeats + 1):
        clock.lap()
        run()
        result.append(clock.lap())
    return max(min(result[1:]), 1e-9)


# --- all points ----------------------------------------------------------------------------------------------------------


def run_point(point: dict[str, Any], parent: Path | None) -> dict[str, Any]:
    """Make the checkpoint and measure on it, each in its own process, so that neither's memory is the other's."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for task in ("make", "measure"):
            words = [sys.executable, __file__, "--task", task, "--point", json.dumps(point), "--folder", folder]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return {**point, **json.loads(done.stdout.strip().splitlines()[-1])}


def on_cpu(parent: Path | None) -> dict[str, Any]:
    points: dict[str, list[dict[str, Any]]] = {}
    for name, values in SERIES.items():
        points[name] = []
        for value in values:
            for streamed in (False, True):
                result = run_point({**BASE, name: value, "streamed": streamed, "device": "cpu"}, parent)
                points[name].append(result)
                print(point_line(result), flush=True)
    per_module = [p["seconds"]["curvature"] / p["modules"] for p in points["layers"] if not p["streamed"]]
    return {
        "points": points,
        "seconds_per_module": per_module,
        "modules": [p["modules"] for p in points["layers"] if not p["streamed"]],
    }


def on_gpu(parent: Path | None) -> dict[str, Any]:
    points = []
    for name, shape in GPU_SHAPES.items():
        for streamed in (False, True):
            points.append({"shape": name, **run_point({**GPU_ROWS, **shape, "streamed": streamed, "device": "cuda"}, parent)})
            print(point_line(points[-1]), flush=True)
    return {"points": {"shapes": points}}


def point_line(p: dict[str, Any]) -> str:
    way = "streamed" if p["streamed"] else "in memory"
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in p["seconds"].items())
    peak = p["device_peak_bytes"] or p["host_added_bytes"]
    size = f"{p['layers']} layers x {p['width']}, {p['rows']} rows, {p['formats']} formats"
    return f"{size}, {way}: {seconds}; floor {p['floor']['seconds']:.2f} s; {peak / 1e6:.0f} MB"


def machine(gpu: bool) -> str:
    import torch

    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, one thread"
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--folder", type=Path, help="where checkpoints and banks lie meanwhile; the 32B shape needs 130 GB")
    parser.add_argument("--task", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        do = {"make": make, "measure": measure}[args.task]
        print(json.dumps(do(args.folder, json.loads(args.point))))
        return
    result = on_gpu(args.folder) if args.gpu else on_cpu(args.folder)
    report = {"benchmark": "time and memory by size", "machine": machine(args.gpu), "date": date.today().isoformat(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ("scale-gpu.json" if args.gpu else "scale.json")).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not args.gpu:
        from scale_plots import write_plots

        write_plots(report["points"], IMAGES)


if __name__ == "__main__":
    main()
