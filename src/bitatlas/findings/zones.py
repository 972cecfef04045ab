"""Zones: runs of neighbouring layers that are about equally critical, found and not assumed.

For every number of zones the best cuts come from an exact dynamic programme: least squares of criticality around the zones'
means, layers weighted by their share of the weights (so a zone's mean is its pooled criticality). How many zones there are is decided by
cross-validation over rows: cuts and means from some rows predict the layers' criticality on the others. The fewest zones whose
loss is within one standard error (over rows, paired) of the best win, so "one zone" is an answer: no zones to speak of.

A zone's word follows its layers: *critical* where its interval lies above 1, some layer is critical and none is safe or light; below 1, *safe*
where all its layers are among those that are safe together (see `joint_damage`), and *light* where all are safe or light; else *uncertain*.

Rows that come in blocks are left out, and resampled, in blocks. The intervals of the zones come from the rows that chose the cuts; they are a little too favourable for that. Each border has an interval
of its own: rows are resampled and cut again into as many zones.
Left out: zones of modules rather than layers; smooth trends (a trend shows as steps).
Sources: Fisher 1958 (exact segmentation); Breiman et al. 1984 (one-standard-error rule).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bitatlas.findings.shares import CRITICAL, FAILS, HOLDS, LIGHT, OPEN, SAFE, UNCERTAIN, Floats, LayerRows, Shares, shares_of
from bitatlas.records import Finding, JointDamage, Layer, Measured, Module, Zone
from bitatlas.records.text import interval, named_layers, number
from bitatlas.stats.bootstrap import Blocks, effective_sample_size, measured, percentile_interval, resample_means, standard_errors

Cuts = list[tuple[int, int]]  # (first layer, last layer) of every zone

MOST_ZONES = 5  # more than a reader keeps apart
FOLDS = 10
BORDER_RESAMPLES = 300  # of the rows, each cut again: positions are whole numbers, so finer quantiles would show nothing
NAMES = {1: ["whole model"], 2: ["early", "late"], 3: ["early", "middle", "late"]}


def segmentations(values: Floats, weights: Floats, most: int) -> list[tuple[Cuts, float]]:
    """Return the best cuts into 1, 2, ... `most` zones, each with its weighted squared error. values, weights: [layers].

    Of equally good cuts the ones with the earlier last zone.
    """
    layers = len(values)
    cost = _zone_errors(np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64))
    best = np.full((most + 1, layers + 1), np.inf)  # [zones, layers covered]
    start = np.zeros((most + 1, layers + 1), dtype=np.int64)  # first layer of the last of those zones
    best[0, 0] = 0.0
    for zones in range(1, most + 1):
        for end in range(zones, layers + 1):
            totals = best[zones - 1, :end] + cost[:end, end - 1]
            start[zones, end] = totals.argmin()
            best[zones, end] = totals[start[zones, end]]
    results = []
    for zones in range(1, min(most, layers) + 1):
        cuts: Cuts = []
        end = layers
        for remaining in range(zones, 0, -1):
            first = int(start[remaining, end])
            cuts.append((first, end - 1))
            end = first
        results.append((cuts[::-1], float(best[zones, layers])))
    return results


def _zone_errors(values: Floats, weights: Floats) -> Floats:
    """Return [layers, layers]: weighted squared error of the zone first..last around its own mean; 0 below the diagonal."""
    layers = len(values)
    errors = np.zeros((layers, layers))
    for first in range(layers):
        mean = total = error = 0.0
        for last in range(first, layers):  # running mean and error (West 1979): no difference of large sums
            total += weights[last]
            step = values[last] - mean
            mean += step * weights[last] / total
            error += weights[last] * step * (values[last] - mean)
            errors[first, last] = error
    return errors


def _zone_means(values: Floats, weights: Floats, cuts: Cuts) -> Floats:
    """Return every layer's zone mean, [layers]."""
    parts = [np.full(b - a + 1, np.average(values[a : b + 1], weights=weights[a : b + 1])) for a, b in cuts]
    return np.concatenate(parts)


