"""The three screens of true damage: every uniform width, every layer both ways, every unit both ways.

"Both ways": lowered around `uniform:high` (the first step down) and raised around `uniform:low` (the last step that is missing).
One 2-bit module in a good model behaves unlike the same module in a bad one, so either direction alone misleads; their mean is the
exact Shapley value of a quadratic damage model (see `findings`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitatlas.planning.budget import units_of
from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.sensitivity.damage import DamageMeter, Swap
from bitatlas.sensitivity.interactions import pair_rows, swap_interactions

STRONGEST = 12  # pairs of units that are told by name


@dataclass(frozen=True)
class LayerScreen:
    """float64 [layers, rows], nats/token: the damage of the whole model."""

    lowered: np.ndarray  # this layer low, the others high
    raised: np.ndarray  # this layer high, the others low


@dataclass(frozen=True)
class PairScreen:
    """What two units lowered together do beyond both alone, at base uniform high on the fit rows; nats/token, second order."""

    extra: np.ndarray  # float64 [units, units], zero on the diagonal
    pairs: list[tuple[int, int]]  # those that hurt most together, the worst first
    by_row: np.ndarray  # float64 [rows, pairs]


@dataclass(frozen=True)
class UnitScreen:
    """Damage of the whole model, nats/token. base -> unit -> format -> float64 [rows]; the base's own damage beside it."""

    by_row: dict[str, dict[str, dict[str, np.ndarray]]]
    base_by_row: dict[str, np.ndarray]
    pairs: PairScreen | None = None  # of one unit alone there are none

    @property
    def damage(self) -> dict[str, dict[str, dict[str, float]]]:
        """Means over rows: base -> unit -> format -> damage."""
        return {
            base: {unit: {name: float(rows.mean()) for name, rows in own.items()} for unit, own in units.items()}
            for base, units in self.by_row.items()
        }

    @property
    def base(self) -> dict[str, float]:
        """Mean over rows of the bases themselves."""
        return {base: float(rows.mean()) for base, rows in self.base_by_row.items()}


def uniform(modules: list[Module], name: str) -> dict[str, str]:
    """Every module at one format."""
    return {module.name: name for module in modules}


def screen_uniform(
    meter: DamageMeter, modules: list[Module], formats: tuple[str, ...], rows: Tensor, reporter: Reporter
) -> dict[str, np.ndarray]:
    """Format -> damage of every module at it, float64 [rows]."""
    with reporter.stage("uniform widths") as progress:
        return meter.plans({name: uniform(modules, name) for name in formats}, rows, progress)


def screen_layers(
    meter: DamageMeter, modules: list[Module], low: str, high: str, rows: Tensor, reporter: Reporter
) -> LayerScreen:
    """Every layer lowered alone, and raised alone."""
    found = {}
    for name, base, other in (("lowered", high, low), ("raised", low, high)):
        layers = sorted({module.layer for module in modules})
        swaps = {str(i): Swap(i, {m.name: other for m in modules if m.layer == i}) for i in layers}
        with reporter.stage(f"layers {name} (base uniform:{base})") as progress:
            damage = meter.swaps(uniform(modules, base), swaps, rows, progress)
        found[name] = np.stack([damage[str(i)] for i in layers])
    return LayerScreen(**found)


def screen_units(
    meter: DamageMeter,
    modules: list[Module],
    formats: tuple[str, ...],
    rows: Tensor,
    reporter: Reporter,
    seed: int = 0,
) -> UnitScreen:
    """Every unit in every other format, around uniform high and around uniform low. `formats`: narrowest first.

    Measured as swaps with interactions: a search that asks for the same swaps (`planning.refine`) finds them in the journal.
    """
    units = units_of(modules)
    damage: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    bases: dict[str, np.ndarray] = {}
    pairs = None
    for base in (formats[-1], formats[0]):
        whole = uniform(modules, base)
        level = meter.plans({base: whole}, rows)[base]
        changes = [(unit, name) for unit in units for name in formats if name != base]
        swaps = [Swap(unit.layer, {module.name: name for module in unit.modules}) for unit, name in changes]
        with reporter.stage(f"units, one at a time (base uniform:{base})") as progress:
            found = swap_interactions(meter, whole, swaps, rows, seed, progress)
        added = found.by_row
        assert added is not None
        if base == formats[-1] and len(units) > 1:
            lowered = [place for place, (_, name) in enumerate(changes) if name == formats[0]]
            extra = 2 * found.together[np.ix_(lowered, lowered)]
            pairs = _pairs(meter, whole, [swaps[place] for place in lowered], extra, rows, seed)
        bases[f"uniform:{base}"] = level
        own = damage[f"uniform:{base}"] = {unit.name: {} for unit in units}
        for (unit, name), more in zip(changes, added.T, strict=True):
            own[unit.name][name] = level + more
    return UnitScreen(damage, bases, pairs)


def _pairs(meter: DamageMeter, base: dict[str, str], swaps: list[Swap], extra: np.ndarray, rows: Tensor, seed: int) -> PairScreen:
    """The matrix without its diagonal, and its strongest pairs row by row."""
    np.fill_diagonal(extra, 0.0)
    upper = [(int(u), int(v)) for u, v in zip(*np.triu_indices(len(swaps), 1), strict=True)]
    strongest = sorted(upper, key=lambda pair: -extra[pair])[:STRONGEST]
    return PairScreen(extra, strongest, pair_rows(meter, base, swaps, strongest, rows, seed))
