"""Run a decoder layer by layer: several batches, and several changes of one model, through each layer before the next one.

So a layer's weights are needed once for all of them, whether they are in memory or read for it (see `streaming`), and what lies in front of
a change is computed once: `record` keeps what goes into every layer of a base, `follow` runs changes of it from the layer where
they begin. The model's own forward does the rest, with every layer standing in: `enter` is all that comes before the layers (embeddings,
masks, positions), `logits_of` all that comes behind them.

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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.model.checkpoint import decoder_layers, is_linear, probe_ids
from bitatlas.model.hidden_states import Shelf
from bitatlas.model.streaming import held, stream_of
from bitatlas.model.swap import swapped, weight_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
Shared = dict[int, Any]  # a pass's own copy of each container that layers share, by the id of the one that the model made

LOGIT_BYTES = 2**26  # of one batch's float32 logits: a few such arrays are alive at a time
CHAIN_TOLERANCE = 1e-3  # of the largest logit; a whole pass and one in pieces differ by rounding alone
CHAIN, TOKEN_AXIS, MORE_VALUES = (
    "bitatlas_chain",
    "bitatlas_token_axis",
    "bitatlas_more_values",
)  # attributes: what was tried once


def batch_rows(row_length: int, vocabulary: int) -> int:
    """Rows in a batch: at most 16, and one batch's logits at most 64 MiB."""
    return max(1, min(16, LOGIT_BYTES // (4 * row_length * vocabulary)))


def token_spans(rows: int, tokens: int, vocabulary: int, logit_bytes: int = LOGIT_BYTES) -> list[slice]:
    """Runs of tokens whose logits, for all `rows`, take at most `logit_bytes`: one run, but for long rows of a large vocabulary."""
    step = max(1, logit_bytes // (4 * rows * vocabulary))
    return [slice(start, min(tokens, start + step)) for start in range(0, tokens, step)]


@dataclass(frozen=True)
class Start:
    """What comes before the layers. `hidden` [rows, tokens, width] goes into layer 0, `calls[i]` beside it into layer i.

    `containers`: what several layers are called with and may write into, as it is before the first one.
    """

    hidden: Tensor
    calls: list[Call]
    containers: list[Any] = field(default_factory=list)

    def fresh(self) -> Shared:
        """The containers of a pass that begins at the first layer."""
        return {id(container): copy.copy(container) for container in self.containers}

    def call(self, layer: int, shared: Shared) -> Call:
        """What goes into a layer beside the hidden state, in the pass that `shared` belongs to."""
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
    starts: list[Start]
    inputs: Shelf
    final: list[Tensor]  # [rows, tokens, width] each
    shared: dict[tuple[int, int], Shared] = field(default_factory=dict)  # (layer, batch) -> the containers in front of it

    def shared_at(self, layer: int, batch: int) -> Shared:
        """The base's containers in front of a layer, to be written into."""
        before = self.shared.get((layer, batch))
        return self.starts[batch].fresh() if before is None else forked(before)


def forked(shared: Shared) -> Shared:
    """Containers of the same content."""
    return {key: copy.copy(container) for key, container in shared.items()}


@dataclass(frozen=True)
class Job:
    """A change of a base that begins at layer `start`; `at(layer)`: the block in which it is in force there."""

    start: int
    at: Callable[[int], AbstractContextManager[Any]]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a layer's output, which comes first where there are several values."""
    return output[0] if isinstance(output, tuple | list) else output


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden state that a layer was called with, and the other arguments."""
    if args:
        return args[0], (args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden state [rows, tokens, width] after one layer."""
    args, kwargs = call
    return hidden_of(layer(hidden, *args, **kwargs))


@torch.no_grad()
def enter(model: Any, input_ids: Tensor) -> Start:
    """What goes into the layers for `input_ids` [rows, tokens]; no layer is run."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden, call = _split(args, kwargs)
        first.append(hidden)
        calls.append(call)
        return hidden

    with _standing_in(model, note):
        model.base_model(input_ids=input_ids, use_cache=False)
    return Start(first[0], calls, _containers(calls))


def _containers(calls: Sequence[Call]) -> list[Any]:
    """The dictionaries and lists that more than one layer is called with."""
    every = [value for args, kwargs in calls for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping | list)]
    count = Counter(map(id, every))
    return [value for value in {id(value): value for value in every}.values() if count[id(value)] > 1]


def cut(model: Any, final: Tensor, span: slice) -> Tensor:
    """The tokens `span` of `final`, which came out of the last layer (of some families with more axes than [rows, tokens, width])."""
    axis = 1 if final.dim() == 3 else _token_axis(model)
    return final[(slice(None),) * axis + (span,)]


def logits_of(model: Any, input_ids: Tensor, final: Tensor) -> Tensor:
    """Logits [rows, tokens, vocabulary] of what came out of the last layer, `final` [rows, tokens, width]. Differentiable in `final`."""
    if not is_chain(model):
        return final
    return _logits(model, input_ids, final)


def _logits(model: Any, input_ids: Tensor, final: Tensor) -> Tensor:
    with _standing_in(model, lambda args, kwargs: final):
        return model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def record(model: Any, batches: Sequence[Tensor], inputs: Shelf | None = None) -> Recorded:
    """One pass over `batches` (int64 [rows, tokens] each, on the model's device). Without `inputs` only its end is kept."""
    if not is_chain(model):
        return Recorded(batches, [], Shelf(0), [whole_logits(model, ids) for ids in batches])
    return _record(model, batches, inputs)


def _record(model: Any, batches: Sequence[Tensor], inputs: Shelf | None) -> Recorded:
    starts = [enter(model, ids) for ids in batches]
    hidden = [start.hidden for start in starts]
    shared = [start.fresh() for start in starts]
    before: dict[tuple[int, int], Shared] = {}
    for index, layer in enumerate(_called_layers(model, starts)):
        with held(model, index):
            for number, start in enumerate(starts):
                if inputs is not None:
                    inputs.put((index, number), hidden[number])
                    if shared[number]:
                        before[index, number] = forked(shared[number])
                hidden[number] = run_layer(layer, hidden[number], start.call(index, shared[number]))
    return Recorded(batches, starts, inputs if inputs is not None else Shelf(0), hidden, before)


def _called_layers(model: Any, starts: Sequence[Start]) -> Sequence[nn.Module]:
    """The decoder layers that a pass runs: some lists go on behind the last of them."""
    layers = decoder_layers(model)
    return list(layers)[: len(starts[0].calls)] if starts else list(layers)


def begin(model: Any, batches: Sequence[Tensor]) -> Recorded:
    """What goes into layer 0, for jobs that begin there; no layer is run."""
    if not is_chain(model):
        return Recorded(batches, [], Shelf(0), [])
    starts = [enter(model, ids) for ids in batches]
    inputs = Shelf(sum(start.hidden.nbytes for start in starts))
    for number, start in enumerate(starts):
        inputs.put((0, number), start.hidden)
    return Recorded(batches, starts, inputs, [])


@torch.no_grad()
def follow(model: Any, recorded: Recorded, jobs: Sequence[Job]) -> list[list[Tensor]]:
    """What comes out of the last layer, by job and batch; each job's change is in force from its layer on, the base's weights around it.

    Call it in the block in which the base was recorded.
    """
    if not is_chain(model):
        return [_whole(model, recorded, job) for job in jobs]
    return _follow(model, recorded, jobs)


def _whole(model: Any, recorded: Recorded, job: Job) -> list[Tensor]:
    with ExitStack() as stack:
        for index in range(job.start, len(decoder_layers(model))):
            stack.enter_context(job.at(index))
        return [whole_logits(model, ids) for ids in recorded.ids]


def _follow(model: Any, recorded: Recorded, jobs: Sequence[Job]) -> list[list[Tensor]]:
    layers = _called_layers(model, recorded.starts)
    states: list[list[Tensor]] = [[] for _ in jobs]
    shared: list[list[Shared]] = [[] for _ in jobs]
    for index in range(min((job.start for job in jobs), default=len(layers)), len(layers)):
        with held(model, index):
            begun = [recorded.inputs.get((index, b)) for b in range(len(recorded.ids))] if _any_starts(jobs, index) else []
            for number, job in enumerate(jobs):
                if job.start == index:
                    states[number] = begun
                    shared[number] = [recorded.shared_at(index, b) for b in range(len(recorded.ids))]
                if job.start <= index:
                    with job.at(index):
                        states[number] = [
                            run_layer(layers[index], hidden, start.call(index, own))
                            for hidden, start, own in zip(states[number], recorded.starts, shared[number], strict=True)
                        ]
    return states


def _any_starts(jobs: Sequence[Job], layer: int) -> bool:
    return any(job.start == layer for job in jobs)


@contextmanager
def _standing_in(model: Any, answer: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
    """Within the block, no layer computes anything: each returns `answer(args, kwargs)`, in the form in which it returns its own."""
    layers = decoder_layers(model)
    more = _more_values(model, layers)
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
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = own


class _SeenError(Exception):
    """Ends a pass once a layer of every class has run."""


@torch.no_grad()
def _more_values(model: Any, layers: nn.ModuleList) -> dict[type, int | None]:
    """How many values a layer of each class returns behind the hidden state; None: it returns no tuple. Tried once a model, on one token."""
    known = getattr(layers, MORE_VALUES, None)
    if known is not None:
        return known  # type: ignore[no-any-return]
    found: dict[type, int | None] = {}
    first = {type(layer): layer for layer in reversed(layers)}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        found[type(module)] = len(output) - 1 if isinstance(output, tuple | list) else None
        if len(found) == len(first):
            raise _SeenError

    hooks = [layer.register_forward_hook(look) for layer in first.values()]
    try:
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    except _SeenError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    setattr(layers, MORE_VALUES, found)
    return found


# --- is it a chain? ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole_logits(model: Any, input_ids: Tensor) -> Tensor:
    """Logits [rows, tokens, vocabulary] of one pass of the model's own."""
    return model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]


def is_chain(model: Any) -> bool:
    """Can the model be run layer by layer? Tried once, on a few tokens."""
    known = getattr(model, CHAIN, None)
    if known is None:
        try:
            known = _tried(model)
        except UserError:
            raise
        except Exception:  # each family fails in its own way where a layer is called with less than it needs
            known = False
        setattr(model, CHAIN, known)
    return bool(known)


@torch.no_grad()
def _tried(model: Any) -> bool:
    """Are passes in pieces the whole ones: of the model, of one that is changed in its first layer, and of the model again, side by side?"""
    ids = probe_ids(model).repeat(2, 1)
    ids[1] = ids[1].flip(0)
    layers = decoder_layers(model)
    halved = {name: 0.5 * weight_of(model, name) for name in _some_module(model)}
    with Shelf(2**30) as shelf:
        recorded = _record(model, [ids], shelf)
        jobs = [Job(0, lambda layer: swapped(model, halved if layer == 0 else {}))]
        jobs += [Job(start, lambda layer: swapped(model, {})) for start in {0, len(layers) // 2}]
        changed, *same = (_logits(model, ids, final[0]) for final in _follow(model, recorded, jobs))
    own = whole_logits(model, ids)
    with swapped(model, halved):
        truly = whole_logits(model, ids)
    pairs = [(changed, truly), (_logits(model, ids, recorded.final[0]), own), *((logits, own) for logits in same)]
    return all(bool((a - b).abs().max() <= CHAIN_TOLERANCE * b.abs().max()) for a, b in pairs)


def _some_module(model: nn.Module) -> list[str]:
    """The first linear module of the first layer that has one, by its name."""
    layer = decoder_layers(model)[0]
    inside = {id(module) for module in layer.modules() if is_linear(module)}
    return [name for name, module in model.named_modules() if id(module) in inside][:1]


@torch.no_grad()
def _token_axis(model: Any) -> int:
    """Which axis of a hidden state of four are the tokens."""
    axis = getattr(model, TOKEN_AXIS, None)
    if axis is None:
        ids = probe_ids(model).repeat(2, 1)
        shape = enter(model, ids).hidden.shape
        axis = next(number for number in range(1, len(shape)) if shape[number - 1 : number + 1] == ids.shape)
        setattr(model, TOKEN_AXIS, axis)
    return int(axis)


def rows_and_tokens(model: Any, hidden: Tensor) -> Tensor:
    """A layer's hidden state as [rows, tokens, width]: of several streams side by side, the largest of each number's."""
    if hidden.dim() == 3:
        return hidden
    axis = _token_axis(model)
    return hidden.movedim((axis - 1, axis), (0, 1)).abs().flatten(2, -2).amax(2)


def check_chain(model: Any, name: str) -> None:
    """UserError where activations leave the range of the model's dtype, or where a model that is streamed has to be run whole."""
    logits = whole_logits(model, probe_ids(model))
    check_range(logits, name)
    if stream_of(model) is not None and not is_chain(model):
        raise UserError(
            f"{name}: {type(model).__name__} hands more from layer to layer than can be kept, so it cannot be run layer by layer: "
            "it needs all its weights in memory (a larger --memory)"
        )


def check_range(values: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """UserError where numbers are not finite that a model made in `dtype` (None: theirs)."""
    if bool(torch.isfinite(values).all()):
        return
    dtype = dtype or values.dtype
    if dtype == torch.float16:
        raise UserError(
            f"{name}: activations overflow float16 (above {torch.finfo(torch.float16).max:.0f}); use --dtype bfloat16 or float32"
        )
    raise UserError(f"{name}: the model's logits are not finite ({str(dtype).removeprefix('torch.')}); nothing can be measured")
