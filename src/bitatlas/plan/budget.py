"""What a budget allows, in whole bits and bytes, and whether it is possible at all: asked before anything slow runs.

Every kind of budget becomes the same thing: an integer cost per unit and format, and an integer limit that a plan must not
exceed by one. `KINDS` is that table; a budget by device memory is one by size with less room (how much less is said below).
Budgets in bits are about the decoder layers; those in bytes are about the whole file, embedding and head included.
Average code bits price the codes alone, so two formats of the same width cost the same there; their bytes differ.
Left out: leaving single modules unquantized as an option (a unit always gets one of the candidate formats).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from bitatlas.errors import UserError
from bitatlas.plan.knapsack import Ints
from bitatlas.records import Budget, ModelInfo, Module
from bitatlas.records.formats import Format, get_format
from bitatlas.records.plan import CacheLayers, MemoryShape, Workload
from bitatlas.records.sizes import (
    RANGE_DIGITS,
    Unit,
    dtype_bytes,
    file_bytes,
    outside_bytes,
    parse_size,
    rounded_up,
    show_bytes,
    units_of,
    weight_bytes,
)
from bitatlas.records.text import given

EXACT_DIGITS = 20  # significant digits that show a number as it was given
MEASURED = {"max_damage": "--max-damage", "protect": "--protect"}  # kinds whose size is sought, not given


@dataclass(frozen=True)
class Costs:
    """A budget in whole numbers: choose one format per unit so that the sum of `cost` is at most `limit`."""

    cost: Ints  # [units, formats]
    limit: int | None  # None: the budget is a damage, and `cost` is what is to be made small
    what: str  # "bits" or "bytes"


@dataclass(frozen=True)
class BudgetKind:
    """How one kind of budget is counted. `worth` turns a summed cost into the number the user gave, `allows` goes back."""

    flag: str
    what: str  # what `cost` counts: "bits" or "bytes"
    cost: Callable[[Module, Format, ModelInfo], int]
    worth: Callable[[int, int, int], Fraction]  # (summed cost, weights, other bytes) -> value
    allows: Callable[[Fraction, int, int], Fraction]  # (value, weights, other bytes) -> summed cost
    show: Callable[[Fraction, int], str]  # (value, significant digits) -> text that can be typed again, rounded up
    whole_file: bool = False  # what is outside the decoder layers counts, too


# --- the kinds of budget -----------------------------------------------------------------------------------------------

KINDS: dict[str, BudgetKind] = {
    "code_bits": BudgetKind(
        flag="--code-bits",
        what="bits",
        cost=lambda module, fmt, info: module.weights * fmt.bits,
        worth=lambda cost, weights, other: Fraction(cost, weights),
        allows=lambda value, weights, other: value * weights,
        show=rounded_up,
    ),
    "stored_bits": BudgetKind(
        flag="--stored-bits",
        what="bytes",
        cost=weight_bytes,
        worth=lambda cost, weights, other: Fraction(8 * cost, weights),
        allows=lambda value, weights, other: value * weights / 8,
        show=rounded_up,
    ),
    "size": BudgetKind(
        flag="--size",
        what="bytes",
        cost=file_bytes,
        worth=lambda cost, weights, other: Fraction(cost + other),
        allows=lambda value, weights, other: value - other,
        show=show_bytes,
        whole_file=True,
    ),
}
KINDS["vram"] = replace(KINDS["size"], flag="--vram")  # its other bytes hold the cache and the activations too


def _kind(name: str) -> BudgetKind:
    if name not in KINDS:
        raise ValueError(f"budget kind {name!r}: known are {', '.join(KINDS)} and max_damage")
    return KINDS[name]


def costs_of(budget: Budget, units: Sequence[Unit], formats: Sequence[str], info: ModelInfo) -> Costs:
    """Return the budget (`resolve_budget`, where it has a workload) in whole numbers, cost: [units, formats].

    The limit is the largest sum whose value, as `size_of` prints it, is not above the budget's; it can be negative where
    the budget is impossible. A tolerated damage and a protected task have no limit: their costs are bytes.
    """
    if budget.kind in MEASURED:
        return Costs(_cost_table(KINDS["size"], units, formats, info), None, KINDS["size"].what)
    kind = _kind(budget.kind)
    weights = _layer_weights(units)
    other = _other_bytes(units, info) + runtime_bytes(budget)
    limit = math.floor(kind.allows(Fraction(budget.value), weights, other))
    # 2.9 as a float is a little below 29/10: the printed average of one more bit may still be 2.9
    if float(kind.worth(limit + 1, weights, other)) <= budget.value:
        limit += 1
    return Costs(_cost_table(kind, units, formats, info), limit, kind.what)


def _cost_table(kind: BudgetKind, units: Sequence[Unit], formats: Sequence[str], info: ModelInfo) -> Ints:
    def cost(module: Module, column: int) -> int:
        counts = kind.whole_file or not module.part
        return kind.cost(module, get_format(module.formats(formats)[column]), info) if counts else 0

    costs = [[sum(cost(module, column) for module in unit.modules) for column in range(len(formats))] for unit in units]
    return np.array(costs, dtype=np.int64).reshape(len(units), len(formats))  # [units, formats]


def _layer_weights(units: Sequence[Unit]) -> int:
    """Return the weights of the units that are in decoder layers."""
    return sum(unit.weights for unit in units if not unit.part)


def _other_bytes(units: Sequence[Unit], info: ModelInfo) -> int:
    """Return the bytes of all that is in no unit."""
    if info.file:
        return info.file.other
    return info.other_bytes - outside_bytes((module for unit in units for module in unit.modules), info)


def size_range(
    kind: str, modules: Sequence[Module], formats: Sequence[str], info: ModelInfo, beside: int = 0
) -> tuple[float, float]:
    """Return the (least, most) that these formats can give, in the unit of the budget's kind: bits a weight, or bytes with `beside` of them."""
    counted, units = _kind(kind), units_of(modules)
    weights, other = _layer_weights(units), _other_bytes(units, info) + beside
    ends = _extremes(_cost_table(counted, units, formats, info))
    least, most = (float(counted.worth(total, weights, other)) for total in ends)
    return least, most


