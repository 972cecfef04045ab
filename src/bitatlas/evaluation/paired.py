"""What item-by-item outcomes of several precisions say, and what they cannot say.

Every precision answers the same items, so two precisions are compared by their flips: items that only one of them gets right.
An exact test (McNemar, two-sided binomial on the flips) decides, corrected by Holm over all pairs of all tasks of a run; the
interval of the difference is Tango's score interval, which stays inside -100..100 points and is sound for few flips.
A score that is not above chance supports no claim about bits, whatever the test says.

Smallest detectable difference. An item's change c is +1 (gained), -1 (lost) or 0. With F flips among n items and no true
difference, the mean of c over the items has variance E[c^2] / n = (F / n) / n, that is standard deviation sqrt(F) / n.
A two-sided 5 % test finds a true difference in 80 % of the cases where it is 1.96 + 0.84 = 2.80 standard deviations:
2.80 sqrt(F) / n as a share, 280 sqrt(F) / n in points. (With the flip rate f = F / n that is 2.80 sqrt(f / n); the count F in
place of f would make it sqrt(n) times too large.)
The exact test cannot reach 5 % with fewer than 6 flips, so nothing below 6 items is detectable, however few flips were seen.

Left out: effects of the prompt and of sampling (greedy decoding, one prompt); tests that pool tasks.
Sources: Wilson 1927; McNemar 1947; Tango 1998 (Stat. Med. 17:891); Connor 1987 (sample size); Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, ndtri  # the distributions of scipy.stats, without its overhead a call

from bitatlas.evaluation.bootstrap import holm
from bitatlas.formats import by_width
from bitatlas.records import Measured, TaskPair, TaskScore

ALPHA = 0.05
POWER = 0.8
UNIFORM = "uniform:"

Outcomes = Mapping[str, ArrayLike]  # precision -> right or wrong, bool [items]
Bools = NDArray[np.bool_]


# --- single numbers ----------------------------------------------------------------------------------------------------


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share, 0..1."""
    z2 = float(ndtri(1 - ALPHA / 2)) ** 2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # at 0 and n right the bound is exactly 0 and 1, which the subtraction misses by a rounding error
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def above_chance_p(correct: int, n: int, chance: float) -> float:
    """One-sided exact binomial p of "the model guesses". With unequal chances an item, their mean errs on the safe side."""
    return float(bdtrc(correct - 1, n, chance))


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided p of "a flip goes either way with equal chance"."""
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def tango(lost: int, gained: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of the paired difference (gained - lost) / n, as a share from -1 to 1."""
    z2 = float(ndtri((1 + level) / 2)) ** 2

    def inside(difference: float) -> bool:
        """Whether the score test accepts `difference`: (gained - lost - n d)^2 <= z^2 n (2 q + d - d^2)."""
        q = _lost_rate(lost, gained, n, difference)
        return (gained - lost - n * difference) ** 2 <= z2 * n * (2 * q + difference * (1 - difference))

    seen = (gained - lost) / n
    return _edge(inside, seen, -1.0), _edge(inside, seen, 1.0)


def _lost_rate(lost: int, gained: int, n: int, difference: float) -> float:
    """Most likely rate of lost items where gained - lost rates are held at `difference` (Tango's q21): a quadratic's root."""
    b = (2 * n - gained + lost) * difference - lost - gained
    c = -lost * difference * (1 - difference)
    root = math.sqrt(max(0.0, b * b - 8 * n * c))
    # two forms of the larger root; each avoids subtracting nearly equal numbers on its side
    return (root - b) / (4 * n) if b <= 0 else -2 * c / (root + b)


def _edge(inside: Callable[[float], bool], start: float, end: float) -> float:
    """The point between `start` (inside) and `end` where `inside` turns false, by bisection; `end` if it never does."""
    if inside(end):
        return end
    for _ in range(60):
        middle = (start + end) / 2
        start, end = (middle, end) if inside(middle) else (start, middle)
    return start


def least_flips(tests: int = 1) -> int:
    """Flips, all one way, below which the exact test stays above 5 % / tests: 2 * 0.5**6 = 0.031 makes it 6 for one test."""
    return math.ceil(math.log2(2 * tests / ALPHA))


def detectable_points(flips: int, n: int) -> float:
    """The smallest true difference that n items with so many flips would have shown with 80 % power, in points.

    Derived in the module's docstring. Above 100 points where the items are too few to show anything.
    """
    return 100 * max(_sigmas(1) * math.sqrt(flips), least_flips()) / n


def items_needed(lost: int, gained: int, n: int, tests: int = 1) -> int | None:
    """About how many items would settle the seen difference at the seen rate of flips, two digits; None if none was seen.

    Solves detectable = seen for n: sigmas^2 (F / n) / ((gained - lost) / n)^2. `tests`: the family that is corrected for.
    """
    change = abs(gained - lost)
    if change == 0:
        return None
    needed = n * max(_sigmas(tests) ** 2 * (lost + gained) / change**2, least_flips(tests) / change)
    digits = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return math.ceil(needed / digits) * digits


def _sigmas(tests: int) -> float:
    """Standard deviations that are found with 80 % power at 5 % / tests, two-sided: 2.80 for one test."""
    return float(ndtri(1 - ALPHA / (2 * tests)) + ndtri(POWER))


# --- records -----------------------------------------------------------------------------------------------------------


