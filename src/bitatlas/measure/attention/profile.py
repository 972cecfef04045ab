"""Profiles the attention of one base: how spread, how specialized, how much on a problem's operands, and how far it moved from the reference.

Three kinds of sequences are read, each once: text rows (entropy, sink mass, previous-token and retrieval roles, drift), a random block
of tokens twice (duplicate and induction roles), and word problems with their solutions (focus). Statistics are taken the moment a
layer's map exists (see `capture`); what is kept is a few numbers per sequence and head, for intervals over sequences.

For the reference that is one eager forward pass over everything. For another base the text rows are read by four models in step
(see `maps`): the reference, each layer changed alone, the changed model, and the reference in the other precision.
Which numbers come out, and why so: `maps` (sinks, entropy, drift), `roles`, `focus`; how they are summed up: `scoring`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.measure.attention.capture import MIXED, eager, heads_apart, run_captured
from bitatlas.measure.attention.focus import FocusMass, Problem, TokenProblem, tokenize
from bitatlas.measure.attention.maps import (
    LEAST_KEYS,
    InStep,
    Sinks,
    allowed_keys,
    count_keys,
    drifts,
    in_step,
    spread,
    strip_sinks,
)
from bitatlas.measure.attention.roles import (
    REPEATED_ROLES,
    ROLES,
    TEXT_ROLES,
    RoleMass,
    repeated_block,
    repeated_tokens,
    role_mass,
)
from bitatlas.measure.attention.scoring import Tally, score
from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import is_chain
from bitatlas.model.streaming import LazyMapping
from bitatlas.records import AttentionHead, AttentionLayer, HeadMap, Module

REPEATED_SEQUENCES = 32
BLOCK = 12  # tokens of an example, twice
ROLE_EXAMPLES = 2  # heads of each role, the clearest first
NO_MAPS = "attention: this model computes no attention maps (no softmax attention, or no eager implementation); not profiled"


@dataclass(frozen=True)
class AttentionResult:
    """`notes`: what was not measured, and why."""

    layers: list[AttentionLayer]
    heads: list[AttentionHead]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AttentionTexts:
    """What is read: test rows int64 [rows, tokens], word problems, and the rows' blocks [rows] (see `stats.bootstrap`)."""

    rows: Tensor
    problems: Sequence[Problem] = ()
    blocks: Sequence[int] | None = None
    batch_size: int = 8  # sequences at a time


