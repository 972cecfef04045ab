"""Expands damage around a base to second order, for every unit and format at once, from one forward pass and a few backward passes.

At the base, `KL(reference || model)` has the gradient `q - p` with respect to the logits, and labels y drawn from the model itself have
the score `onehot(y) - q`, whose second moment is the Fisher matrix, the curvature of that KL. Sent backwards once each, they meet
every linear module as `delta` [rows, tokens, out]; with the module's input x [rows, tokens, in] and the change dW = W_format - W_base,

    <gradient of one row, dW> = sum_t delta_t . (dW x_t) = <sum_t delta_t x_t', dW>,

contracted either way, whichever is cheaper for the shape and the number of formats. Backwards goes layer by layer: what went into each
layer is kept from the pass forwards, the layer is run again, and every gradient is sent through it before the layer in front is
looked at. One layer's activations and changes are alive at a time, at the price of one more pass forwards; no weight gradient of
the model is ever formed. Labels depend on the seed and on a row's tokens alone, not on the batch. What layers hand to later ones beside
the hidden state (keys and values that several share) takes its gradients with it. Where a module's inputs do not tell which row is
whose (tokens of all rows one behind the other, an expert's tokens), one row at a time is run. Of a module that a pass calls more than
once, all calls are added up.

Left out: sequences of unequal length.
Sources: HAWQ-V3 (ICML 2021) and CLADO (arXiv 2307.05657) for what it is used for; Fisher = Gauss-Newton for KL: Martens, arXiv 1412.1193.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.data.rows import rows_sha256
from bitatlas.measure.damage import Assignment, DamageMeter, token_blocks
from bitatlas.measure.workers import Progress
from bitatlas.model.decoder import Decoder
from bitatlas.model.gradients import module_input
from bitatlas.model.layerwise import (
    Recorded,
    Shared,
    is_chain,
    logits_of,
    picks_words,
    record,
    run_layer,
    slice_tokens,
    word_logits,
)  # fmt: skip
from bitatlas.plan.expansion import Expansion
from bitatlas.quantize.bank import Bank
from bitatlas.records import Module
from bitatlas.records.journal import content_key

DRAWS = 4  # of labels, a row
WORK_PER_MOVE = 16  # multiply-adds that take as long as moving one number through memory

Key = tuple[Any, ...]  # where a tensor is that goes from layer to layer
HIDDEN: Key = ()
Gradients = dict[Key, Tensor]  # gradients with respect to what goes from a layer to the next ones
OnDelta = Callable[[str, Tensor, Tensor], None]  # (module name, x [rows, tokens, in], delta [rows, tokens, out])
Loose = tuple[str, Tensor, Tensor]  # (module name, x [rows, tokens, in], its output)
Derivatives = tuple[np.ndarray, np.ndarray]  # of a batch: first order, scores


def expand(
    meter: DamageMeter,
    modules: Sequence[Module],
    formats: Sequence[str],
    base: Assignment,
    rows: Tensor,
    seed: int = 0,
    draws: int = DRAWS,
    progress: Progress | None = None,
) -> Expansion:
    """Expand damage at `base` (module -> format; modules not named keep the reference weights), batch by batch through the journal.

    rows: int64 [rows, tokens]. Units are in the order in which their first module comes.
    """
    key = ("curvature", meter.identity, dict(base), [[m.name, m.unit] for m in modules], list(formats), seed, draws)
    if meter.workers:
        batches = chain.from_iterable(meter.chunks(rows))
        ahead = [batch for batch in batches if meter.journal.get(content_key(*key, rows_sha256(batch))) is None]
        # a batch is a view of all rows, which would travel whole
        meter.workers.share("curvature", [(modules, formats, base, batch.clone(), seed, draws) for batch in ahead], progress)
    results: list[Derivatives] = []
    total = sum(map(len, meter.chunks(rows)))
    for chunk in meter.chunks(rows):
        keys = [content_key(*key, rows_sha256(batch)) for batch in chunk]
        known: dict[str, Any] = {batch_key: meter.journal.get(batch_key) for batch_key in keys}
        missing = {batch_key: batch for batch_key, batch in zip(keys, chunk, strict=True) if known[batch_key] is None}
        if missing:
            new = expand_batches(meter, modules, formats, base, list(missing.values()), seed, draws)
            known |= {batch_key: [_packed(array) for array in arrays] for batch_key, arrays in zip(missing, new, strict=True)}
            meter.journal.put_all("curvature", {batch_key: known[batch_key] for batch_key in missing})
        results += [(_unpacked(first), _unpacked(scores)) for first, scores in (known[batch_key] for batch_key in keys)]
        if progress:
            progress(len(results), total)
    first, scores = zip(*results, strict=True)
    return Expansion(np.concatenate(first), np.concatenate(scores), rows.shape[1])


def _packed(array: np.ndarray) -> dict[str, object]:
    return {"shape": list(array.shape), "float64": base64.b64encode(array.astype("<f8").tobytes()).decode()}


def _unpacked(value: dict[str, object]) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(str(value["float64"])), dtype="<f8")
    return numbers.reshape(value["shape"]).copy()  # type: ignore[call-overload, no-any-return]


def expand_batches(
    meter: DamageMeter,
    modules: Sequence[Module],
    formats: Sequence[str],
    base: Assignment,
    batches: Sequence[Tensor],
    seed: int,
    draws: int,
) -> list[Derivatives]:
    """Return by batch [rows, tokens]: first order [rows, units, formats] and scores [rows, draws, units, formats], float64."""
    batches = [batch.to(meter.decoder.device) for batch in batches]
    expanded = _layer_by_layer if is_chain(meter.decoder) else _whole
    if is_chain(meter.decoder) and not meter.row_by_row:
        if base:
            meter.reference.see(batches)
        try:
            return expanded(meter, modules, formats, base, batches, seed, draws)
        except RowsError:
            meter.row_by_row = True
    rows = [row for batch in batches for row in batch.split(1)]
    if base:
        meter.reference.see(rows)
    single = iter(expanded(meter, modules, formats, base, rows, seed, draws))
    by_batch = [zip(*[next(single) for _ in batch], strict=True) for batch in batches]
    return [(np.concatenate(first), np.concatenate(scores)) for first, scores in by_batch]


class RowsError(Exception):
    """What went into a module does not tell which row is whose: tokens of all rows one behind the other, or those of an expert alone."""


def _layer_by_layer(
    meter: DamageMeter, modules: Sequence[Module], formats: Sequence[str], base: Assignment, batches: Sequence[Tensor], seed: int, draws: int
) -> list[Derivatives]:  # fmt: skip
    unit_index = {name: index for index, name in enumerate(dict.fromkeys(module.unit for module in modules))}
    sums = [_zeros(batch, draws + 1, len(batch), len(unit_index), len(formats)) for batch in batches]
    layers: dict[int, list[Module]] = defaultdict(list)
    for module in modules:
        layers[module.layer].append(module)
    with meter.budget.shelf() as shelf, meter.decoder.swapped(meter.bank.weights(base)):
        recorded = record(meter.decoder, batches, shelf)
        gradients: list[list[Gradients | None]] = []
        for batch, final in zip(batches, recorded.final, strict=True):
            first, of_draws = final_gradients(meter, batch, final, seed, draws, first_order=bool(base))
            gradients.append([None if first is None else {HIDDEN: first}, *({HIDDEN: gradient} for gradient in of_draws)])
        for index in reversed(range(min(max(layers) + 1, len(recorded.starts[0].calls)))):
            with meter.decoder.held(index):
                changes = {module.name: changes_of(meter.bank, module.name, formats, base) for module in layers[index]}
                for number, total in enumerate(sums):
                    products = _backward(meter.decoder, index, recorded, number, gradients[number], changes)
                    for module in layers[index]:
                        total[:, :, unit_index[module.unit]] += products[module.name]
    return [_derivatives(total) for total in sums]


def _zeros(batch: Tensor, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=batch.device)


def _derivatives(total: Tensor) -> Derivatives:
    """Return what was added up, [draws + 1, rows, units, formats], the KL's first, in the form of a result."""
    numbers = total.cpu().numpy()
    return numbers[0], numbers[1:].swapaxes(0, 1).copy()


