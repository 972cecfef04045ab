"""Screens of true damage: every uniform width; every layer, unit and kind of module both ways; sampled orders; a task's own text.

"Both ways": lowered around `uniform:high` (the first step down) and raised around `uniform:low` (the last step that is missing).
One 2-bit module in a good model behaves unlike the same module in a bad one, so either direction alone misleads; their mean is the
exact Shapley value of a quadratic damage model (see `findings`).
Left out: kinds within a layer (the screen of units has those), orders of units (a hundred of them would take a hundred models an
order), single modules and units on a task's text (the rows are too few), and damage on its answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.measure.interactions import pair_rows, swap_interactions
from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.records.sizes import Unit, inner, uniform, units_of

STRONGEST = 12  # pairs of units that are given by name
KIND_ROWS = 32  # of the test rows, at most: whole models cannot resume at a layer, and kinds differ more than layers do
ORDER_ROWS = 8  # of the test rows: the quadratic shares are taken on the same ones, so more would sharpen little
SHORT_ORDER_ROWS = 4  # in a short survey: under ten seconds on the demo's 16 layers, a quarter of the whole check
MOST_PAIRS, FEWEST_PAIRS = 6, 3
MOST_MODELS = 192  # beyond which fewer pairs are drawn: on 8 rows about the cost of the screen of 16 layers on 64
TASK_ROWS = 16
ROW_LENGTH = 64  # tokens of a row of a task's text, at most: a few questions
GENERAL_ROWS = 32  # one comparison serves all tasks, so it is the surer side


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
        """Return means over rows: base -> unit -> format -> damage."""
        return {
            base: {unit: {name: float(rows.mean()) for name, rows in formats.items()} for unit, formats in units.items()}
            for base, units in self.by_row.items()
        }

    @property
    def base(self) -> dict[str, float]:
        """Return the mean over rows of the bases themselves."""
        return {base: float(rows.mean()) for base, rows in self.base_by_row.items()}


def screen_uniform(
    meter: DamageMeter, modules: Sequence[Module], formats: tuple[str, ...], rows: Tensor, reporter: Reporter
) -> dict[str, np.ndarray]:
    """Measure every uniform width: format -> damage of every module at it, float64 [rows]."""
    with reporter.stage("uniform widths") as progress:
        return meter.plans({name: uniform(modules, name) for name in formats}, rows, progress)


def screen_layers(
    meter: DamageMeter, modules: Sequence[Module], low: str, high: str, rows: Tensor, reporter: Reporter
) -> LayerScreen:
    """Measure every layer lowered alone, and raised alone."""
    damages = {}
    for name, base, other in (("lowered", high, low), ("raised", low, high)):
        layers = sorted({module.layer for module in inner(modules)})
        swaps = {str(i): Swap(i, {m.name: m.at(other) for m in inner(modules) if m.layer == i}) for i in layers}
        with reporter.stage(f"layers {name} (base uniform:{base})") as progress:
            damage = meter.swaps(uniform(modules, base), swaps, rows, progress)
        damages[name] = np.stack([damage[str(i)] for i in layers])
    return LayerScreen(**damages)


def screen_units(
    meter: DamageMeter, modules: Sequence[Module], formats: tuple[str, ...], rows: Tensor, reporter: Reporter, seed: int = 0
) -> UnitScreen:
    """Measure every unit in every other format, around uniform high and around uniform low. `formats`: narrowest first.

    Measured as swaps with interactions: a search that asks for the same swaps (`plan.refine`) finds them in the journal.
    """
    units = units_of(modules)
    damage: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    bases: dict[str, np.ndarray] = {}
    pairs = None
    for base in (formats[-1], formats[0]):
        whole = uniform(modules, base)
        level = meter.plans({base: whole}, rows)[base]
        # of units in layers by the survey's names, also where a module holds the nearest in its place
        changes = [(unit, name) for unit in units for name in _others(unit, formats, base)]
        swaps = [Swap(u.layer, {m.name: name if u.part else m.at(name) for m in u.modules}) for u, name in changes]
        with reporter.stage(f"units, one at a time (base uniform:{base})") as progress:
            interactions = swap_interactions(meter, whole, swaps, rows, seed, progress)
        added = interactions.by_row
        assert added is not None
        if base == formats[-1] and len(units) > 1:
            lowered = [
                index
                for index, (unit, name) in enumerate(changes)
                if name == (unit.formats(formats) if unit.part else formats)[0]
            ]
            extra = 2 * interactions.together[np.ix_(lowered, lowered)]
            pairs = _strongest_pairs(meter, whole, [swaps[index] for index in lowered], extra, rows, seed)
        bases[f"uniform:{base}"] = level
        by_unit = damage[f"uniform:{base}"] = {unit.name: {} for unit in units}
        for (unit, name), more in zip(changes, added.T, strict=True):
            by_unit[unit.name][name] = level + more
    return UnitScreen(damage, bases, pairs)


def _others(unit: Unit, formats: Sequence[str], base: str) -> list[str]:
    """Return the names of a unit's formats but that of uniform `base`."""
    if unit.part:
        return [name for name in dict.fromkeys(unit.formats(formats)) if name != unit.modules[0].at(base)]
    return [name for name in formats if name != base]


