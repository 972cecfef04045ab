"""Damage around a base to second order, for every unit and format at once, from one forward pass and a few backward passes.

At the base, `KL(reference || model)` has the gradient `q - p` with respect to the logits, and labels y drawn from the model itself have
the score `onehot(y) - q`, whose second moment is the Fisher matrix, the curvature of that KL. Sent backwards once each, they meet
every linear module as `delta` [rows, tokens, out]; with the module's input x [rows, tokens, in] and the change dW = W_format - W_base,

    <gradient of one row, dW> = sum_t delta_t . (dW x_t) = <sum_t delta_t x_t', dW>,

contracted either way, whichever is cheaper for the shape and the number of formats. Backwards goes layer by layer: what went into each
layer is kept from the pass forwards, the layer is run again, and every gradient is sent through it before the layer in front is
looked at. One layer's activations and changes are alive at a time, at the price of one more pass forwards; no weight gradient of
the model is ever formed. Labels depend on the seed and on a row's tokens alone, not on the batch.

Left out: sequences of unequal length, and modules that one pass calls more than once (shared weights).
Sources: HAWQ-V3 (ICML 2021) and CLADO (arXiv 2307.05657) for what it is used for; Fisher = Gauss-Newton for KL: Martens, arXiv 1412.1193.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.bank import Bank
from bitatlas.checkpoint import decoder_layers
from bitatlas.journal import content_key
from bitatlas.layerwise import Recorded, logits_of, record, run_layer
from bitatlas.planning.expansion import Expansion
from bitatlas.records import Module
from bitatlas.sensitivity.damage import Assignment, DamageMeter, Progress
from bitatlas.streaming import held
from bitatlas.swap import swapped
from bitatlas.tokens import rows_sha256

DRAWS = 4  # of labels, a row
WORK_PER_MOVE = 16  # multiply-adds that take as long as moving one number through memory

Contracted = Callable[[str, Tensor], None]  # (module name, <gradient of each row, dW of each format> [rows, formats])
Found = tuple[np.ndarray, np.ndarray]  # of a batch: first order, scores


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
    """Second-order expansion at `base` (module -> format; modules not named keep the reference weights), batch by batch through the journal.

    rows: int64 [rows, tokens]. Units are in the order in which their first module comes.
    """
    key = ("curvature", meter.identity, dict(base), [[m.name, m.unit] for m in modules], list(formats), seed, draws)
    if meter.workers:
        batches = chain.from_iterable(meter.chunks(rows))
        ahead = [batch for batch in batches if meter.journal.get(content_key(*key, rows_sha256(batch))) is None]
        # a batch is a view of all rows, which would travel whole
        meter.workers.share("curvature", [(modules, formats, base, batch.clone(), seed, draws) for batch in ahead], progress)
    found: list[Found] = []
    total = sum(map(len, meter.chunks(rows)))
    for chunk in meter.chunks(rows):
        keys = [content_key(*key, rows_sha256(batch)) for batch in chunk]
        known: dict[str, Any] = {own: meter.journal.get(own) for own in keys}
        missing = {own: batch for own, batch in zip(keys, chunk, strict=True) if known[own] is None}
        if missing:
            new = expand_batches(meter, modules, formats, base, list(missing.values()), seed, draws)
            known |= {own: [_packed(array) for array in arrays] for own, arrays in zip(missing, new, strict=True)}
            meter.journal.put_all("curvature", {own: known[own] for own in missing})
        found += [(_unpacked(known[own][0]), _unpacked(known[own][1])) for own in keys]
        if progress:
            progress(len(found), total)
    first, scores = zip(*found, strict=True)
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
) -> list[Found]:
    """By batch [rows, tokens]: first order [rows, units, formats] and scores [rows, draws, units, formats], float64."""
    own = [batch.to(meter.model.device) for batch in batches]
    if base:
        meter.reference.see(own)
    place = {name: index for index, name in enumerate(dict.fromkeys(module.unit for module in modules))}
    sums = [np.zeros((draws + 1, len(batch), len(place), len(formats))) for batch in batches]
    layers: dict[int, list[Module]] = defaultdict(list)
    for module in modules:
        layers[module.layer].append(module)
    with meter.shelf() as shelf, swapped(meter.model, meter.bank.weights(base)):
        recorded = record(meter.model, own, shelf)
        back = [
            _at_the_end(meter, batch, final, bool(base), seed, draws) for batch, final in zip(own, recorded.final, strict=True)
        ]
        for index in reversed(range(max(layers) + 1)):
            with held(meter.model, index):
                changes = {module.name: changes_of(meter.bank, module.name, formats, base) for module in layers[index]}
                for number, total in enumerate(sums):
                    meets = _through(meter.model, index, recorded, number, back[number], changes)
                    for module in layers[index]:
                        total[:, :, place[module.unit]] += meets[module.name]
    return [(total[0], total[1:].swapaxes(0, 1).copy()) for total in sums]


def _at_the_end(
    meter: DamageMeter, batch: Tensor, final: Tensor, first_order: bool, seed: int, draws: int
) -> list[Tensor | None]:
    """Gradients [rows, tokens, width] with respect to the last hidden state: of the KL (None at the reference, where it is 0), of each draw."""
    back: list[Tensor | None] = [
        torch.zeros_like(final) if first_order else None,
        *(torch.zeros_like(final) for _ in range(draws)),
    ]
    points = [label_points(batch, seed, draw) for draw in range(draws)]
    for span in meter.spans(batch):
        leaf = final[:, span].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = logits_of(meter.model, batch[:, span], leaf)
        q = torch.softmax(logits.detach().float(), dim=-1)
        for number, own in enumerate(back):
            if own is None:
                continue
            if number == 0:
                score = (q - meter.reference.log_p(batch, span).exp()) / batch.shape[1]
            else:
                labels = labels_at(q, points[number - 1][:, span])
                score = -q.scatter_add(-1, labels.unsqueeze(-1), torch.full_like(q[..., :1], -1.0))
            (own[:, span],) = torch.autograd.grad(logits, leaf, score.to(logits.dtype), retain_graph=number < draws)
    return back


def _through(
    model: nn.Module, index: int, recorded: Recorded, number: int, back: list[Tensor | None], changes: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """Send the gradients `back` through one layer, in place, and contract them with its modules' changes: float64 [draws + 1, rows, formats]."""
    leaf = recorded.inputs.get((index, number)).detach().requires_grad_(True)
    meets = {name: np.zeros((len(back), len(leaf), len(dW))) for name, dW in changes.items()}
    current = [0]

    def add(name: str, contracted: Tensor) -> None:
        meets[name][current[0]] += contracted.double().cpu().numpy()

    with torch.enable_grad(), _watched(model, changes, add):
        output = run_layer(decoder_layers(model)[index], leaf, recorded.starts[number].calls[index])
        for place, gradient in enumerate(back):
            if gradient is not None:
                current[0] = place
                (back[place],) = torch.autograd.grad(output, leaf, gradient, retain_graph=place + 1 < len(back))
    return meets