def _whole(
    meter: DamageMeter, modules: Sequence[Module], formats: Sequence[str], base: Assignment, rows: Sequence[Tensor], seed: int, draws: int
) -> list[Derivatives]:  # fmt: skip
    """Expand a model whose layers cannot be run one by one: one row [1, tokens] at a time through all of it."""
    unit_index = {name: index for index, name in enumerate(dict.fromkeys(module.unit for module in modules))}
    results: list[Derivatives] = []
    for row in rows:
        total = _zeros(row, draws + 1, 1, len(unit_index), len(formats))
        deltas = _deltas(meter, [module.name for module in modules], base, row, seed, draws)
        for module in modules:
            changes = changes_of(meter.bank, module.name, formats, base) if deltas[module.name] else None
            for draw, x, delta in deltas[module.name]:
                assert changes is not None
                total[draw, :, unit_index[module.unit]] += contract(x, delta, changes).double()
        results.append(_derivatives(total))
    return results


def _deltas(
    meter: DamageMeter, names: Sequence[str], base: Assignment, row: Tensor, seed: int, draws: int
) -> dict[str, list[tuple[int, Tensor, Tensor]]]:
    """Return of each module the gradients at its output, with what went in: (0 for the KL, else 1 + draw; x [1, tokens, in]; delta [1, tokens, out])."""
    deltas: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in names}
    current = [0]
    with (
        torch.enable_grad(),
        meter.decoder.swapped(meter.bank.weights(base)),
        _watched(meter.decoder.model, names, row, lambda name, x, delta: deltas[name].append((current[0], x, delta))) as loose,
    ):
        logits = meter.decoder.model(input_ids=row, use_cache=False).logits
        q = torch.softmax(logits.detach().float(), dim=-1)
        for number in range(0 if base else 1, draws + 1):
            current[0] = number
            score = _score(meter, row, slice(0, row.shape[1]), q, seed, number).to(logits.dtype)
            new = torch.autograd.grad(logits, [out for *_, out in loose], score, retain_graph=number < draws, allow_unused=True)
            _deliver(loose, new, lambda name, x, delta: deltas[name].append((current[0], x, delta)))
    return deltas


