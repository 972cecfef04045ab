""" "No loss within x points" against enumeration, scipy and statsmodels, and simulated outcomes whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from bitatlas.errors import UserError
from bitatlas.stats.margin import (
    equivalence_p,
    exact_p,
    items_for_no_loss,
    least_items,
    least_margin,
    no_loss_p,
    parse_points,
    score_p,
    tango_interval,
    tango_intervals,
    tango_z,
)
from bitatlas.stats.paired import compare_all, items_above_chance, mcnemar_p

PRECISIONS = ["reference", "uniform:int4_g64", "uniform:int2_g64", "plan"]
RUNS = 1000


def all_tables(n):
    """(lost, gained) of every outcome of n items."""
    lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = lost + gained <= n
    return lost[possible], gained[possible]


def probabilities(lost, gained, n, lost_rate, gained_rate):
    rates = [lost_rate, gained_rate, max(0.0, 1 - lost_rate - gained_rate)]
    return stats.multinomial.pmf(np.stack([lost, gained, n - lost - gained], axis=-1), n, rates)


# --- single numbers ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 400))
def test_the_score_test_at_no_difference_is_mcnemars(lost, gained, same):
    if lost + gained:
        expected = mcnemar([[0, lost], [gained, same]], exact=False, correction=False).statistic
        assert float(tango_z(lost, gained, lost + gained + same, 0.0)) ** 2 == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0.001, 0.3), st.data())
def test_without_gains_the_score_test_is_the_binomials(n, margin, data):
    """Where more is lost than the margin, no gain is the likeliest: the variance is that of `n` draws at the margin."""
    lost = data.draw(st.integers(0, math.floor(margin * n)))
    # the score test of one share (scipy has no name for it): the normal approximation at the null's own variance
    expected = stats.norm.cdf((lost - n * margin) / math.sqrt(n * margin * (1 - margin)))
    assert score_p(lost, 0, n, margin) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "margin"), [(12, 0.2), (20, 0.1), (30, 0.05)])
def test_the_exact_test_equals_enumeration_over_the_whole_null(n, margin):
    lost, gained = all_tables(n)
    statistic = tango_z(lost, gained, n, -margin)
    rates = [(gain + loss, gain) for loss in np.linspace(margin, 0.9, 25) for gain in np.linspace(0, (1 - loss) / 2, 60)]
    chances = np.stack([probabilities(lost, gained, n, *rate) for rate in rates])  # [rates, tables]
    for seen in ((0, 0), (1, 0), (1, 3), (2, 2), (0, 4)):
        clear = statistic >= float(tango_z(*seen, n, -margin)) - 1e-9
        # the coarser grid of the enumeration may miss the top by a little, never exceed it
        assert exact_p(*seen, n, margin) == pytest.approx(chances[:, clear].sum(axis=1).max(), abs=5e-4)
        assert exact_p(*seen, n, margin) >= chances[:, clear].sum(axis=1).max() - 1e-9


def test_without_flips_the_exact_test_is_the_binomials():
    for n, margin in ((59, 0.05), (149, 0.02), (299, 0.01)):
        assert exact_p(0, 0, n, margin) == pytest.approx(stats.binomtest(0, n, margin, alternative="less").pvalue, abs=1e-9)
        assert least_items(margin) == n
        assert least_margin(n) == pytest.approx(margin, rel=0.02)
        assert no_loss_p(0, 0, n - 1, margin) > 0.05


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 1500), st.floats(0.005, 0.2), st.data())
def test_one_sided_tests_and_the_90_percent_interval_agree(n, margin, data):
    flips = st.integers(0, n // 8)
    lost, gained = data.draw(flips), data.draw(flips)
    low, high = tango_interval(lost, gained, n, 0.9)
    p = score_p(lost, gained, n, margin)
    if abs(p - 0.05) > 1e-9:
        assert (p < 0.05) == (low > -margin)
    both = max(p, score_p(gained, lost, n, margin))
    if abs(both - 0.05) > 1e-9:
        assert (both < 0.05) == (-margin < low and high < margin)
    assert no_loss_p(lost, gained, n, margin) >= p
    assert equivalence_p(lost, gained, n, margin) == equivalence_p(gained, lost, n, margin) >= p


def test_points_as_people_write_them():
    assert [parse_points(text, "--margin") for text in ("1pp", "0.5", "2 points", "1.5 pp", "1 point")] == [1, 0.5, 2, 1.5, 1]
    for text in ("0", "100pp", "-1", "nan", "1%", "a lot", "1e1", "٣"):
        with pytest.raises(UserError, match=r"--margin .*: give percentage points, above 0 and below 100, like 2pp"):
            parse_points(text, "--margin")


# --- truth known -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "lost_rate", "gained_rate"), [(60, 0.05, 0.05), (100, 0.10, 0.02), (300, 0.03, 0.01), (1000, 0.2, 0.2)]
)
@pytest.mark.parametrize("level", [0.95, 0.90])
def test_intervals_cover_the_truth(n, lost_rate, gained_rate, level):
    draws = np.random.default_rng(2).multinomial(n, [lost_rate, gained_rate, 1 - lost_rate - gained_rate], size=RUNS)
    low, high = tango_intervals(draws[:, 0], draws[:, 1], n, level)
    truth = gained_rate - lost_rate
    error = math.sqrt(level * (1 - level) / RUNS)
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(level, abs=3.5 * error)


@pytest.mark.parametrize("n", [20, 52, 60])
@pytest.mark.parametrize("margin", [0.02, 0.05, 0.1])
def test_no_loss_is_never_claimed_too_often(n, margin):
    """The probability of a false claim, summed over all outcomes; the score test alone reaches 6.9 % at 52 items and 5 points."""
    lost, gained = all_tables(n)
    near = lost + gained <= n // 2  # with more flips nothing so small can be claimed
    lost, gained = lost[near], gained[near]
    claimed = tango_z(lost, gained, n, -margin) > stats.norm.ppf(0.95)
    claimed[claimed] = [no_loss_p(int(a), int(b), n, margin) < 0.05 for a, b in zip(lost[claimed], gained[claimed], strict=True)]
    for gain in (0.0, 0.01, 0.05, 0.1):
        assert probabilities(lost, gained, n, gain + margin, gain)[claimed].sum() <= 0.05


def simulated(generator, n, rates):
    """Outcomes of one task: the reference knows 60 % of the items; each precision loses and gains items at its own rates."""
    reference = generator.random(n) < 0.6
    outcomes = {"reference": reference}
    for name, (lost, gained) in zip(PRECISIONS[1:], rates, strict=True):
        flip = generator.random(n) < np.where(reference, lost / 0.6, gained / 0.4)
        outcomes[name] = reference ^ flip
    return outcomes


def test_a_loss_of_the_margin_is_rarely_called_no_loss():
    """Every precision truly loses 5 points: a claim "no loss within 5 points" from the reference is false."""
    generator = np.random.default_rng(23)
    false = 0
    for _ in range(RUNS):
        _, pairs = compare_all({"t": simulated(generator, 100, [(0.06, 0.01)] * 3)}, {"t": 0.25}, margin_points=5)
        false += any(pair.no_loss.held for pair in pairs if pair.first == "reference")
    assert false / RUNS <= 0.05


def test_no_loss_comes_out_where_there_is_none_and_the_items_suffice():
    generator = np.random.default_rng(29)
    needed = items_for_no_loss(20, 1000, 0.02, 0.05 / 5)  # 2 % flips, five pairs
    words = [
        [pair.verdict for pair in compare_all({"t": simulated(generator, needed, [(0.01, 0.01)] * 3)}, {"t": 0.25})[1]]
        for _ in range(150)
    ]
    first = [verdicts[0] for verdicts in words]
    assert first.count("no loss within 2 points") / len(first) >= 0.7
    assert set(first) <= {"no loss within 2 points", "inconclusive"}
    few = compare_all({"t": simulated(generator, needed // 8, [(0.01, 0.01)] * 3)}, {"t": 0.25})[1]
    assert {pair.verdict for pair in few} == {"inconclusive"}


@pytest.mark.parametrize(("flips", "margin", "alpha"), [(50, 0.05, 0.05), (20, 0.02, 0.05), (50, 0.05, 0.005)])
def test_items_for_no_loss_show_it_four_times_in_five(flips, margin, alpha):
    needed, rate = items_for_no_loss(flips, 1000, margin, alpha), flips / 1000
    draws = np.random.default_rng(31).multinomial(needed, [rate / 2, rate / 2, 1 - rate], size=RUNS)
    shown = np.mean([no_loss_p(int(lost), int(gained), needed, margin) < alpha for lost, gained, _ in draws])
    assert shown == pytest.approx(0.8, abs=0.07)  # the normal approximation, and what the exact test gives up


@pytest.mark.parametrize(("share", "chance", "tests"), [(0.05, 0.01, 4), (0.3, 0.25, 1), (0.4, 0.25, 5)])
def test_items_above_chance_show_it_four_times_in_five(share, chance, tests):
    needed = items_above_chance(share, chance, tests)
    critical = stats.binom.isf(0.05 / tests, needed, chance)
    assert stats.binom.sf(critical, needed, share) == pytest.approx(0.8, abs=0.1)
    assert items_above_chance(0.25, 0.25) is None


def test_guessing_is_called_at_chance_and_knowing_is_not():
    generator = np.random.default_rng(37)
    wrong = 0
    for _ in range(RUNS):
        right = generator.random((4, 60)) < 0.25
        _, pairs = compare_all({"t": dict(zip(PRECISIONS, right, strict=True))}, {"t": 0.25})
        wrong += any(pair.verdict != "at chance" for pair in pairs)
    assert wrong / RUNS <= 0.05
    knows = generator.random((4, 60)) < 0.7
    assert not any(
        p.verdict == "at chance" for p in compare_all({"t": dict(zip(PRECISIONS, knows, strict=True))}, {"t": 0.25})[1]
    )


# --- words -------------------------------------------------------------------------------------------------------------


def pair_of(lost, gained, both, n, chance=0.25, margin=2.0):
    first, second = np.zeros(n, bool), np.zeros(n, bool)
    first[: lost + both] = True
    second[lost : lost + both + gained] = True
    (pair,) = compare_all({"t": {"reference": first, "plan": second}}, {"t": chance}, margin)[1]
    return pair


def test_one_right_of_twenty_at_both_widths():
    """The users' overview: nothing can be concluded, why, and how many items it would take."""
    pair = pair_of(0, 0, 1, 20, chance=0.01)
    assert pair.verdict == "at chance"
    assert pair.text == (
        "at chance: 1 and 1 of 20 right, where guessing gets 0.2; a score not above chance supports no claim about bits; "
        "about 140 items would show a score of 1 in 20 to be above it; 20 items show no difference under 30 points"
    )
    assert pair.no_loss is not None
    assert not pair.no_loss.held
    choices = pair_of(0, 0, 1, 20, chance=0.25)
    assert "no number of items would change that at these scores" in choices.text