def _extremes(cost: Ints) -> tuple[int, int]:
    return int(cost.min(axis=1).sum()), int(cost.max(axis=1).sum())


def check_budget(budget: Budget, modules: Sequence[Module], formats: Sequence[str], info: ModelInfo) -> None:
    """Refuse a budget that no plan can meet, or that every plan meets: UserError naming the flag and the possible range.

    A tolerated damage is only checked for being a positive number: what is possible must be measured.
    """
    flag = MEASURED.get(budget.kind) or _kind(budget.kind).flag
    if not formats:
        raise UserError("--formats: at least one format is needed")
    if not math.isfinite(budget.value) or budget.value <= 0:
        raise UserError(f"{flag} {given(budget.value)} must be a positive number")
    if budget.kind in MEASURED:
        return
    kind, units = KINDS[budget.kind], units_of(modules)
    if not units:
        raise UserError("the checkpoint has no linear weights that can be quantized")
    cost, weights = _cost_table(kind, units, formats, info), _layer_weights(units)
    ends = _extremes(cost)
    beside = runtime_bytes(budget)
    least, most = (kind.worth(total, weights, _other_bytes(units, info) + beside) for total in ends)
    shown_least, shown_most = (kind.show(value, RANGE_DIGITS) for value in (least, most))
    possible = f"possible: {shown_least} to {shown_most}" if least < most else f"possible: {shown_least}"
    asked = f"{flag} {budget_text(budget)}"
    typed_most = Fraction(parse_size(shown_most)) if kind.show is show_bytes else Fraction(float(shown_most))
    if budget.value < float(least):
        load = budget.workload
        alone = f"; the cache of {load.context} tokens and the activations alone take {show_bytes(beside)}" if load else ""
        raise UserError(
            f"{asked} is below {shown_least}, the least that {_gives(cost, ends[0], units, formats)}{alone}; {possible}"
        )
    if Fraction(budget.value) > max(most, typed_most):
        raise UserError(f"{asked} is above {shown_most}, the most that {_gives(cost, ends[1], units, formats)}; {possible}")


def _gives(cost: Ints, total: int, units: Sequence[Unit], formats: Sequence[str]) -> str:
    """Name the one format that reaches `total` everywhere, where there is one."""
    if any(unit.formats(formats) != formats for unit in units):
        return "these formats give"
    reached = [name for name, whole in zip(formats, cost.sum(axis=0), strict=True) if whole == total]
    return f"{reached[0]} gives" if reached else "these formats give"


def budget_text(budget: Budget) -> str:
    """Return the budget's value as it was given."""
    is_size = budget.kind in KINDS and KINDS[budget.kind].show is show_bytes
    return _exact_bytes(math.floor(budget.value)) if is_size else given(budget.value)


def _exact_bytes(whole: int) -> str:
    """Return a size with all its digits, in the unit that it may have been given in: 1.5GiB, 1.234567MB."""
    for name, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if whole >= size and 100 * whole % size == 0:
            return f"{given(whole / size)}{name}"
    return show_bytes(whole, EXACT_DIGITS)


