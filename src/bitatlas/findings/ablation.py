"""Are heads what they are called? What their removal does to the repetition of a random block, beside that of random other heads.

The effect is paired: in every sequence, the loss without the named heads minus the mean loss without the random ones, nats/token.
Both the sequences and the random sets were drawn, so both are resampled for the interval; only the sequences where every possible set
was measured. How many random sets do at least as much is said beside the mean, which a single set can carry.
Left out: a p-value for each head; a role is a statement about all heads that carry it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitatlas.findings.shares import FAILS, HOLDS, OPEN, Floats
from bitatlas.records import Ablation, Finding, Measured
from bitatlas.records.text import interval, number
from bitatlas.stats.bootstrap import RESAMPLES, interval_ends

if TYPE_CHECKING:  # the module itself needs torch, which this package does without
    from bitatlas.measure.attention.ablation import Removal

ROWS = "repeated random tokens"
RARE = 0.05  # a random set that does as much, counted with the named heads as one of them
NAMED = 6  # heads in a sentence
SECOND = 1  # half of a sequence, on the last axis of the losses


def ablation_record(removal: Removal, seed: int = 0) -> Ablation:
    """Return the record of losses by sequence; where nothing was tested, only the heads and the reason."""
    heads = [list(head) for head in removal.heads]
    if removal.not_tested:
        return Ablation(removal.role, heads, not_tested=removal.not_tested)
    second = removal.intact[:, SECOND]
    named = removal.removed[:, SECOND] - second  # [sequences]
    others = removal.random[..., SECOND] - second  # [draws, sequences]
    draws, sequences = others.shape
    rng = np.random.default_rng(seed)
    of_rows = rng.multinomial(sequences, np.full(sequences, 1 / sequences), RESAMPLES) / sequences  # [resamples, sequences]
    of_draws = rng.multinomial(draws, np.full(draws, 1 / draws), RESAMPLES) / draws
    if removal.every_draw:
        of_draws = np.full_like(of_draws, 1 / draws)
    added = of_rows @ named
    by_chance = ((of_draws @ others) * of_rows).sum(axis=1)
    n = sequences if removal.every_draw else min(sequences, draws)

    def record(value: float, resampled: Floats, count: int) -> Measured:
        return Measured(float(value), interval_ends(resampled, count), "nats/token", "reference", ROWS, sequences)

    return Ablation(
        role=removal.role,
        heads=heads,
        draws=draws,
        as_harmful=int((others.mean(axis=1) >= named.mean()).sum()),
        first_half=record(removal.intact[:, 0].mean(), of_rows @ removal.intact[:, 0], sequences),
        second_half=record(second.mean(), of_rows @ second, sequences),
        added=record(named.mean(), added, sequences),
        added_by_chance=record(others.mean(), by_chance, n),
        effect=record(named.mean() - others.mean(), added - by_chance, n),
    )


def ablation_findings(ablations: Sequence[Ablation]) -> list[Finding]:
    """Return one statement a role; none where no attention was read."""
    return [_finding(ablation) for ablation in ablations]


def _finding(ablation: Ablation) -> Finding:
    claim = f"removing the heads called {ablation.role} hurts repetition more than removing random heads"
    if ablation.effect is None or ablation.added is None:
        return Finding("attention", claim, OPEN, f"Not tested: {ablation.not_tested}.")
    many = len(ablation.heads) > 1
    heads = f"{len(ablation.heads)} heads" if many else "1 head"
    text = (
        f"Predicting the second half of a random block of tokens twice costs {interval(ablation.second_half, unit=True)} (the first half: "
        f"{interval(ablation.first_half)}). Without the {heads} called {ablation.role} ({head_names(ablation.heads)}) it costs "
        f"{interval(ablation.added, unit=True)} more, without {len(ablation.heads)} random other{'s' if many else ''} {interval(ablation.added_by_chance)} "
        f"({ablation.as_harmful} of {ablation.draws} random {'sets do' if many else 'heads do'} at least as much). "
        f"Difference: {interval(ablation.effect, unit=True)}."
    )
    return Finding("attention", claim, ablation_verdict(ablation), text, ablation.effect)


def ablation_verdict(ablation: Ablation) -> str:
    """Return the word: holds where the whole interval is above 0 and few random sets do as much, does not hold where the interval is below."""
    if ablation.effect is None or ablation.effect.ci95 is None:
        return OPEN
    low, high = ablation.effect.ci95
    rare = (ablation.as_harmful + 1) / (ablation.draws + 1) <= RARE
    return HOLDS if low > 0 and rare else FAILS if high < 0 else OPEN


def head_names(heads: Sequence[Sequence[int]]) -> str:
    """Return `3.1, 5.0`: layer and head, the first of them."""
    names = [f"{layer}.{head}" for layer, head in heads]
    more = f" and {number(len(names) - NAMED, 0)} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
