"""Is no more than a margin lost? The test behind the words "no loss within x points", and how many items they take.

That a fall was not seen is no proof that there is none. "No loss within x points" is the rejection of "x points or more are lost"
(one-sided, 5 %): the lower end of the 90 % interval of the difference lies above -x. "Equivalent within x points" needs the same on the
other side too (two one-sided tests: the whole 90 % interval lies inside -x..x).

Tango's score test alone says so too often where items or flips are few: 52 items of which 5 % are truly lost pass for "no loss within
5 points" in 6.9 % of the cases. So the exact test must reject as well: the probability, at a true loss of x, of outcomes that
speak at least as clearly (by Tango's statistic) against a loss, at the rate of flips where that is largest. p is the larger of the two.

Left out: ratios of scores; margins on pooled tasks.
Sources: Schuirmann 1987 (two one-sided tests); Tango 1998; exact unconditional test: Sidik 2003, Statistics in Medicine 22:265.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtr, ndtri, xlog1py, xlogy
from scipy.special import gammaln as log_gamma

from bitatlas.errors import UserError

ALPHA = 0.05
POWER = 0.8
MARGIN_POINTS = 2.0  # of `--margin` where none is given
GRID = 41  # rates of gained items that the exact test tries
TIE = 1e-9  # outcomes whose statistics differ by less speak equally clearly
NEGLIGIBLE = 1e-13  # probability of a number of gained items that is not looked at
MOST_ITEMS = 10_000_000  # of a number of items that is told
HALVINGS = 56  # of an interval at most 2 wide: below the spacing of floats near 1

Floats = NDArray[np.float64]


def parse_points(text: str, flag: str) -> float:
    """Return the percentage points that "1pp", "0.5" or "2 points" names; UserError naming `flag` otherwise."""
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{0,6})?|\.[0-9]{1,6})\s*(?:pp|points?)?\s*", text, re.ASCII)
    points = float(match.group(1)) if match else 0.0
    if not 0 < points < 100:
        raise UserError(f"{flag} {text}: give percentage points, above 0 and below 100, like 2pp")
    return points


def score_p(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the one-sided p of "a share `margin` or more is lost", by Tango's score test."""
    return float(ndtr(-tango_z(lost, gained, n, -margin)))