# --- memory ----------------------------------------------------------------------------------------------------------------
#
# What a device must hold besides the weights while the model runs at a context length: the KV cache and the activations.
#
#     memory = weights (`Size.total_bytes`: quantized modules and all that stays unquantized) + KV cache + activations
#
# The case: a prompt is read in passes of `chunk` tokens, and the last pass fills the context. It is the largest: earlier ones see fewer
# keys, and a generated token is a pass of 1. With B sequences, C = min(chunk, context) tokens each, n = context:
#
#     KV cache     sum over layers of 2 B k d min(n, w) c      k: key/value heads, d: head width, w: the layer's window (no window: n),
#                                                              c: bytes of a number of the cache
#     activations  carried + max(attention, MLP, norm) or the logits, whichever is more; a: bytes of a number of the activations
#       carried    6 B C h a + 4 C d a + 32 (B C + n) + the masks, B C s for each kind of layer
#                  h: hidden size. Six of them: embedded tokens and positions, residual, the layer's input, normed input, branch output;
#                  sines and cosines; numbers of tokens and places, 8 bytes each;
#                  s: keys that a layer sees, n, or with a window min(n, w - 1 + C)
#       attention  B C (a (2 q + 4 k d) + 12 q), q = heads x d: queries, keys and values, the temporaries of rotation in float32
#                  + the layer's mask as numbers, B C s a
#                  + keys and values as one layer's kernel reads them, 2 B s a x (q if heads share keys, + k d if the layer has a window,
#                    + k d if the cache's dtype is another)
#                  + where transformers has no fused attention (a cap on the scores, ALiBi): all scores, five copies, two of them
#                    in float32, B heads C s (3 a + 8), and keys and values in float32, 8 B s q
#       MLP        4 B C f a, f: the widest input of a linear module (the MLP's inner width)
#       norm       12 B C h: three copies in float32
#       logits     B v (a + 12), v: vocabulary; of the last token of each sequence, three copies in float32
#
# Activations are an upper bound of what is alive at once in a plain PyTorch pass of transformers over a cache that was allocated whole;
# tests compare it with the true peak. Fused runtimes reuse buffers and need less. The activations' dtype is the checkpoint's.
# The cache's dtype is what was asked for, else the checkpoint's where that has 16 bits, else float16. q8_0 and q4_0 are llama.cpp's.
# Of a mixture f is what the k experts of a token have together, beside each other: k (h + the experts' inner width), and what all tokens go through.
# Left out: the runtime itself (a CUDA context takes some hundred MB), fragmentation, and copies of unpacked weights; ask for less to leave
# room. Latent attention, and layers whose state is not keys and values by token are refused. `docs/memory.md` has an example worked by hand.
# Source: our own count, checked against transformers 5.24; passes of 512 tokens are what llama.cpp reads by default (`--ubatch-size`).

# bytes of 32 numbers: llama.cpp's q8_0 and q4_0 have a float16 scale with them
CACHE_BYTES = {"float32": 128, "bfloat16": 64, "float16": 64, "float8_e4m3fn": 32, "float8_e5m2": 32, "q8_0": 34, "q4_0": 18}
CACHE_BLOCK, BLOCKED = 32, ("q8_0", "q4_0")  # numbers; in whole blocks of them
CHUNK = 512  # tokens of a pass over the prompt, unless told otherwise
LARGEST = 10**9  # tokens, sequences: more is a slip of the hand
FLOAT32_BYTES = 4


def workload_of(context: int | None, cache_dtype: str | None, batch: int | None, chunk: int | None) -> Workload:
    """Return what was asked for, checked as far as that goes without a model; UserError naming the flag."""
    for flag, value in (("--context", context), ("--batch", batch), ("--chunk", chunk)):
        if value is not None and not 1 <= value <= LARGEST:
            raise UserError(f"{flag} {value}: must be 1 or more, and at most {LARGEST:,}")
    if cache_dtype is not None and cache_dtype not in CACHE_BYTES:
        raise UserError(f"--cache-dtype {cache_dtype}: unknown; one of {', '.join(CACHE_BYTES)}")
    return Workload(context, 1 if batch is None else batch, CHUNK if chunk is None else chunk, cache_dtype)


