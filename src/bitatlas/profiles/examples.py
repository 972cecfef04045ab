"""Example maps of the heads that matter: where those with the clearest roles look in one short sequence.

The sequence is a random block of tokens twice, because every role shows there at a glance: the previous token as the line beside the
diagonal, duplicate and induction as lines one block and one token less away. Random tokens also keep the survey's text out of a report
that is passed on. One pass of two dozen tokens; only percentages are kept.
Left out: sinks are not removed, unlike in every statistic, since a picture should show where the head looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitatlas.profiles.capture import eager, run_captured
from bitatlas.profiles.roles import ROLES, one_repeated
from bitatlas.records import AttentionHead, HeadMap

BLOCK = 12  # tokens, twice
A_ROLE = 2  # heads of each role, the clearest first


def clearest(heads: Sequence[AttentionHead]) -> list[AttentionHead]:
    """The heads whose role is recognized most clearly, at most `A_ROLE` of each."""
    chosen = []
    for role in ROLES:
        own = [head for head in heads if head.role == role]
        chosen += sorted(own, key=lambda head: (-head.scores[head.role or ""], head.layer, head.head))[:A_ROLE]
    return chosen


@torch.no_grad()
def example_maps(model: Any, tokenizer: Any, heads: Sequence[AttentionHead], seed: int = 0) -> list[HeadMap]:
    """The maps of the clearest heads; none where no head has a role. model: holds the reference weights."""
    chosen = clearest(heads)
    ids = one_repeated(tokenizer, int(model.get_input_embeddings().weight.shape[0]), BLOCK, seed) if chosen else None
    if ids is None:
        return []
    maps: dict[int, Tensor] = {}  # layer -> [heads, queries, keys]

    def keep(layer: int, hidden: Tensor, found: Tensor) -> None:
        maps[layer] = found[0].float().cpu()

    with eager(model):
        run_captured(model, ids.to(model.device), keep)
    return [
        HeadMap(head.layer, head.head, str(head.role), head.scores[str(head.role)], _percent(maps[head.layer][head.head]))
        for head in chosen
    ]


def _percent(weights: Tensor) -> list[list[int]]:
    """[queries, keys] -> rows up to the diagonal, whole percent."""
    return [[round(100 * value) for value in row[: place + 1]] for place, row in enumerate(weights.tolist())]
