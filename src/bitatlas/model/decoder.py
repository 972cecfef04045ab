"""The model as everything else sees it: its decoder layers, a few sizes, and how its weights are read and changed.

A `Decoder` is made once, when a model is opened. Weights are changed for the length of a `with` block (`Decoder.swapped`); what was there
comes back, bit for bit. The parameter's storage is exchanged, not copied into: swapping costs no memory traffic, and restoring cannot
round. Of a model whose layers are read when they run (see `streaming`), the new weights are looked up when their layer is read.

Stages number where a weight is used on the way through the model: `FRONT`, -1, is all in front of the layers (embeddings), then come the layers, 0,
1, ..., and behind them, at `Decoder.behind`, the head. A head that is tied to the embedding is one weight with two stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bitatlas.errors import UserError
from bitatlas.model.linear import is_linear, oriented, shape_of, weight_of
from bitatlas.model.streaming import LazyMapping, Stream
from bitatlas.model.tensor_files import reason_of
from bitatlas.records import Module
from bitatlas.records.plan import CacheLayers, MemoryShape

PROBE_TOKENS = 8  # of a text on which a model is tried
UNKNOWN_CONTEXT = 2048  # tokens, where the config sets no limit
FRONT = -1  # the stage in front of the layers

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model that is open.

    model: of transformers; layers: its decoder layers, which lie at `layers_path`; vocabulary: logits of a token; width: numbers of an
    embedding; context: tokens that it can read; stream: what reads the layers' weights when they run, None of a model in memory.
    """

    model: Any
    layers_path: str
    layers: nn.ModuleList
    vocabulary: int
    width: int
    context: int
    stream: Stream | None = None
    _results: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)  # see `once`

    @property
    def device(self) -> torch.device:
        """The device that tokens have to be on."""
        return self.model.device  # type: ignore[no-any-return]

    def probe_ids(self) -> Tensor:
        """Return a few tokens to try the model on: int64 [1, tokens], on its device."""
        ids = torch.randint(self.vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        return ids.to(self.device)

    def weight(self, name: str) -> Tensor:
        """Return the weight of module `name` as [out, in], a view whichever way round it is kept (of a streamed model, a copy)."""
        if self.stream and name.startswith(f"{self.layers_path}."):
            return self.stream.weight(name)
        return weight_of(self.model.get_submodule(name))

    def references(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the weights [out, in] of modules that no later swap changes: the tensors themselves; of a streamed layer, what is read when asked for."""
        stream, inside = self.stream, f"{self.layers_path}."
        if stream is None:
            return {name: self.weight(name) for name in names}
        outside = {name: self.weight(name) for name in names if not name.startswith(inside)}
        return LazyMapping(names, lambda name: outside[name] if name in outside else stream.stored(name))

    def shape(self, name: str) -> tuple[int, int]:
        """Return (out, in) of module `name`; nothing is read."""
        return shape_of(self.model.get_submodule(name))

    @property
    def behind(self) -> int:
        """The stage behind the layers: their number."""
        return len(self.layers)

    def stages_of(self, name: str) -> tuple[int, ...]:
        """Return the stages at which the weight of module `name` is used, in their order."""
        inside = f"{self.layers_path}."
        if name.startswith(inside):
            return (int(name.removeprefix(inside).split(".")[0]),)
        module, head = self.model.get_submodule(name), self.model.get_output_embeddings()
        if module is head:
            return (self.behind,)
        return (FRONT, self.behind) if head is not None and head.weight is module.weight else (FRONT,)

    def module_at(self, name: str, stage: int) -> Any:
        """Return the module that uses the weight of module `name` at a stage: of a tied one, behind the layers, the head."""
        module = self.model.get_submodule(name)
        is_outside = not name.startswith(f"{self.layers_path}.")
        return self.model.get_output_embeddings() if is_outside and stage == self.behind else module

    def layer_of(self, name: str) -> int:
        """Return the first stage of module `name`: the decoder layer that it is in, where it is in one."""
        return self.stages_of(name)[0]

    def held(self, layer: int) -> AbstractContextManager[None]:
        """Keep the weights of decoder layer `layer` within the block, however often it runs."""
        return self.stream.held(layer) if self.stream else nullcontext()

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Give module `name` the weight `weights[name]` [out, in] within the block. Nests; restores on any exit.

        Raises ValueError where a shape does not fit, before anything is changed (of a streamed model, when the layer is read).
        """
        if self.stream:
            outside = {name: weights[name] for name in weights if not name.startswith(f"{self.layers_path}.")}
            with self.stream.swapped(weights), self._exchanged(outside):
                yield
            return
        with self._exchanged(weights):
            yield

    @contextmanager
    def _exchanged(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Exchange weights that are in memory."""
        parameters: dict[str, nn.Parameter] = {}
        new: dict[str, Tensor] = {}
        for name, weight in weights.items():
            module = self.model.get_submodule(name)
            stored = oriented(module, weight)
            if stored.shape != module.weight.shape:
                raise ValueError(f"{name}: weight of shape {tuple(weight.shape)} does not fit")
            parameters[name] = module.weight
            new[name] = stored.to(device=module.weight.device, dtype=module.weight.dtype)
        old = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = new[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = old[name]


def decoder_of(model: Any, layers_path: str | None = None, stream: Stream | None = None) -> Decoder:
    """Return the decoder of a loaded model, or of a skeleton. Without `layers_path` its layers are looked for: UserError where it has none."""
    path = find_layers(model, type(model).__name__) if layers_path is None else layers_path
    head = model.get_output_embeddings()
    return Decoder(
        model=model,
        layers_path=path,
        layers=layers_at(model, path),
        vocabulary=vocabulary_size(model.config) if head is None else int(head.weight.shape[0]),
        width=int(model.get_input_embeddings().weight.shape[1]),
        context=context_length(model.config),
        stream=stream,
    )


def once(probe: Callable[[Decoder], Result]) -> Callable[[Decoder], Result]:
    """Make of `probe`, which tries something out on a decoder, a function that does so once for each decoder."""

    @wraps(probe)
    def cached(decoder: Decoder) -> Result:
        if probe not in decoder._results:
            decoder._results[probe] = probe(decoder)
        return decoder._results[probe]  # type: ignore[no-any-return]

    return cached


# --- what a config and a skeleton tell ---------------------------------------------------------------------------------


def vocabulary_size(config: Any) -> int:
    """Return the number of tokens that a config's model knows."""
    return int(config.get_text_config().vocab_size)


def context_length(config: Any) -> int:
    """Return how many tokens a config's model can read."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or UNKNOWN_CONTEXT)


def find_layers(model: nn.Module, name: str) -> str:
    """Return the path of the decoder layers: the outermost list of blocks with linear modules that holds most weights, in the part that reads text."""
    candidates: list[tuple[int, str]] = []
    lists: list[str] = []
    inside = text_path(model)
    for path, module in model.named_modules():
        if not f"{path}.".startswith(inside):
            continue
        if not isinstance(module, nn.ModuleList) or any(path.startswith(outer + ".") for outer in lists):
            continue
        lists.append(path)
        if any(any(map(is_linear, block.modules())) for block in module) and not any(map(is_linear, module)):
            candidates.append((sum(p.numel() for p in module.parameters()), path))
    if not candidates:
        raise UserError(f"{name}: no decoder layers with linear modules were found, so there is nothing to quantize")
    return max(candidates)[1]


def text_path(model: nn.Module) -> str:
    """Return the path, with its dot, of the decoder of a model that also sees or hears; "" of a language model."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if get else None
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")


def layers_at(model: nn.Module, path: str) -> nn.ModuleList:
    """Return the list of decoder layers at `path`."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


# --- memory shape ----------------------------------------------------------------------------------------------------------

# What a checkpoint's memory at run time depends on, read off its config: the cache that its skeleton makes, and a few widths.
#
# The layout of the cache is not guessed from names in the config, which differ by family (`num_kv_heads`, `multi_query`, `layer_types`,
# ...): the skeleton on torch's meta device reads a few tokens, which costs no memory, and the cache that it fills is looked at.
# Left out, and said so in one line: state-space and linear-attention layers, latent attention, keys and values of different widths, layers
# that share a cache. `plan/budget.py` has the formula.

CACHE_PROBE_TOKENS = 3  # that the skeleton reads
ROUTED_TO = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")  # experts of a token, as configs call them
SCORES_HELD = ("falcon",)  # called fused, but torch has no fused kernel for one key head beside many query heads given as it is


def memory_shape(model: Any, modules: Sequence[Module], layers: int) -> MemoryShape | str:
    """Return the shape of the memory of `model`, a skeleton on the meta device; or, in a few words, why it cannot be told."""
    config = model.config
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        return "it caches latent attention, which runtimes store in different ways"
    experts = [module for module in modules if module.expert is not None]
    chosen = next((int(value) for name in ROUTED_TO if (value := getattr(text, name, None))), 0)
    if experts and not chosen:
        return "how many experts a token is routed to is not known"
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
    inner = max((module.shape[1] for module in modules if module.expert is None), default=hidden)
    if experts:
        inner += chosen * (hidden + min(min(module.shape) for module in experts))
    fused = getattr(text, "_attn_implementation", "eager") != "eager" and text.model_type not in SCORES_HELD
    return MemoryShape(
        hidden, max(inner, hidden), heads, vocabulary, fused,
        [CacheLayers(count, *kind) for kind, count in Counter(kinds).items()],
    )  # fmt: skip


class UnknownStateError(Exception):
    """Why the memory cannot be told, in a few words."""


@torch.no_grad()
def _cache_of(model: Any) -> Any:
    tokens = torch.zeros((1, CACHE_PROBE_TOKENS), dtype=torch.int64, device="meta")
    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    for module in experts:  # which ones are chosen is in numbers, and here are none
        module.forward = lambda hidden, *_: hidden
    try:
        out = model(tokens, use_cache=True)
    finally:
        for module in experts:
            del module.forward
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
