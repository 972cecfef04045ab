"""Words on heads and attention: a head's role, heads removed, drift in every layer."""

from __future__ import annotations

import numpy as np
import torch

from bitatlas.findings.statements import ablation_findings, ablation_record, drift_finding
from bitatlas.measure.attention.ablation import Removal
from bitatlas.measure.attention.roles import TEXT_ROLES, kappa, permutation_p, recognized, role_mass
from bitatlas.records import AttentionLayer, Measured
from bitatlas.stats.bootstrap import benjamini_hochberg, measured
from simulations import Simulation

TOKENS, WORDS, ROWS = 96, 200, 4


def named(seed: int, wanted: str) -> bool:
    """A head that looks at the tokens that stand in the row most often, whatever it must predict (or at random keys): has it a role?"""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, WORDS + 1)
    ids = rng.choice(WORDS, size=(ROWS, TOKENS), p=chance / chance.sum())
    counts = np.stack([np.bincount(row)[row] for row in ids]).astype(float)  # [rows, keys]
    weight = counts**2 if wanted == "frequent" else rng.lognormal(0, 1, counts.shape)
    maps = np.tril(np.repeat(weight[:, None, :], TOKENS, axis=1))
    maps /= maps.sum(axis=-1, keepdims=True)
    masses = role_mass(TEXT_ROLES, torch.tensor(ids), 0, seed).read(torch.tensor(maps)[:, None])  # [rows, roles, draws, heads]
    means = {role: masses[:, index] for index, role in enumerate(TEXT_ROLES)}
    q = benjamini_hochberg([float(permutation_p(np.moveaxis(m, 1, 0), 200, seed)[0]) for m in means.values()])
    scores = {role: float(kappa(m[:, 0].mean(0), m[:, 1:].mean((0, 1)))[0]) for role, m in means.items()}
    return recognized(scores, dict(zip(scores, map(float, q), strict=True))) is not None


def removed(seed: int) -> bool:
    """The heads do what any other heads do."""
    rng = np.random.default_rng(seed)
    intact = 3 + 0.3 * rng.standard_normal((16, 2))
    effect = rng.normal(0.1, 0.03)  # of this set of heads, drawn like the others
    of_sets = rng.normal(0.1, 0.03, 20)
    noise = 0.05 * rng.standard_normal((21, 16, 2))
    random = intact + of_sets[:, None, None] + noise[1:]
    removal = Removal("induction", ((0, 1),), 20, False, intact, intact + effect + noise[0], random)
    return ablation_findings([ablation_record(removal, seed)])[0].verdict == "holds"


def drifts(seed: int) -> bool:
    """In one of eight layers the maps move as far at the high format as at the low one."""
    rng = np.random.default_rng(seed)
    lines = []
    for base, factor in (("uniform:low", 3.0), ("uniform:high", 1.0)):
        for layer in range(8):
            mean = 0.1 * (1.0 if layer == 5 else factor)
            record = measured(mean * rng.lognormal(0, 0.3, 32), "Jensen-Shannon distance", base, "test", seed)
            lines.append(_layer(layer, base, record))
    finding = drift_finding(lines, "low", "high")
    return finding is not None and finding.verdict == "holds"


def _layer(layer: int, base: str, drift: Measured) -> AttentionLayer:
    nothing = Measured(0.0, None, "share", base, "test", 1)
    return AttentionLayer(layer, base, nothing, nothing, nothing, nothing, {}, {}, None, "", drift_cumulative=drift)


SIMULATIONS = [
    Simulation("head … has a role", "it looks at frequent tokens, whatever comes next", lambda seed: named(seed, "frequent")),
    Simulation("head … has a role", "it looks at random tokens", lambda seed: named(seed, "random")),
    Simulation("removing the heads called … hurts repetition more", "they are as any other heads", removed),
    Simulation("attention drifts more at … than at … in every layer", "in one layer it does not", drifts),
]
