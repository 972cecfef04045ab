"""The benchmark's own parts: peers' rules against hand-worked and brute-force answers, plans read out of the tools' real output, the judge,
the results file and its table. The tools themselves are not run here; `make bench` does that."""

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peers
from bitatlas.errors import UserError
from bitatlas.evaluation.bootstrap import mean_interval
from bitatlas.sensitivity.screens import uniform
from bitatlas.swap import swapped
from plan_peers import autoround_worker, measure, outside, results, rules, scores, search, table
from plan_peers.judging import BEST, MEAN, entries_of, judge
from plan_peers.problem import Problem, Question, assert_disjoint
from tiny import SHARED, TEXT

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
    for place in np.linspace(0.3, 0.7, 200):
        found = rules.mlx_threshold(np.array([0.0, place, place + 1e-4, 1.0]), extra, 11)
        assert extra[found.raised].sum() <= 11
        overran += found.overran
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
    found = rules.exllamav3_greedy(change[:, None], extra[:, None], room)
    assert found.tolist() == expected.tolist()
    assert extra[found == 1].sum() <= room


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

    found = search.swap_search(np.zeros(count, dtype=np.int64), extra, room, damage, seconds=60, seed=1)
    assert found.finished
    assert all(extra[choice == 1].sum() <= room for choice in seen)
    assert len({choice.tobytes() for choice in seen}) == len(seen) == found.measured
    for other in map(np.array, product((0, 1), repeat=count)):
        up, down = int(((other == 1) & (found.choice == 0)).sum()), int(((other == 0) & (found.choice == 1)).sum())
        if up <= 1 and down <= 1 and extra[other == 1].sum() <= room:
            assert other @ matrix @ other >= found.damage - 1e-12


def test_swap_search_stops_in_time_and_refuses_a_start_above_the_budget() -> None:
    extra = np.ones(4, dtype=np.int64)
    found = search.swap_search(np.zeros(4, dtype=np.int64), extra, 2, lambda choice: -float(choice.sum()), seconds=0)
    assert (found.measured, found.finished, found.choice.tolist()) == (1, False, [0, 0, 0, 0])
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
    found = scores.relative_errors(problem)
    bank = problem.meter.bank
    for index, unit in enumerate(problem.units):
        name = unit.modules[0].name
        for column, fmt in enumerate(problem.formats):
            weight, changed = (w.double().numpy() for w in (bank.reference(name), bank.weights({name: fmt})[name]))
            expected = ((weight - changed) ** 2).sum() / (weight**2).sum()
            assert found[index, column] == pytest.approx(expected, rel=1e-5)  # weights are float32
    assert (found[:, 0] > found[:, 1]).all()


def test_mlx_sensitivity_is_the_slope_of_kl_at_the_low_model(problem: Problem) -> None:
    """Central differences of true KL along W_high - W_low, one unit at a time; 2 % for float32 logits and the third order."""
    found = scores.mlx_sensitivity(problem)
    meter, low = problem.meter, uniform(problem.modules, problem.low)
    step = 0.05
    for index in (0, 4, 6, 13):
        unit = problem.units[index]
        name = unit.modules[0].name
        start, end = (meter.bank.weights({name: fmt})[name] for fmt in problem.formats)
        values = []
        for share in (step, -step):
            weights = {**meter.bank.weights(low), name: start + share * (end - start)}
            reference = meter.reference(problem.rows)
            with torch.no_grad(), swapped(meter.model, weights):
                changed = torch.log_softmax(meter.model(problem.rows).logits.double(), -1)
            values.append(float((reference.double().exp() * (reference - changed)).sum(-1).mean()))
        slope = (values[0] - values[1]) / (2 * step)
        assert -slope / (unit.weights / 1e6) == pytest.approx(found[index], rel=0.02, abs=0.02 * np.abs(found).max())


def test_gradient_scores_against_autograd(problem: Problem) -> None:
    fisher, absolute = scores.gradient_scores(problem, squared=True), scores.gradient_scores(problem, squared=False)
    meter, unit = problem.meter, problem.units[5]
    name = unit.modules[0].name
    weight = meter.model.get_submodule(name).weight
    squares, sums = np.zeros(2), np.zeros(2)
    for row in problem.rows:
        leaf = weight.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            logits = torch.func.functional_call(meter.model, {f"{name}.weight": leaf}, (row[None],)).logits
            loss = -torch.log_softmax(logits[0, :-1], -1).gather(1, row[1:, None]).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        for column, fmt in enumerate(problem.formats):
            moved = (gradient * (meter.bank.weights({name: fmt})[name] - weight)).detach().double()
            squares[column] += float((moved**2).sum()) / 2
            sums[column] += float(moved.abs().sum())
    assert fisher[5] == pytest.approx(squares / len(problem.rows), rel=1e-4)
    assert absolute[5] == pytest.approx(sums / len(problem.rows), rel=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in meter.model.parameters())


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


