"""Peers' rules, re-implemented for the benchmark: against hand-worked and brute-force answers, and their scores against autograd, finite
differences and true KL on a tiny model."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.records.sizes import uniform
from plan_peers import rules, scores, search
from plan_peers.problem import Problem, Question

# --- rules in plain numbers --------------------------------------------------------------------------------------------


@st.composite
def scored(draw: st.DrawFn, most: int = 12) -> tuple[np.ndarray, np.ndarray, int]:
    """(score, extra, room) of a few units; ties and negative scores included."""
    count = draw(st.integers(1, most))
    score = draw(st.lists(st.one_of(st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-5, 5)), min_size=count, max_size=count))
    extra = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    return np.array(score), np.array(extra, dtype=np.int64), draw(st.integers(0, 60 * count))


def test_mlx_threshold_by_hand() -> None:
    sensitivity, extra = np.array([0.1, 5.0, 3.0, 1.0]), np.array([10, 20, 30, 40])
    assert rules.mlx_threshold(sensitivity, extra, 50).raised.tolist() == [False, True, True, False]
    assert rules.mlx_threshold(sensitivity, extra, 49).raised.tolist() == [
        False,
        True,
        False,
        False,
    ]  # 3.0 does not fit, 1.0 is not tried
    assert rules.mlx_threshold(sensitivity, extra, 19).raised.tolist() == [False] * 4


@given(scored(), st.integers(0, 2**32 - 1))
def test_mlx_threshold_raises_the_most_sensitive_that_fit(case: tuple[np.ndarray, np.ndarray, int], seed: int) -> None:
    """Whole numbers up to 300 are further apart than the bisection's tolerance, so trying every threshold must give the same."""
    _, extra, room = case
    sensitivity = np.random.default_rng(seed).integers(0, 300, len(extra)).astype(float)
    fitting = [sensitivity > limit for limit in sensitivity if extra[sensitivity > limit].sum() <= room]
    most = max(fitting, key=lambda raised: raised.sum())
    assert rules.mlx_threshold(sensitivity, extra, room).raised.tolist() == most.tolist()


