"""Sums up numbers per sequence and head into the records of layers and heads, with intervals over sequences.

Role scores and focus are ratios of means, (m - e) / (1 - e) of means over sequences, so their intervals resample sequences (text rows in
their blocks) and recompute the ratio. The permutation p-values of all heads and roles are corrected together (Benjamini-Hochberg); a resampled
specialization keeps those verdicts and lets the scores vary. Which heads rest on the sinks is counted apart from the roles.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitatlas.measure.attention.focus import FOCUS_NULL
from bitatlas.measure.attention.maps import LEAST_KEYS
from bitatlas.measure.attention.roles import (
    KAPPA_THRESHOLDS,
    KAPPA_TYPED,
    Q_TYPED,
    REPEATED_ROLES,
    ROLES,
    TEXT_ROLES,
    Floats,
    kappa,
    permutation_p,
    permutations_for,
    recognized,
)
from bitatlas.records import AttentionHead, AttentionLayer, Measured
from bitatlas.stats.bootstrap import benjamini_hochberg, effective_sample_size, measured, percentile_interval, resample_means

SPLIT = "test"  # the rows of text that are read
RESTING_SINK_MASS = 0.5  # a head whose sink mass is larger rests on the sinks; counted as "sink"


class Tally:
    """Numbers per sequence, by layer and name. Every array has the sequences on its first axis."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, str], list[Floats]] = defaultdict(list)

    def add(self, layer: int, name: str, values: Floats) -> None:
        """Add a batch's numbers: [sequences, ...]."""
        self._parts[layer, name].append(values)

    def layers(self) -> list[int]:
        """Return the layers that have any numbers."""
        return sorted({layer for layer, _ in self._parts})

    def find(self, layer: int, name: str) -> Floats | None:
        """Return [sequences, ...], or None where nothing was added."""
        parts = self._parts.get((layer, name))
        return np.concatenate(parts) if parts else None

    def get(self, layer: int, name: str) -> Floats:
        """Return [sequences, ...]; KeyError where nothing was added."""
        values = self.find(layer, name)
        if values is None:
            raise KeyError(f"layer {layer}: no {name}")
        return values


@dataclass(frozen=True)
class RoleScores:
    """One role, all heads of the layers that were read, in order."""

    role: str
    mass: dict[int, Floats]  # layer -> [sequences, heads] on the true targets
    expected: dict[int, Floats]  # layer -> [sequences, heads] on random ones
    kappa: dict[int, Floats]  # layer -> [heads]
    p: dict[int, Floats]  # layer -> [heads]; after Benjamini-Hochberg: q
    blocks: dict[int, list[int] | None]  # layer -> of its sequences


def score(
    tally: Tally, base: str, items: str, seed: int, blocks: Sequence[int] | None = None
) -> tuple[list[AttentionLayer], list[AttentionHead], list[str]]:
    """Return records of all layers that were read, of their heads, and notes. blocks: of the text rows (problems and random tokens have none)."""
    known = [layer for layer in tally.layers() if _sequence_means(tally, layer, "entropy").size]
    notes = [
        f"attention: layer {layer} leaves no query {LEAST_KEYS} keys beside the sinks; not profiled"
        for layer in tally.layers()
        if layer not in known
    ]
    roles = corrected([scores for role in ROLES if (scores := score_role(tally, known, role, seed, blocks)) is not None])
    layers, heads = [], []
    for layer in known:
        of_layer = _heads(tally, layer, base, roles)
        heads += of_layer
        layers.append(_layer(tally, base, items, seed, of_layer, roles, blocks))
    resting = sum(bool(np.isnan(tally.get(layer, "entropy")).all(0).any()) for layer in known)
    if resting:
        notes.append(
            f"attention: in {resting} layers a head rests on the sinks wholly; its entropy is given as 0 and left out of the layer's mean"
        )
    return layers, heads, notes