@torch.no_grad()
def attention_profile(
    decoder: Decoder,
    tokenizer: Any,
    modules: Sequence[Module],
    texts: AttentionTexts,
    base: str,
    changed: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> AttentionResult:
    """Profile the attention of one base.

    decoder: holds the reference weights, before and after; changed: module name -> weight [out, in] of a base other than the
    reference; progress: called with (batches done, batches). Without attention maps, or with rows too short for them, the lists are
    empty and a note says so. Equal arguments give equal results. Raises ValueError where `changed` names an unknown module.
    """
    rows, problems, batch_size = texts.rows, texts.problems, texts.batch_size
    reader = _Reader(decoder, _by_layer(modules, changed), changed or {}, batch_size, seed)
    if not rows.shape[0] or rows.shape[1] < LEAST_KEYS + 2:
        return AttentionResult(
            [], [], [f"attention: text rows of {rows.shape[1]} tokens are too short ({LEAST_KEYS + 2} are needed)"]
        )
    tokenized, notes = _tokenized(problems, tokenizer, decoder.context)
    repeated = repeated_tokens(tokenizer, decoder.vocabulary, decoder.context, REPEATED_SEQUENCES, seed)
    if not repeated:
        notes.append("attention roles: context or vocabulary too small for repeated random tokens; no duplicate, no induction")
    sizes = [len(rows), *(len(group) for group in repeated), len(tokenized)]
    total = sum(math.ceil(size / batch_size) for size in sizes)
    with eager(decoder.model):
        for done, _ in enumerate(chain(reader.text(rows), reader.repeated(repeated), reader.focus(tokenized)), start=1):
            if not reader.tally.layers():
                return AttentionResult([], [], [NO_MAPS])
            if progress:
                progress(done, total)
    sources = "+".join(sorted({problem.source for problem in problems}))
    layers, heads, more = score(reader.tally, base, f"items:{sources}", seed, texts.blocks)
    if changed is None and heads and not heads_apart(decoder, dict(Counter(head.layer for head in heads))):
        more.append(f"attention roles: {MIXED}, so a role is that of the map, and no head is removed")
    return AttentionResult(layers, heads, [*notes, *reader.notes(), *more])


def _by_layer(modules: Sequence[Module], changed: Mapping[str, Tensor] | None) -> dict[int, Mapping[str, Tensor]] | None:
    """Return changed weights by decoder layer; None for the reference."""
    if changed is None:
        return None
    layer_of = {module.name: module.layer for module in modules}
    unknown = sorted(set(changed) - set(layer_of))
    if unknown:
        raise ValueError(f"changed: {unknown[0]} is not one of the model's modules")
    grouped: dict[int, list[str]] = defaultdict(list)
    for name in changed:
        grouped[layer_of[name]].append(name)
    return {layer: LazyMapping(names, changed.__getitem__) for layer, names in grouped.items()}


def _tokenized(problems: Sequence[Problem], tokenizer: Any, context: int) -> tuple[list[TokenProblem], list[str]]:
    """Return problems that can be read, shortest first (little padding), and notes on the others."""
    if problems and not getattr(tokenizer, "is_fast", False):
        return [], ["reasoning focus: the tokenizer does not tell where its tokens stand in the text; not measured"]
    tokenized = [tokenize(problem, tokenizer) for problem in problems]
    short = [problem for problem in tokenized if len(problem.ids) <= context]
    readable = [problem for problem in short if problem.queries]
    notes = []
    if len(short) < len(tokenized):
        notes.append(
            f"reasoning focus: {len(tokenized) - len(short)} of {len(tokenized)} problems are longer than the context of {context} tokens"
        )
    if len(readable) < len(short):
        notes.append(
            f"reasoning focus: {len(short) - len(readable)} of {len(tokenized)} problems have no operand that a token could be matched to"
        )
    return sorted(readable, key=lambda problem: len(problem.ids)), notes


class _Reader:
    """Runs the passes; each is a generator that yields after every batch."""

    def __init__(
        self,
        decoder: Decoder,
        changed: Mapping[int, Mapping[str, Tensor]] | None,
        everything: Mapping[str, Tensor],
        batch_size: int,
        seed: int,
    ):
        self.decoder = decoder
        self.in_step = is_chain(decoder)  # a model that is run whole has no layer that could be run beside others
        self.changed = changed
        self.everything = everything
        self.batch_size = batch_size
        self.seed = seed
        self.tally = Tally()
        self.massive = 0  # tokens with massive activations, the first of a row not counted
        self.rows = 0

    def notes(self) -> list[str]:
        notes = []
        if self.massive:
            notes.append(
                f"attention sinks: the first token of each sequence, and {self.massive} tokens with massive activations in {self.rows} text rows"
            )
        if self.changed is not None and not self.in_step:
            notes.append("attention drift: the layers of this model do not run one after the other; not measured")
        return notes

    def text(self, rows: Tensor) -> Iterator[None]:
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size].to(self.decoder.device)
            roles = role_mass(TEXT_ROLES, batch, start, self.seed)
            sinks = Sinks(batch)
            if self.changed is None or not self.in_step:
                self._run_changed(batch, partial(self._text_map, sinks, roles))
            else:
                in_step(self.decoder, batch, self.changed, partial(self._text_step, sinks, Sinks(batch), roles))
            self.massive += int(sinks.keys[:, 1:].sum())
            self.rows += len(batch)
            yield

    def _text_step(self, sinks: Sinks, reference_sinks: Sinks, roles: RoleMass, step: InStep) -> None:
        self._text_map(sinks, roles, step.layer, step.changed_hidden, step.cumulative)
        keys = reference_sinks.at(step.reference_hidden)
        for name, values in drifts(step, keys, count_keys(allowed_keys(step.reference), keys)).items():
            self.tally.add(step.layer, f"drift_{name}", values.numpy())

    def _text_map(self, sinks: Sinks, roles: RoleMass, layer: int, hidden: Tensor, maps: Tensor) -> None:
        keys = sinks.at(hidden)
        stripped, mass = strip_sinks(maps, keys)
        values = spread(stripped, mass, count_keys(allowed_keys(maps), keys))
        for name, value in zip(("entropy", "entropy_nats", "sink_mass"), values, strict=True):
            self.tally.add(layer, name, value.numpy())
        self.tally.add(layer, "text_roles", roles.read(stripped))

    def repeated(self, groups: Sequence[Tensor]) -> Iterator[None]:
        first = 0
        for group in groups:
            for part in group.split(self.batch_size):
                batch = part.to(self.decoder.device)
                roles = role_mass(REPEATED_ROLES, batch, first, self.seed)
                self._run_changed(batch, partial(self._repeated_map, Sinks(batch), roles))
                first += len(batch)
                yield

    def _repeated_map(self, sinks: Sinks, roles: RoleMass, layer: int, hidden: Tensor, maps: Tensor) -> None:
        stripped, _ = strip_sinks(maps, sinks.at(hidden))
        self.tally.add(layer, "repeated_roles", roles.read(stripped))

    def focus(self, problems: Sequence[TokenProblem]) -> Iterator[None]:
        for start in range(0, len(problems), self.batch_size):
            mass = FocusMass(problems[start : start + self.batch_size])
            batch = mass.ids.to(self.decoder.device)
            self._run_changed(batch, partial(self._focus_map, Sinks(batch, mass.lengths.to(batch.device)), mass))
            yield

    def _focus_map(self, sinks: Sinks, mass: FocusMass, layer: int, hidden: Tensor, maps: Tensor) -> None:
        stripped, _ = strip_sinks(maps, sinks.at(hidden))
        self.tally.add(layer, "focus", np.stack(mass.read(stripped), axis=1))  # [problems, 2, heads]

    def _run_changed(self, batch: Tensor, on_map: Callable[[int, Tensor, Tensor], None]) -> None:
        with self.decoder.swapped(self.everything):
            run_captured(self.decoder, batch, on_map)


