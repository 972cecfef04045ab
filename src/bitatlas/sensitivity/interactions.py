"""True damage of single swaps around a base, and from the same passes how every pair of them interacts.

A swap changes the logits at one token by d_u; with q the base's next-token distribution, the curvature of the damage between two swaps
is the mean over tokens of d_u' (diag(q) - q q') d_v, half of which is what the pair adds beyond its two single damages. It is computed
from K labels drawn from q at each token, e_u = d_u[y] - q . d_u, whose products have that mean: memory does not grow with the
vocabulary. Against `curvature` this costs a (resumed) pass for each swap, but the noise is that of rows x tokens x K samples instead
of rows x draws, and the swaps themselves are measured, not expanded.

Every swap is journaled by itself, with its scores e_u: the same swap around the same base is never run again, whichever others it is
asked for together with. The screens of units measure this way, so a search has the interactions at both ends for nothing.

Left out: third-order terms, and how a swap changes q itself.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.crew.crew import Share
from bitatlas.journal import content_key
from bitatlas.layerwise import batch_rows, resume, trace
from bitatlas.sensitivity.curvature import draw_labels
from bitatlas.sensitivity.damage import Assignment, DamageMeter, Progress, Swap
from bitatlas.swap import swapped
from bitatlas.tokens import rows_sha256

LABELS = 2  # drawn at each token
LARGEST_SCORE = 60000.0  # nats; scores are journaled as float16


@dataclass(frozen=True)
class Interactions:
    """added: [swaps], the true change of damage; together: [swaps, swaps], half the curvature, its diagonal included. nats/token

    by_row: [rows, swaps], what `added` is the mean of.
    """

    added: np.ndarray
    together: np.ndarray
    by_row: np.ndarray | None = None


def swap_interactions(
    meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], rows: Tensor, seed: int = 0, progress: Progress | None = None
) -> Interactions:
    """Every swap alone, around `base`. rows: int64 [rows, tokens]"""
    batches = rows.split(batch_rows(rows.shape[1], meter.vocabulary))
    if meter.crew:
        share = Share("interactions", lambda some, batch: (base, some, batch, seed), passes=0.5, fixed=2)
        ahead = [(batch, list(_look_up(meter, base, swaps, batch, seed)[2].values())) for batch in batches]
        meter.crew.spread(share, ahead, progress)
    by_row, together = [], np.zeros((len(swaps), len(swaps)))
    for number, batch in enumerate(batches):
        found = _batch(meter, base, swaps, batch, seed, progress, (number, len(batches)))
        scores = np.stack([_unpacked(value["scores"]) for value in found]) if found else np.zeros((0, 1))
        by_row.append(np.array([value["added"] for value in found]).reshape(len(swaps), len(batch)).T)
        together += scores @ scores.T
    every = np.concatenate(by_row)
    return Interactions(every.mean(axis=0), together / (2 * LABELS * rows.numel()), every)


def _batch(
    meter: DamageMeter,
    base: Assignment,
    swaps: Sequence[Swap],
    batch: Tensor,
    seed: int,
    progress: Progress | None,
    at: tuple[int, int],
) -> list[dict[str, Any]]:
    """Each swap on one batch, from the journal or measured: added damage of each row, and scores."""
    keys, known, missing = _look_up(meter, base, swaps, batch, seed)
    measured = _measured(meter, base, list(missing.values()), batch, seed) if missing else ()
    number, batches = at
    for done, (own, value) in enumerate(zip(missing, measured, strict=True), start=len(swaps) - len(missing) + 1):
        known[own] = value
        meter.journal.put(own, "interactions", value)
        if progress:
            progress(number * len(swaps) + done, batches * len(swaps))
    if progress:
        progress((number + 1) * len(swaps), batches * len(swaps))
    return [known[own] for own in keys]  # type: ignore[misc]


def _look_up(
    meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], batch: Tensor, seed: int
) -> tuple[list[str], dict[str, Any], dict[str, Swap]]:
    """Each swap's key of the journal; key -> what it holds, or None; key -> swap that is missing."""
    key = ("swap by row", meter.identity, rows_sha256(batch), dict(base), seed)
    keys = [content_key(*key, swap.layer, dict(swap.assignment)) for swap in swaps]
    known = {key: meter.journal.get(key) for key in keys}
    return keys, known, {key: swap for key, swap in zip(keys, swaps, strict=True) if known[key] is None}


@torch.no_grad()
def _measured(meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], batch: Tensor, seed: int) -> Iterator[dict[str, Any]]:
    own = batch.to(meter.model.device)  # type: ignore[arg-type]
    p = meter.reference(own).exp()
    with swapped(meter.model, meter.bank.weights(base)):
        recorded = trace(meter.model, own)
        logits = recorded.logits.float()
        level = logits.logsumexp(-1)  # [rows, tokens]
        q = torch.softmax(logits, dim=-1)
        labels = torch.stack([draw_labels(q, batch, seed, draw) for draw in range(LABELS)], dim=-1)
        for swap in swaps:
            with swapped(meter.model, meter.bank.weights(swap.assignment)):
                changed = resume(meter.model, own, swap.layer, recorded.outputs).float()
            moved = changed - logits
            added = (changed.logsumexp(-1) - level - (p * moved).sum(-1)).double().mean(-1)  # [rows]
            yield {"added": added.tolist(), "scores": _packed(moved.gather(-1, labels) - (q * moved).sum(-1, keepdim=True))}


def _packed(scores: Tensor) -> str:
    numbers = scores.flatten().clamp(-LARGEST_SCORE, LARGEST_SCORE).cpu().numpy()
    return base64.b64encode(numbers.astype("<f2").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    """[rows * tokens * labels], nats"""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