def _sequence_means(tally: Tally, layer: int, name: str) -> Floats:
    """Return the mean over heads of each sequence that has a value: [sequences]."""
    values = tally.get(layer, name)  # [sequences, heads]
    values = values[~np.isnan(values).all(1)]
    return np.nanmean(values, axis=1) if values.size else values[:, 0]


def _blocks_of(blocks: Sequence[int] | None, known: ArrayLike) -> list[int] | None:
    """Return the blocks of the sequences that have a value."""
    return None if blocks is None else [block for block, has in zip(blocks, np.asarray(known), strict=True) if has]


# --- roles ----------------------------------------------------------------------------------------------------------------


def score_role(tally: Tally, layers: list[int], role: str, seed: int, blocks: Sequence[int] | None = None) -> RoleScores | None:
    """Return kappa and permutation p of one role for every head; None where no sequence has a target."""
    group, name = (TEXT_ROLES, "text_roles") if role in TEXT_ROLES else (REPEATED_ROLES, "repeated_roles")
    if any(tally.find(layer, name) is None for layer in layers):
        return None
    masses = {layer: tally.get(layer, name)[:, group.index(role)] for layer in layers}  # [sequences, 1 + draws, heads]
    whole = {layer: ~np.isnan(values).any((1, 2)) for layer, values in masses.items()}
    masses = {layer: values[whole[layer]] for layer, values in masses.items()}
    blocks_of = {layer: _blocks_of(blocks if role in TEXT_ROLES else None, whole[layer]) for layer in masses}
    if not masses or not all(len(values) for values in masses.values()):
        return None
    together = np.concatenate(list(masses.values()), axis=2)
    p = permutation_p(np.moveaxis(together, 1, 0), permutations_for(len(ROLES) * together.shape[2]), seed)
    ends = np.cumsum([values.shape[2] for values in masses.values()])[:-1]
    mass = {layer: values[:, 0] for layer, values in masses.items()}
    expected = {layer: values[:, 1:].mean(1) for layer, values in masses.items()}
    scores = {layer: kappa(mass[layer].mean(0), expected[layer].mean(0)) for layer in masses}
    return RoleScores(role, mass, expected, scores, dict(zip(masses, np.split(p, ends), strict=True)), blocks_of)


def corrected(roles: list[RoleScores]) -> list[RoleScores]:
    """Return the scores with all p-values of all roles, layers and heads replaced by their q-values."""
    values = [p for scores in roles for p in scores.p.values()]
    if not values:
        return roles
    q = iter(np.split(benjamini_hochberg(np.concatenate(values)), np.cumsum([len(p) for p in values])[:-1]))
    return [replace(s, p={layer: next(q) for layer in s.p}) for s in roles]


def _heads(tally: Tally, layer: int, base: str, roles: list[RoleScores]) -> list[AttentionHead]:
    entropy = _head_means(tally.get(layer, "entropy"))
    sink = _head_means(tally.get(layer, "sink_mass"))
    focus = tally.find(layer, "focus")  # [problems, 2, heads]
    focused = None if focus is None else 100 * kappa(focus[:, 0].mean(0), focus[:, 1].mean(0))
    heads = []
    for head in range(len(entropy)):
        scores = {s.role: float(s.kappa[layer][head]) for s in roles}
        q_values = {s.role: float(s.p[layer][head]) for s in roles}
        role = recognized(scores, q_values)
        percent = None if focused is None else float(focused[head])
        heads.append(AttentionHead(layer, head, base, float(entropy[head]), float(sink[head]), role, scores, q_values, percent))
    return heads


def _head_means(values: Floats) -> Floats:
    """Return the mean over sequences that have a value, 0 where none has. [sequences, heads] -> [heads]."""
    known = ~np.isnan(values)
    return np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1)


# --- layers ---------------------------------------------------------------------------------------------------------------


