"""The benchmark's other parts: plans read out of the tools' real output, the judge, the results file and its table, and a whole run.
The tools themselves are not run here; `make bench` does that."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import peers
from bitatlas.errors import UserError
from bitatlas.records.sizes import uniform
from bitatlas.stats.bootstrap import mean_interval
from plan_peers import autoround_worker, measure, outside, results, table
from plan_peers.judging import BEST, MEAN, entries_of, judge
from plan_peers.problem import Problem, Question, assert_disjoint
from tiny import SHARED, TEXT


@pytest.fixture(scope="module")
def problem(tiny_llama: Path) -> Problem:
    rows = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return Problem(Question(str(tiny_llama), ("int2_g32", "int4_g32"), "rtn", 2.7, 0, rows))


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


def test_other_seconds_leaves_the_search_out() -> None:
    log = "opening the checkpoint: 0.4 s\nunits, one at a time (base uniform:int4_g32): 10.0 s\n"
    log += "start: high: 0.8491 nats/token, better\n12 swaps around a plan (fit rows): 2.0 s\nplans on select rows: 0.5 s\n"
    log += "plans on test rows: 9.0 s\nwriting the report: 3.0 s\n"
    assert outside.other_seconds(log) == pytest.approx(0.4 + 9.0 + 3.0)


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
        result = json.loads(answer.read_text())
        assert (done.returncode, result["code"]) == (int(code != 0), code)
        assert megabytes * 2**20 < result["peak_bytes"] < (megabytes + 150) * 2**20
        assert result["seconds"] > 0


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
    result = entries_of("thumb", ("uniform", MEAN, BEST), outside.Answer({}, 0.1, 1.0, 10), judged)
    assert result[MEAN]["damage_nats"] == 1.5
    assert result[MEAN]["quantized_bytes"] == 9
    assert result[MEAN]["each_damage_nats"] == [2.0, 1.0]
    assert (result[BEST]["damage_nats"], result[BEST]["quantized_bytes"]) == (1.0, 8)
    assert result["uniform"]["damage_nats"] == 3.0


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
    case = peers.read_cases(["babyllama-105"], tmp_path, None, None)[0]
    checkpoint = peers.open_checkpoint(case.model, fuse=False)
    rows = peers.judging_rows(checkpoint, case.test, 96, 192)
    problem = Problem(Question(case.model, ("int2_g32", "int4_g32"), "rtn", 3.0, 0, [[0]]))
    plan = problem.assignment([index % 3 == 0 for index in range(len(problem.units))])
    damage = judge(problem, {"": plan}, rows)[""]["damage_nats"]
    formats = {name: {"bits": bits, "group_size": 32, "symmetric": False} for name, bits in (("int2_g32", 2), ("int4_g32", 4))}
    (tmp_path / "plan.json").write_text(json.dumps({"formats": formats, "modules": plan}))
    command = [sys.executable, str(SHARED / "check_plan.py"), case.model, str(tmp_path / "plan.json"), str(case.test)]
    other = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert damage == pytest.approx(other["damage_nats"], rel=0.01)
