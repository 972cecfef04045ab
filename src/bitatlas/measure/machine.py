"""What this machine has for a survey: processors, the threads that run the model's own layers fastest, and memory beside what is needed.

Two processors are often two threads of one core, and share its arithmetic: small products then take several times longer with two
threads than with one. A container may see all processors of its host and be allowed a few. So neither is taken for granted.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.measure.damage import REFERENCE_BYTES, STATE_BYTES, StateBudget, kl_per_row, states_of
from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import HIDDEN_BYTES, LOGIT_BYTES, batch_rows, layer_inputs, logits_of, run_layer
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import CACHE_BYTES
from bitatlas.records import ModelInfo, Module
from bitatlas.records.sizes import dtype_bytes, kept_bytes
from bitatlas.records.text import byte_size, given_size, number

CGROUP_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "quota period" in microseconds, or "max period"
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")  # cgroup v1, -1: none
CGROUP_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
TIMED_ROWS, TIMED_TOKENS = 2, 192
TIMED_SECONDS = 1.0  # in all
SPEED_ROWS, SPEED_TIMES = 8, 3
WORTH = 0.95  # more threads are taken where they need at most this part of the time


def processors() -> int:
    """Return how many processors this process may use: those it is bound to, and no more than its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _quota())))


def _quota() -> float:
    """Processors' worth of time that the container has, infinite without a limit."""
    try:
        if CGROUP_MAX.is_file():
            quota, period = CGROUP_MAX.read_text().split()
        else:
            quota, period = CGROUP_QUOTA.read_text(), CGROUP_PERIOD.read_text()
        return int(quota) / int(period) if quota.strip() not in ("max", "-1") else math.inf
    except (OSError, ValueError):
        return math.inf


def thread_counts(most: int) -> list[int]:
    """Return the numbers of threads to try: 1, 2, 4, … and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


@torch.no_grad()
def time_threads(decoder: Decoder) -> dict[int, float]:
    """Time the model's first layer on a few rows with 1, 2, 4, … threads: threads -> seconds, the best of some. Under two seconds.

    The number of threads is what it was afterwards. Empty where there is nothing to choose: one processor, or a model that is not on the CPU.
    """
    counts, before = thread_counts(processors()), torch.get_num_threads()
    if decoder.device.type != "cpu" or len(counts) < 2:
        return {}
    times = dict.fromkeys(counts, math.inf)
    ids = decoder.probe_ids()[0].repeat(1 + TIMED_TOKENS)[: min(TIMED_TOKENS, decoder.context)].repeat(TIMED_ROWS, 1)
    try:
        start = layer_inputs(decoder, ids)
        with decoder.held(0):
            end = time.perf_counter() + TIMED_SECONDS
            while time.perf_counter() < end:
                for count in counts:  # in turn, so that other work on the machine meets all of them
                    torch.set_num_threads(count)
                    begun = time.perf_counter()
                    run_layer(decoder.layers[0], start.hidden, start.call(0, start.fresh()))
                    times[count] = min(times[count], time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)
    return times


@torch.no_grad()
def row_seconds(decoder: Decoder, row_length: int) -> float:
    """Time the model's first layer and its head on a few rows: seconds of a row through all of it, about, its damage included."""
    tokens = min(row_length, decoder.context)
    ids = decoder.probe_ids()[0].repeat(1 + tokens)[:tokens].repeat(SPEED_ROWS, 1)
    start = layer_inputs(decoder, ids)
    with decoder.held(0):
        layer = _best_of(lambda: run_layer(decoder.layers[0], start.hidden, start.call(0, start.fresh())), decoder.device)
    head = _best_of(lambda: kl_of_row(decoder, ids[:1], start.hidden[:1]), decoder.device)
    return layer * len(decoder.layers) / SPEED_ROWS + head


