"""Measures the true damage of single swaps around a base, and from the same passes how every pair of them interacts.

A swap changes the logits at one token by d_u; with q the base's next-token distribution, the curvature of the damage between two swaps
is the mean over tokens of d_u' (diag(q) - q q') d_v, half of which is what the pair adds beyond its two single damages. It is computed
from K labels drawn from q at each token, e_u = d_u[y] - q . d_u, whose products have that mean: memory does not grow with the
vocabulary. This costs a (resumed) pass for each swap, in which the swap itself is measured, and the noise is that of rows x tokens x K
samples.

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
from bitatlas.measure.damage import Assignment, DamageMeter, Swap, moved_logits
from bitatlas.measure.workers import Progress, Share
from bitatlas.model.gradients import label_points, labels_at
from bitatlas.model.layerwise import Ending, check_range, record, token_blocks
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
    """Measure every swap alone around `base`, and how each pair of them interacts. rows: int64 [rows, tokens]"""
    if meter.workers:
        share = Share("interactions", lambda missing, batch: (base, missing, batch, seed), passes=0.5, fixed=2)
        ahead = []
        for batch in chain.from_iterable(meter.chunks(rows)):
            keys = zip(_keys(meter, base, swaps, [batch], seed), swaps, strict=True)
            ahead.append((batch, [swap for (key,), swap in keys if meter.journal.get(key) is None]))
        meter.workers.spread(share, ahead, progress)
    by_row, together, done = [], np.zeros((len(swaps), len(swaps))), 0
    total = len(swaps) * sum(map(len, meter.chunks(rows)))
    for chunk in meter.chunks(rows):
        for values in _chunk(meter, base, swaps, chunk, seed, progress and _counted(progress, done, total)):
            scores = (
                np.stack([_unpacked(value["scores"]) for value in values]) if values else np.zeros((0, 1))
            )  # [swaps, samples]
            by_row.append(np.array([value["added"] for value in values]).reshape(len(swaps), -1).T)  # [rows, swaps]
            together += scores @ scores.T
        done += len(swaps) * len(chunk)
    added = np.concatenate(by_row)
    return Interactions(added.mean(axis=0), together / (2 * LABELS * rows.numel()), added)


def pair_rows(
    meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], pairs: Sequence[tuple[int, int]], rows: Tensor, seed: int = 0
) -> np.ndarray:
    """Return what each pair of `swaps` adds beyond both alone, row by row: float64 [rows, pairs], nats/token; twice `together`, on average.

    After `swap_interactions` of the same swaps around the same base this reads the journal and runs nothing.
    """
    indices = sorted({index for pair in pairs for index in pair})
    by_row = []
    for chunk in meter.chunks(rows):
        for values in _chunk(meter, base, [swaps[index] for index in indices], chunk, seed, None):
            scores = {
                index: _unpacked(value["scores"]).reshape(len(value["added"]), -1)  # [rows, samples]
                for index, value in zip(indices, values, strict=True)
            }
            by_row.append(np.stack([(scores[u] * scores[v]).mean(axis=1) for u, v in pairs], axis=1))
    return np.concatenate(by_row)


def _keys(meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], batches: Sequence[Tensor], seed: int) -> list[Keys]:
    """Return each swap's keys in the journal, one a batch."""
    start = [("swap by row", meter.identity, rows_sha256(batch), dict(base), seed) for batch in batches]
    return [tuple(content_key(*of_batch, swap.layer, dict(swap.assignment)) for of_batch in start) for swap in swaps]