# --- what the tools answer ---------------------------------------------------------------------------------------------

# Cut from real answers of auto-round 0.16.1 and nvidia-modelopt 0.47.0.
AUTOROUND = {
    "layers": {
        "model.layers.0.self_attn.q_proj": {"bits": 2, "group_size": 32, "sym": False, "data_type": "int_asym"},
        "model.layers.0.self_attn.v_proj": {"bits": 4, "group_size": 32, "sym": False, "data_type": "int_asym"},
        "lm_head": {"bits": 16, "group_size": 32, "sym": False, "data_type": "fp"},
    },
    "seconds": 9.5,
}
MODELOPT = {
    "recipe": {
        "model.layers.0.self_attn.q_proj.quant_recipe": "CUSTOM_MODULE_0_1(effective-bits: 4.0)",
        "model.layers.0.self_attn.v_proj.quant_recipe": "CUSTOM_MODULE_0_0(effective-bits: 2.0)",
        "lm_head.quant_recipe": "NONE(effective-bits: 16.0)",
    },
    "effective_bits": 2.4903954802259887,
}


def test_bits_are_read_out() -> None:
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    assert outside.autoround_bits(AUTOROUND) == {q: 2, v: 4, "lm_head": 16}
    assert outside.modelopt_bits(MODELOPT) == {q: 4, v: 2, "lm_head": 16}


def test_bits_become_a_plan_or_a_reason(problem: Problem) -> None:
    bits = {module.name: 2 for module in problem.modules} | {problem.modules[0].name: 4, "lm_head": 16}
    plan = outside.plan_of_bits(problem, bits)
    assert problem.choice(plan).tolist() == [1] + [0] * (len(problem.units) - 1)
    with pytest.raises(outside.NotRunError, match="16 bits, which is no candidate"):
        outside.plan_of_bits(problem, bits | {problem.modules[1].name: 16})
    del bits[problem.modules[1].name]
    with pytest.raises(outside.NotRunError, match="no bits"):
        outside.plan_of_bits(problem, bits)


def test_an_answer_without_scores_is_no_plan(problem: Problem) -> None:
    low = uniform(problem.modules, problem.low)
    with pytest.raises(outside.NotRunError, match="scored nothing"):
        outside.refuse_unscored(problem, low)
    outside.refuse_unscored(problem, {**low, problem.modules[0].name: problem.high})


def test_autoscheme_is_fed_the_very_rows() -> None:
    """Its window is the row's length; the text must be longer, and its first tokens the row's."""
    row = [7, 0, 299, 12, 12, 45]
    tokens = autoround_worker.number_tokenizer(300)(outside.number_text(row))["input_ids"]
    assert len(tokens) > len(row)
    assert tokens[: len(row)] == row


def test_stage_seconds_counts_the_search_alone() -> None:
    log = "opening the checkpoint: 0.4 s\nunits, one at a time (base uniform:int4_g32): 10.0 s\ncurvature at a plan: 1.5 s\n"
    log += "12 swaps around a plan (fit rows): 2.0 s\nplans on select rows: 0.5 s\nplans on test rows: 9.0 s\nwriting the report: 3.0 s\n"
    assert outside.stage_seconds(log) == pytest.approx(14.0)
    assert outside.stage_seconds("writing the report: 3.0 s\n") is None


def test_an_environment_that_cannot_be_made_is_a_reason(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(outside.NotRunError, match="environment could not be made") as caught:
        outside.python_of("autoround", blocked, lambda text: None)
    assert str(tmp_path) not in str(caught.value)


def test_measure_counts_the_command_and_not_who_started_it(tmp_path: Path) -> None:
    ballast = bytearray(400 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])  # really in memory
    for megabytes, code in ((0, 0), (200, 3)):
        script = f"x = bytearray({megabytes} << 20); x[::4096] = b'x' * len(x[::4096]); raise SystemExit({code})"
        answer = tmp_path / "answer.json"
        done = subprocess.run([sys.executable, measure.__file__, str(answer), sys.executable, "-c", script])
        found = json.loads(answer.read_text())
        assert (done.returncode, found["code"]) == (int(code != 0), code)
        assert megabytes * 2**20 < found["peak_bytes"] < (megabytes + 150) * 2**20
        assert found["seconds"] > 0


