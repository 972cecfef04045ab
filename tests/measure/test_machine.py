"""Processors and threads: a container's quota is kept, the fastest is taken, and the number of threads is left as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bitatlas.measure import machine
from bitatlas.model.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    ("content", "count"), [("max 100000\n", 64), ("150000 100000\n", 2), ("400000 100000\n", 4), ("10000 100000\n", 1), ("?", 64)]
)
def test_a_quota_bounds_the_processors(tmp_path: Path, monkeypatch, content: str, count: int):
    (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(machine, "CGROUP_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert machine.processors() == count


def test_the_older_form_of_a_quota(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP_MAX", tmp_path / "nowhere")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    for name, content in (("CGROUP_QUOTA", "250000\n"), ("CGROUP_PERIOD", "100000\n")):
        (tmp_path / name).write_text(content)
        monkeypatch.setattr(machine, name, tmp_path / name)
    assert machine.processors() == 3
    (tmp_path / "CGROUP_QUOTA").write_text("-1\n")
    assert machine.processors() == 8


def test_threads_are_timed_and_left_as_they_were(tiny_llama: Path, monkeypatch):
    monkeypatch.setattr(machine, "processors", lambda: 3)
    monkeypatch.setattr(machine, "TIMED_SECONDS", 0.05)
    times = machine.time_threads(open_checkpoint(str(tiny_llama)).load_model())
    assert sorted(times) == [1, 2, 3] and all(0 < seconds < 60 for seconds in times.values())
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(machine, "processors", lambda: 1)
    assert machine.time_threads(open_checkpoint(str(tiny_llama)).load_model()) == {}


def test_the_fastest_is_taken_and_more_threads_must_be_worth_it():
    assert machine.best_threads({1: 1.0, 2: 3.0}) == 1
    assert machine.best_threads({1: 1.0, 2: 0.5, 4: 0.3}) == 4
    assert machine.best_threads({1: 1.0, 2: 0.5, 4: 0.49}) == 2
    assert machine.best_threads({1: 1.0, 2: 1.2, 4: 0.5}) == 4