def test_twenty_items_cannot_tell_above_chance_either():
    text = pair_of(1, 1, 14, 20).text
    assert text == (
        "inconclusive: 20 items cannot tell (seen 0.0 points [−20, 20]); differences under 30 points would not show; "
        "about 1600 would show no loss within 2 points, if there is none"
    )


def test_a_significant_fall_within_the_margin_is_told_as_both():
    pair = pair_of(12, 0, 2400, 3000, margin=2.0)
    assert pair.verdict == "falls"
    assert pair.no_loss is not None
    assert pair.no_loss.held
    assert "falls: −0.4 points" in pair.text
    assert "but no loss within 2 points (90% interval [−0.6, −0.3], one-sided Holm p" in pair.text


def test_no_loss_is_told_with_its_interval_and_equivalence():
    pair = pair_of(2, 3, 800, 1000)
    assert pair.verdict == "no loss within 2 points"
    assert pair.text == (
        "no loss within 2 points: 0.1 points [−0.5, 0.7], 90% interval [−0.3, 0.6]; 2 of 1000 items lost, 3 gained "
        "(one-sided Holm p < 0.0001); nor gain: equivalent (p < 0.0001)"
    )


def test_no_loss_needs_something_to_lose():
    """30 of 100 where guessing gets 25: within 10 points of it lies chance itself."""
    pair = pair_of(0, 0, 330, 1000, margin=10.0)
    assert pair.no_loss is not None
    assert pair.no_loss.holm_p < 0.05
    assert pair.verdict == "inconclusive"
    assert "reference is not far enough above chance to speak of no loss within 10 points" in pair.text


def test_holm_runs_over_all_claims():
    first = np.ones(300, bool)
    task = {"reference": first, "uniform:int4_g64": first, "uniform:int2_g64": first, "plan": first}
    _, pairs = compare_all({"t": task}, {"t": 0.25})
    alone = no_loss_p(0, 0, 300, 0.02)
    assert [pair.no_loss.holm_p for pair in pairs] == pytest.approx([5 * alone] * 5)
    assert mcnemar_p(0, 0) == 1.0
