"""True damage of single swaps around a base, and from the same passes how every pair of them interacts.

A swap changes the logits at one token by d_u; with q the base's next-token distribution, the curvature of the damage between two swaps
is the mean over tokens of d_u' (diag(q) - q q') d_v, half of which is what the pair adds beyond its two single damages. It is computed
from K labels drawn from q at each token, e_u = d_u[y] - q . d_u, whose products have that mean: memory does not grow with the
vocabulary. Against `curvature` this costs a (resumed) pass for each swap, but the noise is that of rows x tokens x K samples instead
of rows x draws, and the swaps themselves are measured, not expanded: the better instrument near the end of a search.

Left out: third-order terms, and how a swap changes q itself.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitatlas.journal import content_key
from bitatlas.layerwise import resume, trace
from bitatlas.sensitivity.curvature import draw_labels
from bitatlas.sensitivity.damage import Assignment, DamageMeter, Progress, Swap, batch_rows
from bitatlas.swap import swapped
from bitatlas.tokens import rows_sha256

LABELS = 2  # drawn at each token


@dataclass(frozen=True)
class Interactions:
    """added: [swaps], the true change of damage; together: [swaps, swaps], half the curvature, its diagonal included. nats/token"""

    added: np.ndarray
    together: np.ndarray


def swap_interactions(
    meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], rows: Tensor, seed: int = 0, progress: Progress | None = None
) -> Interactions:
    """Every swap alone, around `base`; means over rows, batch by batch through the journal. rows: int64 [rows, tokens]"""
    key = ("interactions", meter.identity, dict(base), [[swap.layer, dict(swap.assignment)] for swap in swaps], seed)
    batches = rows.split(batch_rows(rows.shape[1], meter.vocabulary))
    total = np.zeros((len(swaps) + 1, len(swaps)))
    for number, batch in enumerate(batches):
        own = content_key(*key, rows_sha256(batch))
        value = meter.journal.get(own)
        if value is None:
            sums = _batch(meter, base, swaps, batch, seed)
            meter.journal.put(own, "interactions", base64.b64encode(sums.astype("<f8").tobytes()).decode())
        else:
            sums = np.frombuffer(base64.b64decode(value), dtype="<f8").reshape(total.shape)
        total += sums
        if progress:
            progress((number + 1) * len(swaps), len(batches) * len(swaps))
    total /= rows.numel()
    return Interactions(total[0], total[1:])


@torch.no_grad()
def _batch(meter: DamageMeter, base: Assignment, swaps: Sequence[Swap], batch: Tensor, seed: int) -> np.ndarray:
    """Sums over one batch's tokens: row 0 the damage added, rows 1.. the products of scores. float64 [1 + swaps, swaps]"""
    own = batch.to(meter.model.device)  # type: ignore[arg-type]
    p = meter.reference(own).exp()
    added = np.zeros(len(swaps))
    scores = np.zeros((len(swaps), LABELS * batch.numel()), dtype=np.float32)
    with swapped(meter.model, meter.bank.weights(base)):
        recorded = trace(meter.model, own)
        logits = recorded.logits.float()
        level = logits.logsumexp(-1)  # [rows, tokens]
        q = torch.softmax(logits, dim=-1)
        labels = torch.stack([draw_labels(q, batch, seed, draw) for draw in range(LABELS)], dim=-1)
        for index, swap in enumerate(swaps):
            with swapped(meter.model, meter.bank.weights(swap.assignment)):
                changed = resume(meter.model, own, swap.layer, recorded.outputs).float()
            moved = changed - logits
            added[index] = float((changed.logsumexp(-1) - level - (p * moved).sum(-1)).double().sum())
            scores[index] = (moved.gather(-1, labels) - (q * moved).sum(-1, keepdim=True)).flatten().cpu().numpy()
    products = scores.astype(np.float64) @ scores.T.astype(np.float64)
    return np.vstack([added, products / (2 * LABELS)])