def number_of_zones(by_row: Floats, weights: Floats, most: int, seed: int = 0, blocks: Blocks = None) -> int:
    """Return how many zones predict rows that did not choose them. by_row: [rows, layers], criticality up to a common factor a row."""
    rows = len(by_row)
    most = min(most, by_row.shape[1])
    numbers = np.unique(range(rows) if blocks is None else blocks, return_inverse=True)[1]  # [rows], block of each
    count = int(numbers.max()) + 1
    if count < 2 or most < 2:
        return 1
    losses = np.empty((most, rows))
    for fold in np.array_split(np.random.default_rng(seed).permutation(count), min(FOLDS, count)):
        held_out = np.flatnonzero(np.isin(numbers, fold))
        mean = np.delete(by_row, held_out, axis=0).mean(axis=0)  # [layers]
        for zones, (cuts, _) in enumerate(segmentations(mean, weights, most)):
            errors = (by_row[held_out] - _zone_means(mean, weights, cuts)) ** 2  # [held out rows, layers]
            losses[zones, held_out] = errors @ weights
    excess = losses - losses[losses.mean(axis=1).argmin()]  # [zones, rows]; what all rows share cancels
    within_tolerance = excess.mean(axis=1) <= standard_errors(excess.T, blocks)
    return int(np.flatnonzero(within_tolerance)[0]) + 1


def border_intervals(
    by_row: Floats, weights: Floats, count: int, seed: int = 0, blocks: Blocks = None
) -> list[tuple[int, int] | None]:
    """Return for each of `count` zones the 95 % interval of its first layer; None for the first zone, and of a single row. by_row: [rows, layers]"""
    n = effective_sample_size(len(by_row), blocks)
    if count < 2 or n < 2:
        return [None] * count
    cuts = segmentations(by_row.mean(axis=0), weights, count)[-1][0]
    resampled = [segmentations(mean, weights, count)[-1][0] for mean in resample_means(by_row, BORDER_RESAMPLES, seed, blocks)]
    starts = np.array([[first for first, _ in redrawn] for redrawn in resampled], dtype=np.float64)  # [resamples, zones]
    low, high = percentile_interval(starts, n)
    ends = [(min(first, int(np.floor(a))), max(first, int(np.ceil(b)))) for (first, _), a, b in zip(cuts, low, high, strict=True)]
    return [None, *ends[1:]]