def _strongest_pairs(
    meter: DamageMeter, base: dict[str, str], swaps: list[Swap], extra: np.ndarray, rows: Tensor, seed: int
) -> PairScreen:
    """Return the matrix `extra` without its diagonal, and its strongest pairs row by row."""
    np.fill_diagonal(extra, 0.0)
    upper = [(int(u), int(v)) for u, v in zip(*np.triu_indices(len(swaps), 1), strict=True)]
    strongest = sorted(upper, key=lambda pair: -extra[pair])[:STRONGEST]
    return PairScreen(extra, strongest, pair_rows(meter, base, swaps, strongest, rows, seed))


# --- kinds of modules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KindScreen:
    """float64 [kinds, rows], nats/token: the damage of the whole model on the first rows. Kinds in the order in which they come in a layer."""

    kinds: list[str]
    lowered: np.ndarray  # all modules of the kind low, the others high
    raised: np.ndarray  # all modules of the kind high, the others low


def screen_kinds(
    meter: DamageMeter, modules: Sequence[Module], low: str, high: str, rows: Tensor, reporter: Reporter
) -> KindScreen:
    """Measure every kind of module, all layers at once: lowered around uniform high, raised around uniform low.

    One model a kind and direction, on half of the default test rows, so it costs a third of a screen of 16 layers. Units do not matter
    here: the modules of one kind are moved by themselves, also where a runtime would have them share a format with others.
    """
    kinds = list(dict.fromkeys(module.kind for module in inner(modules)))

    def only(kind: str, there: str, elsewhere: str) -> dict[str, str]:
        return uniform(modules, elsewhere) | {m.name: m.at(there) for m in inner(modules) if m.kind == kind}

    with reporter.stage("kinds of modules") as progress:
        plans = {f"lowered {kind}": only(kind, low, high) for kind in kinds}
        plans |= {f"raised {kind}": only(kind, high, low) for kind in kinds}
        damage = meter.plans(plans, rows[:KIND_ROWS], progress)
    lowered, raised = (np.stack([damage[f"{way} {kind}"] for kind in kinds]) for way in ("lowered", "raised"))
    return KindScreen(kinds, lowered, raised)


# --- orders of the layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrderScreen:
    """`added[p, r, i]`: what layer i adds on row r, nats/token, mean over the order p and its reverse."""

    added: np.ndarray  # float64 [pairs, rows, layers]
    models: int  # that were measured