@lru_cache(maxsize=65536)
def exact_p(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the exact one-sided p of "a share `margin` or more is lost": the largest probability of outcomes at least as clear, over
    all rates of flips at a loss of `margin`."""
    most_lost = _most_lost(float(tango_z(lost, gained, n, -margin)), n, margin)
    gains = (1 - margin) / 2 * np.linspace(0, 1, GRID) ** 2  # rates of gained items; close together near 0, where p changes fast
    for _ in range(2):  # the second time between the neighbours of the best
        probabilities = _probability(most_lost, n, margin, gains)
        best, index = float(probabilities.max()), int(probabilities.argmax())
        gains = np.linspace(gains[max(0, index - 1)], gains[min(len(gains) - 1, index + 1)], GRID)
    return min(1.0, max(best, float(_probability(most_lost, n, margin, gains).max())))


def _most_lost(z: float, n: int, margin: float) -> Floats:
    """Return, by gained items [n + 1], the largest number of lost ones whose statistic is still at least `z`; -1 for none."""
    gained = np.arange(n + 1)
    low, high = np.full(n + 1, -1), n - gained  # the statistic falls with every lost item
    while (open_ := low < high).any():
        middle = (low + high + 1) // 2
        clear = tango_z(middle, gained, n, -margin) >= z - TIE
        low, high = np.where(open_ & clear, middle, low), np.where(open_ & ~clear, middle - 1, high)
    return low


def _probability(most_lost: Floats, n: int, margin: float, gains: Floats) -> Floats:
    """Return by `gains` the probability of outcomes within `most_lost`, where a share `gain` is gained and `gain + margin` lost."""
    probabilities = np.zeros(len(gains))
    gained = np.arange(n + 1)
    ways = log_gamma(n + 1) - log_gamma(gained + 1) - log_gamma(n - gained + 1)
    for index, gain in enumerate(gains):
        weight = np.exp(ways + xlogy(gained, gain) + xlog1py(n - gained, -gain))  # [n + 1], binomial
        counted = (weight > NEGLIGIBLE) & (most_lost >= 0)
        share = min(1.0, (gain + margin) / (1 - gain))  # lost, of the items that are not gained
        probabilities[index] = (weight[counted] * bdtr(most_lost[counted], n - gained[counted], share)).sum()
    return probabilities


@lru_cache(maxsize=65536)
def no_loss_p(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the one-sided p of "a share `margin` or more is lost": the larger of the two tests'."""
    return max(score_p(lost, gained, n, margin), exact_p(lost, gained, n, margin))


def equivalence_p(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the p of "lost or gained, it is a share `margin` or more": the larger of two one-sided tests'."""
    return max(no_loss_p(lost, gained, n, margin), no_loss_p(gained, lost, n, margin))


# --- how many items ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def least_items(margin: float, alpha: float = ALPHA) -> int:
    """Return the number of items below which not even outcomes without a single flip show that less than `margin` is lost."""
    z2 = float(ndtri(1 - alpha)) ** 2
    n = max(1, math.ceil(math.log(alpha) / math.log1p(-margin)), math.ceil(z2 * (1 - margin) / margin))  # exact, and score test
    while n < MOST_ITEMS and no_loss_p(0, 0, n, margin) >= alpha:
        n += max(1, n // 200)
    return n


def least_margin(n: int) -> float:
    """Return the smallest margin, as a share, that n items can show where not a single one flips."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if no_loss_p(0, 0, n, middle) < ALPHA else (middle, high)
    return high


def items_for_no_loss(flips: int, n: int, margin: float, alpha: float = ALPHA) -> int:
    """Return about how many items show that less than `margin` is lost, in 80 % of the cases where nothing is, at the seen rate of flips.

    The score test wants the difference to lie z(1 - alpha) standard deviations above -margin, those of a true loss of `margin`; without a
    loss it does in 80 % of the cases where that is 0.84 of its own standard deviations, sqrt(flips / n / items), below 0.
    """
    rate = flips / n
    at_loss = 2 * float(lost_rate(rate / 2, rate / 2, 1, -margin)) - margin * (1 + margin)  # variance of an item's change
    distance = float(ndtri(1 - alpha)) * math.sqrt(at_loss) + float(ndtri(POWER)) * math.sqrt(rate)
    return round_up(max((distance / margin) ** 2, least_items(margin, alpha)))


def round_up(count: float) -> int:
    """Return a number of items rounded up to two digits."""
    digits = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / digits) * digits


# --- Tango's test and interval ------------------------------------------------------------------------------------------

# Of n items, `lost` are right at first only and `gained` at second only; the difference is (gained - lost) / n. Whether a true difference d
# fits is asked with the variance that d itself implies: the two rates are the most likely ones whose difference is d, which is the root of
# a quadratic. The interval is every d that the test accepts: it stays inside -1..1 and is sound for few flips.
# All functions take numbers or arrays that broadcast. Left out: continuity corrections (`no_loss_p` asks for an exact test as well).
# Source: Tango 1998, Statistics in Medicine 17:891.


def lost_rate(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, difference: ArrayLike) -> Floats:
    """Return the most likely rate of lost items where the gained rate minus the lost rate is held at `difference`."""
    lost, gained, n, d = (np.asarray(value, dtype=np.float64) for value in (lost, gained, n, difference))
    b = (2 * n - gained + lost) * d - lost - gained
    c = -lost * d * (1 - d)
    root = np.sqrt(np.maximum(0.0, b * b - 8 * n * c))
    # two forms of the larger root; each avoids subtracting nearly equal numbers on its side
    return np.where(b <= 0, (root - b) / (4 * n), -2 * c / np.where(b > 0, root + b, 1.0))


def tango_z(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, difference: ArrayLike) -> Floats:
    """Return how many standard deviations the seen difference lies above `difference`; standard normal where that is the true one."""
    lost, gained, n, d = (np.asarray(value, dtype=np.float64) for value in (lost, gained, n, difference))
    variance = np.maximum(0.0, n * (2 * lost_rate(lost, gained, n, d) + d * (1 - d)))
    distance = gained - lost - n * d
    some = variance > 0
    return np.where(some, distance / np.sqrt(np.where(some, variance, 1.0)), np.copysign(np.inf, distance))


def tango_intervals(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return the ends of the interval of each difference, as shares from -1 to 1."""
    z2 = float(ndtri((1 + level) / 2)) ** 2
    lost, gained, n = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in (lost, gained, n)))

    def inside(d: Floats) -> NDArray[np.bool_]:
        """Without a division: at -1 and 1 there may be no variance."""
        return (gained - lost - n * d) ** 2 <= z2 * n * (2 * lost_rate(lost, gained, n, d) + d * (1 - d))

    def edge(end: float) -> Floats:
        """Where `inside` turns false between the seen difference and `end`, by bisection; `end` if it never does."""
        near, far = (gained - lost) / n, np.full(lost.shape, end)
        whole = inside(far)
        for _ in range(HALVINGS):
            middle = (near + far) / 2
            accepted = inside(middle)
            near, far = np.where(accepted, middle, near), np.where(accepted, far, middle)
        return np.where(whole, end, near)

    return edge(-1.0), edge(1.0)


@lru_cache(maxsize=4096)
def tango_interval(lost: int, gained: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of one difference, as shares from -1 to 1."""
    low, high = tango_intervals(lost, gained, n, level)
    return float(low), float(high)
