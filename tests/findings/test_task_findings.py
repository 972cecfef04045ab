"""Tasks on their own text, and the widths that hold them: made-up damage and outcomes whose truth is known."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bitatlas.findings.shares import LayerRows, shares_of
from bitatlas.findings.tasks import (
    HELD,
    LOST,
    differing,
    smallest_held,
    task_damages,
    task_text_findings,
    task_widths,
    width_findings,
)
from bitatlas.measure.screens import general_rows
from bitatlas.stats.paired import compare_all

LAYERS = 6
PROFILE = np.array([0.5, 1.0, 2.0, 1.0, 0.7, 0.8])


def rows_of(profile, rows, seed):
    """Additive damage: each layer adds `profile`, and rows differ in how much everything hurts."""
    generator = np.random.default_rng(seed)
    each = profile[:, None] * generator.lognormal(0, 0.3, (len(profile), rows)) * generator.lognormal(0, 0.3, rows)
    high = np.full(rows, 0.05)
    low = high + each.sum(axis=0)
    return LayerRows(high, low, high + each, low - each, np.ones(len(profile)))


def record(profile, seed=0):
    general = rows_of(PROFILE, 48, 1000 + seed)
    (found,) = task_damages({"t": ({"int2_g64": np.ones(16)}, rows_of(profile, 16, seed))}, general, seed)
    return found, shares_of(general, seed)


def test_equal_profiles_are_rarely_called_different():
    runs = 60
    false = sum(bool(differing(record(PROFILE, seed)[0])) for seed in range(runs))
    # a true rate of 5 % gives more than 7 of 60 in 1 % of the cases
    assert false <= 7


def test_a_layer_that_the_task_needs_more_is_found():
    changed = PROFILE.copy()
    changed[4] = 3.0
    found, _ = record(changed)
    assert 4 in differing(found)
    (finding,) = task_text_findings([found])
    assert finding.verdict == "holds"
    assert "ore critical there: layer" in finding.text
    assert "(layer 4: " in finding.text
    same, _ = record(PROFILE)
    (finding,) = task_text_findings([same])
    assert finding.verdict == "inconclusive"
    assert "No layer's criticality is shown to differ" in finding.text


def test_tasks_are_one_family_and_without_general_text_of_their_length_nothing_is_compared():
    changed = PROFILE.copy()
    changed[4] = 3.0
    texts = {"t": ({}, rows_of(changed, 16, 0)), **{f"same {i}": ({}, rows_of(PROFILE, 16, 1 + i)) for i in range(3)}}
    general = rows_of(PROFILE, 48, 1000)
    alone = task_damages({"t": texts["t"]}, general)[0].q_values
    together = task_damages(texts, general)
    assert together[0].q_values[4] > alone[4]
    assert differing(together[0])
    assert together[0].general == together[1].general
    (untold,) = task_damages({"t": texts["t"]}, None)
    assert untold.q_values == [1.0] * LAYERS
    assert task_text_findings([untold])[0].verdict == "inconclusive"


def test_the_general_text_is_cut_to_the_tasks_length_and_spread_over_all_rows():
    test = torch.arange(100 * 8).reshape(100, 8)
    cut, _ = general_rows(test, 3)
    assert cut.shape == (32, 3)
    assert (cut[0].tolist(), cut[-1].tolist()) == ([0, 1, 2], [792, 793, 794])
    assert len(np.unique(cut[:, 0].numpy())) == 32
    assert general_rows(test[:5], 3)[0].tolist() == test[:5, :3].tolist()
    assert general_rows(test, 8)[0] is test


def test_the_rank_correlation_equals_scipys():
    found, general = record(PROFILE[::-1].copy())
    own = [m.mean for m in found.criticality]
    other = [general.criticality([layer])[0] for layer in range(LAYERS)]
    assert found.agreement is not None
    assert found.agreement.rho == pytest.approx(spearmanr(own, other).statistic, abs=1e-9)
    assert found.agreement.ci95[0] <= found.agreement.rho <= found.agreement.ci95[1]


def outcomes(lost_by_format, n=2000):
    """The reference knows 80 %; each width loses the first so many of these."""
    reference = np.arange(n) < 0.8 * n
    found = {"reference": reference}
    for name, lost in lost_by_format.items():
        found[f"uniform:{name}"] = reference & (np.arange(n) >= lost)
    return found


@pytest.mark.parametrize(
    ("lost", "verdicts", "best"),
    [
        ({"int4_g64": 0, "int3_g64": 10, "int2_g64": 400}, [LOST, HELD, HELD], "int3_g64"),
        ({"int4_g64": 30, "int3_g64": 30, "int2_g64": 400}, [LOST, LOST, LOST], None),
        ({"int4_g64": 400, "int3_g64": 0, "int2_g64": 0}, [HELD, HELD, LOST], None),  # a wider one is lost: chance, or a bug
        ({"int4_g64": 0, "int3_g64": 0, "int2_g64": 0}, [HELD, HELD, HELD], "int2_g64"),
    ],
)
def test_the_smallest_width_held(lost, verdicts, best):
    _, pairs = compare_all({"t": outcomes(lost)}, {"t": 0.25})
    widths = task_widths(pairs)["t"]
    assert [one.format for one in widths] == ["int2_g64", "int3_g64", "int4_g64"]
    assert [one.verdict for one in widths] == verdicts
    found = smallest_held(widths)
    assert (found.format if found else None) == best
    (finding,) = width_findings(pairs)
    assert finding.verdict == (best or ("lost" if set(verdicts) == {LOST} else "inconclusive"))


def test_few_items_hold_nothing_and_lose_nothing():
    _, pairs = compare_all({"t": outcomes({"int4_g64": 0, "int2_g64": 1}, n=20)}, {"t": 0.25})
    assert {one.verdict for one in task_widths(pairs)["t"]} == {"inconclusive"}
    nothing = np.zeros(20, bool)
    _, pairs = compare_all({"t": {"reference": nothing, "uniform:int2_g64": nothing}}, {"t": 0.25})
    (finding,) = width_findings(pairs)
    assert finding.verdict == "below chance"  # none of 20, where guessing gets 5
    _, pairs = compare_all({"t": {"reference": nothing[:8], "uniform:int2_g64": nothing[:8]}}, {"t": 0.25})
    (finding,) = width_findings(pairs)
    assert finding.verdict == "at chance"
