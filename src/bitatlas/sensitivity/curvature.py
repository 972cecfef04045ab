"""Damage around a base to second order, for every unit and format at once, from one forward pass and a few backward passes.

At the base, `KL(reference || model)` has the gradient `q - p` with respect to the logits, and labels y drawn from the model itself have
the score `onehot(y) - q`, whose second moment is the Fisher matrix, the curvature of that KL. Sent backwards once each, they meet
every linear module as `delta` [rows, tokens, out]; with the module's input x [rows, tokens, in] and the change dW = W_format - W_base,

    <gradient of one row, dW> = sum_t delta_t . (dW x_t) = <sum_t delta_t x_t', dW>,

contracted either way, whichever is cheaper for the shape and the number of formats. Only one batch's worth of one module's row gradients is alive at a
time; no weight gradient of the model is ever formed. Labels depend on the seed and on a row's tokens alone, not on the batch.

Left out: sequences of unequal length, and modules that one pass calls more than once (shared weights).
Sources: HAWQ-V3 (ICML 2021) and CLADO (arXiv 2307.05657) for what it is used for; Fisher = Gauss-Newton for KL: Martens, arXiv 1412.1193.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.bank import Bank
from bitatlas.journal import content_key
from bitatlas.layerwise import batch_rows
from bitatlas.planning.expansion import Expansion
from bitatlas.records import Module
from bitatlas.sensitivity.damage import Assignment, DamageMeter, Progress
from bitatlas.swap import swapped
from bitatlas.tokens import rows_sha256

DRAWS = 4  # of labels, a row
CHANGES_BYTES = (
    2**28
)  # dW of all modules and formats is kept for the length of a call up to this size, else made again when needed
WORK_PER_MOVE = 16  # multiply-adds that take as long as moving one number through memory

Contracted = Callable[[str, Tensor], None]  # (module name, <gradient of each row, dW of each format> [rows, formats])


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
    first, scores = [], []
    batches = rows.split(batch_rows(rows.shape[1], meter.vocabulary))
    if meter.crew:
        missing = [batch for batch in batches if meter.journal.get(content_key(*key, rows_sha256(batch))) is None]
        # a batch is a view of all rows, which would travel whole
        pieces = [(modules, formats, base, batch.clone(), seed, draws) for batch in missing]
        meter.crew.share("curvature", pieces, progress)
    for done, batch in enumerate(batches, start=1):
        own = content_key(*key, rows_sha256(batch))
        value = meter.journal.get(own)
        if value is None:
            found = expand_batch(meter, modules, formats, base, batch, seed, draws)
            meter.journal.put(own, "curvature", [_packed(array) for array in found])
        else:
            found = (_unpacked(value[0]), _unpacked(value[1]))
        first.append(found[0])
        scores.append(found[1])
        if progress:
            progress(done, len(batches))
    return Expansion(np.concatenate(first), np.concatenate(scores), rows.shape[1])


def _packed(array: np.ndarray) -> dict[str, object]:
    return {"shape": list(array.shape), "float64": base64.b64encode(array.astype("<f8").tobytes()).decode()}


def _unpacked(value: dict[str, object]) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(str(value["float64"])), dtype="<f8")
    return numbers.reshape(value["shape"]).copy()  # type: ignore[call-overload, no-any-return]


def expand_batch(
    meter: DamageMeter,
    modules: Sequence[Module],
    formats: Sequence[str],
    base: Assignment,
    batch: Tensor,
    seed: int,
    draws: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(first [rows, units, formats], scores [rows, draws, units, formats]) of one batch [rows, tokens], float64."""
    model, bank = meter.model, meter.bank
    batch = batch.to(model.device)  # type: ignore[arg-type]
    tokens = batch.shape[1]
    place = {name: index for index, name in enumerate(dict.fromkeys(module.unit for module in modules))}
    unit_of = {module.name: place[module.unit] for module in modules}
    sums = np.zeros((draws + 1, len(batch), len(place), len(formats)))
    current = [0]

    def add(name: str, contracted: Tensor) -> None:
        sums[current[0], :, unit_of[name]] += contracted.double().cpu().numpy()

    reference = meter.reference(batch) if base else None
    changes = Changes(bank, modules, formats, base)
    with swapped(model, bank.weights(base)), _watched(model, modules, changes, add), torch.enable_grad():
        logits = model(input_ids=batch, use_cache=False).logits
        q = torch.softmax(logits.detach().float(), dim=-1)
        if reference is not None:
            logits.backward(((q - reference.exp()) / tokens).to(logits.dtype), retain_graph=draws > 0)
        for draw in range(draws):
            current[0] = draw + 1
            labels = draw_labels(q, batch, seed, draw)
            score = -q.scatter_add(-1, labels.unsqueeze(-1), torch.full_like(q[..., :1], -1.0))
            logits.backward(score.to(logits.dtype), retain_graph=draw + 1 < draws)
    return sums[0], sums[1:].swapaxes(0, 1).copy()


def draw_labels(q: Tensor, batch: Tensor, seed: int, draw: int) -> Tensor:
    """One label a position, drawn from q [rows, tokens, vocabulary]; seeded by the row's own tokens. int64 [rows, tokens]"""
    uniform = []
    for row in batch.cpu().numpy().astype("<i8"):
        digest = hashlib.sha256(row.tobytes() + f"{seed},{draw}".encode()).digest()
        uniform.append(np.random.default_rng(int.from_bytes(digest[:16], "big")).random(batch.shape[1]))
    points = torch.from_numpy(np.stack(uniform)).to(q.device, q.dtype).unsqueeze(-1)
    below = q.cumsum(-1)
    return torch.searchsorted(below, points * below[..., -1:]).squeeze(-1).clamp(max=q.shape[-1] - 1)


class Changes:
    """dW of a module in every format, [formats, out, in]; kept where all of them are small."""

    def __init__(self, bank: Bank, modules: Sequence[Module], formats: Sequence[str], base: Assignment):
        self.bank = bank
        self.formats = list(formats)
        self.base = dict(base)
        self.keep = 4 * len(self.formats) * sum(module.weights for module in modules) <= CHANGES_BYTES
        self.kept: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        weights = [self.bank.weights({name: fmt})[name] for fmt in self.formats]
        base = weights[self.formats.index(self.base[name])] if name in self.base else self.bank.reference(name)
        changes = torch.stack([weight - base for weight in weights])
        if self.keep:
            self.kept[name] = changes
        return changes


@contextmanager
def _watched(model: nn.Module, modules: Sequence[Module], changes: Changes, add: Contracted) -> Iterator[None]:
    """Within the block, each backward pass hands every module's row gradients, contracted with its dW's, to `add`."""

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda delta: add(name, contract(x, delta, changes.of(name))))

        return hook

    def start(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)  # the graph begins here; no parameter needs a gradient

    hooks = [model.get_submodule(module.name).register_forward_hook(after(module.name)) for module in modules]
    hooks.append(model.get_input_embeddings().register_forward_hook(start))  # type: ignore[operator]
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