def _counted(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _chunk(
    meter: DamageMeter,
    base: Assignment,
    swaps: Sequence[Swap],
    batches: Sequence[Tensor],
    seed: int,
    report: Callable[[int], None] | None,
) -> list[list[Value]]:
    """Return by batch and swap, from the journal or measured: added damage of each row, and scores."""
    keys = _keys(meter, base, swaps, batches, seed)
    known = {key: meter.journal.get(key) for of_swap in keys for key in of_swap}
    missing = {of_swap: swap for of_swap, swap in zip(keys, swaps, strict=True) if any(known[key] is None for key in of_swap)}
    done = len(batches) * (len(swaps) - len(missing))
    for group, values in _measured(meter, base, missing, batches, seed) if missing else ():
        for keys_of_swap, of_swap in zip(group, values, strict=True):
            new = dict(zip(keys_of_swap, of_swap, strict=True))
            meter.journal.put_all("interactions", new)
            known |= new
        done += len(batches) * len(group)
        if report:
            report(done)
    if report:
        report(len(batches) * len(swaps))
    return [[known[of_swap[index]] for of_swap in keys] for index in range(len(batches))]  # type: ignore[misc]


@torch.no_grad()
def _measured(
    meter: DamageMeter, base: Assignment, swaps: Mapping[Keys, Swap], batches: Sequence[Tensor], seed: int
) -> Iterator[tuple[Sequence[Keys], list[list[Value]]]]:
    """Yield groups of swaps by their keys, with what was measured of each by batch."""
    batches = [batch.to(meter.decoder.device) for batch in batches]
    meter.reference.see(batches)
    with meter.budget.shelf() as shelf, meter.decoder.swapped(meter.bank.weights(base)):
        recorded = record(meter.decoder, batches, shelf)
        for group in meter.groups(sorted(swaps, key=lambda keys: swaps[keys].layer), batches):
            endings = meter.follow(recorded, [swaps[keys] for keys in group])
            base_ending = Ending(recorded.final)
            by_batch = [_against_base(meter, batch, number, base_ending, endings, seed) for number, batch in enumerate(batches)]
            yield group, [list(of_swap) for of_swap in zip(*by_batch, strict=True)]


def _against_base(
    meter: DamageMeter, batch: Tensor, number: int, base: Ending, endings: Sequence[Ending], seed: int
) -> list[Value]:
    """Return what each swap adds on batch `number`. base, endings: what the base and the swaps came to"""
    points = torch.stack([label_points(batch, seed, draw) for draw in range(LABELS)], dim=-1).to(batch.device)
    added = torch.zeros(len(endings), len(batch), dtype=torch.float64, device=batch.device)
    scores = torch.zeros(len(endings), *points.shape, device=batch.device)  # [swaps, rows, tokens, labels]
    for span in meter.spans(batch):
        p = meter.reference.log_p(batch, span).exp()  # [rows, tokens, vocabulary], as all logits here
        log_q = torch.log_softmax(meter.logits(base, number, batch, span).float(), dim=-1)
        q = log_q.exp()
        labels = labels_at(q, points[:, span])
        for index, ending in enumerate(endings):
            by_token, of_labels = _moved(p, log_q, q, labels, meter.logits(ending, number, batch, span))
            added[index] += by_token.sum(-1)
            scores[index, :, span] = of_labels
    by_row, packable = (added / batch.shape[1]).cpu(), scores.clamp(-LARGEST_SCORE, LARGEST_SCORE).cpu()
    check_range(by_row, "a quantized model", base.final[number].dtype)
    return [{"added": of_swap.tolist(), "scores": _packed(part)} for of_swap, part in zip(by_row, packable, strict=True)]


def _moved(p: Tensor, log_q: Tensor, q: Tensor, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || changed) - KL(p || q) of each token, float64 [rows, tokens], and the labels' scores [rows, tokens, labels].

    p, log_q, q, logits (of the changed model): [rows, tokens, vocabulary]
    """
    p, log_q, q, labels = (tensor.flatten(0, 1) for tensor in (p, log_q, q, labels))
    added, scores = [], []
    for block in token_blocks(logits):
        moved, level = moved_logits(log_q[block], logits.flatten(0, 1)[block])
        added.append(level.double() - torch.linalg.vecdot(p[block], moved).double())
        scores.append(moved.gather(-1, labels[block]) - torch.linalg.vecdot(q[block], moved).unsqueeze(-1))
    return torch.cat(added).view(logits.shape[:2]), torch.cat(scores).view(*logits.shape[:2], -1)


def _packed(scores: Tensor) -> str:
    numbers = scores.flatten().numpy()
    return base64.b64encode(numbers.astype("<f2").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    """[rows * tokens * labels], nats"""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
