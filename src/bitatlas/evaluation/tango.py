"""Tango's score test and interval for the difference of two shares that the same items gave.

Of n items, `lost` are right at first only and `gained` at second only; the difference is (gained - lost) / n. Whether a true difference d
fits is asked with the variance that d itself implies: the two rates are the most likely ones whose difference is d, which is the root of
a quadratic. The interval is every d that the test accepts: it stays inside -1..1 and is sound for few flips.
All functions take numbers or arrays that broadcast. Left out: continuity corrections (`no_loss` asks for an exact test beside this one).
Source: Tango 1998, Statistics in Medicine 17:891.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri  # the distributions of scipy.stats, without its overhead a call

Floats = NDArray[np.float64]
HALVINGS = 56  # of an interval at most 2 wide: below the spacing of floats near 1


def lost_rate(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, difference: ArrayLike) -> Floats:
    """Most likely rate of lost items where the gained rate minus the lost rate is held at `difference`."""
    lost, gained, n, d = (np.asarray(value, dtype=np.float64) for value in (lost, gained, n, difference))
    b = (2 * n - gained + lost) * d - lost - gained
    c = -lost * d * (1 - d)
    root = np.sqrt(np.maximum(0.0, b * b - 8 * n * c))
    # two forms of the larger root; each avoids subtracting nearly equal numbers on its side
    return np.where(b <= 0, (root - b) / (4 * n), -2 * c / np.where(b > 0, root + b, 1.0))


def score_z(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, difference: ArrayLike) -> Floats:
    """How many standard deviations the seen difference lies above `difference`; standard normal where that is the true one."""
    lost, gained, n, d = (np.asarray(value, dtype=np.float64) for value in (lost, gained, n, difference))
    variance = np.maximum(0.0, n * (2 * lost_rate(lost, gained, n, d) + d * (1 - d)))
    distance = gained - lost - n * d
    some = variance > 0
    return np.where(some, distance / np.sqrt(np.where(some, variance, 1.0)), np.copysign(np.inf, distance))


def intervals(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """Ends of the interval of each difference, as shares from -1 to 1."""
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
            held = inside(middle)
            near, far = np.where(held, middle, near), np.where(held, far, middle)
        return np.where(whole, end, near)

    return edge(-1.0), edge(1.0)


@lru_cache(maxsize=4096)
def tango(lost: int, gained: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of one difference."""
    low, high = intervals(lost, gained, n, level)
    return float(low), float(high)
