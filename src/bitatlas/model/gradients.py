"""Send the gradients of drawn labels backwards through a decoder, layer by layer: what each module meets at its input and its output.

Labels are drawn from the model's own predictions, so the second moment of what arrives at any tensor is the Fisher matrix there: the
curvature of KL(reference || model) at the reference. Backwards goes layer by layer: what went into each layer is kept from the pass forwards,
the layer is run again, and the gradient is sent through it before the layer in front is looked at. One layer's activations are alive at
a time, at the price of one more pass forwards; no weight gradient is ever formed. Labels depend on the seed and on a row's tokens alone,
not on the batch. What layers hand to later ones beside the hidden state (keys and values that several share) takes its gradients with it.

Source: Fisher = Gauss-Newton for KL: Martens, arXiv 1412.1193.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.model.decoder import FRONT, Decoder
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.layerwise import (
    LOGIT_BYTES,
    Recorded,
    Shared,
    is_chain,
    layer_inputs,
    logits_of,
    record,
    run_layer,
    slice_tokens,
    token_blocks,
    token_spans,
)

Key = tuple[Any, ...]  # where a tensor is that goes from layer to layer
HIDDEN: Key = ()
Output = tuple[str, Tensor, Tensor]  # (module, its input [..., in], its output [..., out])
Gradients = dict[Key, Tensor]  # gradients with respect to what goes from a layer to the next ones


@dataclass(frozen=True)
class ModuleCall:
    """One call of a linear module: its input [..., in], and the gradient at its output [..., out], zeros where nothing arrived.

    Of an embedding the input is the tokens' numbers, int64 [...].
    """

    name: str
    inputs: Tensor
    gradient: Tensor


def layer_calls(
    decoder: Decoder, layers: Mapping[int, Sequence[str]], batches: Sequence[Tensor], states: StateCache, seed: int = 0
) -> Iterator[tuple[int, list[ModuleCall], bool]]:
    """Yield (stage, calls of its modules, are they its last), from the last stage to the first, batch after batch; of the head in a few parts each.

    layers: stage (see `decoder`) -> names of its modules; batches: int64 [rows, tokens] each, on the model's device; `states` takes what goes into
    every layer. Of a model that is no chain, the whole model runs forwards and backwards again for every stage.
    """
    wanted = sorted((index for index, names in layers.items() if names), reverse=True)
    if not is_chain(decoder):
        for index in wanted:
            for number, batch in enumerate(batches, start=1):
                yield index, _whole_calls(decoder, index, layers[index], batch, seed), number == len(batches)
        return
    recorded = record(decoder, batches, states)
    gradients: list[Gradients] = [{HIDDEN: torch.zeros_like(final)} for final in recorded.final]
    for number, (batch, final) in enumerate(zip(batches, recorded.final, strict=True)):
        of_head = _head_calls(decoder, batch, final, gradients[number], layers.get(decoder.behind, ()), seed)
        for calls, is_last in of_head:
            yield decoder.behind, calls, is_last and number == len(batches) - 1
    for index in reversed(range(max(0, wanted[-1]) if wanted else 0, len(recorded.starts[0].calls))):
        with decoder.held(index):
            for number in range(len(batches)):
                calls = _backward(decoder, index, recorded, number, gradients, layers.get(index, ()))
                if index in layers:
                    yield index, calls, number == len(batches) - 1
    for number in range(len(batches)) if FRONT in layers else ():
        yield FRONT, _front_calls(decoder, recorded, number, gradients[number], layers[FRONT]), number == len(batches) - 1


def label_points(batch: Tensor, seed: int, draw: int) -> Tensor:
    """Return a uniform number for each position, float64 [rows, tokens], seeded by the row's own tokens: where its label is drawn."""
    uniform = []
    for row in batch.cpu().numpy().astype("<i8"):
        digest = hashlib.sha256(row.tobytes() + f"{seed},{draw}".encode()).digest()
        uniform.append(np.random.default_rng(int.from_bytes(digest[:16], "big")).random(batch.shape[1]))
    return torch.from_numpy(np.stack(uniform))


