"""What item-by-item outcomes of several precisions say, and what they cannot say.

Every precision answers the same items, so two precisions are compared by their flips: items that only one of them gets right.
An exact test (McNemar, two-sided binomial on the flips) decides, corrected by Holm over all pairs of all tasks of a run; the
interval of the difference is Tango's score interval, which stays inside -100..100 points and is sound for few flips.
A score that is not above chance supports no claim about bits, whatever the test says. Clearly below chance is another thing than at chance
(0 of 64 where guessing gets 16): the model does not guess, it answers something else, and that is said.

"No loss within x points" is a claim of its own, with its own test (see `stats.margin`) and its own Holm correction over the same pairs: that
a fall was not seen does not show it. It is made only where the first of the pair is above chance by more than x, since a loss of x that
ends at chance is no small one. A fall may be significant and still within x: then both are said.

Smallest detectable difference. An item's change c is +1 (gained), -1 (lost) or 0. With F flips among n items and no true
difference, the mean of c over the items has variance E[c^2] / n = (F / n) / n, that is standard deviation sqrt(F) / n.
A two-sided 5 % test finds a true difference in 80 % of the cases where it is 1.96 + 0.84 = 2.80 standard deviations:
2.80 sqrt(F) / n as a share, 280 sqrt(F) / n in points. (With the flip rate f = F / n that is 2.80 sqrt(f / n); the count F in
place of f would make it sqrt(n) times too large.)
The exact test cannot reach 5 % with fewer than 6 flips, so nothing below 6 items is detectable, however few flips were seen.

Left out: effects of the prompt and of sampling (greedy decoding, one prompt); tests that pool tasks.
Sources: Wilson 1927; McNemar 1947; Tango 1998; Connor 1987 (sample size); Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, ndtri  # the distributions of scipy.stats, without its overhead a call

from bitatlas.records import Measured, NoLoss, TaskPair, TaskScore
from bitatlas.records.formats import by_width
from bitatlas.records.text import given, p_is, p_value
from bitatlas.stats.bootstrap import holm
from bitatlas.stats.margin import (
    ALPHA,
    MARGIN_POINTS,
    POWER,
    equivalence_p,
    items_for_no_loss,
    no_loss_p,
    round_up,
    tango_interval,
)

UNIFORM = "uniform:"
MANY = 500  # items, from which on a binomial is normal enough to say "about so many"
BELOW_ALPHA = 0.01  # of "below chance": so guessing is called "at chance" in 95 of 100 tasks, whichever side the luck is on
AT_CHANCE, BELOW_CHANCE, NO_LOSS = "at chance", "below chance", "no loss"

Outcomes = Mapping[str, ArrayLike]  # precision -> right or wrong, bool [items]
Bools = NDArray[np.bool_]


# --- single numbers ----------------------------------------------------------------------------------------------------


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share, 0..1."""
    z2 = float(ndtri(1 - ALPHA / 2)) ** 2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # at 0 and n right the bound is exactly 0 and 1, which the subtraction misses by a rounding error
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def above_chance_p(correct: int, n: int, chance: float) -> float:
    """Return the one-sided exact binomial p of "the model guesses". With unequal chances an item, their mean errs on the safe side."""
    return float(bdtrc(correct - 1, n, chance))


def below_chance_p(correct: int, n: int, chance: float) -> float:
    """Return the one-sided exact binomial p of "the model is at least as good as guessing"."""
    return float(bdtr(correct, n, chance))


def mcnemar_p(lost: int, gained: int) -> float:
    """Return the exact two-sided p of "a flip goes either way with equal chance"."""
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def least_flips(tests: int = 1) -> int:
    """Return the flips, all one way, below which the exact test stays above 5 % / tests: 2 * 0.5**6 = 0.031 makes it 6 for one test."""
    return math.ceil(math.log2(2 * tests / ALPHA))


