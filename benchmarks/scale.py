"""Measure what a first plan costs as models grow: its pieces, and all of it in passes forwards.

    python benchmarks/scale.py [--weights 10 30 100]  # million weights, up to 500; random Llama-shaped checkpoints, one CPU thread
    python benchmarks/scale.py --gpu [--folder DIR]   # Llama-3-8B and Qwen3-32B shapes, in memory and layer by layer

A point is a process of its own: it opens a checkpoint of random weights (timing needs no training) and takes the steps of a first plan, each timed:
*codes*: moments of inputs and gradients and `gptq` of all modules in 2, 3 and 4 bits, on the fit rows; *prices* of all units on 16 select rows;
*models*: every uniform width on 8 select rows, and the plan of the knapsack at 3 bits on all of them. *forward*: one pass of the reference over
the fit rows, with its logits. Each split has 24 rows of 192 tokens (on a GPU 128 of 2048). Seconds are of the processor on a CPU with one thread
(waiting left out), of the clock on a GPU; memory is the most that the process had, above what it had before it opened the model.

Writes benchmarks/results/scale.json (or scale-gpu.json) with date and machine.
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
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.machine import LoadMode, choose_load_mode, estimate_memory, peak_bytes
from bitatlas.measure.prices import price_units
from bitatlas.measure.screens import uniform
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import logits_of, record, token_spans
from bitatlas.plan.search import PlannerHooks, PlanningProblem, Scores, search
from bitatlas.quantize import QUANTIZERS
from bitatlas.quantize.bank import Bank
from bitatlas.records import Budget
from bitatlas.records.formats import FORMATS
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import assignment_of
from bitatlas.run.planner import PRICED_ROWS, SCALED_ROWS

RESULTS = Path(__file__).parent / "results"
NAMES = ("int2_g64", "int3_g64", "int4_g64")
CODE_BITS = 3.0
SHAPES: dict[int, dict[str, int]] = {  # million weights in linear modules -> the shape; from 100 on those of small models in use
    10: {"layers": 12, "width": 256, "inner": 768, "heads": 4, "kv_heads": 2},
    30: {"layers": 16, "width": 384, "inner": 1152, "heads": 6, "kv_heads": 3},
    100: {"layers": 30, "width": 576, "inner": 1536, "heads": 9, "kv_heads": 3},
    300: {"layers": 32, "width": 960, "inner": 2560, "heads": 15, "kv_heads": 5},
    500: {"layers": 36, "width": 1152, "inner": 3072, "heads": 18, "kv_heads": 6},
}
ROWS = {"rows": 24, "row_length": 192, "vocabulary": 32000}
GPU_SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {"layers": 32, "width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "qwen3-32b": {"layers": 64, "width": 5120, "inner": 25600, "heads": 64, "kv_heads": 8, "head_dim": 128, "vocabulary": 151936},
}
GPU_ROWS = {"rows": 128, "row_length": 2048}
STREAMED_BYTES = 12 * 10**9  # of the device, where the shapes go layer by layer
FORWARD_ROWS = 8  # that go through the model together
RANDOM = 2**24  # numbers that are drawn; larger tensors repeat them


# --- one point, in a process of its own ----------------------------------------------------------------------------------


def make(folder: Path, point: dict[str, Any]) -> None:
    """Write a Llama-shaped checkpoint of random weights: float32 for the CPU, bfloat16 for a GPU."""
    width, heads = point["width"], point["heads"]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=point["layers"], num_attention_heads=heads, num_key_value_heads=point["kv_heads"],
        head_dim=point.get("head_dim", width // heads), intermediate_size=point["inner"], vocab_size=point["vocabulary"],
        max_position_embeddings=2048, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_on(point["device"]))
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


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def measure(folder: Path, point: dict[str, Any]) -> dict[str, Any]:
    """Take the steps of a first plan: their seconds, and the peaks."""
    device, before = point["device"], peak_bytes("cpu")
    clock, seconds = Clock(device), {}
    checkpoint = open_checkpoint(str(folder))
    mode = load_mode_of(checkpoint, point, folder)
    load = checkpoint.stream_model if mode.streamed else checkpoint.load_model
    decoder = load(device, dtype_on(device))
    generator = torch.Generator().manual_seed(1)
    fit, select = torch.randint(point["vocabulary"], (2, point["rows"], point["row_length"]), generator=generator)
    bank = Bank(decoder, [module.name for module in checkpoint.modules], "gptq", rows=fit, folder=folder / "bank")
    last = bank.modules[-1:]
    list(QUANTIZERS["gptq"].quantize(decoder, last, [FORMATS[name] for name in NAMES], fit[:1]))  # compiles
    meter = DamageMeter(decoder, bank, checkpoint.info.weights_sha256, bank.identity, Journal(None), mode.state_budget)
    clock.lap()
    forward(decoder, fit)
    seconds["forward"] = clock.lap()
    bank.fill(NAMES)
    seconds["codes"] = clock.lap()
    prices = price_units(meter, checkpoint.modules, NAMES, select[:PRICED_ROWS])
    seconds["prices"] = clock.lap()
    plan(checkpoint, meter, prices, select)
    seconds["models"] = clock.lap()
    forward(decoder, fit)  # once more: what else the machine does comes and goes
    seconds["forward"] = min(seconds["forward"], clock.lap())
    total = seconds["codes"] + seconds["prices"] + seconds["models"]
    return {
        "streamed": mode.streamed, "predicted_bytes": mode.predicted_bytes,
        "modules": len(bank.modules), "weights": checkpoint.info.quantizable_weights, "bytes": checkpoint.info.total_bytes,
        "seconds": seconds, "first_plan_seconds": total, "first_plan_per_forward": total / seconds["forward"],
        "host_peak_bytes": peak_bytes("cpu"), "host_added_bytes": peak_bytes("cpu") - before,
        "device_peak_bytes": None if device == "cpu" else peak_bytes(device),
    }  # fmt: skip


@torch.no_grad()
def forward(decoder: Decoder, rows: Tensor) -> None:
    """Run the reference over `rows` int64 [rows, tokens] and make its logits."""
    batches = list(rows.to(decoder.device).split(FORWARD_ROWS))
    for batch, final in zip(batches, record(decoder, batches).final, strict=True):
        for span in token_spans(*batch.shape, decoder.vocabulary):
            logits_of(decoder, batch[:, span], final[:, span])


def plan(checkpoint: Checkpoint, meter: DamageMeter, prices: np.ndarray, select: Tensor) -> None:
    """Measure the uniform widths on a few rows, solve for a plan of `CODE_BITS`, and measure that. prices: [units, formats]"""
    problem = PlanningProblem(checkpoint.info, checkpoint.modules, NAMES, meter.bank.identity)
    widths = meter.plans({name: uniform(checkpoint.modules, name) for name in NAMES}, select[:SCALED_ROWS])
    scores = Scores({"prices": prices - prices[:, -1:]}, float(widths[NAMES[-1]].mean()))

    def on_select(plans: Any) -> dict[str, float]:
        by_row = meter.plans({name: assignment_of(problem.units, NAMES, choice) for name, choice in plans.items()}, select)
        return {name: float(damage.mean()) for name, damage in by_row.items()}

    search(problem, Budget("code_bits", CODE_BITS), PlannerHooks(scores, on_select))


def load_mode_of(checkpoint: Checkpoint, point: dict[str, Any], folder: Path) -> LoadMode:
    """Choose as a survey would, on a GPU with what is free there or with `STREAMED_BYTES`."""
    device = point["device"]
    sizes = point["vocabulary"], point["rows"], point["row_length"], len(NAMES)
    needed = estimate_memory(checkpoint.info, checkpoint.modules, *sizes, dtype_on(device), device)
    return choose_load_mode(needed, STREAMED_BYTES if point["streamed"] else None, device, folder)


class Clock:
    """Seconds of the processor, or of the clock where a GPU works."""

    def __init__(self, device: str):
        self.device, self.last = device, 0.0
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        if self.device == "cpu":
            now = time.process_time()
        else:
            torch.cuda.synchronize()
            now = time.perf_counter()
        before, self.last = self.last, now
        return now - before


# --- all points ----------------------------------------------------------------------------------------------------------


def run_point(point: dict[str, Any], parent: Path | None) -> dict[str, Any]:
    """Make the checkpoint and measure on it, each in its own process, so that neither's memory is the other's."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for task in ("make", "measure"):
            words = [sys.executable, __file__, "--task", task, "--point", json.dumps(point), "--folder", folder]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    result = {**point, **json.loads(done.stdout.strip().splitlines()[-1])}
    print(point_line(result), flush=True)
    return result


