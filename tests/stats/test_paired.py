"""Paired statistics against scipy, statsmodels, published intervals, brute force and simulation."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from bitatlas.stats.margin import tango_interval
from bitatlas.stats.paired import (
    above_chance_p,
    compare_all,
    detectable_points,
    headline_pairs,
    items_needed,
    least_flips,
    mcnemar_p,
    score,
    scores,
    wilson,
)

PRECISIONS = ["reference", "uniform:int4_g64", "uniform:int2_g64", "plan"]


@st.composite
def tables(draw, most=60):
    """lost, gained, n"""
    n = draw(st.integers(1, most))
    lost = draw(st.integers(0, n))
    return lost, draw(st.integers(0, n - lost)), n


def outcomes_of(lost, gained, n, both=0):
    """Two rows of outcomes with so many flips, and `both` items right in both."""
    first = np.zeros(n, bool)
    second = np.zeros(n, bool)
    first[: lost + both] = True
    second[lost : lost + both + gained] = True
    return first, second


def pair_of(lost, gained, n, both=0, chance=0.0):
    first, second = outcomes_of(lost, gained, n, both)
    (pair,) = compare_all({"t": {"reference": first, "plan": second}}, {"t": chance})[1]
    return pair


# --- single numbers ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1), st.floats(0.001, 0.999))
def test_binomial_numbers_equal_the_libraries(n, share, chance):
    correct = round(share * n)
    assert wilson(correct, n) == pytest.approx(proportion_confint(correct, n, method="wilson"), abs=1e-9)
    expected = stats.binomtest(correct, n, chance, alternative="greater").pvalue
    assert above_chance_p(correct, n, chance) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(tables(400))
def test_mcnemar_equals_statsmodels(table):
    lost, gained, n = table
    expected = mcnemar([[0, lost], [gained, n - lost - gained]], exact=True).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "low", "high"),
    [
        (7, 1, 21, -0.517, -0.026),  # airway hyper-responsiveness: Bentur et al. 2009, in Fagerland et al. 2014
        (16, 6, 161, -0.1240, -0.0054),  # complete response: Cavo et al. 2012, in the same textbook
    ],
)
def test_tango_equals_published_intervals(lost, gained, n, low, high):
    digits = 3 if n == 21 else 4
    assert [round(bound, digits) for bound in tango_interval(lost, gained, n)] == [low, high]


def tango_by_brute_force(lost, gained, n):
    """Score test with the rates found by numerical maximization of the likelihood, inverted by root search."""

    def likeliest(difference):
        def minus_log_likelihood(q):
            terms = [(gained, q + difference), (lost, q), (n - lost - gained, 1 - 2 * q - difference)]
            return -sum(count * math.log(max(rate, 1e-300)) for count, rate in terms if count)

        bounds = (max(0.0, -difference), (1 - difference) / 2)
        return optimize.minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x

    def excess(difference):
        q = likeliest(difference)
        variance = (2 * q + difference - difference**2) / n
        return abs((gained - lost) / n - difference) - stats.norm.ppf(0.975) * math.sqrt(max(0.0, variance))

    seen = (gained - lost) / n
    near = 1e-6 if abs(seen) == 1 else 0  # at -1 and 1 themselves the variance is 0
    low = optimize.brentq(excess, -1 + 1e-9, seen - near) if seen > -1 else -1.0
    high = optimize.brentq(excess, seen + near, 1 - 1e-9) if seen < 1 else 1.0
    return low, high


@settings(max_examples=60, deadline=None)
@given(tables())
def test_tango_equals_brute_force(table):
    # the bounded search finds a likelihood's flat maximum to about 1e-7
    assert tango_interval(*table) == pytest.approx(tango_by_brute_force(*table), abs=3e-6)


@settings(max_examples=100, deadline=None)
@given(tables(3000))
def test_tango_is_an_interval_and_mirrors(table):
    lost, gained, n = table
    low, high = tango_interval(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert tango_interval(gained, lost, n) == pytest.approx((-high, -low), abs=1e-12)


def test_tango_without_flips_is_wilson_like():
    z2 = stats.norm.ppf(0.975) ** 2
    assert tango_interval(0, 0, 20) == pytest.approx((-z2 / (20 + z2), z2 / (20 + z2)), abs=1e-12)


def test_tango_covers():
    generator = np.random.default_rng(3)
    n, rates = 40, [0.15, 0.05, 0.8]
    tables_ = generator.multinomial(n, rates, size=2000)
    hits = np.mean([low <= -0.10 <= high for low, high in (tango_interval(lost, gained, n) for lost, gained, _ in tables_)])
    assert hits == pytest.approx(0.95, abs=0.02)


# --- how much can be seen ----------------------------------------------------------------------------------------------


def test_least_flips_is_where_the_exact_test_can_reach_the_level():
    for tests in (1, 5, 12):
        flips = least_flips(tests)
        assert mcnemar_p(flips, 0) <= 0.05 / tests < mcnemar_p(flips - 1, 0)


def power(n, lost_rate, gained_rate, runs=4000):
    draws = np.random.default_rng(1).multinomial(n, [lost_rate, gained_rate, 1 - lost_rate - gained_rate], size=runs)
    return np.mean([mcnemar_p(lost, gained) < 0.05 for lost, gained, _ in draws])


@pytest.mark.parametrize(("n", "rate"), [(300, 0.2), (1000, 0.1), (200, 0.5)])
def test_detectable_difference_is_found_four_times_in_five(n, rate):
    difference = detectable_points(round(rate * n), n) / 100
    assert difference == pytest.approx(2.80 * math.sqrt(rate / n), rel=2e-3)
    # the exact test gives up a few points of power; the true spread, below sqrt(F)/n, gives some back
    assert power(n, (rate + difference) / 2, (rate - difference) / 2) == pytest.approx(0.8, abs=0.06)


def test_detectable_difference_never_falls_below_what_the_exact_test_needs():
    assert detectable_points(0, 20) == pytest.approx(30)
    assert detectable_points(4, 20) == pytest.approx(30)
    assert detectable_points(9, 20) == pytest.approx(42, abs=0.1)
    assert detectable_points(2, 5) > 100


def test_items_needed_is_where_the_seen_difference_becomes_detectable():
    needed = items_needed(15, 10, 100)
    assert needed is not None
    assert detectable_points(round(25 * needed / 100), needed) == pytest.approx(5, rel=0.05)
    assert power(needed, 0.15, 0.10) == pytest.approx(0.8, abs=0.06)
    assert items_needed(10, 15, 100) == needed
    assert items_needed(15, 10, 100, tests=10) > needed
    assert items_needed(7, 7, 100) is None


@settings(max_examples=200, deadline=None)
@given(tables(300))
def test_an_inconclusive_difference_needs_more_items_than_there_were(table):
    pair = pair_of(*table)
    if pair.verdict == "inconclusive" and pair.items_needed is not None:
        assert pair.items_needed > table[2]


# --- verdicts ----------------------------------------------------------------------------------------------------------


def test_scores_and_the_holm_correction_over_precisions():
    right = np.zeros(20, bool)
    right[:9] = True  # one-sided p = 0.041 at chance 0.25
    assert score("arc", "plan", right, 0.25).above_chance
    four = scores("arc", dict.fromkeys(PRECISIONS, right), 0.25)
    assert [one.above_chance for one in four.values()] == [False] * 4
    assert four["plan"].wilson95 == pytest.approx(proportion_confint(9, 20, method="wilson"))
    assert (four["plan"].correct, four["plan"].n) == (9, 20)


def test_pairs_that_are_tested():
    assert headline_pairs(PRECISIONS) == [
        ("reference", "uniform:int4_g64"),
        ("reference", "uniform:int2_g64"),
        ("reference", "plan"),
        ("uniform:int4_g64", "uniform:int2_g64"),
        ("uniform:int2_g64", "plan"),
    ]
    assert headline_pairs(["mine", "yours"]) == [("mine", "yours")]
    assert headline_pairs(["uniform:int2_g64", "uniform:int4_g64"]) == [
        ("uniform:int2_g64", "uniform:int4_g64"),
        ("uniform:int4_g64", "uniform:int2_g64"),
    ]
    assert headline_pairs(["reference"]) == []


@pytest.mark.parametrize(
    ("lost", "gained", "both", "verdict"),
    [(30, 5, 50, "falls"), (5, 30, 50, "rises"), (6, 5, 50, "inconclusive"), (1, 1, 0, "at chance"), (0, 0, 1, "at chance")],
)
def test_verdicts(lost, gained, both, verdict):
    pair = pair_of(lost, gained, 100, both, chance=0.05)
    assert pair.verdict == verdict
    assert pair.text.startswith(f"{verdict}: ")
    assert pair.difference.mean == pytest.approx(gained - lost)
    assert (pair.lost, pair.gained, pair.difference.base, pair.difference.rows) == (lost, gained, "reference", "items:t")


def test_one_of_twenty_open_answers_is_at_chance():
    for k in (0, 1):
        assert pair_of(k, 0, 20, chance=0.01).verdict == "at chance"


def test_chance_wins_over_a_significant_fall():
    # 25 of 100 and 5 of 100 where guessing gets 25: the fall is significant, and says nothing about bits
    pair = pair_of(20, 0, 100, both=5, chance=0.25)
    assert pair.holm_p < 0.001
    assert pair.verdict == "below chance"
    assert pair_of(8, 0, 100, both=17, chance=0.25).verdict == "at chance"


def test_below_chance_is_another_word_than_at_chance():
    assert pair_of(0, 0, 64, both=0, chance=0.25).verdict == "below chance"
    assert pair_of(0, 0, 64, both=0, chance=0.0).verdict == "at chance"  # nothing is below no chance
    at = score("t", "plan", [1] * 10 + [0] * 54, 0.25)
    assert (at.above_chance, at.below_chance) == (False, False)


def test_texts():
    assert pair_of(1, 0, 20, both=11).text == (
        "inconclusive: 20 items cannot tell (seen −5.0 points [−24, 12]); about 160 would show a difference like this; "
        "about 840 would show no loss within 2 points, if there is none"
    )
    assert pair_of(2, 2, 20, both=11).text == (
        "inconclusive: 20 items cannot tell (seen 0.0 points [−23, 23]); differences under 30 points would not show; "
        "about 3200 would show no loss within 2 points, if there is none"
    )
    assert pair_of(20, 4, 200, both=100).text == (
        "falls: −8.0 points [−13.2, −3.5]; 20 of 200 items lost, 4 gained (Holm p = 0.0015)"
    )
    assert pair_of(1, 1, 20, chance=0.1).text == (
        "at chance: 1 and 1 of 20 right, where guessing gets 2; a score not above chance supports no claim about bits; "
        "no number of items would change that at these scores; 20 items show no difference under 30 points"
    )


def test_holm_runs_over_every_pair_of_every_task():
    first, second = outcomes_of(9, 1, 100, both=60)  # p = 0.021
    task = {"reference": first, "uniform:int4_g64": first, "uniform:int2_g64": second, "plan": second}
    all_scores, pairs = compare_all({"a": task, "b": task}, {"a": 0.25, "b": 0.25})
    assert len(all_scores) == 8
    assert len(pairs) == 10
    changed = [pair for pair in pairs if pair.lost]
    assert [pair.holm_p for pair in changed] == pytest.approx([min(1, 10 * mcnemar_p(9, 1))] * len(changed))
    assert {pair.verdict for pair in changed} == {"inconclusive"}
    assert "alone" in changed[0].text
    assert "among 10 comparisons" in changed[0].text


def test_records_hold_plain_numbers():
    all_scores, pairs = compare_all({"t": {"reference": [1, 0, 1], "plan": [0, 0, 1]}}, {"t": 0.25})
    plain = [value for record in [*all_scores, *pairs] for value in asdict(record).values()]
    assert {type(value) for value in plain} <= {str, int, float, bool, tuple, dict, type(None)}
    assert type(all_scores[0].wilson95[0]) is float
    assert type(pairs[0].difference.ci95[0]) is float


def test_unequal_items_are_refused():
    with pytest.raises(ValueError, match="same items"):
        compare_all({"t": {"reference": [1, 0], "plan": [1]}}, {"t": 0.25})
    with pytest.raises(ValueError, match="right or wrong"):
        compare_all({"t": {"reference": [0.5, 1]}}, {"t": 0.25})
    assert compare_all({}, {}) == ([], [])


# --- error rates -------------------------------------------------------------------------------------------------------


def test_false_claims_stay_below_five_percent():
    """Two tasks, four precisions that differ by chance only: any "falls" or "rises" is false."""
    generator = np.random.default_rng(17)
    runs = 1000
    false = single = 0
    for _ in range(runs):
        skill = generator.random((2, 60)) < 0.6  # what the model knows, shared by the precisions
        noise = generator.random((2, 4, 60)) < 0.25  # each precision answers a quarter of the items anew
        anew = generator.random((2, 4, 60)) < 0.6
        right = np.where(noise, anew, skill[:, None])
        outcomes = {task: dict(zip(PRECISIONS, right[number], strict=True)) for number, task in enumerate("ab")}
        _, pairs = compare_all(outcomes, {"a": 0.25, "b": 0.25})
        false += any(pair.verdict in ("falls", "rises") for pair in pairs)
        single += pairs[0].mcnemar_p < 0.05
    assert false / runs <= 0.05
    assert single / runs <= 0.05


def test_guessing_is_rarely_called_above_chance():
    generator = np.random.default_rng(19)
    draws = generator.random((1000, 4, 40)) < 0.25
    wrong = [
        any(one.above_chance for one in scores("t", dict(zip(PRECISIONS, draw, strict=True)), 0.25).values()) for draw in draws
    ]
    assert np.mean(wrong) <= 0.05