def labels_at(q: Tensor, points: Tensor) -> Tensor:
    """Return a label for each of `points`, [rows, tokens] or [rows, tokens, draws], drawn from q [rows, tokens, vocabulary]: int64, as `points`."""
    labels = []
    values = points.to(q.device, q.dtype).reshape(q.shape[0] * q.shape[1], -1)
    for block in token_blocks(q):
        cumulative = q.flatten(0, 1)[block].cumsum(-1)
        labels.append(torch.searchsorted(cumulative, values[block] * cumulative[..., -1:]))
    return torch.cat(labels).clamp(max=q.shape[-1] - 1).view(points.shape)


def _score(logits: Tensor, points: Tensor) -> Tensor:
    """Return the gradient of the drawn labels' log-probability with respect to `logits` [rows, tokens, vocabulary]: onehot(y) - q."""
    q = torch.softmax(logits.detach().float(), dim=-1)
    labels = labels_at(q, points).unsqueeze(-1)
    return q.neg_().scatter_add_(-1, labels, torch.ones_like(q[..., :1])).to(logits.dtype)


def final_gradient(decoder: Decoder, batch: Tensor, final: Tensor, score: Callable[[Tensor, slice], Tensor]) -> Gradients:
    """Return the gradient with respect to the last hidden state; `score` gives that with respect to the logits of a span of tokens."""
    gradient = torch.zeros_like(final)
    for span in token_spans(len(batch), batch.shape[1], decoder.vocabulary, LOGIT_BYTES):
        leaf = slice_tokens(decoder, final, span).detach().requires_grad_(True)
        with torch.enable_grad():
            logits = logits_of(decoder, batch[:, span], leaf)
        (of_span,) = torch.autograd.grad(logits, leaf, score(logits.detach(), span))
        slice_tokens(decoder, gradient, span).copy_(of_span)
    return {HIDDEN: gradient}


def _head_calls(
    decoder: Decoder, batch: Tensor, final: Tensor, gradients: Gradients, names: Sequence[str], seed: int
) -> Iterator[tuple[list[ModuleCall], bool]]:
    """Fill in the gradient of the drawn labels' log-probability with respect to the last hidden state, and yield (the head's calls, are they the last)
    by spans of tokens."""
    points = label_points(batch, seed, 0)
    spans = token_spans(len(batch), batch.shape[1], decoder.vocabulary, LOGIT_BYTES)
    for span in spans:
        leaf = slice_tokens(decoder, final, span).detach().requires_grad_(True)
        with torch.enable_grad(), _watched(decoder, decoder.behind, names) as outputs:
            logits = logits_of(decoder, batch[:, span], leaf)
            asked = [leaf, *(output for *_, output in outputs)]
            of_span, *of_outputs = torch.autograd.grad(logits, asked, _score(logits, points[:, span]))
        slice_tokens(decoder, gradients[HIDDEN], span).copy_(of_span)
        if names:
            yield _calls(outputs, of_outputs), span is spans[-1]


def _front_calls(
    decoder: Decoder, recorded: Recorded, number: int, gradients: Gradients, names: Sequence[str]
) -> list[ModuleCall]:
    """Send what has arrived in front of the layers on to the embeddings, and return their calls on one batch."""
    with torch.enable_grad(), _watched(decoder, FRONT, names) as outputs:
        start = layer_inputs(decoder, recorded.ids[number])
        leaving = {HIDDEN: start.hidden, **_tensors(start.fresh())}
        new = _sent_on(leaving, gradients, [output for *_, output in outputs])
    return _calls(outputs, new)


