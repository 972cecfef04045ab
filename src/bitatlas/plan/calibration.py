"""Does the prediction hold? Random plans around the final plan, predicted from the fit rows and measured on the select rows.

*The plans.* `PLANS` plans around a base: the i-th changes k units, k running evenly from 1 to a third of all units, which ones and to
which other format by chance. No budget and no prediction has a say in the draw, no plan comes twice. So the damages spread both ways,
from one swap to about as far as one step of the refinement goes.

*The prediction.* With every single change measured on the fit rows around the base, and the curvature between each two of them,

    damage(plan) = damage(base) + sum of the changes' own damages + share x sum over pairs of changes of their curvature,

the share, 0..1, being the one that explains `TRAINING` other random plans best, measured on the fit rows too. The curvature is that of the
base model's own predictions (Gauss-Newton); at a base that is far from the reference, and for steps this long, it overstates how changes add
to each other, because damage saturates. Neither the select rows nor the plans that judge it are seen by the prediction.

*Beside it*, on the same plans: their damage measured on the fit rows, which no prediction from those rows can be expected to beat (where it ranks
badly too, the rows are too few, not the prediction too poor), and scores measured around the two uniform widths and added up (`plan.search`).

Intervals are by bootstrap over the plans, all statistics from the same draws; a point's own interval is over rows.
Left out: terms of three changes, and the noise of the rows in the intervals (all plans share the rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bitatlas.plan.knapsack import Floats, Ints
from bitatlas.plan.refine import Change, MeasuredChanges, Probe
from bitatlas.plan.search import Scores
from bitatlas.records import Calibration, CalibrationPoint, Correlation, Measured
from bitatlas.stats.bootstrap import RESAMPLES, Blocks, interval_ends, measured, rank_correlation

MeasureRows = Callable[[Mapping[str, Ints], str], Mapping[str, np.ndarray]]  # (plans by name, split) -> damage [rows], nats/token

PLANS = 50
TRAINING = 16  # further plans, for the one number that is fitted
FARTHEST = 3  # at most one of so many units is changed
REDRAWS = 100  # of a plan that was drawn before
LEAST = 1e-9  # nats/token, that an error is compared with
FEWEST = 10  # plans that a rank correlation is worth something of
PREDICTION = "prediction"
ADDED = "scores added up"
MEASURED = "same plans measured on fit rows"


def draw_plans(base: Ints, formats: int, count: int = PLANS, seed: int = 0) -> list[Ints]:
    """Return different random plans around `base` [units], as defined above; fewer than `count` where there are not so many."""
    units = len(base)
    farthest = max(1, units // FARTHEST)
    generator = np.random.default_rng(seed)
    seen, plans = {base.tobytes()}, []
    for number in range(count):
        changed = 1 + number * farthest // count
        for _ in range(REDRAWS):
            plan = base.copy()
            index = generator.choice(units, changed, replace=False)
            plan[index] = (base[index] + generator.integers(1, formats, changed)) % formats
            if plan.tobytes() not in seen:
                seen.add(plan.tobytes())
                plans.append(plan)
                break
    return plans


@dataclass(frozen=True)
class Predictor:
    """The prediction around `base`. added: [units x formats], together: the same squared, without diagonal; 0 for the base's own formats."""

    base: Ints
    level: float  # damage of the base, nats/token
    added: Floats
    together: Floats
    share: float = 0.0  # of the curvature between changes

    def parts(self, plan: Ints) -> tuple[float, float]:
        """Return (damage of the base and of the single changes, curvature between them), nats/token."""
        index = np.arange(len(plan)) * (len(self.added) // len(plan)) + plan
        return self.level + float(self.added[index].sum()), float(self.together[np.ix_(index, index)].sum())

    def predict(self, plan: Ints) -> float:
        alone, between = self.parts(plan)
        return max(0.0, alone + self.share * between)  # a divergence is never negative


def predictor(base: Ints, formats: int, level: float, changes: list[Change], measured_changes: MeasuredChanges) -> Predictor:
    """Return the prediction from all single changes, measured; with no share of the curvature between them."""
    index = np.array([unit * formats + fmt for unit, fmt in changes])
    added, together = np.zeros(len(base) * formats), np.zeros((len(base) * formats,) * 2)
    added[index] = measured_changes.added
    together[np.ix_(index, index)] = measured_changes.together - np.diag(np.diag(measured_changes.together))
    return Predictor(base, level, added, together)


def curvature_share(model: Predictor, plans: list[Ints], damage: Floats) -> float:
    """Return the share of the curvature between changes with the least squared error over `plans`, 0..1. damage: [plans], nats/token"""
    alone, between = np.array([model.parts(plan) for plan in plans]).T
    size = float(between @ between)
    return float(np.clip(between @ (damage - alone) / size, 0.0, 1.0)) if size > 0 else 0.0


def calibrate(
    base: Ints,
    formats: int,
    probe: Probe,
    scores: Scores,
    measure: MeasureRows,
    seed: int = 0,
    blocks: Blocks = None,
    count: int = PLANS,
) -> Calibration | None:
    """Predict and measure `count` random plans around `base` [units]; None where there are fewer than `FEWEST` different ones.

    `scores` are the added-up ones to compare with. `measure` knows the splits "fit" and "select"; blocks: of the select rows.
    """
    drawn = draw_plans(base, formats, count + TRAINING, seed)
    training, plans = _split(drawn, seed, count)
    if len(plans) < FEWEST:
        return None
    changes = [(u, f) for u in range(len(base)) for f in range(formats) if f != base[u]]
    on_fit = measure({"": base, **_named(training)}, "fit")
    model = predictor(base, formats, float(on_fit[""].mean()), changes, probe.swaps(base, changes, "fit"))
    if training:
        damage = np.array([on_fit[str(i)].mean() for i in range(len(training))])
        model = replace(model, share=curvature_share(model, training, damage))
    table = scores.tables["mean of both"]
    predicted = {
        PREDICTION: np.array([model.predict(plan) for plan in plans]),
        ADDED: np.array([scores.at_high + float(table[np.arange(len(plan)), plan].sum()) for plan in plans]),
    }
    again = measure(_named(plans), "fit")
    predicted[MEASURED] = np.array([again[str(i)].mean() for i in range(len(plans))])
    on_select = measure({"": base, **_named(plans)}, "select")
    points = [
        _point(int((plan != base).sum()), value, on_select[name], seed, blocks)
        for (name, plan), value in zip(_named(plans).items(), predicted[PREDICTION], strict=True)
    ]
    centre = _point(0, model.level, on_select[""], seed, blocks)
    return calibration(predicted, points, centre, model.share, len(training), seed)


def _point(changed: int, predicted: float, rows: Floats, seed: int, blocks: Blocks) -> CalibrationPoint:
    return CalibrationPoint(changed, float(predicted), measured(rows, "nats/token", "plan", "select", seed, blocks))


def _split(drawn: list[Ints], seed: int, count: int) -> tuple[list[Ints], list[Ints]]:
    """Split plans by chance into those that the share of the curvature is fitted on and those that judge; of few plans the same parts."""
    order = np.random.default_rng([seed, 1]).permutation(len(drawn))
    cut = len(drawn) * TRAINING // (count + TRAINING)
    return [drawn[i] for i in order[:cut]], [drawn[i] for i in sorted(order[cut:])]


def _named(plans: list[Ints]) -> dict[str, Ints]:
    return {str(i): plan for i, plan in enumerate(plans)}


def calibration(
    predicted: Mapping[str, Floats],
    points: list[CalibrationPoint],
    centre: CalibrationPoint,
    share: float,
    training: int,
    seed: int,
) -> Calibration:
    """Return the record. predicted: name -> [plans], nats/token, `PREDICTION` and `MEASURED` among them; points: of the same plans."""
    true = np.array([point.measured.mean for point in points])
    n = len(true)
    draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))  # [resamples, plans], drawn with replacement
    values = predicted[PREDICTION]
    slope, intercept = line(values, true)
    slopes, intercepts = line(values[draws], true[draws])
    errors = np.abs(values - true) / np.maximum(np.abs(true), LEAST)

    def number(value: float, resampled: Floats, unit: str) -> Measured:
        return Measured(float(value), interval_ends(resampled, n), unit, "plan", "plans around it", n)

    def correlation(name: str) -> Correlation:
        resampled = rank_correlation(predicted[name][draws], true[draws])
        return Correlation(name, float(rank_correlation(predicted[name], true)), interval_ends(resampled, n), n)

    return Calibration(
        prediction=correlation(PREDICTION),
        others=[correlation(name) for name in predicted if name not in (PREDICTION, MEASURED)],
        on_fit=correlation(MEASURED),
        slope=number(float(slope), slopes, "ratio"),
        intercept=number(float(intercept), intercepts, "nats/token"),
        relative_error=number(float(errors.mean()), errors[draws].mean(axis=1), "share"),
        kept=share,
        training=training,
        centre=centre,
        points=points,
    )


def line(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return least-squares slope and intercept of y on x along the last axis: [..., plans] -> two of [...]; slope 0 where x is constant."""
    centre_x, centre_y = x.mean(axis=-1), y.mean(axis=-1)
    deviations = x - centre_x[..., None]
    size = (deviations**2).sum(axis=-1)
    slope = np.divide((deviations * y).sum(axis=-1), size, out=np.zeros_like(size), where=size > 0)
    return slope, centre_y - slope * centre_x