def score(task: str, precision: str, correct: ArrayLike, chance: float) -> TaskScore:
    """k of n with its interval. correct: bool [items]; chance: share that guessing gets right. `above_chance` is uncorrected."""
    outcomes = _bools(correct)
    k, n = int(outcomes.sum()), len(outcomes)
    return TaskScore(task, precision, k, n, chance, wilson(k, n), above_chance_p(k, n, chance) < ALPHA)


def _bools(correct: ArrayLike) -> Bools:
    array = np.asarray(correct)
    if array.ndim != 1 or len(array) == 0 or not np.isin(array, (0, 1)).all():
        raise ValueError("correct: one row of right or wrong, at least one item")
    return array.astype(bool)


def scores(task: str, outcomes: Outcomes, chance: float) -> dict[str, TaskScore]:
    """A task's scores by precision; "above chance" is corrected by Holm over the precisions."""
    each = {precision: score(task, precision, correct, chance) for precision, correct in outcomes.items()}
    adjusted = holm([above_chance_p(one.correct, one.n, chance) for one in each.values()])
    return {name: replace(one, above_chance=bool(p < ALPHA)) for (name, one), p in zip(each.items(), adjusted, strict=True)}


def headline_pairs(precisions: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that are tested: the reference (else the first) with every other, uniform high with low, low with the plan."""
    names = list(precisions)
    first = "reference" if "reference" in names else names[0]
    pairs = [(first, name) for name in names if name != first]
    uniform = by_width([name.removeprefix(UNIFORM) for name in names if name.startswith(UNIFORM)])
    if uniform:
        low, high = UNIFORM + uniform[0], UNIFORM + uniform[-1]
        pairs += [pair for pair in ((high, low), (low, "plan")) if pair[0] != pair[1] and pair[1] in names]
    return list(dict.fromkeys(pairs))


def compare_all(outcomes: Mapping[str, Outcomes], chance: Mapping[str, float]) -> tuple[list[TaskScore], list[TaskPair]]:
    """Scores and tested pairs of every task.

    outcomes: task -> precision -> bool [items], the same items in the same order for every precision of a task.
    chance: task -> share that guessing gets right. Holm's family is every pair of every task, those at chance included:
    a family chosen after looking would not be corrected. Raises ValueError where a task's precisions differ in items.
    """
    all_scores: list[TaskScore] = []
    tested: list[tuple[TaskScore, TaskScore, int, int]] = []
    for task, by_precision in outcomes.items():
        right = {precision: _bools(correct) for precision, correct in by_precision.items()}
        if len({len(correct) for correct in right.values()}) != 1:
            raise ValueError(f"{task}: every precision must have answered the same items")
        of_task = scores(task, right, chance[task])
        all_scores += of_task.values()
        for first, second in headline_pairs(list(right)):
            lost, gained = int((right[first] & ~right[second]).sum()), int((~right[first] & right[second]).sum())
            tested.append((of_task[first], of_task[second], lost, gained))
    adjusted = holm([mcnemar_p(lost, gained) for _, _, lost, gained in tested])
    pairs = [_pair(*each, holm_p=float(p), tests=len(tested)) for each, p in zip(tested, adjusted, strict=True)]
    return all_scores, pairs


def _pair(first: TaskScore, second: TaskScore, lost: int, gained: int, holm_p: float, tests: int) -> TaskPair:
    n = first.n
    low, high = tango(lost, gained, n)
    points = Measured(100 * (gained - lost) / n, (100 * low, 100 * high), "points", first.precision, f"items:{first.task}", n)
    if not (first.above_chance or second.above_chance):
        verdict = "at chance"
    elif holm_p < ALPHA:
        verdict = "rises" if gained > lost else "falls"
    else:
        verdict = "inconclusive"
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
    )
    return replace(pair, text=_text(pair, first, second, tests))


# --- words -------------------------------------------------------------------------------------------------------------


def _text(pair: TaskPair, first: TaskScore, second: TaskScore, tests: int) -> str:
    """The sentence that is printed; it begins with the verdict."""
    n = first.n
    if pair.verdict == "at chance":
        return (
            f"at chance: {first.correct} and {second.correct} of {n} right, where guessing gets {first.chance * n:.3g}; "
            "a score not above chance supports no claim about bits"
        )
    seen = f"{_signed(pair.difference.mean)} points {_bracket(pair.difference)}"
    flips = f"{pair.lost} of {n} items lost, {pair.gained} gained"
    if pair.verdict != "inconclusive":
        return f"{pair.verdict}: {seen}; {flips} (Holm p = {pair.holm_p:.2g})"
    start = f"inconclusive: {n} items cannot tell (seen {seen})"
    if pair.items_needed is None:
        return f"{start}; differences under {pair.detectable_points:.0f} points would not show"
    if pair.mcnemar_p < ALPHA:
        start += f"; p = {pair.mcnemar_p:.2g} alone, {pair.holm_p:.2g} among {tests} comparisons"
    return f"{start}; about {pair.items_needed} would"


def _bracket(difference: Measured) -> str:
    assert difference.ci95 is not None
    digits = 0 if difference.ci95[1] - difference.ci95[0] >= 10 else 1
    return "[" + ", ".join(_signed(bound, digits) for bound in difference.ci95) + "]"


def _signed(points: float, digits: int = 1) -> str:
    """With a true minus sign, and never "-0"."""
    return f"{round(points, digits) + 0.0:.{digits}f}".replace("-", "−")
