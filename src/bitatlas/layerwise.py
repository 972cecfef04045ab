"""Run a decoder layer by layer: several batches, and several changes of one model, through each layer before the next one.

So a layer's weights are needed once for all of them, whether they are in memory or read for it (see `streaming`), and what lies in front of
a change is computed once: `record` keeps what goes into every layer of a base, `follow` runs changes of it from the layer where
they begin. The model's own forward does the rest, with every layer standing in: `enter` is all that comes before the layers (embeddings,
masks, positions), `logits_of` all that comes behind them.

A pass in these pieces gives what a whole pass gives, to the last bit, where layers follow each other and nothing else happens
between them; `check_chain` refuses a model in which that is not so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.checkpoint import decoder_layers
from bitatlas.errors import UserError
from bitatlas.shelf import Shelf
from bitatlas.streaming import held

Call = tuple[tuple[Any, ...], dict[str, Any]]

LOGIT_BYTES = 2**26  # of one batch's float32 logits: a few such arrays are alive at a time
CHAIN_TOLERANCE = 1e-3  # of the largest logit; a whole pass and one in pieces differ by rounding alone


def batch_rows(row_length: int, vocabulary: int) -> int:
    """Rows in a batch: at most 16, and one batch's logits at most 64 MiB."""
    return max(1, min(16, LOGIT_BYTES // (4 * row_length * vocabulary)))


def token_spans(rows: int, tokens: int, vocabulary: int, logit_bytes: int = LOGIT_BYTES) -> list[slice]:
    """Runs of tokens whose logits, for all `rows`, take at most `logit_bytes`: one run, but for long rows of a large vocabulary."""
    step = max(1, logit_bytes // (4 * rows * vocabulary))
    return [slice(start, min(tokens, start + step)) for start in range(0, tokens, step)]


@dataclass(frozen=True)
class Start:
    """What comes before the layers. `hidden` [rows, tokens, width] goes into layer 0, `calls[i]` beside it into layer i."""

    hidden: Tensor
    calls: list[Call]


@dataclass(frozen=True)
class Recorded:
    """One pass of a base over batches. `inputs` holds (layer, batch) -> what went into the layer, `final` what came out of the last one."""

    ids: Sequence[Tensor]
    starts: list[Start]
    inputs: Shelf
    final: list[Tensor]  # [rows, tokens, width] each


@dataclass(frozen=True)
class Job:
    """A change of a base that begins at layer `start`; `at(layer)`: the block in which it is in force there."""

    start: int
    at: Callable[[int], AbstractContextManager[Any]]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a layer's output, which some architectures wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


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
    return Start(first[0], calls)


def logits_of(model: Any, input_ids: Tensor, final: Tensor) -> Tensor:
    """Logits [rows, tokens, vocabulary] of what came out of the last layer, `final` [rows, tokens, width]. Differentiable in `final`."""
    with _standing_in(model, lambda args, kwargs: final):
        return model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def record(model: Any, batches: Sequence[Tensor], inputs: Shelf | None = None) -> Recorded:
    """One pass over `batches` (int64 [rows, tokens] each, on the model's device). Without `inputs` only its end is kept."""
    starts = [enter(model, ids) for ids in batches]
    hidden = [start.hidden for start in starts]
    for index, layer in enumerate(decoder_layers(model)):
        with held(model, index):
            for number, start in enumerate(starts):
                if inputs is not None:
                    inputs.put((index, number), hidden[number])
                hidden[number] = run_layer(layer, hidden[number], start.calls[index])
    return Recorded(batches, starts, inputs if inputs is not None else Shelf(0), hidden)


def begin(model: Any, batches: Sequence[Tensor]) -> Recorded:
    """What goes into layer 0, for jobs that begin there; no layer is run."""
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
    layers = decoder_layers(model)
    states: list[list[Tensor]] = [[] for _ in jobs]
    for index in range(min((job.start for job in jobs), default=len(layers)), len(layers)):
        with held(model, index):
            begun = [recorded.inputs.get((index, b)) for b in range(len(recorded.ids))] if _any_starts(jobs, index) else []
            for number, job in enumerate(jobs):
                if job.start <= index:
                    before = begun if job.start == index else states[number]
                    with job.at(index):
                        states[number] = [
                            run_layer(layers[index], hidden, start.calls[index])
                            for hidden, start in zip(before, recorded.starts, strict=True)
                        ]
    return states


def _any_starts(jobs: Sequence[Job], layer: int) -> bool:
    return any(job.start == layer for job in jobs)


@contextmanager
def _standing_in(model: Any, answer: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
    """Within the block, no layer computes anything: each returns `answer(args, kwargs)`, in the form in which it returns its own."""
    layers = decoder_layers(model)
    wraps = _wraps(model, layers)
    before = [layer.__dict__.get("forward") for layer in layers]

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = answer(args, kwargs)
        return (hidden,) if wraps else hidden

    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = own


class _SeenError(Exception):
    """Ends a pass behind the first layer."""


@torch.no_grad()
def _wraps(model: Any, layers: nn.ModuleList) -> bool:
    """Do the layers return a tuple? Tried once a model, on one token."""
    known = getattr(layers, "returns_tuple", None)
    if known is not None:
        return bool(known)

    def look(module: nn.Module, args: Any, output: Any) -> None:
        layers.returns_tuple = isinstance(output, tuple)  # type: ignore[assignment]
        raise _SeenError

    hook = layers[0].register_forward_hook(look)
    try:
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    except _SeenError:
        pass
    finally:
        hook.remove()
    return bool(layers.returns_tuple)


@torch.no_grad()
def check_chain(model: Any, name: str, input_ids: Tensor) -> None:
    """UserError where a pass in pieces is not the whole pass: something happens between the layers."""
    logits = model(input_ids=input_ids, use_cache=False).logits
    pieces = logits_of(model, input_ids, record(model, [input_ids]).final[0])
    if not (pieces - logits).abs().max() <= CHAIN_TOLERANCE * logits.abs().max():
        raise UserError(
            f"{name}: the layers of {type(model).__name__} do not simply follow each other, which measuring them needs"
        )