def points_of(gpu: bool, weights: list[int]) -> list[dict[str, Any]]:
    """Return what is measured: each shape by itself, on a GPU in memory and layer by layer."""
    if not gpu:
        return [{"shape": f"{size} M", **ROWS, **SHAPES[size], "streamed": False, "device": "cpu"} for size in weights]
    return [
        {"shape": name, **GPU_ROWS, **shape, "streamed": streamed, "device": "cuda"}
        for name, shape in GPU_SHAPES.items()
        for streamed in (False, True)
    ]


def point_line(p: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in p["seconds"].items())
    way = "layer by layer" if p["streamed"] else "in memory"
    peak = (p["device_peak_bytes"] or p["host_added_bytes"]) / 1e6
    plan_text = f"first plan {p['first_plan_seconds']:.1f} s, {p['first_plan_per_forward']:.1f} passes forwards"
    return f"{p['weights'] / 1e6:.1f} M weights in {p['modules']} modules, {way}: {seconds}; {plan_text}; {peak:.0f} MB"


def machine(gpu: bool) -> str:
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, one thread"
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--weights", type=int, nargs="+", choices=list(SHAPES), default=[10, 30, 100], help="million")
    parser.add_argument("--folder", type=Path, help="where checkpoints and banks lie meanwhile; the 32B shape needs 130 GB")
    parser.add_argument("--task", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        torch.set_num_threads(1)
        do = {"make": make, "measure": measure}[args.task]
        print(json.dumps(do(args.folder, json.loads(args.point))))
        return
    points = [run_point(point, args.folder) for point in points_of(args.gpu, args.weights)]
    report = {
        "benchmark": "a first plan by size",
        "machine": machine(args.gpu),
        "date": date.today().isoformat(),
        "points": points,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ("scale-gpu.json" if args.gpu else "scale.json")).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