# --- judge, file, table ------------------------------------------------------------------------------------------------


def test_judge_measures_and_refuses(problem: Problem) -> None:
    choice = np.zeros(len(problem.units), dtype=np.int64)
    choice[0] = 1
    plan = problem.assignment(choice)
    entry = judge(problem, {"": plan}, problem.rows)[""]
    damage = problem.meter.plans({"": plan}, problem.rows)[""]
    assert entry["rows"] == pytest.approx(damage, rel=1e-8)
    assert (entry["damage_nats"], *entry["ci95"]) == pytest.approx(mean_interval(damage), rel=1e-6)
    assert entry["high"] == [problem.modules[0].name]
    assert entry["code_bits"] == problem.spent(choice) / sum(unit.weights for unit in problem.units)
    with pytest.raises(AssertionError, match="above the budget"):
        judge(problem, {"": uniform(problem.modules, problem.high)}, problem.rows)


def test_random_plans_are_summed_up() -> None:
    def one(damage: float, size: int) -> dict:
        return {
            "damage_nats": damage,
            "ci95": [0, 1],
            "rows": [damage, damage],
            "quantized_bytes": size,
            "code_bits": 2.0,
            "stored_bits": 3.0,
        }

    judged = {"uniform": one(3.0, 5), "random 1": one(2.0, 9), "random 2": one(1.0, 8)}
    found = entries_of("thumb", ("uniform", MEAN, BEST), outside.Answer({}, 0.1, 1.0, 10), judged)
    assert found[MEAN]["damage_nats"] == 1.5
    assert found[MEAN]["quantized_bytes"] == 9
    assert found[MEAN]["each_damage_nats"] == [2.0, 1.0]
    assert (found[BEST]["damage_nats"], found[BEST]["quantized_bytes"]) == (1.0, 8)
    assert found["uniform"]["damage_nats"] == 3.0


SETTINGS = {
    "formats": ["int2_g32", "int4_g32"],
    "quantizer": "rtn",
    "rows": {"fit": 24, "select": 24, "test": 4},
    "row_length": 192,
    "seed": 0,
}


def content_with(**cells: dict[str, list[float]]) -> dict:
    content = {"schema": results.SCHEMA, "settings": SETTINGS, "machine": {"cores": 2}, "cells": {}, "together": {}}
    for key, methods in cells.items():
        entries = {
            label: {
                "damage_nats": float(np.mean(rows)), "ci95": [min(rows), max(rows)], "rows": rows, "code_bits": 2.5, "quantized_bytes": 12345,
                "search_seconds": 0.01, "process_seconds": 9.0, "peak_bytes": 2**28, "remarks": [],
            }
            for label, rows in methods.items()
        }  # fmt: skip
        content["cells"][key] = {"checkpoint": key, "code_bits": 2.5, "methods": entries}
    return content


def test_ratios_are_paired_and_their_mean_is_geometric(tmp_path: Path) -> None:
    ours, other = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]
    content = content_with(a={"bitatlas": ours, "uniform": other}, b={"bitatlas": other, "uniform": ours}, c={"uniform": ours})
    results.save_results(tmp_path / "r.json", content)
    saved = json.loads((tmp_path / "r.json").read_text())
    entry = saved["cells"]["a"]["methods"]["uniform"]
    assert entry["ours_to_it"]["ratio"] == 0.5
    assert entry["ours_to_it"]["ci95"] == pytest.approx([0.5, 0.5])  # every row is twice as bad: no doubt about the ratio
    assert entry["more_than_ours_nats"]["mean"] == 2.5
    low, high = entry["more_than_ours_nats"]["ci95"]
    assert low < 2.5 < high
    assert saved["together"]["uniform"]["geometric_mean_ratio"] == pytest.approx(1.0)  # sqrt(1/2 x 2)
    assert saved["together"]["uniform"]["cells"] == ["a", "b"]
    assert "ours_to_it" not in saved["cells"]["c"]["methods"]["uniform"]


def test_numbers_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results.save_results(path, content_with(a={"uniform": [1.0, 2.0]}))
    assert "a" in results.open_results(path, SETTINGS, fresh=False)["cells"]
    with pytest.raises(UserError, match="other settings"):
        results.open_results(path, {**SETTINGS, "seed": 1}, fresh=False)
    assert results.open_results(path, {**SETTINGS, "seed": 1}, fresh=True)["cells"] == {}
    content = results.open_results(path, SETTINGS, fresh=False)
    with pytest.raises(UserError, match="other weights or other rows"):
        results.cell_of(content, "a", {"checkpoint": "a", "code_bits": 3.0})