def _sent_on(leaving: Gradients, arriving: Gradients, asked: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients with respect to `asked` of what arrives at the tensors `leaving`, None where nothing does."""
    keys = [key for key, tensor in leaving.items() if key in arriving and tensor.requires_grad]
    if not keys or not asked:
        return [None] * len(asked)
    return torch.autograd.grad([leaving[key] for key in keys], asked, [arriving[key] for key in keys], allow_unused=True)


def _whole_calls(decoder: Decoder, stage: int, names: Sequence[str], batch: Tensor, seed: int) -> list[ModuleCall]:
    with torch.enable_grad(), _watched(decoder, stage, names) as outputs:
        logits = decoder.model(input_ids=batch, use_cache=False).logits
        if not outputs:
            return []
        score = _score(logits, label_points(batch, seed, 0))
        gradients = torch.autograd.grad(logits, [output for *_, output in outputs], score, allow_unused=True)
    return _calls(outputs, gradients)


def send_back(
    decoder: Decoder,
    index: int,
    recorded: Recorded,
    number: int,
    gradients: list[Gradients],
    more: Iterable[Tensor],
) -> list[Tensor | None]:
    """Send a batch's gradients through one layer, in place, and return those with respect to `more`, None where nothing arrived.

    `more` is read once the layer has run. Hold the layer around the call.
    """
    start, arriving = recorded.starts[number], gradients[number]
    leaf = recorded.inputs.get((index, number)).detach().requires_grad_(True)
    shared, before = recorded.shared_at(index, number), _tensors(start.fresh())
    entering = {HIDDEN: leaf, **_as_leaves(shared, before)}
    with torch.enable_grad():
        output = run_layer(decoder.layers[index], leaf, start.call(index, shared))
        leaving = {HIDDEN: output, **{key: t for key, t in _tensors(shared).items() if t is not before.get(key)}}
        new = _sent_on(leaving, arriving, [*entering.values(), *more])
    gradients[number] = {key: gradient for key, gradient in zip(entering, new, strict=False) if gradient is not None}
    return list(new[len(entering) :])


def _backward(
    decoder: Decoder, index: int, recorded: Recorded, number: int, gradients: list[Gradients], names: Sequence[str]
) -> list[ModuleCall]:
    """Send a batch's gradients through one layer, in place, and return its modules' calls."""
    with _watched(decoder, index, names) as outputs:
        new = send_back(decoder, index, recorded, number, gradients, (output for *_, output in outputs))
    return _calls(outputs, new)


def _calls(outputs: Sequence[Output], gradients: Sequence[Tensor | None]) -> list[ModuleCall]:
    return [
        ModuleCall(name, inputs, torch.zeros_like(output) if gradient is None else gradient)
        for (name, inputs, output), gradient in zip(outputs, gradients, strict=True)
    ]


@contextmanager
def _watched(decoder: Decoder, stage: int, names: Sequence[str]) -> Iterator[list[Output]]:
    """Yield a list that takes (name, input, output) of each call of a stage's modules within the block; gradients can be asked for at the outputs."""
    outputs: list[Output] = []

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            # where nothing in front has an effect that is asked for, the output becomes a leaf of its own
            output = output if output.requires_grad else output.detach().requires_grad_(True)
            outputs.append((name, _module_input(args, kwargs).detach(), output))
            return output.view_as(output)  # another tensor: what comes next may write into it

        return hook

    modules = {name: decoder.module_at(name, stage) for name in names}
    hooks = [module.register_forward_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _module_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a linear module was called with."""
    return next(iter((*args, *kwargs.values())))  # type: ignore[no-any-return]


# --- what layers share beside the hidden state ---------------------------------------------------------------------------


def _tensors(shared: Shared) -> dict[Key, Tensor]:
    """Return the floating-point tensors in what layers share, by where they are."""
    tensors: dict[Key, Tensor] = {}

    def look(key: Key, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensors[key] = tensor
        return tensor

    _each_tensor(shared, look)
    return tensors


def _as_leaves(shared: Shared, before: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Replace what layers in front wrote into `shared` by leaves, and return these: gradients with respect to them are wanted, too."""
    leaves: dict[Key, Tensor] = {}

    def replace(key: Key, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor is before.get(key):
            return tensor
        leaves[key] = tensor.detach().requires_grad_(True)
        return leaves[key]

    _each_tensor(shared, replace)
    return leaves


def _each_tensor(shared: Shared, change: Callable[[Key, Tensor], Tensor]) -> None:
    """Replace every tensor in the containers, and in tuples and lists in them."""

    def changed(key: Key, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(key, value)
        if type(value) in (tuple, list):
            return type(value)(changed((*key, number), part) for number, part in enumerate(value))
        return value

    for identity, container in shared.items():
        for key in list(container) if isinstance(container, MutableMapping) else range(len(container)):
            container[key] = changed((identity, key), container[key])