def _best_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of a few runs."""
    times = []
    for _ in range(SPEED_TIMES):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def kl_of_row(decoder: Decoder, ids: Tensor, final: Tensor) -> Tensor:
    """Return what measuring a row costs beside the layers: logits of a last hidden state, and a divergence."""
    logits = logits_of(decoder, ids, final).float()
    return kl_per_row(torch.log_softmax(logits, dim=-1), logits)


def use_threads(decoder: Decoder, threads: int | None, reporter: Reporter) -> None:
    """Run on `threads` threads; without a number on OMP_NUM_THREADS, else on as many as are fastest here, and say so."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and (times := time_threads(decoder)):
        torch.set_num_threads(best := best_threads(times))
        others = ", ".join(
            f"{number(times[count] / times[best], 1)} times as long with {count}" for count in times if count != best
        )
        reporter.say(f"{best} thread{'s' * (best > 1)}: the model's first layer takes {others} (--threads)")


def best_threads(times: dict[int, float]) -> int:
    """Return the number of threads that is fastest; fewer where more gain next to nothing."""
    best = min(times)
    for count in sorted(times):
        if times[count] <= WORTH * times[best]:
            best = count
    return best


# --- memory --------------------------------------------------------------------------------------------------------------

# Estimates how much memory a survey will need at its peak, and chooses: all weights in memory, or one decoder layer at a time.
#
# The sum has a term for each thing that is alive at the same time: this process as it is, what is outside the layers, the weights (of all
# layers, or of the largest), its changes of weights in every format, the activations of one layer, a few arrays of logits, codes and hidden
# states. Terms are upper bounds, so the prediction is an upper bound of what `peak_bytes` measures, tested to be within a half of it.
#
# On an accelerator `--memory` is of the device; hidden states wait in the host's memory. Tasks add what their library imports and a cache of keys
# and values, as one number: a survey of SmolLM2-135M with ARC and SVAMP had 0.14 GB more at its peak than was predicted without it.

