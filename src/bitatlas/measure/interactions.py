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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.data.rows import rows_sha256
from bitatlas.measure.curvature import label_points, labels_at
from bitatlas.measure.damage import Assignment, DamageMeter, Swap
from bitatlas.measure.workers import Progress, Share
from bitatlas.model.layerwise import check_range, logits_of, record, slice_tokens
from bitatlas.records.journal import content_key

LABELS = 2  # drawn at each token
LARGEST_SCORE = 60000.0  # nats; scores are journaled as float16

Keys = tuple[str, ...]  # of one swap in the journal, by batch
Value = dict[str, Any]  # "added" of each row, "scores"


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
    if meter.workers:
        share = Share("interactions", lambda some, batch: (base, some, batch, seed), passes=0.5, fixed=2)
        ahead = [
            (
                batch,
                [
                    swap
                    for (key,), swap in zip(_keys(meter, base, swaps, [batch], seed), swaps, strict=True)
                    if meter.journal.get(key) is None
                ],
            )
            for batch in chain.from_iterable(meter.chunks(rows))
        ]
        meter.workers.spread(share, ahead, progress)
    by_row, together, done = [], np.zeros((len(swaps), len(swaps))), 0
    total = len(swaps) * sum(map(len, meter.chunks(rows)))
    for chunk in meter.chunks(rows):
        for found in _chunk(meter, base, swaps, chunk, seed, progress and _counted(progress, done, total)):
            scores = np.stack([_unpacked(value["scores"]) for value in found]) if found else np.zeros((0, 1))
            by_row.append(np.array([value["added"] for value in found]).reshape(len(swaps), -1).T)
            together += scores @ scores.T
        done += len(swaps) * len(chunk)
    every = np.concatenate(by_row)
    return Interactions(every.mean(axis=0), together / (2 * LABELS * rows.numel()), every)


def pair_rows(
    meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], pairs: Sequence[tuple[int, int]], rows: Tensor, seed: int = 0
) -> np.ndarray:
    """What each pair of `swaps` adds beyond both alone, row by row: float64 [rows, pairs], nats/token; twice `together`, on average.

    After `swap_interactions` of the same swaps around the same base this reads the journal and runs nothing.
    """
    asked = sorted({place for pair in pairs for place in pair})
    by_row = []
    for chunk in meter.chunks(rows):
        for found in _chunk(meter, base, [swaps[place] for place in asked], chunk, seed, None):
            scores = {
                place: _unpacked(value["scores"]).reshape(len(value["added"]), -1)
                for place, value in zip(asked, found, strict=True)
            }
            by_row.append(np.stack([(scores[u] * scores[v]).mean(axis=1) for u, v in pairs], axis=1))
    return np.concatenate(by_row)


def _keys(meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], batches: Sequence[Tensor], seed: int) -> list[Keys]:
    start = [("swap by row", meter.identity, rows_sha256(batch), dict(base), seed) for batch in batches]
    return [tuple(content_key(*own, swap.layer, dict(swap.assignment)) for own in start) for swap in swaps]


def _counted(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _chunk(
    meter: DamageMeter,
    base: Assignment,
    swaps: Sequence[Swap],
    batches: Sequence[Tensor],
    seed: int,
    told: Callable[[int], None] | None,
) -> list[list[Value]]:
    """By batch: each swap, from the journal or measured: added damage of each row, and scores."""
    keys = _keys(meter, base, swaps, batches, seed)
    known = {key: meter.journal.get(key) for of_swap in keys for key in of_swap}
    missing = {own: swap for own, swap in zip(keys, swaps, strict=True) if any(known[key] is None for key in own)}
    done = len(batches) * (len(swaps) - len(missing))
    for group, values in _measured(meter, base, missing, batches, seed) if missing else ():
        for own, of_swap in zip(group, values, strict=True):
            new = dict(zip(own, of_swap, strict=True))
            meter.journal.put_all("interactions", new)
            known |= new
        done += len(batches) * len(group)
        if told:
            told(done)
    if told:
        told(len(batches) * len(swaps))
    return [[known[own[number]] for own in keys] for number in range(len(batches))]  # type: ignore[misc]


@torch.no_grad()
def _measured(
    meter: DamageMeter, base: Assignment, swaps: Mapping[Keys, Swap], batches: Sequence[Tensor], seed: int
) -> Iterator[tuple[Sequence[Keys], list[list[Value]]]]:
    """Groups of swaps by their keys, with what was measured of each by batch."""
    own = [batch.to(meter.decoder.device) for batch in batches]
    meter.reference.see(own)
    with meter.shelf() as shelf, meter.decoder.swapped(meter.bank.weights(base)):
        recorded = record(meter.decoder, own, shelf)
        for group in meter.groups(sorted(swaps, key=lambda keys: swaps[keys].layer), own):
            finals = meter.follow(recorded, [swaps[keys] for keys in group])
            by_batch = [
                _against_base(meter, *one, seed) for one in zip(own, recorded.final, zip(*finals, strict=True), strict=True)
            ]
            yield group, [list(of_swap) for of_swap in zip(*by_batch, strict=True)]


def _against_base(meter: DamageMeter, batch: Tensor, base: Tensor, finals: Sequence[Tensor], seed: int) -> list[Value]:
    """What each swap adds on one batch. base, finals: last hidden states [rows, tokens, width]"""
    added = torch.zeros(len(finals), len(batch), dtype=torch.float64)
    scores: list[list[Tensor]] = [[] for _ in finals]
    points = [label_points(batch, seed, draw) for draw in range(LABELS)]
    for span in meter.spans(batch):
        p = meter.reference.log_p(batch, span).exp()
        logits = logits_of(meter.decoder, batch[:, span], slice_tokens(meter.decoder, base, span)).float()
        level = logits.logsumexp(-1)  # [rows, tokens]
        q = torch.softmax(logits, dim=-1)
        labels = torch.stack([labels_at(q, own[:, span]) for own in points], dim=-1)
        for place, final in enumerate(finals):
            changed = logits_of(meter.decoder, batch[:, span], slice_tokens(meter.decoder, final, span)).float()
            moved = changed - logits
            added[place] += (changed.logsumexp(-1) - level - (p * moved).sum(-1)).double().sum(-1).cpu()
            scores[place].append(moved.gather(-1, labels) - (q * moved).sum(-1, keepdim=True))
    check_range(added, "a quantized model", base.dtype)
    return [
        {"added": (own / batch.shape[1]).tolist(), "scores": _packed(torch.cat(parts, dim=1))}
        for own, parts in zip(added, scores, strict=True)
    ]


def _packed(scores: Tensor) -> str:
    numbers = scores.flatten().clamp(-LARGEST_SCORE, LARGEST_SCORE).cpu().numpy()
    return base64.b64encode(numbers.astype("<f2").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    """[rows * tokens * labels], nats"""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