def zones(
    rows: LayerRows, layers: Sequence[Layer], together: Collection[int] = (), shares: Shares | None = None, seed: int = 0
) -> list[Zone]:
    """Return the zones of a model, `low_share` not yet filled. `layers`: with their verdicts; `together`: those that are safe together.

    A single zone has criticality 1 by definition: uncertain.
    """
    shares = shares or shares_of(rows, seed)
    count = 1
    if shares.defined:
        weights = rows.weights / rows.weights.sum()
        by_row = shares.by_row / shares.whole / weights
        count = number_of_zones(by_row, weights, min(MOST_ZONES, max(1, rows.layers // 2)), seed, rows.blocks)
        cuts = segmentations(by_row.mean(axis=0), weights, count)[-1][0]
        borders = border_intervals(by_row, weights, count, seed, rows.blocks)
    else:
        cuts, borders = [(0, rows.layers - 1)], [None]
    names = NAMES.get(count) or [f"zone {number}" for number in range(1, count + 1)]
    results = []
    for name, (first, last), border in zip(names, cuts, borders, strict=True):
        members = list(range(first, last + 1))
        criticality = shares.record(*shares.criticality(members), "ratio")
        jointly = len(members) == 1 or set(members) <= set(together)  # one layer alone is lowered together with nothing
        verdict = _word(criticality, [layers[layer].verdict for layer in members], jointly)
        results.append(Zone(first, last, name, criticality, verdict if count > 1 else UNCERTAIN, border95=border))
    return results


def _word(criticality: Measured, verdicts: Collection[str], together: bool) -> str:
    """Return a zone's verdict from its criticality and those of its layers; `together`: lowering all of it is within the tolerance."""
    low, high = criticality.ci95 or (-np.inf, np.inf)
    if low > 1 and CRITICAL in verdicts and not {SAFE, LIGHT} & set(verdicts):
        return CRITICAL
    if high < 1 and set(verdicts) <= {SAFE, LIGHT}:
        return SAFE if together and LIGHT not in verdicts else LIGHT
    return UNCERTAIN


def with_low_share(zones: Sequence[Zone], modules: Sequence[Module], assignment: Mapping[str, str], low: str) -> list[Zone]:
    """Return the zones with the share of their weights that a plan puts at the format `low`."""
    filled = []
    for zone in zones:
        inside = [module for module in modules if zone.first <= module.layer <= zone.last]
        lowest = sum(module.weights for module in inside if assignment.get(module.name) == low)
        whole = sum(module.weights for module in inside)
        filled.append(replace(zone, low_share=lowest / whole if whole else None))
    return filled


# --- safe together ---------------------------------------------------------------------------------------------------------
#
# Which layers that are safe alone are safe together, measured: lowered at once, on rows that did not call them safe.
#
# A layer's word comes from the test rows, with the layer lowered alone. Layers that hurt little alone may hurt much together, so the safe ones,
# the least harmful first, are lowered together, all at once and then as many of them as the tolerance allows, found by bisection, on the
# select rows. What n layers together stay within, fewer of them do as well (up to noise), so looking at several groups on the same rows
# makes a wrong group hardly more likely than looking at one.
# Left out: groups that are not the least harmful layers; they may be larger.

JOINT_CLAIM = "the safe layers are safe together"

MeasureLowered = Callable[[Sequence[int]], np.ndarray]  # layers that are low -> damage added to uniform high, [rows]


def joint_damage(
    layers: Sequence[Layer], measure: MeasureLowered, tolerance: float, base: str, blocks: Blocks = None, seed: int = 0
) -> JointDamage | None:
    """Measure the safe layers together; None where fewer than two are safe. `tolerance`: nats/token; blocks: of the rows measured on."""
    safe = [layer for layer in layers if layer.verdict == SAFE]
    order = [layer.layer for layer in sorted(safe, key=lambda layer: (layer.lowered.mean, layer.layer))]
    if len(order) < 2:
        return None

    def added(count: int) -> Measured:
        return measured(measure(order[:count]), "nats/token", base, "select", seed, blocks)

    measured_by_count = {len(order): added(len(order))}
    fits, fails = 0, len(order) + 1
    while fails - fits > 1:
        count = len(order) if fails > len(order) else (fits + fails) // 2
        if count not in measured_by_count:
            measured_by_count[count] = added(count)
        if within_tolerance(measured_by_count[count], tolerance):
            fits = count
        else:
            fails = count
    return JointDamage(sorted(order), measured_by_count[len(order)], sorted(order[:fits]), measured_by_count.get(fits))


def within_tolerance(added: Measured, tolerance: float) -> bool:
    """Return whether the whole interval is within the tolerance."""
    return added.ci95 is not None and added.ci95[1] <= tolerance


def joint_findings(joint: JointDamage | None, tolerance: float) -> list[Finding]:
    """Return one statement; none where fewer than two layers are safe."""
    if joint is None:
        return []
    low = joint.added.ci95[0] if joint.added.ci95 else -np.inf
    verdict = HOLDS if within_tolerance(joint.added, tolerance) else FAILS if low > tolerance else OPEN
    text = (
        f"{named_layers(joint.layers).capitalize()}, each safe alone, add {interval(joint.added, unit=True)} lowered together (on select rows); "
        f"the tolerance is {number(tolerance)}."
    )
    if verdict != HOLDS:
        if len(joint.together) > 1:
            text += f" Safe together: {named_layers(joint.together)}, adding {interval(joint.added_together)}."
        else:
            text += " No two of them, from the least harmful up, are shown to be safe together."
    return [Finding("layers", JOINT_CLAIM, verdict, text, joint.added)]
