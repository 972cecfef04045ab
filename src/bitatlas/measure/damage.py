"""Measures damage: KL(reference || quantized) of the next-token distribution, in nats/token, one number a row.

Every result belongs to one *assignment* (module -> format; modules not named keep the reference weights) and one batch of rows,
and is journaled under their hash, so nothing is measured twice, whichever way it was asked for.

Swapping the modules of one layer changes nothing in front of that layer: what goes into every layer of the base is recorded once and
every swap begins at its own layer (see `layerwise`), which halves the work and gives the same bits as a full pass. A swapped embedding begins in
front of them, and a swapped head behind them: logits are made with each model's own. Of the reference
its last hidden states are kept, which say the same as its logits in a fraction of the bytes; logits are made of them where they are needed.
Batches are a fixed cut of the rows; where a run was interrupted does not change them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.data.rows import rows_sha256
from bitatlas.measure.workers import Progress, Share, Workers
from bitatlas.model.decoder import Decoder
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.layerwise import (
    LOGIT_BYTES,
    Ending,
    Job,
    Recorded,
    begin,
    check_range,
    follow,
    is_chain,
    logits_of,
    record,
    slice_tokens,
    split_rows,
    token_blocks,
    token_spans,
)
from bitatlas.model.streaming import LazyMapping
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal, content_key

Assignment = Mapping[str, str]
EndingsOf = Callable[[Sequence[Tensor], Sequence[str]], Iterator[dict[str, Ending]]]
REFERENCE_BYTES = 2**28  # of the reference's log-probabilities that are kept: a search asks for the same rows again and again
STATE_BYTES = 2**28  # of hidden states in memory, where nothing else is said
GROUP = 8  # models that go through a layer together: what is measured of them is journaled together


@dataclass(frozen=True)
class StateBudget:
    """What hidden states may take. `state_bytes` in memory, the rest in files below `folder`; `whole`: all weights are in memory.

    As many batches as have room go through a layer together, since a changed weight is made of its codes once for all of them. Where the
    weights are not in memory, so do as many models, and of what goes into each layer the most may lie in files: reading weights takes longer.
    """

    state_bytes: int = STATE_BYTES
    reference_bytes: int = REFERENCE_BYTES
    logit_bytes: int = LOGIT_BYTES  # of one array of logits
    whole: bool = True
    folder: Path | None = None

    def shelf(self) -> StateCache:
        """Return an empty store of hidden states under this budget."""
        return StateCache(self.state_bytes, self.folder, host=not self.whole)

    def batches(self, count: int, state_bytes: int, layers: int) -> int:
        """Return how many of `count` batches go at a time; `state_bytes`: of one batch's hidden state."""
        each = states_of(layers, state_bytes) if self.whole else 4 * state_bytes
        return max(1, min(count, self.state_bytes // each))

    def models(self, batches: int, state_bytes: int) -> int:
        """Return how many models go at a time."""
        fitting = max(1, self.state_bytes // (2 * batches * state_bytes))
        return min(GROUP, fitting) if self.whole else fitting


def states_of(layers: int, state_bytes: int) -> int:
    """Return the bytes of hidden states while swaps are followed: what went into every layer, and before and after one for each model."""
    return (layers + 1 + 3 * GROUP) * state_bytes


def kl_per_row(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference || model), mean over a row's tokens, nats. reference: log-probabilities, logits: raw, both [rows, tokens, vocabulary] -> [rows]."""
    return kl_per_token(reference, reference.exp(), logits).mean(-1)


def kl_per_token(log_p: Tensor, p: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p || model) of each token, nats: all [rows, tokens, vocabulary] -> float64 [rows, tokens]."""
    parts = []
    for block in token_blocks(logits):
        moved, level = moved_logits(log_p.flatten(0, 1)[block], logits.flatten(0, 1)[block])
        parts.append(level.double() - torch.linalg.vecdot(p.flatten(0, 1)[block], moved).double())
    return torch.cat(parts).view(logits.shape[:2])


def moved_logits(log_p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits - log_p [tokens, vocabulary] and the logits' logsumexp [tokens], both after a shift that gives each token's logits the same
    maximum as its log_p. The shift changes no distribution, and small differences keep their digits: neither is a difference of large numbers.
    """
    aligned = logits.float() + (log_p.amax(-1, keepdim=True) - logits.amax(-1, keepdim=True).float())
    level = aligned.logsumexp(-1)
    return aligned.sub_(log_p), level


@dataclass(frozen=True)
class Swap:
    """A change to a base: some modules of one layer in other formats, or one outside the layers, whose first stage counts as its layer."""

    layer: int
    assignment: Assignment


class Reference:
    """The unquantized model on batches that it has seen: last hidden states, and log-probabilities as far as the budget goes."""

    def __init__(self, decoder: Decoder, budget: StateBudget, head: Mapping[str, Tensor]):
        """head: the unquantized weights behind the layers that may be swapped."""
        self.decoder, self.head = decoder, head
        self.states = budget.shelf()
        self._log_p: dict[str, Tensor] = {}
        self._free_bytes = budget.reference_bytes

    def see(self, batches: Sequence[Tensor]) -> None:
        """Run the model over those of `batches` that it has not seen; call it outside any `swapped` block."""
        new = [batch for batch in batches if rows_sha256(batch) not in self.states]
        if new:
            for batch, final in zip(new, record(self.decoder, new).final, strict=True):
                check_range(final, "the unquantized model on these rows")
                self.states.put(rows_sha256(batch), final)

    @torch.no_grad()
    def log_p(self, batch: Tensor, span: slice) -> Tensor:
        """Return log-probabilities [rows, tokens of the span, vocabulary] on a batch that was seen."""
        key = f"{rows_sha256(batch)} {span.start}"
        if key in self._log_p:
            return self._log_p[key]
        final = self.states.get(rows_sha256(batch))
        with self.decoder.swapped(self.head):  # a base may be swapped in around us
            logits = logits_of(self.decoder, batch[:, span], slice_tokens(self.decoder, final, span))
        log_p = torch.log_softmax(logits.float(), dim=-1)
        if log_p.nbytes <= self._free_bytes:
            self._log_p[key] = log_p
            self._free_bytes -= log_p.nbytes
        return log_p


class _LayerWeights:
    """Weights made of one layer's codes, cached until another layer is asked for: most plans share them. Outside the layers one weight at a time."""

    def __init__(self, bank: Bank):
        self._bank = bank
        self._layer = -1
        self._weights: dict[tuple[str, str], Tensor] = {}

    def get(self, layer: int, module: str, format_name: str) -> Tensor:
        key = (module, format_name)
        inside = 0 <= layer < self._bank.decoder.behind
        if layer != self._layer or not (inside or key in self._weights):
            self._layer, self._weights = layer, {}
        if key not in self._weights:
            self._weights[key] = self._bank.weights({module: format_name})[module]
        return self._weights[key]


class DamageMeter:
    """Measures the damage of assignments of one model. `decoder` holds the reference weights between calls. `workers`: who measures ahead of it."""

    def __init__(
        self,
        decoder: Decoder,
        bank: Bank,
        weights_sha256: str,
        quantizer: str,
        journal: Journal,
        budget: StateBudget | None = None,
    ):
        self.decoder = decoder
        self.bank = bank
        self.journal = journal
        self.budget = budget or StateBudget()
        self.workers: Workers | None = None
        weight = next(decoder.model.parameters())
        self.identity = (weights_sha256, quantizer, str(weight.dtype), weight.device.type)
        # what is kept of a model that is run whole is its logits
        self._width = decoder.width if is_chain(decoder) else decoder.vocabulary
        self._head = [name for name in bank.modules if decoder.stages_of(name)[-1] == decoder.behind]
        self.reference = Reference(decoder, self.budget, decoder.references(self._head))

    def plans(self, plans: Mapping[str, Assignment], rows: Tensor, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Measure whole assignments: name -> damage, float64 [rows], nats/token."""

        def endings_of(batches: Sequence[Tensor], names: Sequence[str]) -> Iterator[dict[str, Ending]]:
            for group in self.groups(names, batches):
                yield dict(zip(group, self._whole_models(batches, [plans[name] for name in group]), strict=True))

        share = Share("plans", lambda names, batch: ({name: plans[name] for name in names}, batch), passes=1, fixed=1)
        return self._measure(rows, plans, endings_of, share, progress)

    def swaps(
        self, base: Assignment, swaps: Mapping[str, Swap], rows: Tensor, progress: Progress | None = None
    ) -> dict[str, np.ndarray]:
        """Measure `base` with each swap made alone: name -> damage, float64 [rows], nats/token."""

        def endings_of(batches: Sequence[Tensor], names: Sequence[str]) -> Iterator[dict[str, Ending]]:
            with self.budget.shelf() as shelf, self.decoder.swapped(self.bank.weights(base)):
                recorded = record(self.decoder, batches, shelf)
                for group in self.groups(sorted(names, key=lambda name: swaps[name].layer), batches):
                    yield dict(zip(group, self.follow(recorded, [swaps[name] for name in group]), strict=True))

        whole = {name: {**base, **swap.assignment} for name, swap in swaps.items()}
        share = Share("swaps", lambda names, batch: (base, {name: swaps[name] for name in names}, batch), passes=0.5, fixed=2)
        return self._measure(rows, whole, endings_of, share, progress)

    def _whole_models(self, batches: Sequence[Tensor], plans: Sequence[Assignment]) -> list[Ending]:
        """Return what each plan comes to: all plans go through a layer, whose weights are made once, before the next."""
        # In one go: a fit passes through the whole model.
        self.bank.ready({pair: None for plan in plans for pair in plan.items()})
        layer_weights = _LayerWeights(self.bank)
        jobs = [Job(min([0, *map(self.decoder.layer_of, plan)]), self._plan_swap(plan, layer_weights)) for plan in plans]
        return follow(self.decoder, begin(self.decoder, batches), jobs)

    def _plan_swap(self, plan: Assignment, layer_weights: _LayerWeights) -> Callable[[int], AbstractContextManager[Any]]:
        """Return what swaps a plan's weights into a stage while it runs."""
        names: dict[int, list[str]] = defaultdict(list)
        for name in plan:
            for stage in self.decoder.stages_of(name):
                names[stage].append(name)
        return lambda layer: self.decoder.swapped(
            LazyMapping(names[layer], lambda name: layer_weights.get(layer, name, plan[name]))
        )

    def follow(self, recorded: Recorded, swaps: Sequence[Swap]) -> list[Ending]:
        """Return what each swap comes to, made alone; call it, and make logits of what it returns, while the recorded base is swapped in."""
        return follow(self.decoder, recorded, [Job(swap.layer, self._swap_in(swap)) for swap in swaps])

    def _swap_in(self, swap: Swap) -> Callable[[int], AbstractContextManager[Any]]:
        weights = self.bank.weights(swap.assignment)
        stages = {stage for name in swap.assignment for stage in self.decoder.stages_of(name)}
        return lambda stage: self.decoder.swapped(weights if stage in stages else {})

    def chunks(self, rows: Tensor) -> list[list[Tensor]]:
        """Cut the rows into batches [rows, tokens], in runs of as many as go through a layer together."""
        batches = split_rows(self.decoder, rows)
        step = self.budget.batches(len(batches), self._state_bytes(batches[0]), len(self.decoder.layers)) if batches else 1
        return [batches[start : start + step] for start in range(0, len(batches), step)]

    def groups(self, names: Sequence[Any], batches: Sequence[Tensor]) -> Iterator[Sequence[Any]]:
        """Cut `names` into runs of as many models as go through a layer together."""
        step = self.budget.models(len(batches), self._state_bytes(batches[0]))
        return (names[start : start + step] for start in range(0, len(names), step))

    def _state_bytes(self, batch: Tensor) -> int:
        return batch.numel() * self._width * next(self.decoder.model.parameters()).element_size()

    def spans(self, batch: Tensor) -> list[slice]:
        """Return the runs of tokens in which a batch's logits are made."""
        return token_spans(len(batch), batch.shape[1], self.decoder.vocabulary, self.budget.logit_bytes)

    def logits(self, ending: Ending, number: int, batch: Tensor, span: slice) -> Tensor:
        """Return the logits [rows, tokens of the span, vocabulary] of what a model came to on batch `number`."""
        with ending.head():
            return logits_of(self.decoder, batch[:, span], slice_tokens(self.decoder, ending.final[number], span))

    @torch.no_grad()
    def _kl(self, batch: Tensor, number: int, endings: Sequence[Ending]) -> list[Tensor]:
        """Return the damage of each model on batch `number` of those that it was run on: float64 [rows] each."""
        sums = torch.zeros(len(endings), len(batch), dtype=torch.float64, device=batch.device)
        for span in self.spans(batch):
            log_p = self.reference.log_p(batch, span)  # [rows, tokens of the span, vocabulary]
            p = log_p.exp()
            for total, ending in zip(sums, endings, strict=True):
                total += kl_per_token(log_p, p, self.logits(ending, number, batch, span)).sum(-1)
        means = (sums / batch.shape[1]).cpu()
        check_range(means, "a quantized model", endings[0].final[number].dtype)
        return list(means)

    def _measure(
        self, rows: Tensor, plans: Mapping[str, Assignment], endings_of: EndingsOf, share: Share, progress: Progress | None
    ) -> dict[str, np.ndarray]:
        """Take each (assignment, batch) from the journal, or from `endings_of(batches, missing names)`."""
        self._measure_ahead(rows, plans, share, progress)
        parts: dict[str, list[Any]] = {name: [] for name in plans}
        done, total = 0, len(plans) * len(split_rows(self.decoder, rows))
        for chunk in self.chunks(rows):
            keys = {name: self._keys(plan, chunk) for name, plan in plans.items()}
            known = {key: self.journal.get(key) for of_plan in keys.values() for key in of_plan}
            # equal plans once
            missing = {of_plan: name for name, of_plan in keys.items() if any(known[key] is None for key in of_plan)}
            done += len(chunk) * (len(plans) - len(missing))
            for measured in self._measured(chunk, endings_of, list(missing.values())) if missing else ():
                for name, values in measured.items():
                    new = dict(zip(keys[name], values, strict=True))
                    self.journal.put_all("damage", new)
                    known |= new
                done += len(measured) * len(chunk)
                if progress:
                    progress(done, total)
            for name, of_plan in keys.items():
                parts[name] += [known[key] for key in of_plan]
        if progress:
            progress(total, total)
        return {name: np.concatenate([np.asarray(part) for part in of_plan]) for name, of_plan in parts.items()}

    def _measure_ahead(self, rows: Tensor, plans: Mapping[str, Assignment], share: Share, progress: Progress | None) -> None:
        """Have the workers measure what is missing, where there are some."""
        if not self.workers:
            return
        ahead = []
        for batch in chain.from_iterable(self.chunks(rows)):
            keys = {self._keys(plan, [batch])[0]: name for name, plan in plans.items()}  # equal plans once
            ahead.append((batch, [name for key, name in keys.items() if self.journal.get(key) is None]))
        self.bank.ready(sorted({pair for _, names in ahead for name in names for pair in plans[name].items()}))
        self.workers.spread(share, ahead, progress)

    def _keys(self, plan: Assignment, batches: Sequence[Tensor]) -> tuple[str, ...]:
        return tuple(content_key("damage", self.identity, rows_sha256(batch), dict(plan)) for batch in batches)

    def _measured(
        self, batches: Sequence[Tensor], endings_of: EndingsOf, names: Sequence[str]
    ) -> Iterator[dict[str, list[list[float]]]]:
        """Yield damage by name, batch and row, as it is measured."""
        batches = [batch.to(self.decoder.device) for batch in batches]
        self.reference.see(batches)
        for endings in endings_of(batches, names):
            by_batch = [self._kl(batch, number, list(endings.values())) for number, batch in enumerate(batches)]
            yield {name: [of_batch[index].tolist() for of_batch in by_batch] for index, name in enumerate(endings)}
