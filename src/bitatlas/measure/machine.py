"""What this machine can do, measured: how many processors a process may use, and how many threads run the model's own layers fastest.

Two processors are often two threads of one core, and share its arithmetic: small products then take several times longer with two
threads than with one. A container may see all processors of its host and be allowed a few. So neither is taken for granted.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import layer_inputs, run_layer
from bitatlas.progress import Reporter
from bitatlas.records.text import number

CGROUP_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "quota period" in microseconds, or "max period"
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")  # cgroup v1, -1: none
CGROUP_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
TIMED_ROWS, TIMED_TOKENS = 2, 192
TIMED_SECONDS = 1.0  # in all
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