def _layer(
    tally: Tally,
    base: str,
    items: str,
    seed: int,
    heads: list[AttentionHead],
    roles: list[RoleScores],
    blocks: Sequence[int] | None,
) -> AttentionLayer:
    """Return the record of the layer of `heads`."""
    layer = heads[0].layer

    def mean(name: str, unit: str) -> Measured:
        known = ~np.isnan(tally.get(layer, name)).all(1)
        return measured(_sequence_means(tally, layer, name), unit, base, SPLIT, seed, _blocks_of(blocks, known))

    def drift(name: str) -> Measured | None:
        values = tally.find(layer, name)
        known = None if values is None else ~np.isnan(values)
        if values is None or known is None or not known.any():
            return None
        return measured(values[known], "Jensen-Shannon distance", base, SPLIT, seed, _blocks_of(blocks, known))

    focus = tally.find(layer, "focus")
    counts = Counter(head.role for head in heads if head.role)
    return AttentionLayer(
        layer=layer,
        base=base,
        entropy=mean("entropy", "share of ln(keys)"),
        entropy_nats=mean("entropy_nats", "nats"),
        sink_mass=mean("sink_mass", "share"),
        specialization_percent=specialization(layer, roles, base, seed),
        specialization_at={f"{t:g}": 100 * share_typed(layer, roles, t) for t in KAPPA_THRESHOLDS},
        roles={**{role: counts[role] for role in ROLES}, "sink": sum(head.sink_mass > RESTING_SINK_MASS for head in heads)},
        focus_percent=None if focus is None else focus_interval(focus.mean(2), base, items, seed),
        focus_null=FOCUS_NULL,
        drift_local=drift("drift_local"),
        drift_cumulative=drift("drift_cumulative"),
        drift_noise=drift("drift_noise"),
    )


def share_typed(layer: int, roles: list[RoleScores], threshold: float) -> float:
    """Return the share of a layer's heads with any role at `threshold`."""
    typed = [(s.kappa[layer] >= threshold) & (s.p[layer] <= Q_TYPED) for s in roles]
    return float(np.any(typed, axis=0).mean()) if typed else 0.0


def specialization(layer: int, roles: list[RoleScores], base: str, seed: int) -> Measured:
    """Return the share of heads with a role, %, with an interval from resampling the text rows and the repeated sequences."""
    typed: NDArray[np.bool_] | None = None
    sequences, worth = {}, {}
    for s in roles:
        mass, expected = s.mass[layer], s.expected[layer]  # [sequences, heads]
        role_seed = seed + (s.role in REPEATED_ROLES)  # the two kinds of sequences are drawn independently
        means = resample_means(np.stack([mass, expected], axis=1), seed=role_seed, blocks=s.blocks[layer])
        passes = (kappa(means[:, 0], means[:, 1]) >= KAPPA_TYPED) & (s.p[layer] <= Q_TYPED)
        typed = passes if typed is None else typed | passes
        sequences[s.role in REPEATED_ROLES] = len(mass)
        worth[s.role in REPEATED_ROLES] = effective_sample_size(len(mass), s.blocks[layer])
    mean = 100 * share_typed(layer, roles, KAPPA_TYPED)
    ci95 = None
    if typed is not None and min(worth.values()) >= 2:
        low, high = percentile_interval(100 * typed.mean(1), min(worth.values()))
        ci95 = (min(float(low), mean), max(float(high), mean))
    return Measured(mean, ci95, "%", base, f"{SPLIT} + repeated random tokens", sum(sequences.values()))


def focus_interval(masses: Floats, base: str, items: str, seed: int) -> Measured:
    """Return 100 (m - e) / (1 - e) over problems. masses: [problems, 2] = (m, e), means over heads."""
    mean = float(100 * kappa(*masses.mean(0)))
    ci95 = None
    if len(masses) > 1:
        resampled = resample_means(masses, seed=seed)
        low, high = percentile_interval(100 * kappa(resampled[:, 0], resampled[:, 1]), len(masses))
        ci95 = (float(low), float(high))
    return Measured(mean, ci95, "%", base, items, len(masses))
