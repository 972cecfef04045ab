"""A plan is judged with a model: rivals on drawn rows of the whole text, each row once, and nothing again in a second judging."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bitatlas.cli.show import show_plan
from bitatlas.plan.baselines import RANDOM_PLANS
from bitatlas.plan.budget import costs_of
from bitatlas.plan.judge import judge
from bitatlas.plan.looks import look_order
from bitatlas.plan.search import Candidate
from bitatlas.records import Budget
from bitatlas.run.prepare import prepare
from surveys import QUIET, settings_for

ROWS = 24


def test_rivals_are_measured_in_looks(tiny_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = prepare(settings_for(tiny_llama, text, rows=(2, 2, ROWS)), tmp_path, False, QUIET)
    asked: list[list[int]] = []

    def measure(plans, split, rows=None):
        asked.append(list(range(ROWS)) if rows is None else rows)
        return session.measure(plans, split, rows)

    with closing(session.journal):
        session.bank.fill(session.settings.formats)
        subject, budget = session.subject, Budget("code_bits", 3.0)
        limit = costs_of(budget, subject.units, subject.formats, subject.info).limit
        assert limit is not None
        choice = np.zeros(len(subject.units), dtype=np.int64)  # narrow everywhere: the plan is its uniform rival
        candidate = Candidate(choice, 1.0, 1.0, limit, {})
        plan = judge(subject, budget, candidate, measure).plan
        journaled = session.journal.entries()
        assert judge(subject, budget, candidate, measure).plan == plan
        assert session.journal.entries() == journaled
        whole = session.measure({"plan": plan.modules}, "test")["plan"]
        drawn = session.measure({"plan": plan.modules}, "test", asked[1])["plan"]
    order = look_order(ROWS, subject.test_blocks, subject.seed)
    assert asked[:2] == [list(range(ROWS)), sorted(order[:8])]
    assert all(rows == sorted(order[8:]) for rows in asked[2:3])
    np.testing.assert_allclose(drawn, whole[asked[1]], rtol=1e-4)
    assert sum(baseline.is_random for baseline in plan.baselines) == RANDOM_PLANS
    fewer = [baseline for baseline in plan.baselines if baseline.damage.n < ROWS]
    assert fewer and all(baseline.damage.n == 8 and not baseline.name.startswith("uniform") for baseline in fewer)
    assert f"{len(fewer)} of these" in plan.verdict or plan.standing == "worse"
    show_plan(plan)
    assert ("(8 rows)" in capsys.readouterr().out) == any(not baseline.is_random for baseline in fewer)