def _score(meter: DamageMeter, batch: Tensor, span: slice, q: Tensor, seed: int, number: int) -> Tensor:
    """Return the gradient with respect to the logits of `span` [rows, tokens, vocabulary]: of the KL (number 0), or of the log-probability of drawn labels."""
    if number == 0:
        return (q - meter.reference.log_p(batch, span).exp()) / batch.shape[1]
    return _label_score(q, labels_at(q, label_points(batch, seed, number - 1)[:, span]))


def _label_score(q: Tensor, labels: Tensor) -> Tensor:
    """Return onehot(labels) - q, [rows, tokens, vocabulary]."""
    return -q.scatter_add(-1, labels.unsqueeze(-1), torch.full_like(q[..., :1], -1.0))


def final_gradients(
    meter: DamageMeter, batch: Tensor, final: Tensor, seed: int, draws: int, first_order: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Return gradients with respect to the last hidden state of the model as it is now, `final`, on `batch` [rows, tokens], which the reference
    saw if `first_order`: of each row's KL(reference || model), as `final` is, None without `first_order` (at the reference it is 0);
    of the summed log-probability of each draw's labels, [draws, *final's].

    The score of a draw, onehot(y) - q, goes back through the head as two: q, which all draws have in common, in one product of the head's
    size, and each token's label, which needs one row of the head alone. Where the head does more than that, each draw has its own product.
    """
    first = torch.zeros_like(final) if first_order else None
    of_draws = final.new_zeros(draws, *final.shape)
    points = torch.zeros(*batch.shape, draws, dtype=torch.float64, device=batch.device)
    for draw in range(draws):
        points[..., draw] = label_points(batch, seed, draw)
    for span in meter.spans(batch):
        leaf = slice_tokens(meter.decoder, final, span).detach().requires_grad_(True)
        with torch.enable_grad():
            logits = logits_of(meter.decoder, batch[:, span], leaf)
        q = torch.softmax(logits.detach().float(), dim=-1)
        if first is not None:
            score = _score(meter, batch, span, q, seed, 0).to(logits.dtype)
            slice_tokens(meter.decoder, first, span).copy_(torch.autograd.grad(logits, leaf, score, retain_graph=draws > 0)[0])
        for draw, gradient in enumerate(_label_gradients(meter.decoder, batch[:, span], leaf, logits, q, points[:, span])):
            slice_tokens(meter.decoder, of_draws[draw], span).copy_(gradient)
    return first, of_draws


def _label_gradients(decoder: Decoder, ids: Tensor, leaf: Tensor, logits: Tensor, q: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Yield the gradient at `leaf`, the last hidden state of `ids` [rows, tokens], of each draw's summed log-probability.

    q: softmax of `logits`; points: where the labels are drawn, [rows, tokens, draws]
    """
    draws = points.shape[-1]
    if not draws:
        return
    labels = labels_at(q, points)  # [rows, tokens, draws]
    if not picks_words(decoder):
        for draw in range(draws):
            score = _label_score(q, labels[..., draw]).to(logits.dtype)
            yield torch.autograd.grad(logits, leaf, score, retain_graph=draw + 1 < draws)[0]
        return
    (common,) = torch.autograd.grad(logits, leaf, q.to(logits.dtype))
    for draw in range(draws):
        with torch.enable_grad():
            picked = word_logits(decoder, ids, leaf, labels[..., draw])
        yield torch.autograd.grad(picked.sum(), leaf)[0] - common


