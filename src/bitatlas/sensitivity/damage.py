"""Damage, measured: KL(reference || quantized) of the next-token distribution, in nats/token, one number a row.

Every result belongs to one *assignment* (module -> format; modules not named keep the reference weights) and one batch of rows,
and is journaled under their hash, so nothing is measured twice, whichever way it was asked for.

Swapping the modules of one layer changes nothing in front of that layer: the base model's pass over a batch is recorded once and
every swap resumes at its own layer (see `layerwise`), which halves the work and gives the same bits as a full pass.
Batches are a fixed cut of the rows; where a run was interrupted does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.bank import Bank
from bitatlas.crew.crew import Crew, Share
from bitatlas.journal import Journal, content_key
from bitatlas.layerwise import batch_rows, resume, trace
from bitatlas.swap import swapped
from bitatlas.tokens import rows_sha256

Assignment = Mapping[str, str]
Progress = Callable[[int, int], None]
LogitsOf = Callable[[Tensor, list[str]], Iterator[tuple[str, Tensor]]]
REFERENCE_BYTES = 2**28  # of the reference's log-probabilities that are kept: a search asks for the same rows again and again


def kl_per_row(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model), mean over a row's tokens. reference: log-probabilities, logits: raw, both [rows, tokens, vocabulary] -> [rows]."""
    changed = torch.log_softmax(logits.float(), dim=-1)
    return (reference.exp() * (reference - changed)).sum(-1).double().mean(-1)


@dataclass(frozen=True)
class Swap:
    """A change to a base: some modules of one layer in other formats."""

    layer: int
    assignment: Assignment


class DamageMeter:
    """Measures assignments of one model. `model` holds the reference weights between calls. `crew`: who measures ahead of it."""

    def __init__(self, model: torch.nn.Module, bank: Bank, weights_sha256: str, quantizer: str, journal: Journal):
        self.model = model
        self.bank = bank
        self.journal = journal
        self.crew: Crew | None = None
        weight = next(model.parameters())
        self.identity = (weights_sha256, quantizer, str(weight.dtype), weight.device.type)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        self._references: dict[str, Tensor] = {}

    @torch.no_grad()
    def reference(self, batch: Tensor) -> Tensor:
        """The reference's log-probabilities [rows, tokens, vocabulary] on a batch; call it outside any `swapped` block."""
        key = rows_sha256(batch)
        if key in self._references:
            return self._references[key]
        found = torch.log_softmax(self.model(input_ids=batch, use_cache=False).logits.float(), dim=-1)
        kept = sum(4 * other.numel() for other in self._references.values())
        if kept + 4 * found.numel() <= REFERENCE_BYTES:
            self._references[key] = found
        return found

    def plans(self, plans: Mapping[str, Assignment], rows: Tensor, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Damage of whole assignments, by name: float64 [rows] each, nats/token."""

        def logits_of(batch: Tensor, names: list[str]) -> Iterator[tuple[str, Tensor]]:
            for name in names:
                with swapped(self.model, self.bank.weights(plans[name])):
                    yield name, self.model(input_ids=batch, use_cache=False).logits

        share = Share("plans", lambda names, batch: ({name: plans[name] for name in names}, batch), passes=1, fixed=1)
        return self._measure(rows, plans, logits_of, share, progress)

    def swaps(
        self, base: Assignment, swaps: Mapping[str, Swap], rows: Tensor, progress: Progress | None = None
    ) -> dict[str, np.ndarray]:
        """Damage of `base` with each swap made alone, by name: float64 [rows] each, nats/token."""

        def logits_of(batch: Tensor, names: list[str]) -> Iterator[tuple[str, Tensor]]:
            with swapped(self.model, self.bank.weights(base)):
                outputs = trace(self.model, batch).outputs
                for name in names:
                    with swapped(self.model, self.bank.weights(swaps[name].assignment)):
                        yield name, resume(self.model, batch, swaps[name].layer, outputs)

        whole = {name: {**base, **swap.assignment} for name, swap in swaps.items()}
        share = Share("swaps", lambda names, batch: (base, {name: swaps[name] for name in names}, batch), passes=0.5, fixed=2)
        return self._measure(rows, whole, logits_of, share, progress)

    @torch.no_grad()
    def _measure(
        self, rows: Tensor, plans: Mapping[str, Assignment], logits_of: LogitsOf, share: Share, progress: Progress | None
    ) -> dict[str, np.ndarray]:
        """Take each (assignment, batch) from the journal, or from `logits_of(batch, missing names)`."""
        batches = rows.split(batch_rows(rows.shape[1], self.vocabulary))
        if self.crew:
            ahead = [(batch, list(self._look_up(batch, plans)[2].values())) for batch in batches]
            self.bank.ready(sorted({pair for _, names in ahead for name in names for pair in plans[name].items()}))
            self.crew.spread(share, ahead, progress)
        parts: dict[str, list[Any]] = {name: [] for name in plans}
        for number, batch in enumerate(batches):
            keys, known, missing = self._look_up(batch, plans)
            if missing:
                batch = batch.to(self.model.device)  # type: ignore[arg-type]
                reference = self.reference(batch)
                measured = logits_of(batch, list(missing.values()))
                for done, (name, logits) in enumerate(measured, start=len(plans) - len(missing) + 1):
                    known[keys[name]] = kl_per_row(reference, logits).tolist()
                    self.journal.put(keys[name], "damage", known[keys[name]])
                    if progress:
                        progress(number * len(plans) + done, len(batches) * len(plans))
            for name, key in keys.items():
                parts[name].append(known[key])
        if progress:
            progress(len(batches) * len(plans), len(batches) * len(plans))
        return {name: np.concatenate([np.asarray(part) for part in chunks]) for name, chunks in parts.items()}

    def _look_up(self, batch: Tensor, plans: Mapping[str, Assignment]) -> tuple[dict[str, str], dict[str, Any], dict[str, str]]:
        """Name -> key of the journal; key -> what it holds, or None; key -> name of what is missing."""
        batch_sha = rows_sha256(batch)
        keys = {name: content_key("damage", self.identity, batch_sha, dict(plan)) for name, plan in plans.items()}
        known = {key: self.journal.get(key) for key in keys.values()}
        return keys, known, {key: name for name, key in keys.items() if known[key] is None}  # equal plans once