LIBRARIES_BYTES = 2**29  # what later stages import and allocate: tables, statistics, templates, the allocator's slack
TASK_BYTES = 2**28
LOGIT_ARRAYS = 7  # alive at once where two models' logits are compared and sent backwards
FREE_SHARE = 0.9  # of the memory at hand that is taken without being asked
DEVICE_STATE_BYTES = 2**33  # of hidden states on an accelerator, where making weights of codes is what takes long
LEAST_LOGITS = 2**24  # bytes of an array of logits, layer by layer
LEAST_STATES = 2**24  # bytes of hidden states without which nothing can be measured


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes at the peak, with the least memory for hidden states (layer by layer, for codes too)."""

    whole: int
    streamed: int
    states: int = STATE_BYTES  # of that in memory: what one batch leaves in all layers
    max_states: int = STATE_BYTES  # with which as many batches as pay go through a layer together


@dataclass(frozen=True)
class LoadMode:
    """How a survey will run. `predicted_bytes`: at the peak, of the host on a CPU, else of the device."""

    streamed: bool
    state_budget: StateBudget
    cache_bytes: int  # of unpacked codes in memory
    predicted_bytes: int


def estimate_memory(
    info: ModelInfo,
    modules: Sequence[Module],
    vocabulary: int,
    rows: int,
    row_length: int,
    formats: int,
    dtype: torch.dtype,
    device: str,
    tasks: bool = False,
    outside_weights: int = 0,
) -> MemoryNeed:
    """Return what a survey needs with so many rows of `row_length` tokens and so many formats; `tasks`: it scores some, too.

    modules: of the decoder layers; outside_weights: of the largest module outside them that is planned, too.
    """
    size = dtype.itemsize
    outside = (info.other_bytes // dtype_bytes(info.dtype) if info.other_numbers is None else info.other_numbers) * size
    layers, stored = Counter[int](), Counter[int]()
    for module in modules:
        layers[module.layer] += module.weights
        stored[module.layer] += kept_bytes(module, info.dtype)
    layer, largest = max(layers.values()), max(module.weights for module in modules)
    batch = batch_rows(row_length, modules[0].shape[1], HIDDEN_BYTES)
    tokens = batch * row_length
    wide = sum(out + inputs for out, inputs in (m.shape for m in modules if m.layer == modules[0].layer))
    # forwards and backwards; attention maps, eager
    activations = 8 * tokens * wide + 24 * max(batch, 8) * info.heads * row_length**2
    logits, least_logits = (
        LOGIT_ARRAYS * min(4 * tokens * vocabulary, most + 4 * batch * vocabulary) for most in (LOGIT_BYTES, LEAST_LOGITS)
    )
    changes = (formats * layer + (formats + 2) * largest) * size + 16 * largest
    # outside the layers: made of its codes at either end, twice where a base is measured around it, with a step of making it
    changes += 5 * outside_weights * size + 8 * outside_weights
    loading = info.total_bytes  # the stored bytes, mapped, beside the converted ones; layer by layer one tensor is there twice
    base = (psutil.Process().memory_info().rss + LIBRARIES_BYTES) if device == "cpu" else 2**29
    fixed = base + outside + TASK_BYTES * tasks
    state = tokens * modules[0].shape[1] * size
    states, all_states = (n * states_of(info.layers, state) for n in (1, -(-rows // batch)))
    reference = min(STATE_BYTES, rows * row_length * modules[0].shape[1] * size)
    reference += min(REFERENCE_BYTES, 4 * rows * row_length * vocabulary)
    codes = min(CACHE_BYTES, formats * info.quantizable_weights) if device == "cpu" else 0
    return MemoryNeed(
        fixed + max(loading, activations + logits + changes) + info.quantizable_weights * size + reference + states + codes,
        fixed + max(outside, activations + least_logits + changes) + layer * size + max(stored.values()) + 4 * LEAST_STATES,
        states,
        max(states, min(all_states, STATE_BYTES if device == "cpu" else DEVICE_STATE_BYTES)),
    )


def choose_load_mode(needed: MemoryNeed, memory_bytes: int | None, device: str, folder: Path) -> LoadMode:
    """Choose all weights in memory where that fits into `memory_bytes`, or what is free; else layer by layer; UserError where neither fits."""
    limit = memory_bytes if memory_bytes is not None else available_bytes(device)
    if needed.whole <= limit:
        more = min(needed.max_states - needed.states, (limit - needed.whole) // 4)
        return LoadMode(False, StateBudget(needed.states + more), CACHE_BYTES, needed.whole + more)
    if needed.streamed > limit:
        asked = f"--memory {given_size(limit)}" if memory_bytes is not None else f"{byte_size(limit)} of memory are free here"
        shown = given_size if byte_size(limit) == byte_size(needed.streamed) else byte_size  # never "1.07 GB, 1.07 GB are needed"
        raise UserError(
            f"{asked}: too little; layer by layer this survey needs {shown(needed.streamed)} "
            f"(all weights in memory: {byte_size(needed.whole)}); shorter rows (--row-length) or fewer formats need less"
        )
    spare = min(limit - needed.streamed, 4 * 2**30) + 4 * LEAST_STATES
    budget = StateBudget(spare // 5, spare // 5, LEAST_LOGITS, whole=False, folder=folder)
    return LoadMode(True, budget, spare // 5, needed.streamed + spare - 4 * LEAST_STATES)


def available_bytes(device: str) -> int:
    """Return the bytes that this process may reach: what it has and most of what is free, of the device or of the host, limits included."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(FREE_SHARE * free)
    used = psutil.Process().memory_info().rss
    return used + int(FREE_SHARE * min(psutil.virtual_memory().available, _group_free()))


def _group_free() -> int:
    """Return the bytes that the control group that this process is in still allows; no limit where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        return int(limit) - int((folder / "memory.current").read_text()) if limit.isdigit() else sys.maxsize
    except OSError:
        return sys.maxsize


def peak_bytes(device: str) -> int:
    """Return the most bytes that this process has had, of the device or of the host."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_reserved(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