def _backward(
    decoder: Decoder, index: int, recorded: Recorded, number: int, gradients: list[Gradients | None], changes: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Send `gradients` through one layer, in place, and contract them with its modules' changes: float64 [draws + 1, rows, formats]."""
    ids, start = recorded.ids[number], recorded.starts[number]
    leaf = recorded.inputs.get((index, number)).detach().requires_grad_(True)
    shared, before = recorded.shared_at(index, number), _tensors(start.fresh())
    entering = {HIDDEN: leaf, **_as_leaves(shared, before)}
    products = {name: _zeros(ids, len(gradients), len(ids), len(dW)) for name, dW in changes.items()}
    current = [0]

    def add(name: str, x: Tensor, delta: Tensor) -> None:
        products[name][current[0]] += contract(x, delta, changes[name]).double()

    with torch.enable_grad(), _watched(decoder.model, list(changes), ids, add) as loose:
        output = run_layer(decoder.layers[index], leaf, start.call(index, shared))
        leaving = {HIDDEN: output, **{key: t for key, t in _tensors(shared).items() if t is not before.get(key)}}
        for draw, arriving in enumerate(gradients):
            keys = [key for key, tensor in leaving.items() if key in (arriving or {}) and tensor.requires_grad]
            if arriving is None or not keys:
                continue
            current[0] = draw
            new = torch.autograd.grad(
                [leaving[key] for key in keys], [*entering.values(), *(out for *_, out in loose)], [arriving[key] for key in keys],
                retain_graph=draw + 1 < len(gradients), allow_unused=True,
            )  # fmt: skip
            gradients[draw] = {key: gradient for key, gradient in zip(entering, new, strict=False) if gradient is not None}
            _deliver(loose, new[len(entering) :], add)
    return products


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


def changes_of(bank: Bank, name: str, formats: Sequence[str], base: Assignment) -> Tensor:
    """Return dW of a module in every format, [formats, out, in]."""
    weights = [bank.weights({name: fmt})[name] for fmt in formats]
    at_base = weights[list(formats).index(base[name])] if name in base else bank.reference(name)
    return torch.stack([weight - at_base for weight in weights])


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], ids: Tensor, on_delta: OnDelta) -> Iterator[list[Loose]]:
    """Hand what went into every module and the gradient at its output to `on_delta`, in each pass backwards within the block.

    Yields the modules' outputs on which nothing in front of them has an effect that is asked for: gradients with respect to these have
    to be asked for, too. Raises RowsError where it is not known to which of the rows of `ids` [rows, tokens] an input belongs.
    """
    loose: list[Loose] = []

    def after(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x = module_input(args, kwargs).detach()
            if len(ids) > 1 and (x.dim() < 3 or x.shape[:2] != ids.shape):
                raise RowsError
            x = x.reshape(len(ids), -1, x.shape[-1])
            if output.requires_grad:
                output.register_hook(lambda delta: on_delta(name, x, delta.reshape(*x.shape[:2], -1)))
                return None
            leaf = output.detach().requires_grad_(True)
            loose.append((name, x, leaf))
            return leaf.clone()

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(after(name), with_kwargs=True) for name in names]
    try:
        yield loose
    finally:
        for hook in hooks:
            hook.remove()


def _deliver(loose: Sequence[Loose], gradients: Sequence[Tensor | None], on_delta: OnDelta) -> None:
    """Hand the gradients at outputs that nothing in front has an effect on to `on_delta`."""
    for (name, x, _), delta in zip(loose, gradients, strict=True):
        if delta is not None:
            on_delta(name, x, delta.reshape(*x.shape[:2], -1))


def contract(x: Tensor, delta: Tensor, changes: Tensor) -> Tensor:
    """Return <sum_t delta_t x_t', dW> by row and format. x: [rows, tokens, in], delta: [rows, tokens, out], changes: [formats, out, in] -> [rows, formats]."""
    _, tokens, width = x.shape
    formats, outputs, _ = changes.shape
    if by_gradient(tokens, width, outputs, formats):
        flat = changes.flatten(1)
        return torch.stack([flat @ (d.T @ of_row).flatten() for of_row, d in zip(x, delta, strict=True)])
    return torch.stack([((x @ change.T) * delta).sum((1, 2)) for change in changes], dim=1)


def by_gradient(tokens: int, inputs: int, outputs: int, formats: int) -> bool:
    """Return whether one row's weight gradient is cheaper than applying every dW to its inputs, in multiply-adds and numbers moved."""
    area = inputs * outputs
    gradient = (tokens + formats) * area + WORK_PER_MOVE * (1 + formats) * area
    applied = formats * (tokens * area + WORK_PER_MOVE * tokens * (inputs + 2 * outputs))
    return gradient <= applied