def resolve_budget(budget: Budget, info: ModelInfo) -> Budget:
    """Return the budget with all that the model decides: context, dtypes, and the bytes of cache and activations. Others as they are.

    UserError where the context is longer than the model's, or where the shape of the model's memory is not known.
    """
    load = budget.workload
    if load is None:
        return budget
    shape = info.memory
    if shape is None:
        raise UserError("--vram: this survey does not hold what the memory depends on; make it again (survey), or use --size")
    if isinstance(shape, str):
        raise UserError(f"--vram: what {info.name} needs besides its weights cannot be told: {shape}; use --size")
    context = info.context if load.context is None else load.context
    if context > info.context:
        raise UserError(f"--context {context}: the model's own is {info.context} tokens; give at most that")
    cache_dtype = load.cache_dtype or (info.dtype if dtype_bytes(info.dtype) == 2 else "float16")
    full = replace(load, context=context, cache_dtype=cache_dtype, activation_dtype=info.dtype)
    return replace(
        budget, workload=replace(full, cache_bytes=cache_bytes(shape, full), activation_bytes=activation_bytes(shape, full))
    )


def default_context_text(load: Workload) -> str:
    """Return what is said where no context was asked for and the model's own was taken."""
    return f"--context is not given: planned for the model's own, {load.context:,} tokens"


def runtime_bytes(budget: Budget) -> int:
    """Return the bytes that the budget must hold besides the weights: 0 unless it is a budget of memory. ValueError where not resolved."""
    if budget.workload is None:
        return 0
    if not budget.workload.activation_bytes:
        raise ValueError("the budget's workload is not settled: its bytes are not known")
    return budget.workload.cache_bytes + budget.workload.activation_bytes


def cache_bytes(shape: MemoryShape, load: Workload) -> int:
    """Return the bytes of the keys and values of the whole context, all layers and sequences. `load` with its context and dtypes."""
    context, _ = _known(load)
    # whole blocks of a token's keys, of all heads: a row in llama.cpp's cache
    of_layers = (
        kind.layers * min(context, kind.window or context) * _row_bytes(kind.kv_heads * kind.head_dim, load)
        for kind in shape.layers
    )
    return 2 * load.batch * sum(of_layers)


def _row_bytes(numbers: int, load: Workload) -> int:
    """Return the bytes of a token's keys in a layer."""
    _, width = _known(load)
    return int(width * (-(-numbers // CACHE_BLOCK) * CACHE_BLOCK if load.cache_dtype in BLOCKED else numbers))


def activation_bytes(shape: MemoryShape, load: Workload) -> int:
    """Return an upper bound of the bytes that are alive at once besides weights and cache, see the module's formula."""
    context, _ = _known(load)
    width = dtype_bytes(load.activation_dtype)
    chunk = min(load.chunk, context)
    tokens = load.batch * chunk
    seen = [_keys_seen(kind, context, chunk) for kind in shape.layers]
    rotation = 4 * chunk * max((kind.head_dim for kind in shape.layers), default=0) * width
    places = 32 * (tokens + context)
    carried = 6 * tokens * shape.hidden * width + rotation + places + sum(tokens * keys for keys in seen)
    attention = max((_attention_bytes(shape, kind, load, keys) for kind, keys in zip(shape.layers, seen, strict=True)), default=0)
    inner = 4 * tokens * shape.inner * width
    norm = 3 * tokens * shape.hidden * FLOAT32_BYTES
    logits = load.batch * shape.vocabulary * (width + 3 * FLOAT32_BYTES)
    return max(carried + max(attention, inner, norm), logits + tokens * shape.hidden * width)


def _known(load: Workload) -> tuple[int, Fraction]:
    """Return (context, bytes of a number of the cache); ValueError where they are not known."""
    if load.context is None or load.cache_dtype is None:
        raise ValueError("the workload's context and cache dtype are not settled")
    return load.context, Fraction(CACHE_BYTES[load.cache_dtype], CACHE_BLOCK)


def _keys_seen(kind: CacheLayers, context: int, chunk: int) -> int:
    """Return the keys that the last pass sees in a layer: with a window, those before the pass and the pass itself."""
    return context if kind.window is None else min(context, kind.window - 1 + chunk)


def _attention_bytes(shape: MemoryShape, kind: CacheLayers, load: Workload, keys: int) -> int:
    width, (context, cache_width) = dtype_bytes(load.activation_dtype), _known(load)
    tokens, queries, keys_wide = load.batch * min(load.chunk, context), shape.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    projected = tokens * (width * (2 * queries + 4 * keys_wide) + 3 * FLOAT32_BYTES * queries)
    copied = queries * (shape.heads != kind.kv_heads) + keys_wide * (kind.window is not None) + keys_wide * (cache_width != width)
    unfused = tokens * shape.heads * keys * (3 * width + 2 * FLOAT32_BYTES) + 2 * FLOAT32_BYTES * load.batch * keys * queries
    scores = 0 if shape.fused else unfused
    return projected + tokens * keys * width + 2 * load.batch * keys * copied * width + scores
