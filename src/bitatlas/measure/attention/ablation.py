"""Tests whether a head is what it is called: heads of one role are removed, and the model must repeat worse than without as many random other heads.

What is predicted is the second half of a random block of tokens twice, without the block's first token (nothing tells that the repeat
begins): only what copies from the first half can know it. The sequences are not those on which the heads got their names. The heads
called induction are removed, and, in a model that has them, those called previous token, from which they read (arXiv:2209.11895).

*Removed* means that the head's output is zero: its columns of what the output projection reads. Zero, and not the head's mean output,
because a mean would have to be taken over some text, would leave in what the head adds everywhere, and differs between the two halves.
What zero does besides taking the role away (the rest of the model meets a sum that it never saw) it does to the random heads as well:
that is what they are drawn for.
Left out: heads whose role is another, paths between heads, and removal in quantized models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitatlas.data.rows import rows_sha256
from bitatlas.measure.attention.capture import MIXED, heads_apart, output_projection
from bitatlas.measure.attention.roles import ABLATION_PART, repeated_tokens
from bitatlas.model.decoder import Decoder
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.layerwise import Job, batch_rows, follow, logits_of, record
from bitatlas.model.linear import shape_of
from bitatlas.records import AttentionHead
from bitatlas.records.journal import Journal, content_key

ABLATED_ROLES = ("induction", "previous")
ABLATION_SEQUENCES = 32
SHORT_SEQUENCES = 8  # in a short survey: where heads do the repeating, the effect is many times the interval of so few
ABLATION_DRAWS = 20  # fewest with which "none of them does as much" is rarer than 1 in 20 by chance

STATE_BYTES = 2**28  # of what goes into the layers, in memory
GROUP = 8  # sets of heads that are removed side by side

Head = tuple[int, int]  # layer, head
Heads = tuple[Head, ...]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Removal:
    """Mean loss on both halves of each sequence, nats/token: first and second on the last axis. `not_tested`: why arrays are empty."""

    role: str
    heads: Heads  # that were removed
    draws: int  # of as many other heads
    every_draw: bool  # the draws are all there are
    intact: Floats  # [sequences, 2]
    removed: Floats  # [sequences, 2]
    random: Floats  # [draws, sequences, 2]
    not_tested: str = ""


def ablate(
    decoder: Decoder,
    tokenizer: Any,
    heads: Sequence[AttentionHead],
    identity: Sequence[str],
    journal: Journal,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    sequences: int = ABLATION_SEQUENCES,
) -> list[Removal]:
    """Remove the heads of each role of `ABLATED_ROLES` from the reference, and random other heads; nothing where `heads` is empty.

    heads: of the reference, all layers that have maps; `identity`: what journaled losses belong to. Equal arguments, equal results.
    """
    if not heads:
        return []
    all_heads = sorted({(head.layer, head.head) for head in heads})
    by_role = {role: tuple(sorted((h.layer, h.head) for h in heads if h.role == role)) for role in ABLATED_ROLES}
    groups = repeated_tokens(tokenizer, decoder.vocabulary, decoder.context, sequences, seed, ABLATION_PART)
    reasons = {role: _not_tested(decoder, role, by_role, all_heads, groups) for role in ABLATED_ROLES}
    draws = {role: () if reasons[role] else random_sets(named, all_heads, seed) for role, named in by_role.items()}
    tested = [role for role in ABLATED_ROLES if not reasons[role]]
    removals = list(dict.fromkeys(heads for role in tested for heads in ((), by_role[role], *draws[role])))
    losses = _losses(decoder, groups, removals, _heads_by_layer(all_heads), identity, journal, progress) if tested else {}
    results = []
    for role, named in by_role.items():
        none = np.empty((0, 2))
        if reasons[role]:
            results.append(Removal(role, named, 0, False, none, none, none[None], reasons[role]))
            continue
        every_draw = len(draws[role]) == math.comb(len(all_heads) - len(named), len(named))
        random = np.stack([losses[heads] for heads in draws[role]])
        results.append(Removal(role, named, len(random), every_draw, losses[()], losses[named], random))
    return results


def _not_tested(
    decoder: Decoder, role: str, by_role: dict[str, Heads], all_heads: Sequence[Head], groups: Sequence[Tensor]
) -> str:
    """Return why a role's heads cannot be removed and compared; "" where they can."""
    named = by_role[role]
    if not named:
        return f"no head is called {role}"
    if not by_role["induction"]:
        return "no head is called induction, so none could need these for repeating"
    if len(all_heads) < 2 * len(named):
        return f"{len(named)} of {len(all_heads)} heads are called {role}, so there are not as many others to compare with"
    if not groups:
        return "context or vocabulary too small for repeated random tokens"
    layers, count = decoder.layers, _heads_by_layer(all_heads)
    if any(output_projection(layers[layer], count[layer]) is None for layer in count):
        return "a layer's heads cannot be told apart in what its attention puts out"
    if not heads_apart(decoder, count):
        return MIXED
    return ""