# --- example maps ----------------------------------------------------------------------------------------------------------


def _clearest(heads: Sequence[AttentionHead]) -> list[AttentionHead]:
    """Return the heads whose role is recognized most clearly, at most `ROLE_EXAMPLES` of each."""
    chosen = []
    for role in ROLES:
        of_role = [head for head in heads if head.role == role]
        chosen += sorted(of_role, key=lambda head: (-head.scores[role], head.layer, head.head))[:ROLE_EXAMPLES]
    return chosen


@torch.no_grad()
def example_maps(decoder: Decoder, tokenizer: Any, heads: Sequence[AttentionHead], seed: int = 0) -> list[HeadMap]:
    """Return the maps of the heads with the clearest roles on one short sequence; none where no head has a role.

    The sequence is a random block of tokens twice, because every role shows there at a glance: the previous token as the line beside
    the diagonal, duplicate and induction as lines one block and one token less away. Random tokens also keep the survey's text out of
    a report that is passed on. Sinks are not removed, unlike in every statistic, since a picture should show where the head looks.
    decoder: holds the reference weights.
    """
    chosen = _clearest(heads)
    ids = repeated_block(tokenizer, decoder.vocabulary, BLOCK, seed) if chosen else None
    if ids is None:
        return []
    maps: dict[int, Tensor] = {}  # layer -> [heads, queries, keys]

    def on_map(layer: int, hidden: Tensor, of_layer: Tensor) -> None:
        maps[layer] = of_layer[0].float().cpu()

    with eager(decoder.model):
        run_captured(decoder, ids.to(decoder.device), on_map)
    return [
        HeadMap(head.layer, head.head, str(head.role), head.scores[str(head.role)], _percent(maps[head.layer][head.head]))
        for head in chosen
    ]


def _percent(weights: Tensor) -> list[list[int]]:
    """Return rows up to the diagonal, whole percent, of weights [queries, keys]."""
    return [[round(100 * value) for value in row[: query + 1]] for query, row in enumerate(weights.tolist())]