@given(scored())
def test_mlx_threshold_never_overruns(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    sensitivity, extra, room = case
    raised = rules.mlx_threshold(sensitivity, extra, room).raised
    assert extra[raised].sum() <= room
    assert sensitivity[raised].min(initial=math.inf) > sensitivity[~raised].max(initial=-math.inf)


def test_mlx_threshold_takes_the_tighter_end_where_its_middle_overruns() -> None:
    """Two units closer together than the tolerance, of which one fits: for some place of theirs the middle of the last bracket is below both."""
    extra = np.array([1, 10, 10, 1])
    overran = 0
    for middle in np.linspace(0.3, 0.7, 200):
        result = rules.mlx_threshold(np.array([0.0, middle, middle + 1e-4, 1.0]), extra, 11)
        assert extra[result.raised].sum() <= 11
        overran += result.overran
    assert 0 < overran < 200


def test_exllamav3_greedy_by_hand() -> None:
    change = np.array([[-0.4, -0.6], [-0.1, -0.5], [0.2, -0.01]])
    extra = np.array([[10, 20], [10, 20], [10, 20]])
    # 0.4^0.69 = 0.531 for 11, 0.5^0.69 = 0.620 for 21, ...: group 0 goes up one level first, then group 1 two
    assert rules.exllamav3_greedy(change, extra, 31).tolist() == [1, 2, 0]
    assert rules.exllamav3_greedy(change, extra, 30).tolist() == [1, 1, 0]  # a step must cost less than the room
    assert rules.exllamav3_greedy(change, extra, 10).tolist() == [0, 0, 0]
    assert rules.exllamav3_greedy(change, extra, 1000).tolist() == [2, 2, 2]


@given(scored())
def test_exllamav3_greedy_with_one_level_is_one_pass_by_rate(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    change, extra, room = case
    expected, left = np.zeros(len(change), dtype=int), room
    rate = [(-(abs(c) ** 0.69) if c <= 0 else c) / (e + 1) for c, e in zip(change, extra, strict=True)]
    for group in sorted(range(len(change)), key=lambda group: rate[group]):
        if rate[group] < 0 and extra[group] < left:
            expected[group], left = 1, left - extra[group]
    result = rules.exllamav3_greedy(change[:, None], extra[:, None], room)
    assert result.tolist() == expected.tolist()
    assert extra[result == 1].sum() <= room


@given(scored())
def test_greedy_per_bit_fits_and_passes_over(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    gain, extra, room = case
    raised = rules.greedy_per_bit(gain, extra, room)
    left = room - extra[raised].sum()
    assert left >= 0
    assert not (raised & (gain <= 0)).any()
    assert (extra[~raised & (gain > 0)] > left).all()


def test_greedy_per_bit_by_hand() -> None:
    gain, extra = np.array([10.0, 9.0, 1.0]), np.array([10, 3, 4])
    assert rules.greedy_per_bit(gain, extra, 10).tolist() == [False, True, True]  # 9/3 first, then 10/10 has no room, 1/4 has


def test_exllamav3_groups() -> None:
    names = [f"m.0.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    assert rules.exllamav3_groups([*names, "m.1.k_proj", "m.1.c_fc"]) == [[0], [1, 2], [3], [4, 5], [6], [7], [8]]


@settings(max_examples=40)
@given(st.integers(2, 7), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_swap_search_ends_where_no_neighbour_is_better(count: int, seed: int, share: int) -> None:
    generator = np.random.default_rng(seed)
    extra = generator.integers(1, 9, count)
    room = int(extra.sum() * share / 100)
    matrix = generator.normal(size=(count, count))
    seen = []

    def damage(choice: np.ndarray) -> float:
        seen.append(choice.copy())
        return float(choice @ matrix @ choice)

    result = search.swap_search(np.zeros(count, dtype=np.int64), extra, room, damage, seconds=60, seed=1)
    assert result.finished
    assert all(extra[choice == 1].sum() <= room for choice in seen)
    assert len({choice.tobytes() for choice in seen}) == len(seen) == result.measured
    for other in map(np.array, product((0, 1), repeat=count)):
        up, down = int(((other == 1) & (result.choice == 0)).sum()), int(((other == 0) & (result.choice == 1)).sum())
        if up <= 1 and down <= 1 and extra[other == 1].sum() <= room:
            assert other @ matrix @ other >= result.damage - 1e-12


def test_swap_search_stops_in_time_and_refuses_a_start_above_the_budget() -> None:
    extra = np.ones(4, dtype=np.int64)
    result = search.swap_search(np.zeros(4, dtype=np.int64), extra, 2, lambda choice: -float(choice.sum()), seconds=0)
    assert (result.measured, result.finished, result.choice.tolist()) == (1, False, [0, 0, 0, 0])
    with pytest.raises(ValueError, match="above the budget"):
        search.swap_search(np.ones(4, dtype=np.int64), extra, 2, lambda choice: 0.0, seconds=1)


# --- scores of a real, tiny model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(tiny_llama: Path) -> Problem:
    rows = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return Problem(Question(str(tiny_llama), ("int2_g32", "int4_g32"), "rtn", 2.7, 0, rows))


def test_budget_of_a_problem(problem: Problem) -> None:
    weights = sum(unit.weights for unit in problem.units)
    assert problem.limit == math.floor(2.7 * weights)
    assert problem.room == problem.limit - 2 * weights
    assert problem.extra.tolist() == [2 * unit.weights for unit in problem.units]
    everything = np.ones(len(problem.units), dtype=np.int64)
    with pytest.raises(AssertionError, match="above the budget"):
        problem.assignment(everything)
    some = np.zeros(len(problem.units), dtype=np.int64)
    some[3] = 1
    assert problem.choice(problem.assignment(some)).tolist() == some.tolist()


def test_relative_errors_against_float64(problem: Problem) -> None:
    result = scores.relative_errors(problem)
    bank = problem.meter.bank
    for index, unit in enumerate(problem.units):
        name = unit.modules[0].name
        for column, fmt in enumerate(problem.formats):
            weight, changed = (w.double().numpy() for w in (bank.reference(name), bank.weights({name: fmt})[name]))
            expected = ((weight - changed) ** 2).sum() / (weight**2).sum()
            assert result[index, column] == pytest.approx(expected, rel=1e-5)  # weights are float32
    assert (result[:, 0] > result[:, 1]).all()


def test_mlx_sensitivity_is_the_slope_of_kl_at_the_low_model(problem: Problem) -> None:
    """Central differences of true KL along W_high - W_low, one unit at a time; 2 % for float32 logits and the third order."""
    result = scores.mlx_sensitivity(problem)
    meter, low = problem.meter, uniform(problem.modules, problem.low)
    step = 0.05
    for index in (0, 4, 6, 13):
        unit = problem.units[index]
        name = unit.modules[0].name
        start, end = (meter.bank.weights({name: fmt})[name] for fmt in problem.formats)
        values = []
        for share in (step, -step):
            weights = {**meter.bank.weights(low), name: start + share * (end - start)}
            meter.reference.see([problem.rows])
            reference = meter.reference.log_p(problem.rows, slice(0, problem.rows.shape[1]))
            with torch.no_grad(), meter.decoder.swapped(weights):
                changed = torch.log_softmax(meter.decoder.model(problem.rows).logits.double(), -1)
            values.append(float((reference.double().exp() * (reference - changed)).sum(-1).mean()))
        slope = (values[0] - values[1]) / (2 * step)
        assert -slope / (unit.weights / 1e6) == pytest.approx(result[index], rel=0.02, abs=0.02 * np.abs(result).max())


def test_gradient_scores_against_autograd(problem: Problem) -> None:
    fisher, absolute = scores.gradient_scores(problem, squared=True), scores.gradient_scores(problem, squared=False)
    meter, unit = problem.meter, problem.units[5]
    name = unit.modules[0].name
    weight = meter.decoder.model.get_submodule(name).weight
    squares, sums = np.zeros(2), np.zeros(2)
    for row in problem.rows:
        leaf = weight.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            logits = torch.func.functional_call(meter.decoder.model, {f"{name}.weight": leaf}, (row[None],)).logits
            loss = -torch.log_softmax(logits[0, :-1], -1).gather(1, row[1:, None]).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        for column, fmt in enumerate(problem.formats):
            moved = (gradient * (meter.bank.weights({name: fmt})[name] - weight)).detach().double()
            squares[column] += float((moved**2).sum()) / 2
            sums[column] += float(moved.abs().sum())
    assert fisher[5] == pytest.approx(squares / len(problem.rows), rel=1e-4)
    assert absolute[5] == pytest.approx(sums / len(problem.rows), rel=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in meter.decoder.model.parameters())


def test_swaps_are_true_kl(problem: Problem) -> None:
    meter, unit = problem.meter, problem.units[2]
    lowered = {**uniform(problem.modules, problem.high), unit.modules[0].name: problem.low}
    assert scores.single_swaps(problem, problem.high)[2, 0] == meter.plans({"x": lowered}, problem.rows)["x"].mean()
    alone = {unit.modules[0].name: problem.low}
    assert scores.single_swaps(problem, None)[2, 0] == meter.plans({"x": alone}, problem.rows)["x"].mean()
    low = uniform(problem.modules, problem.low)
    groups = rules.exllamav3_groups([unit.modules[0].name for unit in problem.units])
    raised = {**low, **{problem.units[index].modules[0].name: problem.high for index in groups[1]}}
    measured = meter.plans({"low": low, "raised": raised}, problem.rows)
    assert scores.raised_groups(problem, groups)[1, 0] == measured["raised"].mean() - measured["low"].mean()
