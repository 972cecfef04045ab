"""Prediction against truth on planted games: exact where the game is quadratic, honest where it is not; and what the report says of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import linregress, spearmanr

from atlas_factory import Recipe, make_atlas
from bitatlas.findings.reliability import as_measured, calibration_findings, calibration_verdict, line_text
from bitatlas.measure.interactions import Interactions
from bitatlas.plan.calibration import (
    FARTHEST,
    PLANS,
    PREDICTION,
    TRAINING,
    Predictor,
    calibrate,
    curvature_share,
    draw_plans,
    line,
)
from bitatlas.plan.refine import Change, Probe
from bitatlas.plan.search import Scores
from bitatlas.records import Atlas, Calibration, Correlation
from bitatlas.records.files import read_record, to_json
from bitatlas.records.text import interval, number
from bitatlas.report.html import html
from bitatlas.report.markdown import markdown
from bitatlas.stats.bootstrap import rank_correlation
from report_cases import RECIPES, emptied

ROWS = 12


class Game:
    """damage = level + first . z + z' Q z around `base`, saturating if asked; select rows are fit rows with noise on every row and plan."""

    def __init__(self, units: int = 18, formats: int = 3, saturation: float = 0.0, noise: float = 0.0, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.units, self.formats = units, formats
        self.base = generator.integers(formats, size=units)
        self.own = np.arange(units) * formats + self.base
        self.first = 0.02 * generator.standard_normal(units * formats)
        self.vectors = 0.15 * generator.standard_normal((5, units * formats)) + 0.05
        self.first[self.own], self.vectors[:, self.own] = 0.0, 0.0
        self.saturation, self.noise = saturation, noise
        self.asked: list[tuple[str, int]] = []

    def of(self, plan: np.ndarray) -> float:
        at = np.arange(self.units) * self.formats + plan
        moved = self.vectors[:, at].sum(axis=1)
        value = float(self.first[at].sum() + moved @ moved / 2)
        return 1.0 + (np.tanh(self.saturation * value) / self.saturation if self.saturation else value)

    def swaps(self, base: np.ndarray, changes: Sequence[Change], split: str) -> Interactions:
        assert split == "fit", "the prediction must not see other rows"
        plans = np.repeat(base[None], len(changes), axis=0)
        for plan, (unit, fmt) in zip(plans, changes, strict=True):
            plan[unit] = fmt
        at = [unit * self.formats + fmt for unit, fmt in changes]
        together = self.vectors[:, at].T @ self.vectors[:, at] / 2
        return Interactions(np.array([self.of(plan) - self.of(base) for plan in plans]), together)

    def measure(self, plans: Mapping[str, np.ndarray], split: str) -> dict[str, np.ndarray]:
        self.asked.append((split, len(plans)))
        found = {}
        for name, plan in plans.items():
            seed = [int(f) for f in plan] if split == "select" else [0]
            error = np.random.default_rng(seed).standard_normal(ROWS) if split == "select" else np.zeros(ROWS)
            found[name] = self.of(plan) + self.noise * error
        return found

    def calibrated(self, seed: int = 0) -> Calibration:
        def damage(plans: Mapping[str, np.ndarray]) -> dict[str, float]:
            raise AssertionError("not asked for")

        scores = Scores({"mean of both": self.first.reshape(self.units, self.formats)}, 1.0)
        found = calibrate(self.base, self.formats, Probe(self.swaps, damage), scores, self.measure, seed)
        assert found is not None
        return found


# --- the draw ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "formats"), [(35, 2), (35, 5), (4, 3), (500, 6)])
def test_plans_are_different_and_change_from_one_unit_to_a_third(units: int, formats: int) -> None:
    base = np.random.default_rng(1).integers(formats, size=units)
    plans = draw_plans(base, formats, seed=3)
    changed = [int((plan != base).sum()) for plan in plans]
    farthest = max(1, units // FARTHEST)
    assert len({plan.tobytes() for plan in plans}) == len(plans)
    assert all(1 <= k <= farthest for k in changed)
    assert all(((plan >= 0) & (plan < formats)).all() for plan in plans)
    if units >= 35:
        assert len(plans) == PLANS
        assert changed == sorted(changed)
        assert (changed[0], changed[-1]) == (1, (PLANS - 1) * farthest // PLANS + 1)
    else:
        assert len(plans) == units * (formats - 1), "all there are"


def test_the_draw_depends_on_the_seed_alone_and_favours_no_unit_and_no_format() -> None:
    base = np.zeros(30, dtype=np.int64)
    assert all(np.array_equal(a, b) for a, b in zip(draw_plans(base, 4, seed=1), draw_plans(base, 4, seed=1), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(draw_plans(base, 4, seed=1), draw_plans(base, 4, seed=2), strict=True))
    many = np.stack(draw_plans(base, 4, 4000))
    of_format = np.bincount(many[many > 0], minlength=4)[1:]
    of_unit = (many > 0).sum(axis=0)
    for counts in (of_format, of_unit):  # five standard errors of a count
        assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


# --- planted games ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [2, 3, 5])
def test_an_exact_quadratic_is_predicted_exactly(formats: int) -> None:
    found = Game(formats=formats).calibrated()
    assert found.kept == pytest.approx(1.0, abs=1e-9)
    assert found.prediction.rho == pytest.approx(1.0, abs=1e-12)
    assert found.slope.mean == pytest.approx(1.0, abs=1e-9)
    assert found.intercept.mean == pytest.approx(0.0, abs=1e-9)
    assert found.relative_error.mean < 1e-9
    assert found.on_fit.rho == pytest.approx(1.0, abs=1e-12)
    assert calibration_verdict(found) == "holds"
    assert found.centre.predicted == found.centre.measured.mean == 1.0


def test_noise_of_the_rows_lowers_the_agreement_as_it_should() -> None:
    game = Game(noise=1.0)
    found = game.calibrated()
    x = np.array([point.predicted for point in found.points])
    y = np.array([point.measured.mean for point in found.points])
    fitted = linregress(x, y)
    assert found.prediction.rho == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert (found.slope.mean, found.intercept.mean) == pytest.approx((fitted.slope, fitted.intercept), abs=1e-12)
    assert found.relative_error.mean == pytest.approx(np.mean(np.abs(x - y) / y), abs=1e-12)
    assert 0.3 < found.prediction.rho < 0.99
    for m in (as_measured(found.prediction), found.slope, found.intercept, found.relative_error):
        assert m.ci95 is not None
        assert m.ci95[0] < m.mean < m.ci95[1]
    assert abs(found.on_fit.rho - found.prediction.rho) < 1e-9, "the game is exact, so noise is all that is missing"
    half = 1.96 * fitted.stderr  # the bootstrap's interval of the slope is about the normal one
    assert found.slope.ci95 == pytest.approx((fitted.slope - half, fitted.slope + half), abs=0.5 * half)


def test_saturation_keeps_less_of_the_curvature_and_still_ranks() -> None:
    found = Game(saturation=0.7, units=30).calibrated()
    assert 0 < found.kept < 0.9
    assert found.prediction.rho > 0.95


def test_the_prediction_sees_no_select_row_and_not_the_plans_that_judge_it() -> None:
    game = Game(noise=0.5)
    found = game.calibrated()
    assert game.asked == [("fit", TRAINING + 1), ("fit", PLANS), ("select", PLANS + 1)]
    assert (len(found.points), found.training, found.prediction.n) == (PLANS, TRAINING, PLANS)
    quiet = Game(noise=0.0).calibrated()
    assert [point.predicted for point in found.points] == [point.predicted for point in quiet.points]
    assert found.kept == quiet.kept


def test_equal_input_gives_equal_records_and_the_seed_matters() -> None:
    assert Game(noise=0.1).calibrated(4) == Game(noise=0.1).calibrated(4)
    assert Game(noise=0.1).calibrated(4) != Game(noise=0.1).calibrated(5)


def test_too_few_different_plans_are_not_judged() -> None:
    game = Game(units=4, formats=2)
    none = Scores({"mean of both": np.zeros((4, 2))}, 0.0)
    assert calibrate(game.base, 2, Probe(game.swaps, lambda plans: {}), none, game.measure) is None
    some = Game(units=5, formats=5).calibrated()
    assert 10 <= len(some.points) < PLANS
    assert len(some.points) + some.training == 5 * 4


def test_the_share_that_is_kept_is_least_squares_between_0_and_1() -> None:
    rng = np.random.default_rng(0)
    together = rng.standard_normal((12, 12))
    model = Predictor(np.zeros(6, dtype=np.int64), 0.5, rng.standard_normal(12), together + together.T)
    plans = [rng.integers(2, size=6) for _ in range(20)]
    alone, between = np.array([model.parts(plan) for plan in plans]).T
    noisy = alone + 0.4 * between + 0.1 * rng.standard_normal(20)
    expected = np.linalg.lstsq(between[:, None], noisy - alone, rcond=None)[0][0]
    assert curvature_share(model, plans, noisy) == pytest.approx(expected, rel=1e-9)
    assert curvature_share(model, plans, alone - between) == 0.0
    assert curvature_share(model, plans, alone + 3 * between) == 1.0
    assert curvature_share(dataclasses.replace(model, together=np.zeros((12, 12))), plans, noisy) == 0.0


def test_row_wise_statistics_are_scipys() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(8, size=(2, 5, 30)).astype(float)
    for i, (rho, slope, intercept) in enumerate(zip(rank_correlation(x, y), *line(x, y), strict=True)):
        fitted = linregress(x[i], y[i])
        assert (rho, slope, intercept) == pytest.approx(
            (spearmanr(x[i], y[i]).statistic, fitted.slope, fitted.intercept), abs=1e-12
        )
    flat = np.ones((1, 30))
    assert rank_correlation(flat, y[:1])[0] == line(flat, y[:1])[0][0] == 0.0


# --- words, records, report ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "ci95", "word", "why"),
    [
        (0.97, (0.94, 0.985), "holds", ""),
        (0.97, (0.85, 0.985), "inconclusive", "its interval reaches below 0.90"),
        (0.93, (0.91, 0.96), "inconclusive", "ρ is below 0.95"),
        (0.93, (0.85, 0.96), "inconclusive", "ρ is below 0.95 and its interval"),
        (0.8, (0.7, 0.9), "does not hold", "whole interval is below 0.95"),
        (0.99, None, "inconclusive", "its interval"),
    ],
)
def test_the_word_follows_from_the_number_and_its_interval(
    rho: float, ci95: tuple[float, float] | None, word: str, why: str
) -> None:
    given = make_atlas().calibration
    assert given is not None
    found = dataclasses.replace(given, prediction=Correlation(PREDICTION, rho, ci95, 50))
    (finding,) = calibration_findings(found)
    assert finding.verdict == calibration_verdict(found) == word
    assert finding.text.endswith("of the damage." if not why else ".")
    assert why in finding.text
    assert "--rows" not in finding.text
    rough = Correlation("same plans measured on fit rows", 0.96, (0.88, 0.98), 50)
    (finding,) = calibration_findings(dataclasses.replace(found, on_fit=rough))
    assert ("0.96 [0.88, 0.98]" in finding.text) == ("more rows (--rows)" in finding.text) == (word == "inconclusive")


def test_records_go_through_the_file(tmp_path: Path) -> None:
    atlas = dataclasses.replace(make_atlas(), calibration=Game(noise=0.2).calibrated())
    (tmp_path / "atlas.json").write_text(to_json(atlas), encoding="utf-8")
    assert read_record(tmp_path / "atlas.json", Atlas) == atlas
    old = json.loads(to_json(atlas))
    del old["calibration"]
    (tmp_path / "atlas.json").write_text(json.dumps(old), encoding="utf-8")
    assert read_record(tmp_path / "atlas.json", Atlas) == dataclasses.replace(atlas, calibration=None)


def test_both_reports_show_the_line_and_every_point() -> None:
    atlas = make_atlas()
    found = atlas.calibration
    assert found is not None
    page, text = html(atlas), markdown(atlas)
    figure = page[page.index('id="figure-prediction"') : page.index("</figure>", page.index('id="figure-prediction"'))]
    caption = re.sub(r"<[^>]+>", "", figure[: figure.index("</figcaption>")])
    assert "It does: rank correlation 0.972 [0.947, 0.986] over 50 random plans" in caption
    assert line_text(found) == "slope 1.04 [0.99, 1.09], intercept −0.006 [−0.017, 0.004] nats/token"
    assert f"Solid line: {line_text(found)}" in caption
    assert figure.count("changed: predicted ") == 2 * len(found.points)  # wide and narrow
    for point in found.points:
        assert f"predicted {number(point.predicted)}, measured {interval(point.measured, unit=True)}" in figure
    for shown in (
        "0.972 [0.947, 0.986]",
        "0.81 [0.68, 0.90]",
        "0.991 [0.980, 0.996]",
        "1.04 [0.99, 1.09]",
        "−0.006 [−0.017, 0.004]",
        "2.10% [1.70, 2.60]",
    ):
        assert shown in text
        assert shown in re.sub(r"<[^>]+>", "", page)


def test_what_was_not_tested_is_said() -> None:
    for atlas in (emptied(make_atlas()), make_atlas(Recipe(plan=False))):
        assert 'id="figure-prediction"' not in html(atlas)
        assert "Does the prediction hold?" in html(atlas)
        assert "## Does the prediction hold?\n\nNot measured" in markdown(atlas)


def test_hostile_names_stay_text() -> None:
    atlas = make_atlas(RECIPES["hostile"])
    found = atlas.calibration
    assert found is not None
    evil = Correlation("<script>alert(1)</script> | `x`", 0.5, None, 50)
    atlas = dataclasses.replace(atlas, calibration=dataclasses.replace(found, others=[evil]))
    assert html(atlas).count("<script") == html(make_atlas()).count("<script")
    assert "<script" not in markdown(atlas)
    assert "no interval" in markdown(atlas)