def _heads_by_layer(all_heads: Sequence[Head]) -> dict[int, int]:
    return {layer: 1 + max(head for other, head in all_heads if other == layer) for layer, _ in all_heads}


def random_sets(named: Heads, all_heads: Sequence[Head], seed: int) -> tuple[Heads, ...]:
    """Draw up to `ABLATION_DRAWS` different sets of as many heads that are not in `named`."""
    others = [head for head in all_heads if head not in named]
    count = min(ABLATION_DRAWS, math.comb(len(others), len(named)))
    generator = np.random.default_rng([seed, len(named)])
    sets: dict[Heads, None] = {}
    while len(sets) < count:
        chosen = generator.choice(len(others), len(named), replace=False)
        sets[tuple(others[i] for i in sorted(chosen))] = None
    return tuple(sets)


# --- removing heads ------------------------------------------------------------------------------------------------------------


@contextmanager
def without_heads(decoder: Decoder, heads: Sequence[Head], count: dict[int, int]) -> Iterator[None]:
    """Make the outputs of `heads` zero within the block. count: layer -> its heads. Raises ValueError where they cannot be told apart."""
    hooks = []
    try:
        for layer in sorted({layer for layer, _ in heads}):
            module = output_projection(decoder.layers[layer], count[layer])
            if module is None:
                raise ValueError(f"layer {layer}: no output projection of {count[layer]} heads")
            remaining = torch.ones(count[layer], dtype=torch.bool)
            remaining[[head for other, head in heads if other == layer]] = False
            columns = remaining.repeat_interleave(shape_of(module)[1] // count[layer])
            hooks.append(module.register_forward_pre_hook(partial(_mask_columns, columns)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mask_columns(columns: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * columns.to(args[0].device), *args[1:])


# --- losses --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _losses(
    decoder: Decoder,
    groups: Sequence[Tensor],
    removals: Sequence[Heads],
    count: dict[int, int],
    identity: Sequence[str],
    journal: Journal,
    progress: Callable[[int, int], None] | None,
) -> dict[Heads, Floats]:
    """Return losses [sequences, 2] without each set of heads, from the journal or measured; a pass resumes at the first changed layer."""
    batches = [batch for group in groups for batch in group.split(batch_rows(group.shape[1], decoder.vocabulary))]
    parts: dict[Heads, list[Any]] = {heads: [] for heads in removals}
    for number, batch in enumerate(batches):
        keys = {heads: content_key("ablation", list(identity), rows_sha256(batch), heads) for heads in removals}
        known = {heads: journal.get(key) for heads, key in keys.items()}
        missing = [heads for heads in removals if known[heads] is None]
        for heads, logits in _logits_without(decoder, batch.to(decoder.device), missing, count) if missing else ():
            known[heads] = half_losses(logits, batch.to(decoder.device)).tolist()
            journal.put(keys[heads], "ablation", known[heads])
        for heads in removals:
            parts[heads].append(known[heads])
        if progress:
            progress(number + 1, len(batches))
    return {heads: np.concatenate([np.asarray(part, dtype=np.float64) for part in of_set]) for heads, of_set in parts.items()}


def _logits_without(
    decoder: Decoder, ids: Tensor, removals: Sequence[Heads], count: dict[int, int]
) -> Iterator[tuple[Heads, Tensor]]:
    """Yield logits [rows, tokens, vocabulary] without each set of heads."""
    with StateCache(STATE_BYTES) as shelf:
        recorded = record(decoder, [ids], shelf)
        ordered = sorted(removals)  # the empty set first, then by the first layer that is changed
        for start in range(0, len(ordered), GROUP):
            group = ordered[start : start + GROUP]
            jobs = [Job(heads[0][0], _removal(decoder, heads, count)) for heads in group if heads]
            finals = iter(follow(decoder, recorded, jobs))
            for heads in group:
                yield heads, logits_of(decoder, ids, next(finals).final[0] if heads else recorded.final[0])


def _removal(decoder: Decoder, heads: Heads, count: dict[int, int]) -> Callable[[int], AbstractContextManager[None]]:
    return lambda layer: without_heads(decoder, [head for head in heads if head[0] == layer], count)


def half_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss on the first and on the second block of each sequence, each without its first token, nats/token.

    logits: [rows, tokens, vocabulary]; ids: [rows, tokens], a block twice, with or without a beginning token -> float64 [rows, 2].
    """
    block = ids.shape[1] // 2
    start = ids.shape[1] - 2 * block  # 1 where there is a beginning token
    log_p = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, ids[:, 1:, None])[..., 0]  # of the token behind each
    first, second = log_p[:, start : start + block - 1], log_p[:, start + block :]
    return -torch.stack([first.double().mean(1), second.double().mean(1)], dim=1)
