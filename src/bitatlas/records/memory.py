"""What a running model holds besides its weights, as records: what that depends on (of the model), and what was asked for (of the user).

Part of `ModelInfo` and `Budget` in `records/`; `planning/memory.py` has the formula, `shape.py` reads a model's shape.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheLayers:
    """Decoder layers whose keys and values take equally much room. `window`: tokens kept by sliding attention; None: all."""

    layers: int  # how many
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class MemoryShape:
    """What the memory of a running model depends on besides its weights (`planning/memory.py` has the formula)."""

    hidden: int
    inner: int  # widest input of a linear module: the inner width of the MLP
    heads: int
    vocabulary: int
    fused: bool  # attention without the whole matrix of scores in memory
    layers: list[CacheLayers]


@dataclass(frozen=True)
class Workload:
    """What a budget of device memory has to hold besides the weights. None, "" and 0 stand until the model is known."""

    context: int | None  # tokens of a sequence, all of them in the cache
    batch: int  # sequences at once
    chunk: int  # tokens of each sequence that one pass reads
    cache_dtype: str | None
    activation_dtype: str = ""
    cache_bytes: int = 0
    activation_bytes: int = 0