def label_points(batch: Tensor, seed: int, draw: int) -> Tensor:
    """A uniform number for each position, float64 [rows, tokens], seeded by the row's own tokens: where its label is drawn."""
    uniform = []
    for row in batch.cpu().numpy().astype("<i8"):
        digest = hashlib.sha256(row.tobytes() + f"{seed},{draw}".encode()).digest()
        uniform.append(np.random.default_rng(int.from_bytes(digest[:16], "big")).random(batch.shape[1]))
    return torch.from_numpy(np.stack(uniform))


def labels_at(q: Tensor, points: Tensor) -> Tensor:
    """One label a position, drawn from q [rows, tokens, vocabulary] at `points` [rows, tokens]: int64 [rows, tokens]."""
    below = q.cumsum(-1)
    found = torch.searchsorted(below, points.to(q.device, q.dtype).unsqueeze(-1) * below[..., -1:])
    return found.squeeze(-1).clamp(max=q.shape[-1] - 1)


def changes_of(bank: Bank, name: str, formats: Sequence[str], base: Assignment) -> Tensor:
    """dW of a module in every format, [formats, out, in]."""
    weights = [bank.weights({name: fmt})[name] for fmt in formats]
    at_base = weights[list(formats).index(base[name])] if name in base else bank.reference(name)
    return torch.stack([weight - at_base for weight in weights])


@contextmanager
def _watched(model: nn.Module, changes: dict[str, Tensor], add: Contracted) -> Iterator[None]:
    """Within the block, each pass backwards hands every module's row gradients, contracted with its dW's, to `add`."""

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda delta: add(name, contract(x, delta, changes[name])))

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(after(name)) for name in changes]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def contract(x: Tensor, delta: Tensor, changes: Tensor) -> Tensor:
    """<sum_t delta_t x_t', dW> by row and format. x: [rows, tokens, in], delta: [rows, tokens, out], changes: [formats, out, in] -> [rows, formats]."""
    _, tokens, inputs = x.shape
    formats, outputs, _ = changes.shape
    if by_gradient(tokens, inputs, outputs, formats):
        flat = changes.flatten(1)
        return torch.stack([flat @ (d.T @ own).flatten() for own, d in zip(x, delta, strict=True)])
    return torch.stack([((x @ change.T) * delta).sum((1, 2)) for change in changes], dim=1)


def by_gradient(tokens: int, inputs: int, outputs: int, formats: int) -> bool:
    """Is one row's weight gradient cheaper than applying every dW to its inputs? Counted in multiply-adds and numbers moved."""
    area = inputs * outputs
    gradient = (tokens + formats) * area + WORK_PER_MOVE * (1 + formats) * area
    applied = formats * (tokens * area + WORK_PER_MOVE * tokens * (inputs + 2 * outputs))
    return gradient <= applied