def test_table_has_every_number_and_every_reason() -> None:
    label = "|g·ΔW| + knapsack"
    content = content_with(a={"bitatlas": [1.0, 2.0], label: [2.0, 4.0]})
    content["cells"]["a"]["methods"]["AutoRound AutoScheme"] = {"method": "autoround", "not_run": "no network | none"}
    for cell in content["cells"].values():
        results.compare(cell["methods"])
    content["together"] = results.together(content["cells"])
    page = table.render(content, peers.ORDER, "peers.json")
    lines = [line.replace("\\|", "!") for line in page.splitlines()]
    assert any(line.startswith("| !g·ΔW! + knapsack | 3.0000 |") and " 0.500 (" in line and "12,345" in line for line in lines)
    assert any(line.startswith("| **bitatlas** | 1.5000 |") for line in lines)
    assert any(line.startswith("| AutoRound AutoScheme | not run: no network ! none |") for line in lines)
    assert any(line.startswith("| !g·ΔW! + knapsack | 0.500 | ") for line in lines)
    for block in "\n".join(lines).split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block


def test_rows_are_disjoint() -> None:
    rows = torch.arange(12).view(3, 4)
    assert_disjoint(rows[:2], rows[2:])
    with pytest.raises(AssertionError, match="fitted on"):
        assert_disjoint(rows[:2], rows[1:])


# --- as a whole --------------------------------------------------------------------------------------------------------


def texts(folder: Path) -> list[str]:
    """Two texts that share no row: --fit-text and --test-text."""
    for name, words in (("fit", TEXT.split()), ("test", TEXT.split()[::-1])):
        (folder / f"{name}.txt").write_text(" ".join(" ".join(words[::step]) for step in (1, 3, 7, 9, 11, 13, 17)))
    return ["--fit-text", str(folder / "fit.txt"), "--test-text", str(folder / "test.txt")]


@pytest.mark.slow
def test_run_resumes_and_writes_the_table(tiny_llama: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "r.json", tmp_path / "t.md"
    command = ["--checkpoints", str(tiny_llama), *texts(tmp_path), "--fit-rows", "3", "--select-rows", "2", "--test-rows", "4"]
    command += ["--row-length", "16", "--code-bits", "2.6", "--results", str(file), "--table", str(page), "--envs", str(tmp_path)]
    peers.main([*command, "--methods", "thumb,mlx"])
    first = json.loads(file.read_text())
    methods = first["cells"]["tiny-llama, 2.6"]["methods"]
    assert set(methods) == {*peers.METHODS["thumb"], *peers.METHODS["mlx"]}
    assert all(entry["code_bits"] <= 2.6 for entry in methods.values())
    assert all(entry["peak_bytes"] > 2**26 and entry["process_seconds"] > 0 for entry in methods.values())
    peers.main([*command, "--methods", "thumb,mlx,search", "--search-seconds", "2"])
    second = json.loads(file.read_text())["cells"]["tiny-llama, 2.6"]["methods"]
    assert {label: second[label] for label in methods} == methods  # kept, times and all
    assert second["swap search"]["search_seconds"] < 20
    assert str(tmp_path) not in file.read_text() + page.read_text()
    assert "swap search" in page.read_text()


@pytest.mark.slow
def test_the_judge_agrees_with_the_independent_checker(babyllama: Path, tmp_path: Path) -> None:
    """Another implementation of codes and KL, on the rows that this one draws: within 1 %, as its scales are not rounded to float16."""
    place = peers.places(["babyllama-105"], tmp_path, None, None)[0]
    checkpoint = peers.open_checkpoint(place.model, fuse=False)
    rows = peers.judging_rows(checkpoint, place.test, 96, 192)
    problem = Problem(Question(place.model, ("int2_g32", "int4_g32"), "rtn", 3.0, 0, [[0]]))
    plan = problem.assignment([index % 3 == 0 for index in range(len(problem.units))])
    damage = judge(problem, {"": plan}, rows)[""]["damage_nats"]
    formats = {name: {"bits": bits, "group_size": 32, "symmetric": False} for name, bits in (("int2_g32", 2), ("int4_g32", 4))}
    (tmp_path / "plan.json").write_text(json.dumps({"formats": formats, "modules": plan}))
    command = [sys.executable, str(SHARED / "check_plan.py"), place.model, str(tmp_path / "plan.json"), str(place.test)]
    other = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert damage == pytest.approx(other["damage_nats"], rel=0.01)
