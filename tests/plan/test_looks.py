"""Rivals are measured on as few rows as decide them, no row twice, and the words keep their error rates in worlds of known truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bitatlas.plan.judge import verdict_of
from bitatlas.plan.looks import (
    FIRST_ROWS,
    LEVEL,
    PLAN,
    RANDOM_TO_ALL,
    UNIT,
    Comparison,
    compare_in_looks,
    compare_on_all,
    error_rates,
    look_order,
    look_sizes,
)
from bitatlas.stats.bootstrap import measured, t_interval
from simulations.plans import DOCUMENTS, STRETCHES, real_model

ROWS = 64


class Model:
    """Damage by name and row, and which rows were asked for. rows: name -> [rows]"""

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.rows = rows
        self.asked: dict[str, list[int]] = {name: [] for name in rows}

    def measure(self, names, rows: list[int]) -> dict[str, np.ndarray]:
        for name in names:
            self.asked[name] += rows
        return {name: self.rows[name][rows] for name in names}

    def compare(self, plan: np.ndarray, seed: int = 0, blocks: list[int] | None = None) -> dict[str, Comparison]:
        return {rival.name: rival for rival in compare_in_looks(plan, {}, list(self.rows), self.measure, seed, blocks)}


def model(means: dict[str, float], seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, Model]:
    rng = np.random.default_rng(seed)
    rows = {name: mean + noise * rng.standard_normal(ROWS) for name, mean in {PLAN: 1.0, **means}.items()}
    return rows.pop(PLAN), Model(rows)


# --- how many rows, and which ------------------------------------------------------------------------------------------


@given(st.integers(1, 500))
def test_looks_grow_in_eights_to_all_rows_and_share_the_error_rate(rows: int) -> None:
    looks = look_sizes(rows)
    assert looks[-1] == rows
    assert looks == sorted(set(looks))
    assert all(size % FIRST_ROWS == 0 and 2 * size <= rows for size in looks[:-1])
    rates = error_rates(len(looks))
    assert len(rates) == len(looks)
    assert sum(rates) == pytest.approx(LEVEL)
    assert min(rates) > 0


def test_looks_of_the_default_rows() -> None:
    assert look_sizes(64) == [8, 24, 64]
    assert look_sizes(8) == [8]
    assert error_rates(1) == [0.05]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(0, 5))
def test_the_order_takes_every_row_once_and_one_of_each_block_before_a_second(blocks: list[int], seed: int) -> None:
    order = look_order(len(blocks), blocks, seed)
    assert sorted(order) == list(range(len(blocks)))
    kinds = len(set(blocks))
    assert {blocks[row] for row in order[:kinds]} == set(blocks)
    assert order == look_order(len(blocks), blocks, seed)


def test_rows_are_drawn_from_the_whole_text() -> None:
    first = [look_order(ROWS, None, seed)[:8] for seed in range(200)]
    counts = np.bincount(np.ravel(first), minlength=ROWS)  # of each row, 25 expected
    assert stats.chisquare(counts).pvalue > 1e-3


def test_far_rivals_stop_at_the_first_look_and_near_ones_go_on_and_no_row_is_measured_twice() -> None:
    plan, rivals = model({"first layers high": 3.0, "last layers high": 1.0, "most critical layers high": 1.12})
    compared = rivals.compare(plan)
    assert {name: rival.damage.n for name, rival in compared.items()} == {
        "first layers high": 8, "last layers high": 64, "most critical layers high": 64,
    }  # fmt: skip
    for name, rows in rivals.asked.items():
        assert len(rows) == len(set(rows)) == compared[name].damage.n == compared[name].difference.n
        assert compared[name].damage.mean == pytest.approx(rivals.rows[name][rows].mean())
        assert compared[name].difference.mean == pytest.approx((plan - rivals.rows[name])[rows].mean())


def test_of_open_random_plans_three_go_on_to_all_rows_and_the_others_are_not_said_to_be_beaten() -> None:
    plan, rivals = model({f"random {number}": 1.0 for number in range(10)} | {"random far": 4.0})
    compared = rivals.compare(plan)
    rows = [rival.damage.n for rival in compared.values()]
    assert (rows.count(8), rows.count(24), rows.count(64)) == (1, 10 - RANDOM_TO_ALL, RANDOM_TO_ALL)
    dropped = [rival for rival in compared.values() if rival.damage.n == 24]
    assert {rival.relation for rival in dropped} == {"ties with"}
    on = [rivals.rows[name][rivals.asked[name][:24]].mean() for name, rival in compared.items() if rival.damage.n == 64]
    assert max(on) < min(rival.damage.mean for rival in dropped)


def test_a_rival_that_is_far_better_is_said_to_be_and_stops_early() -> None:
    plan, rivals = model({"first layers high": 0.2, "last layers high": 3.0}, noise=0.02)
    verdict = verdict_of(measured(plan, UNIT, PLAN, "test"), list(rivals.compare(plan).values()))
    assert (verdict.standing, verdict.winner) == ("worse", "first layers high")
    best = verdict.baselines[0]
    ours = plan[rivals.asked["first layers high"]].mean()  # on the same 8 rows
    assert best.damage.n == 8
    assert f"on 8 test rows: {best.damage.mean:.3f} against {ours:.3f} nats/token" in verdict.text


def test_the_sentence_says_once_how_many_plans_were_measured_on_fewer_rows() -> None:
    plan, rivals = model({"first layers high": 3.0, "last layers high": 1.06, "random 1": 4.0})
    verdict = verdict_of(measured(plan, UNIT, PLAN, "test"), list(rivals.compare(plan).values()))
    assert verdict.text.count("rows") == 2
    assert "on 64 test rows" in verdict.text
    assert "2 of these 3 plans were measured on 8 rows" in verdict.text


# --- intervals ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_students_and_that_of_block_means() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal(8)
    low, high = t_interval(values, 0.99)
    expected = stats.t.interval(0.99, 7, values.mean(), stats.sem(values))
    np.testing.assert_allclose((low, high), expected)
    blocks = np.repeat(np.arange(8), 3)
    low, high = t_interval(values[blocks] + np.tile([-1.0, 0.0, 1.0], 8), 0.99, blocks.tolist())
    np.testing.assert_allclose((low, high), expected)
    assert t_interval(np.ones(3), 0.95, [0, 0, 0]) == (-np.inf, np.inf)


# --- known truth: the plan and one rival are as good as each other -----------------------------------------------------
#
# Rates with fixed seeds; tolerance: three standard errors of a rate that is just the promise.

WORLDS = 600
PROMISE = LEVEL / 2
MOST = PROMISE + 3 * np.sqrt(PROMISE * (1 - PROMISE) / WORLDS)


def noise(world: str, rng: np.random.Generator) -> np.ndarray:
    """What a row does to a model besides its difficulty: [rows], mean 0."""
    if world == "normal":
        return 0.1 * rng.standard_normal(ROWS)
    if world == "heavy tails":
        return 0.1 * rng.standard_t(3, ROWS)
    blocks = DOCUMENTS if world == "documents" else STRETCHES
    return 0.1 * (rng.standard_t(3, max(blocks) + 1)[blocks] + rng.standard_t(3, ROWS))


@pytest.mark.parametrize("world", ["normal", "heavy tails", "documents", "stretches"])
def test_a_plan_is_seldom_said_to_beat_its_equal_and_seldom_to_lose(world: str) -> None:
    blocks = {"documents": DOCUMENTS, "stretches": STRETCHES}.get(world)
    said = []
    for seed in range(WORLDS):
        rng = np.random.default_rng(seed)
        hard = rng.lognormal(-0.125, 0.5, ROWS)
        plan, rival = hard * (1 + noise(world, rng)), hard * (1 + noise(world, rng))
        said.append(Model({"first layers high": rival}).compare(plan, blocks=blocks)["first layers high"])
    for word in ("beats", "loses to"):
        rate = np.mean([rival.relation == word for rival in said])
        assert rate <= MOST, f"{word}: {rate:.4f}"
    early = np.mean([rival.relation == "beats" and rival.damage.n < ROWS for rival in said])
    assert early <= 0.01  # 0.2 % are promised


def test_looks_see_nearly_all_that_all_rows_see() -> None:
    """The plan does 5 % less than the best of 24 simple plans."""
    better = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        hard = rng.lognormal(-0.125, 0.5, ROWS)
        means = {"last layers high": 1.0, "first layers high": 1.7} | {f"random {n}": 1.4 + 0.05 * n for n in range(20)}
        rows = {name: 0.3 * mean * hard * (1 + 0.08 * rng.standard_normal(ROWS)) for name, mean in {PLAN: 0.95, **means}.items()}
        plan = rows.pop(PLAN)
        each = Model(rows).compare(plan).values(), compare_on_all(plan, rows)
        better.append([all(rival.relation == "beats" for rival in compared) for compared in each])
    looks, whole = np.mean(better, axis=0)
    assert whole > 0.7
    assert looks >= whole - 0.1


def test_a_real_models_numbers_take_less_than_a_third_of_the_rows() -> None:
    judged = [real_model(seed) for seed in range(20)]
    rows = [world.model_rows for world in judged]
    assert np.mean(rows) <= 450
    assert max(rows) <= 600  # of 24 plans and rivals on all rows: 25 * 64 = 1600
    assert all(world.verdict.standing == "better" for world in judged)