def detectable_points(flips: int, n: int) -> float:
    """Return the smallest true difference that n items with so many flips would have shown with 80 % power, in points.

    Derived in the module's docstring. Above 100 points where the items are too few to show anything.
    """
    return 100 * max(_sigmas(1) * math.sqrt(flips), least_flips()) / n


def items_needed(lost: int, gained: int, n: int, tests: int = 1) -> int | None:
    """Return about how many items would settle the seen difference at the seen rate of flips, two digits; None if none was seen.

    Solves detectable = seen for n: sigmas^2 (F / n) / ((gained - lost) / n)^2. `tests`: the family that is corrected for.
    """
    change = abs(gained - lost)
    if change == 0:
        return None
    return round_up(n * max(_sigmas(tests) ** 2 * (lost + gained) / change**2, least_flips(tests) / change))


def items_above_chance(share: float, chance: float, tests: int = 1) -> int | None:
    """Return about how many items show a true `share` to be above `chance` in 80 % of the cases; None where it is not.

    By the normal approximation of both binomials; where it says few, searched for with the exact one-sided test at 5 % / tests.
    """
    if share <= chance:
        return None
    at_chance, at_share = (math.sqrt(rate * (1 - rate)) for rate in (chance, share))
    distance = float(ndtri(1 - ALPHA / tests)) * at_chance + float(ndtri(POWER)) * at_share
    about = (distance / (share - chance)) ** 2
    if about > MANY:
        return round_up(about)
    n = max(1, round(0.7 * about))
    while bdtrc(_least_correct(n, chance, tests) - 1, n, share) < POWER:
        n += max(1, n // 100)
    return round_up(n)


def _least_correct(n: int, chance: float, tests: int) -> int:
    """Return the fewest right answers of n that the test against chance calls above it."""
    right = np.arange(n + 2)
    return int((bdtrc(right - 1, n, chance) < ALPHA / tests).argmax())


def _sigmas(tests: int) -> float:
    """Return the standard deviations that are found with 80 % power at 5 % / tests, two-sided: 2.80 for one test."""
    return float(ndtri(1 - ALPHA / (2 * tests)) + ndtri(POWER))


# --- records -----------------------------------------------------------------------------------------------------------


def score(task: str, precision: str, correct: ArrayLike, chance: float) -> TaskScore:
    """Return k of n with its interval. correct: bool [items]; chance: share that guessing gets right. Above and below chance are uncorrected."""
    outcomes = _bools(correct)
    k, n = int(outcomes.sum()), len(outcomes)
    above, below = above_chance_p(k, n, chance) < ALPHA, below_chance_p(k, n, chance) < BELOW_ALPHA
    return TaskScore(task, precision, k, n, chance, wilson(k, n), above, below)


def _bools(correct: ArrayLike) -> Bools:
    array = np.asarray(correct)
    if array.ndim != 1 or len(array) == 0 or not np.isin(array, (0, 1)).all():
        raise ValueError("correct: one row of right or wrong, at least one item")
    return array.astype(bool)


def scores(task: str, outcomes: Outcomes, chance: float) -> dict[str, TaskScore]:
    """Return a task's scores by precision; "above chance" and "below chance" are each corrected by Holm over the precisions."""
    single = [score(task, precision, correct, chance) for precision, correct in outcomes.items()]
    above, below = (holm([test(s.correct, s.n, chance) for s in single]) for test in (above_chance_p, below_chance_p))
    return {
        s.precision: replace(s, above_chance=bool(p < ALPHA), below_chance=bool(q < BELOW_ALPHA))
        for s, p, q in zip(single, above, below, strict=True)
    }


def headline_pairs(precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs that are tested: the reference (else the first) with every other, uniform high with low, low with the plan."""
    names = list(precisions)
    first = "reference" if "reference" in names else names[0]
    pairs = [(first, name) for name in names if name != first]
    uniform = by_width([name.removeprefix(UNIFORM) for name in names if name.startswith(UNIFORM)])
    if uniform:
        low, high = UNIFORM + uniform[0], UNIFORM + uniform[-1]
        pairs += [pair for pair in ((high, low), (low, "plan")) if pair[0] != pair[1] and pair[1] in names]
    return list(dict.fromkeys(pairs))


def compare_all(
    outcomes: Mapping[str, Outcomes],
    chance: Mapping[str, float],
    margin_points: float = MARGIN_POINTS,
    pairs_of: Callable[[Sequence[str]], list[tuple[str, str]]] = headline_pairs,
) -> tuple[list[TaskScore], list[TaskPair]]:
    """Return scores and tested pairs of every task.

    outcomes: task -> precision -> bool [items], the same items in the same order for every precision of a task.
    chance: task -> share that guessing gets right; `margin_points`: of "no loss within"; pairs_of: those that are tested, of a task's precisions. Holm's families are every pair of every task,
    those at chance included: a family chosen after looking would not be corrected. Raises ValueError where a task's precisions differ
    in items.
    """
    all_scores: list[TaskScore] = []
    tested: list[_Flips] = []
    for task, by_precision in outcomes.items():
        right = {precision: _bools(correct) for precision, correct in by_precision.items()}
        if len({len(correct) for correct in right.values()}) != 1:
            raise ValueError(f"{task}: every precision must have answered the same items")
        of_task = scores(task, right, chance[task])
        all_scores += of_task.values()
        for first, second in pairs_of(list(right)):
            lost, gained = int((right[first] & ~right[second]).sum()), int((~right[first] & right[second]).sum())
            tested.append(_Flips(of_task[first], of_task[second], len(right), lost, gained))
    adjusted = holm([mcnemar_p(flips.lost, flips.gained) for flips in tested])
    margin = margin_points / 100
    no_loss = holm([no_loss_p(flips.lost, flips.gained, flips.first.n, margin) for flips in tested])
    pairs = [
        _pair(flips, holm_p=float(p), no_loss=_no_loss(flips, margin_points, float(q), len(tested)), tests=len(tested))
        for flips, p, q in zip(tested, adjusted, no_loss, strict=True)
    ]
    return all_scores, pairs


@dataclass(frozen=True)
class _Flips:
    """A pair before its tests. `precisions`: how many of the task were tested against chance."""

    first: TaskScore
    second: TaskScore
    precisions: int
    lost: int
    gained: int


def _no_loss(flips: _Flips, margin_points: float, holm_p: float, tests: int) -> NoLoss:
    n, margin = flips.first.n, margin_points / 100
    low, high = tango_interval(flips.lost, flips.gained, n, 1 - 2 * ALPHA)
    return NoLoss(
        margin_points=margin_points,
        ci90=(100 * low, 100 * high),
        p=no_loss_p(flips.lost, flips.gained, n, margin),
        holm_p=holm_p,
        equivalence_p=equivalence_p(flips.lost, flips.gained, n, margin),
        items_needed=items_for_no_loss(flips.lost + flips.gained, n, margin, ALPHA / tests),
        held=holm_p < ALPHA and flips.first.above_chance and _room(flips.first) > margin_points,
    )


def _room(score: TaskScore) -> float:
    """Return how far above chance a score is, in points: what there is to lose."""
    return 100 * (score.correct / score.n - score.chance)


def _pair(flips: _Flips, holm_p: float, no_loss: NoLoss, tests: int) -> TaskPair:
    first, second, lost, gained = flips.first, flips.second, flips.lost, flips.gained
    n = first.n
    low, high = tango_interval(lost, gained, n)
    points = Measured(100 * (gained - lost) / n, (100 * low, 100 * high), "points", first.precision, f"items:{first.task}", n)
    if not (first.above_chance or second.above_chance):
        verdict = BELOW_CHANCE if first.below_chance or second.below_chance else AT_CHANCE
    elif holm_p < ALPHA:
        verdict = "rises" if gained > lost else "falls"
    else:
        verdict = within(no_loss.margin_points) if no_loss.held else "inconclusive"
    pair = TaskPair(
        task=first.task,
        first=first.precision,
        second=second.precision,
        difference=points,
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar_p(lost, gained),
        holm_p=holm_p,
        detectable_points=detectable_points(lost + gained, n),
        items_needed=items_needed(lost, gained, n, tests),
        verdict=verdict,
        text="",
        no_loss=no_loss,
    )
    return replace(pair, text=_text(pair, flips, tests))


# --- words -------------------------------------------------------------------------------------------------------------


def within(points: float) -> str:
    """Return the verdict "no loss within x points"."""
    return f"{NO_LOSS} within {given(round(points, 9))} point{'' if points == 1 else 's'}"


def _text(pair: TaskPair, flips: _Flips, tests: int) -> str:
    """Return the sentence that is printed; it begins with the verdict."""
    assert pair.no_loss is not None
    if pair.verdict in (AT_CHANCE, BELOW_CHANCE):
        return _at_chance_text(pair, flips)
    n, room = flips.first.n, pair.no_loss
    seen = f"{_signed(pair.difference.mean)} points {_bracket(pair.difference.ci95)}"
    counts = f"{pair.lost} of {n} items lost, {pair.gained} gained"
    if pair.verdict.startswith(NO_LOSS):
        also = f"; nor gain: equivalent ({p_is(room.equivalence_p)})" if room.equivalence_p < ALPHA / tests else ""
        return f"{pair.verdict}: {seen}, 90% interval {_bracket(room.ci90)}; {counts} (one-sided Holm {p_is(room.holm_p)}){also}"
    if pair.verdict != "inconclusive":
        also = ""
        if pair.verdict == "falls" and room.held:
            also = f"; but {within(room.margin_points)} (90% interval {_bracket(room.ci90)}, one-sided Holm {p_is(room.holm_p)})"
        return f"{pair.verdict}: {seen}; {counts} (Holm {p_is(pair.holm_p)}){also}"
    start = f"inconclusive: {n} items cannot tell (seen {seen})"
    if pair.items_needed is None:
        start += f"; differences under {pair.detectable_points:.0f} points would not show"
    else:
        if pair.mcnemar_p < ALPHA:
            start += f"; {p_is(pair.mcnemar_p)} alone, {p_value(pair.holm_p)} among {tests} comparisons"
        start += f"; about {pair.items_needed} would show a difference like this"
    return f"{start}; {_proof_text(flips, room)}"


def _proof_text(flips: _Flips, room: NoLoss) -> str:
    """Return what it would take to show that nothing is lost."""
    if not flips.first.above_chance or _room(flips.first) <= room.margin_points:
        return f"{flips.first.precision} is not far enough above chance to speak of {within(room.margin_points)}"
    return f"about {room.items_needed} would show {within(room.margin_points)}, if there is none"


def _at_chance_text(pair: TaskPair, flips: _Flips) -> str:
    first, second, n = flips.first, flips.second, flips.first.n
    text = (
        f"{pair.verdict}: {first.correct} and {second.correct} of {n} right, where guessing gets {first.chance * n:.3g}; "
        "a score not above chance supports no claim about bits"
    )
    if pair.verdict == BELOW_CHANCE:
        return f"{text}; so few are not guessed: the answers are read, or asked for, in another form than the model gives them"
    best = max(first.correct, second.correct)
    needed = items_above_chance(best / n, first.chance, flips.precisions)
    if needed is None:
        text += "; no number of items would change that at these scores"
    else:
        text += f"; about {max(needed, n + 1)} items would show a score of {best} in {n} to be above it"
    return f"{text}; {n} items show no difference under {pair.detectable_points:.0f} points"


def _bracket(ends: tuple[float, float] | None) -> str:
    assert ends is not None
    digits = 0 if ends[1] - ends[0] >= 10 else 1
    return "[" + ", ".join(_signed(bound, digits) for bound in ends) + "]"


def _signed(points: float, digits: int = 1) -> str:
    """Return points with a true minus sign, and never "-0"."""
    return f"{round(points, digits) + 0.0:.{digits}f}".replace("-", "−")
