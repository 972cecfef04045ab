"""Run a decoder layer by layer: several batches, and several changes of one model, through each layer before the next one.

So a layer's weights are needed once for all of them, whether they are in memory or read for it (see `streaming`), and what lies in front of
a change is computed once: `record` keeps what goes into every layer of a base, `follow` runs changes of it from the layer where
they begin. The model's own forward does the rest, with every layer replaced: `layer_inputs` is all that comes before the layers
(embeddings, masks, positions), `logits_of` all that comes behind them.

Some families hand more from layer to layer than the hidden state: layers write keys and values into a dictionary from which later layers
read. Every pass has its own copies of such containers (`Shared`), and one that begins behind the first layer begins with the base's.

A pass in these pieces gives what a whole pass gives, to the last bit, where layers follow each other and nothing else happens
between them. `is_chain` tries that out. A model in which it is not so (layers that run more than once, or read what several layers
before them gave) is run whole for every change, with all weights in memory: slower, and the same numbers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.model.decoder import FRONT, Decoder, once
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.linear import is_linear

Call = tuple[tuple[Any, ...], dict[str, Any]]
Shared = dict[int, Any]  # a pass's own copy of each container that layers share, by the id of the one that the model made

BATCH_ROWS = 8
HIDDEN_BYTES = 2**24  # of one batch's hidden state: as many are alive as the model has layers
LOGIT_BYTES = 2**26  # of one array of float32 logits: a few are alive at a time; in smaller ones the head's product is slower
CACHED_BYTES = 2**21  # of logits that are looked at at a time on a CPU, whose caches hold a few arrays of this size
CHAIN_TOLERANCE = 1e-3  # of the largest logit; a whole pass and one in pieces differ by rounding alone


def batch_rows(row_length: int, numbers: int, most_bytes: int = LOGIT_BYTES) -> int:
    """Return the rows of a batch: at most 8, and at most so many bytes of what has `numbers` float32 numbers a token.

    Where logits of a whole batch are made at once these are the vocabulary; where rows go through layers, the width of a hidden state.
    """
    return max(1, min(BATCH_ROWS, most_bytes // (4 * row_length * numbers)))


def split_rows(decoder: Decoder, rows: Tensor) -> list[Tensor]:
    """Cut rows [rows, tokens] into the batches that go through a layer together, or through all of a model that has to be run whole."""
    numbers, most = (decoder.width, HIDDEN_BYTES) if is_chain(decoder) else (decoder.vocabulary, LOGIT_BYTES)
    return list(rows.split(batch_rows(rows.shape[1], numbers, most)))


def token_spans(rows: int, tokens: int, vocabulary: int, logit_bytes: int = LOGIT_BYTES) -> list[slice]:
    """Return runs of tokens whose logits, for all `rows`, take at most `logit_bytes`: one run, but for long rows of a large vocabulary."""
    step = max(1, logit_bytes // (4 * rows * vocabulary))
    return [slice(start, min(tokens, start + step)) for start in range(0, tokens, step)]


def token_blocks(logits: Tensor) -> list[slice]:
    """Cut the rows x tokens of logits [rows, tokens, vocabulary] into runs that a CPU's caches hold; elsewhere one run."""
    tokens = logits.shape[0] * logits.shape[1]
    step = max(1, CACHED_BYTES // (4 * logits.shape[2])) if logits.device.type == "cpu" else tokens
    return [slice(start, start + step) for start in range(0, tokens, step)]


@dataclass(frozen=True)
class LayerInputs:
    """What goes into the layers. `hidden` [rows, tokens, width] goes into layer 0, `calls[i]` beside it into layer i.

    `containers`: what several layers are called with and may write into, as it is before the first one.
    """

    hidden: Tensor
    calls: list[Call]
    containers: list[Any] = field(default_factory=list)

    def fresh(self) -> Shared:
        """Return the containers of a pass that begins at the first layer."""
        return {id(container): copy.copy(container) for container in self.containers}

    def call(self, layer: int, shared: Shared) -> Call:
        """Return what goes into a layer beside the hidden state, in the pass that `shared` belongs to."""
        args, kwargs = self.calls[layer]
        return tuple(shared.get(id(value), value) for value in args), {
            name: shared.get(id(value), value) for name, value in kwargs.items()
        }


@dataclass(frozen=True)
class Recorded:
    """One pass of a base over batches. `inputs` holds (layer, batch) -> what went into the layer, `final` what came out of the last one.

    Of a model that is run whole, `final` is the logits, and `inputs` stays empty.
    """

    ids: Sequence[Tensor]
    starts: list[LayerInputs]
    inputs: StateCache
    final: list[Tensor]  # [rows, tokens, width] each
    shared: dict[tuple[int, int], Shared] = field(default_factory=dict)  # (layer, batch) -> the containers in front of it

    def shared_at(self, layer: int, batch: int) -> Shared:
        """Return the base's containers in front of a layer, to be written into."""
        before = self.shared.get((layer, batch))
        return self.starts[batch].fresh() if before is None else copy_shared(before)


def copy_shared(shared: Shared) -> Shared:
    """Return containers of equal content."""
    return {key: copy.copy(container) for key, container in shared.items()}


@dataclass(frozen=True)
class Job:
    """A change of a base that begins at stage `start` (see `decoder`); `at(stage)`: the block in which it is in force there."""

    start: int
    at: Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Ending:
    """What a model comes to: what comes out of its last layer, by batch, and the block in which logits are to be made of it."""

    final: list[Tensor]
    head: Callable[[], AbstractContextManager[Any]] = nullcontext


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Return the hidden state that a layer was called with, and the other arguments."""
    if args:
        return args[0], (args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return the hidden state [rows, tokens, width] after one layer; of several values that a layer returns it is the first."""
    args, kwargs = call
    output = layer(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def layer_inputs(decoder: Decoder, input_ids: Tensor) -> LayerInputs:
    """Return what goes into the layers for `input_ids` [rows, tokens]; no layer is run. Differentiable, where gradients are on, in what it reads."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden, call = _split(args, kwargs)
        first.append(hidden)
        calls.append(call)
        return hidden

    with _replaced_layers(decoder, note):
        decoder.model.base_model(input_ids=input_ids, use_cache=False)
    return LayerInputs(first[0], calls, _containers(calls))


def _containers(calls: Sequence[Call]) -> list[Any]:
    """Return the dictionaries and lists that more than one layer is called with."""
    every = [value for args, kwargs in calls for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping | list)]
    count = Counter(map(id, every))
    return [value for value in {id(value): value for value in every}.values() if count[id(value)] > 1]


def slice_tokens(decoder: Decoder, final: Tensor, span: slice) -> Tensor:
    """Return the tokens `span` of `final`, which came out of the last layer (of some families with more axes than [rows, tokens, width])."""
    axis = 1 if final.dim() == 3 else _token_axis(decoder)
    return final[(slice(None),) * axis + (span,)]


def logits_of(decoder: Decoder, input_ids: Tensor, final: Tensor) -> Tensor:
    """Return logits [rows, tokens, vocabulary] of what came out of the last layer, `final` [rows, tokens, width]. Differentiable in `final`."""
    if not is_chain(decoder):
        return final
    return _logits(decoder, input_ids, final)


def _logits(decoder: Decoder, input_ids: Tensor, final: Tensor) -> Tensor:
    with _replaced_layers(decoder, lambda args, kwargs: final):
        return decoder.model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def record(decoder: Decoder, batches: Sequence[Tensor], inputs: StateCache | None = None) -> Recorded:
    """Run one pass over `batches` (int64 [rows, tokens] each, on the model's device). Without `inputs` only its end is kept."""
    if not is_chain(decoder):
        return Recorded(batches, [], StateCache(0), [whole_logits(decoder, ids) for ids in batches])
    return _record(decoder, batches, inputs)


def _record(decoder: Decoder, batches: Sequence[Tensor], inputs: StateCache | None) -> Recorded:
    starts = [layer_inputs(decoder, ids) for ids in batches]
    hidden = [start.hidden for start in starts]
    shared = [start.fresh() for start in starts]
    before: dict[tuple[int, int], Shared] = {}
    for index, layer in enumerate(_called_layers(decoder, starts)):
        with decoder.held(index):
            for number, start in enumerate(starts):
                if inputs is not None:
                    inputs.put((index, number), hidden[number])
                    if shared[number]:
                        before[index, number] = copy_shared(shared[number])
                hidden[number] = run_layer(layer, hidden[number], start.call(index, shared[number]))
    return Recorded(batches, starts, inputs if inputs is not None else StateCache(0), hidden, before)


def _called_layers(decoder: Decoder, starts: Sequence[LayerInputs]) -> Sequence[nn.Module]:
    """Return the decoder layers that a pass runs: some lists go on behind the last of them."""
    layers = decoder.layers
    return list(layers)[: len(starts[0].calls)] if starts else list(layers)


def begin(decoder: Decoder, batches: Sequence[Tensor]) -> Recorded:
    """Return what goes into layer 0, for jobs that begin there or in front of it; no layer is run."""
    if not is_chain(decoder):
        return Recorded(batches, [], StateCache(0), [])
    starts = [layer_inputs(decoder, ids) for ids in batches]
    inputs = StateCache(sum(start.hidden.nbytes for start in starts))
    for number, start in enumerate(starts):
        inputs.put((0, number), start.hidden)
    return Recorded(batches, starts, inputs, [])


@torch.no_grad()
def follow(decoder: Decoder, recorded: Recorded, jobs: Sequence[Job]) -> list[Ending]:
    """Return what each job comes to; its change is in force from its stage on, the base's weights around it.

    Call it, and make logits of what it returns, in the block in which the base was recorded.
    """
    if not is_chain(decoder):
        return [Ending(_run_whole(decoder, recorded, job)) for job in jobs]
    return [
        Ending(states, partial(job.at, decoder.behind))
        for job, states in zip(jobs, _follow(decoder, recorded, jobs), strict=True)
    ]


def _run_whole(decoder: Decoder, recorded: Recorded, job: Job) -> list[Tensor]:
    with ExitStack() as stack:
        for stage in range(job.start, decoder.behind + 1):
            stack.enter_context(job.at(stage))
        return [whole_logits(decoder, ids) for ids in recorded.ids]


def _follow(decoder: Decoder, recorded: Recorded, jobs: Sequence[Job]) -> list[list[Tensor]]:
    layers, batches = _called_layers(decoder, recorded.starts), range(len(recorded.ids))
    # what only the head changes comes out of the layers as the base does
    states: list[list[Tensor]] = [recorded.final if job.start >= len(layers) else [] for job in jobs]
    starts: list[list[LayerInputs]] = [recorded.starts for _ in jobs]
    shared: list[list[Shared]] = [[] for _ in jobs]
    for number, job in enumerate(jobs):
        if job.start == FRONT:
            with job.at(FRONT):
                starts[number] = [layer_inputs(decoder, ids) for ids in recorded.ids]
            states[number] = [start.hidden for start in starts[number]]
            shared[number] = [start.fresh() for start in starts[number]]
    for index in range(max(0, min((job.start for job in jobs), default=len(layers))), len(layers)):
        with decoder.held(index):
            starting = any(job.start == index for job in jobs)
            inputs = [recorded.inputs.get((index, b)) for b in batches] if starting else []
            for number, job in enumerate(jobs):
                if job.start == index:
                    states[number] = inputs
                    shared[number] = [recorded.shared_at(index, b) for b in batches]
                if job.start <= index:
                    with job.at(index):
                        states[number] = [
                            run_layer(layers[index], hidden, start.call(index, containers))
                            for hidden, start, containers in zip(states[number], starts[number], shared[number], strict=True)
                        ]
    return states


@contextmanager
def _replaced_layers(decoder: Decoder, answer: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
    """Replace every layer within the block by `answer(args, kwargs)`, returned in the form in which the layer returns its hidden state."""
    layers = decoder.layers
    more = _more_values(decoder)
    before = [layer.__dict__.get("forward") for layer in layers]

    def forward_of(layer: nn.Module) -> Callable[..., Any]:
        values = more.get(type(layer))

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = answer(args, kwargs)
            return hidden if values is None else (hidden,) + (None,) * values

        return forward

    try:
        for layer in layers:
            layer.forward = forward_of(layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


class _SeenError(Exception):
    """Ends a pass once a layer of every class has run."""


@once
@torch.no_grad()
def _more_values(decoder: Decoder) -> dict[type, int | None]:
    """Return how many values a layer of each class returns behind the hidden state; None: it returns no tuple. Tried on one token."""
    values: dict[type, int | None] = {}
    first = {type(layer): layer for layer in reversed(decoder.layers)}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        values[type(module)] = len(output) - 1 if isinstance(output, tuple | list) else None
        if len(values) == len(first):
            raise _SeenError

    hooks = [layer.register_forward_hook(look) for layer in first.values()]
    try:
        decoder.model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=decoder.device), use_cache=False)
    except _SeenError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return values


# --- is it a chain? ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole_logits(decoder: Decoder, input_ids: Tensor) -> Tensor:
    """Return logits [rows, tokens, vocabulary] of one pass of the model's own."""
    return decoder.model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]


@once
def is_chain(decoder: Decoder) -> bool:
    """Return whether the model can be run layer by layer, tried on a few tokens."""
    try:
        return _same_in_pieces(decoder)
    except UserError:
        raise
    except Exception:  # each family fails in its own way where a layer is called with less than it needs
        return False


@torch.no_grad()
def _same_in_pieces(decoder: Decoder) -> bool:
    """Return whether passes in pieces are whole ones: of the model, of one changed in its first layer, and of the model again, side by side."""
    ids = decoder.probe_ids().repeat(2, 1)
    ids[1] = ids[1].flip(0)
    first = decoder.layers[0].named_modules(prefix=f"{decoder.layers_path}.0")
    halved = {name: 0.5 * decoder.weight(name) for name in [name for name, module in first if is_linear(module)][:1]}
    with StateCache(2**30) as states:
        recorded = _record(decoder, [ids], states)
        jobs = [Job(0, lambda layer: decoder.swapped(halved if layer == 0 else {}))]
        jobs += [Job(start, lambda layer: decoder.swapped({})) for start in {0, len(decoder.layers) // 2}]
        changed, *same = (_logits(decoder, ids, final[0]) for final in _follow(decoder, recorded, jobs))
    whole = whole_logits(decoder, ids)
    with decoder.swapped(halved):
        whole_changed = whole_logits(decoder, ids)
    pairs = [(changed, whole_changed), (_logits(decoder, ids, recorded.final[0]), whole), *((logits, whole) for logits in same)]
    return all(bool((a - b).abs().max() <= CHAIN_TOLERANCE * b.abs().max()) for a, b in pairs)


@once
@torch.no_grad()
def _token_axis(decoder: Decoder) -> int:
    """Return which axis of a hidden state of four are the tokens."""
    ids = decoder.probe_ids().repeat(2, 1)
    shape = layer_inputs(decoder, ids).hidden.shape
    return next(number for number in range(1, len(shape)) if shape[number - 1 : number + 1] == ids.shape)


def rows_and_tokens(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Return a layer's hidden state as [rows, tokens, width]: of several streams side by side, the largest of each number's."""
    if hidden.dim() == 3:
        return hidden
    axis = _token_axis(decoder)
    return hidden.movedim((axis - 1, axis), (0, 1)).abs().flatten(2, -2).amax(2)


def check_chain(decoder: Decoder, name: str) -> None:
    """Refuse, with UserError, activations that leave the range of the model's dtype, and a streamed model that has to be run whole."""
    logits = whole_logits(decoder, decoder.probe_ids())
    check_range(logits, name)
    if decoder.stream is not None and not is_chain(decoder):
        raise UserError(
            f"{name}: {type(decoder.model).__name__} hands more from layer to layer than can be kept, so it cannot be run layer by layer: "
            "it needs all its weights in memory (a larger --memory)"
        )


def check_range(values: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Refuse, with UserError, numbers that are not finite and that a model made in `dtype` (None: theirs)."""
    if bool(torch.isfinite(values).all()):
        return
    dtype = dtype or values.dtype
    if dtype == torch.float16:
        raise UserError(
            f"{name}: activations overflow float16 (above {torch.finfo(torch.float16).max:.0f}); use --dtype bfloat16 or float32"
        )
    raise UserError(f"{name}: the model's logits are not finite ({str(dtype).removeprefix('torch.')}); nothing can be measured")