def pairs_for(layers: int, short: bool = False) -> int:
    """Return the number of pairs of orders that are drawn; 0 where there is nothing to order."""
    if layers < 2:
        return 0
    return FEWEST_PAIRS if short else max(FEWEST_PAIRS, min(MOST_PAIRS, MOST_MODELS // (2 * (layers - 1))))


def screen_orders(
    meter: DamageMeter,
    modules: Sequence[Module],
    low: str,
    high: str,
    rows: Tensor,
    seed: int,
    reporter: Reporter,
    short: bool = False,
) -> OrderScreen | None:
    """Measure damage along random orders of the layers: sampled Shapley values, which the quadratic shares are checked against.

    In an order, layers go from the high format to the low one, one after the other; what each adds when its turn comes is one sample of
    its Shapley value, whatever the interactions. Orders come in pairs, each with its reverse (antithetic): in a quadratic game one pair
    is exact, so what differs between pairs is interaction of three and more layers. A set of layers that two orders share is measured once.
    Source: permutation sampling with antithetic pairs: Mitchell et al., JMLR 2022.

    rows: [rows, tokens], of which the first are used. None of a model with one layer. `short`: few orders on few rows.
    """
    layers = sorted({module.layer for module in inner(modules)})
    pairs = pairs_for(len(layers), short)
    if not pairs or not len(rows):
        return None
    rng = np.random.default_rng(seed)
    drawn = [[int(layer) for layer in rng.permutation(layers)] for _ in range(pairs)]
    orders = [order for first in drawn for order in (first, first[::-1])]
    sets = {set_name(order[:count]): frozenset(order[:count]) for order in orders for count in range(len(order) + 1)}
    plans = {
        name: uniform(modules, high) | {m.name: m.at(low) for m in inner(modules) if m.layer in chosen}
        for name, chosen in sets.items()
    }
    with reporter.stage(f"{len(orders)} orders of the layers") as progress:
        damage = meter.plans(plans, rows[: SHORT_ORDER_ROWS if short else ORDER_ROWS], progress)
    added = np.empty((len(orders), len(damage[""]), len(layers)))
    for index, order in enumerate(orders):
        for position, layer in enumerate(order):
            before, after = set_name(order[:position]), set_name(order[: position + 1])
            added[index, :, layers.index(layer)] = damage[after] - damage[before]
    return OrderScreen((added[::2] + added[1::2]) / 2, len(plans))


def set_name(layers: Sequence[int]) -> str:
    """Return one name for a set of layers."""
    return ",".join(map(str, sorted(layers)))


# --- a task's own text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextScreen:
    """`widths`: format -> damage of every module at it, float64 [rows]."""

    widths: dict[str, np.ndarray]
    layers: LayerScreen


def screen_text(
    meter: DamageMeter, modules: Sequence[Module], formats: tuple[str, ...], rows: Tensor, name: str, reporter: Reporter
) -> TextScreen:
    """Measure every uniform width and every layer both ways on one text's rows, int64 [rows, length]. `formats`: narrowest first.

    General text may miss what a task needs, so a task's own text is read: the questions of its items with their right answers, as the
    model reads them when it is asked. These rows describe; they do not choose a plan, since they may hold items that are scored.
    """
    reporter.say(f"{name}, {len(rows)} rows of {rows.shape[1]} tokens")
    widths = screen_uniform(meter, modules, formats, rows, reporter)
    return TextScreen(widths, screen_layers(meter, modules, formats[0], formats[-1], rows, reporter))


def general_rows(test: Tensor, length: int, count: int = GENERAL_ROWS) -> tuple[Tensor, list[int]]:
    """Return the general text to compare tasks' text with: the first `length` tokens of test rows spread over all, and their indices.

    What is early in a row hurts otherwise than what is late, so lengths are the same. All rows where they are no longer than `length`:
    these were measured already.
    """
    if test.shape[1] <= length:
        return test, list(range(len(test)))
    indices = [int(index) for index in np.unique(np.linspace(0, len(test) - 1, min(count, len(test))).round())]
    return test[indices, :length], indices
