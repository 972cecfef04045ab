"""Estimates how much memory a survey will need at its peak, and chooses: all weights in memory, or one decoder layer at a time.

The sum has a term for each thing that is alive at the same time: this process as it is, what is outside the layers, the weights (of all
layers, or of the largest), its changes of weights in every format, the activations of one layer, a few arrays of logits, codes and hidden
states. Terms are upper bounds, so the prediction is an upper bound of what `peak_bytes` measures, tested to be within a half of it.

On an accelerator `--memory` is of the device; hidden states wait in the host's memory. Left out: tasks, whose generation adds a cache.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bitatlas.errors import UserError
from bitatlas.measure.damage import REFERENCE_BYTES, STATE_BYTES, StateBudget, states_of
from bitatlas.model.layerwise import LOGIT_BYTES, batch_rows
from bitatlas.quantize.bank import CACHE_BYTES
from bitatlas.records import ModelInfo, Module
from bitatlas.records.sizes import dtype_bytes, kept_bytes
from bitatlas.records.text import byte_size, given_size

LIBRARIES_BYTES = 2**29  # what later stages import and allocate: tables, statistics, templates, the allocator's slack
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
) -> MemoryNeed:
    """Return what a survey needs with so many rows of `row_length` tokens and so many formats."""
    size = dtype.itemsize
    outside = (info.other_bytes // dtype_bytes(info.dtype) if info.other_numbers is None else info.other_numbers) * size
    layers, stored = Counter[int](), Counter[int]()
    for module in modules:
        layers[module.layer] += module.weights
        stored[module.layer] += kept_bytes(module, info.dtype)
    layer, largest = max(layers.values()), max(module.weights for module in modules)
    batch = batch_rows(row_length, vocabulary)
    tokens = batch * row_length
    wide = sum(out + inputs for out, inputs in (m.shape for m in modules if m.layer == modules[0].layer))
    # forwards and backwards; attention maps, eager
    activations = 8 * tokens * wide + 24 * max(batch, 8) * info.heads * row_length**2
    logits, least_logits = (
        LOGIT_ARRAYS * min(4 * tokens * vocabulary, most + 4 * batch * vocabulary) for most in (LOGIT_BYTES, LEAST_LOGITS)
    )
    changes = (formats * layer + (formats + 2) * largest) * size + 16 * largest
    loading = info.other_bytes  # the stored bytes beside the converted ones
    base = (psutil.Process().memory_info().rss + LIBRARIES_BYTES) if device == "cpu" else 2**29
    fixed = base + outside
    state = tokens * modules[0].shape[1] * size
    states, all_states = (n * states_of(info.layers, state) for n in (1, -(-rows // batch)))
    reference = min(STATE_BYTES, rows * row_length * modules[0].shape[1] * size)
    reference += min(REFERENCE_BYTES, 4 * rows * row_length * vocabulary)
    codes = min(CACHE_BYTES, formats * info.quantizable_weights) if device == "cpu" else 0
    return MemoryNeed(
        fixed + max(loading, activations + logits + changes) + info.quantizable_weights * size + reference + states + codes,
        fixed + max(loading, activations + least_logits + changes) + layer * size + max(stored.values()) + 4 * LEAST_STATES,
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
