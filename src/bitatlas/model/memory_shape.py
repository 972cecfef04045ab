"""What a checkpoint's memory at run time depends on, read off its config: the cache that its skeleton makes, and a few widths.

The layout of the cache is not guessed from names in the config, which differ by family (`num_kv_heads`, `multi_query`, `layer_types`,
...): the skeleton on torch's meta device reads a few tokens, which costs no memory, and the cache that it fills is looked at.
Left out, and said so in one line: state-space and linear-attention layers, latent attention, routed experts, keys and values of
different widths, layers that share a cache. `plan/budget.py` has the formula.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bitatlas.model.decoder import vocabulary_size
from bitatlas.model.tensor_files import reason_of
from bitatlas.records import Module
from bitatlas.records.plan import CacheLayers, MemoryShape

PROBE_TOKENS = 3  # that the skeleton reads
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SCORES_HELD = ("falcon",)  # called fused, but torch has no fused kernel for one key head beside many query heads given as it is


def memory_shape(model: Any, modules: Sequence[Module], layers: int) -> MemoryShape | str:
    """Return the shape of the memory of `model`, a skeleton on the meta device; or, in a few words, why it cannot be told."""
    config = model.config
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        return "it caches latent attention, which runtimes store in different ways"
    if any(getattr(text, name, None) for name in EXPERTS):
        return "it routes tokens to experts, whose activations depend on the text"
    try:
        cache = _cache_of(model)
        kinds = [_layer_of(layer) for layer in cache.layers]
        hidden, heads, vocabulary = int(text.hidden_size), int(text.num_attention_heads), vocabulary_size(config)
    except UnknownStateError as error:
        return str(error)
    except Exception as error:  # each family fails in its own way without weights
        return f"its skeleton cannot be run ({reason_of(error)})"
    if len(kinds) != layers:
        return f"its cache has {len(kinds)} layers, the model {layers}"
    inner = max((module.shape[1] for module in modules), default=hidden)
    fused = getattr(text, "_attn_implementation", "eager") != "eager" and text.model_type not in SCORES_HELD
    return MemoryShape(
        hidden, max(inner, hidden), heads, vocabulary, fused,
        [CacheLayers(count, *kind) for kind, count in Counter(kinds).items()],
    )  # fmt: skip


class UnknownStateError(Exception):
    """Why the memory cannot be told, in a few words."""


@torch.no_grad()
def _cache_of(model: Any) -> Any:
    tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.int64, device="meta")
    out = model(tokens, use_cache=True)
    cache = getattr(out, "past_key_values", None) or getattr(out, "cache", None)  # the older and the newer name
    if not hasattr(cache, "layers"):
        raise UnknownStateError("it keeps a state that is not a cache of keys and values")
    return cache


def _layer_of(layer: Any) -> tuple[int, int, int | None]:
    """Return (key/value heads, head width, window) of a layer of the cache."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UnknownStateError(f"a layer keeps more than keys and values by token ({type(layer).__name__})")
    if not layer.is_initialized:
        raise UnknownStateError("some layers use the cache of others")
    if layer.keys.shape != layer.values.shape or layer.keys.shape[0] != 1:
        raise UnknownStateError("its keys and values differ in shape")
    _, heads, _, width = layer.keys.shape  # [1, heads, tokens, width]
    return heads, width, layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
