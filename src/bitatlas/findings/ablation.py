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
from numpy.typing import NDArray

from bitatlas.findings.shares import FAILS, HOLDS, OPEN
from bitatlas.records import Ablation, Finding, Measured
from bitatlas.records.text import interval, number
from bitatlas.stats.bootstrap import RESAMPLES, percentile_interval

if TYPE_CHECKING:
    from bitatlas.measure.attention.ablation import Removal

ROWS = "repeated random tokens"
RARE = 0.05  # a random set that does as much, counted with the named heads as one of them
NAMED = 6  # heads in a sentence
SECOND = 1  # half of a sequence, on the last axis of the losses

Floats = NDArray[np.float64]


def ablation_record(found: Removal, seed: int = 0) -> Ablation:
    """From losses by sequence to the record; where nothing was tested, only the heads and the reason."""
    heads = [list(head) for head in found.heads]
    if found.not_tested:
        return Ablation(found.role, heads, not_tested=found.not_tested)
    second = found.intact[:, SECOND]
    own = found.removed[:, SECOND] - second  # [sequences]
    others = found.random[..., SECOND] - second  # [draws, sequences]
    draws, sequences = others.shape
    rng = np.random.default_rng(seed)
    of_rows = rng.multinomial(sequences, np.full(sequences, 1 / sequences), RESAMPLES) / sequences  # [resamples, sequences]
    of_draws = rng.multinomial(draws, np.full(draws, 1 / draws), RESAMPLES) / draws
    if found.every_draw:
        of_draws = np.full_like(of_draws, 1 / draws)
    added = of_rows @ own
    by_chance = ((of_draws @ others) * of_rows).sum(axis=1)
    n = sequences if found.every_draw else min(sequences, draws)

    def record(value: float, resampled: Floats, count: int) -> Measured:
        low, high = percentile_interval(resampled, count)
        ends = (float(low), float(high)) if count > 1 else None
        return Measured(float(value), ends, "nats/token", "reference", ROWS, sequences)

    return Ablation(
        role=found.role,
        heads=heads,
        draws=draws,
        as_harmful=int((others.mean(axis=1) >= own.mean()).sum()),
        first_half=record(found.intact[:, 0].mean(), of_rows @ found.intact[:, 0], sequences),
        second_half=record(second.mean(), of_rows @ second, sequences),
        added=record(own.mean(), added, sequences),
        added_by_chance=record(others.mean(), by_chance, n),
        effect=record(own.mean() - others.mean(), added - by_chance, n),
    )


def ablation_findings(found: Sequence[Ablation]) -> list[Finding]:
    """One statement a role; none where no attention was read."""
    return [_finding(one) for one in found]


def _finding(one: Ablation) -> Finding:
    claim = f"removing the heads called {one.role} hurts repetition more than removing random heads"
    if one.effect is None or one.added is None:
        return Finding("attention", claim, OPEN, f"Not tested: {one.not_tested}.")
    many = len(one.heads) > 1
    heads = f"{len(one.heads)} heads" if many else "1 head"
    text = (
        f"Predicting the second half of a random block of tokens twice costs {interval(one.second_half, unit=True)} (the first half: "
        f"{interval(one.first_half)}). Without the {heads} called {one.role} ({head_names(one.heads)}) it costs "
        f"{interval(one.added, unit=True)} more, without {len(one.heads)} random other{'s' if many else ''} {interval(one.added_by_chance)} "
        f"({one.as_harmful} of {one.draws} random {'sets do' if many else 'heads do'} at least as much). "
        f"Difference: {interval(one.effect, unit=True)}."
    )
    return Finding("attention", claim, ablation_verdict(one), text, one.effect)


def ablation_verdict(one: Ablation) -> str:
    """Holds where the whole interval is above 0 and few random sets do as much, does not hold where the interval is below."""
    if one.effect is None or one.effect.ci95 is None:
        return OPEN
    low, high = one.effect.ci95
    rare = (one.as_harmful + 1) / (one.draws + 1) <= RARE
    return HOLDS if low > 0 and rare else FAILS if high < 0 else OPEN


def head_names(heads: Sequence[Sequence[int]]) -> str:
    """`3.1, 5.0`: layer and head, the first of them."""
    names = [f"{layer}.{head}" for layer, head in heads]
    more = f" and {number(len(names) - NAMED, 0)} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
