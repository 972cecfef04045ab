"""Find a plan: certified knapsacks on measured damage, the best of them chosen on the select rows.

Three sets of scores, each a table [units, formats] of damage in nats/token with 0 at the widest format:
*high*, what lowering a unit adds around `uniform:high`; *low*, what not raising it leaves around `uniform:low`; and their mean,
which is the exact Shapley value of a quadratic damage model. Scores taken around one base alone add up badly at 2 bits, because
damages interact; which of the three misleads least differs from model to model, so all three plans are measured.

For `--max-damage` the size is bisected: the smallest limit whose best plan, *measured* on the select rows, is within the tolerance.
These plans are where the search with interactions starts (`refine`), and what it has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.errors import UserError
from bitatlas.planning.solve import solve_knapsack
from bitatlas.words import given

Measure = Callable[[Mapping[str, np.ndarray]], dict[str, float]]  # plans by name -> mean damage on the select rows, nats/token
BISECTIONS = 12


@dataclass(frozen=True)
class Scores:
    """Damage tables [units, formats], formats narrowest first, and the measured damage of uniform high they are added to."""

    tables: dict[str, np.ndarray]
    at_high: float
    source: str = "measured single-unit damage"

    def predicted(self, table: np.ndarray, choice: np.ndarray) -> float:
        """Damage of a choice [units] by one of the tables, nats/token.

        Scores taken around uniform low can sum to less than 0 near the widest formats; no plan is promised less than these do.
        """
        return self.at_high + max(0.0, float(table[np.arange(len(table)), choice].sum()))


@dataclass(frozen=True)
class Candidate:
    """`choice[u]` = index of unit u's format. `gap` is the solver's proven distance to the optimum of `scores`."""

    scores: str
    choice: np.ndarray
    predicted: float  # nats/token
    gap: float


def damage_tables(
    units: Sequence[str],
    formats: Sequence[str],
    damage: Mapping[str, Mapping[str, Mapping[str, float]]],
    base: Mapping[str, float],
) -> Scores:
    """Tables from the two screens of units (see `sensitivity.screens.UnitScreen`); `formats` narrowest first."""
    low, high = formats[0], formats[-1]

    def around(name: str) -> np.ndarray:
        """What each unit in each format adds to the damage of uniform `name`; 0 for the base's own format."""
        own = damage[f"uniform:{name}"]
        rows = [[own[unit][f] - base[f"uniform:{name}"] if f != name else 0.0 for f in formats] for unit in units]
        return np.asarray(rows)

    return scores_of_ends(around(high), around(low), base[f"uniform:{high}"])


def scores_of_ends(wide: np.ndarray, narrow: np.ndarray, at_high: float, source: str = Scores.source) -> Scores:
    """Tables from what each unit adds in each format around uniform high (`wide`) and around uniform low (`narrow`), 0 for the base's own."""
    low = narrow - narrow[:, -1:]
    return Scores({"high": wide, "low": low, "mean of both": (wide + low) / 2}, at_high, source)


def candidates(scores: Scores, cost: np.ndarray, limit: int) -> list[Candidate]:
    """The proven optimum of each table under `limit`; equal plans once."""
    found: list[Candidate] = []
    for name, table in scores.tables.items():
        solution = solve_knapsack(table, cost, limit)
        if any(np.array_equal(solution.choice, other.choice) for other in found):
            continue
        reference = scores.tables.get("mean of both", table)
        found.append(Candidate(name, solution.choice, scores.predicted(reference, solution.choice), solution.gap))
    return found


def choose(scores: Scores, cost: np.ndarray, limit: int, measure: Measure) -> tuple[Candidate, float, dict[str, float]]:
    """The candidate with the least measured damage, that damage, and everybody's, by name."""
    found = candidates(scores, cost, limit)
    measured = measure({candidate.scores: candidate.choice for candidate in found})
    best = min(found, key=lambda candidate: measured[candidate.scores])  # ties: the first
    return best, measured[best.scores], measured


def choose_smallest(
    scores: Scores, cost: np.ndarray, tolerated: float, measure: Measure, where: str = "did on the select rows"
) -> tuple[Candidate, float, dict[str, float], int]:
    """The smallest plan whose measured damage is within `tolerated` (nats/token), and the limit it was found under.

    `where` ends the sentence of a refusal: what the damages are.

    Raises UserError where even the widest format does more.
    """
    least, most = int(cost.min(1).sum()), int(cost.max(1).sum())
    best = (*choose(scores, cost, most, measure), most)
    if best[1] > tolerated:
        least_damage = f"{best[1]:.3g}" if float(f"{best[1]:.3g}") > tolerated else given(best[1])
        raise UserError(
            f"--max-damage {given(tolerated)} is below {least_damage} nats/token, the least that these formats {where}; "
            "possible: more than that, or a wider format in --formats"
        )
    cheapest = (*choose(scores, cost, least, measure), least)
    if cheapest[1] <= tolerated:
        return cheapest
    for _ in range(BISECTIONS):
        middle = (least + most) // 2
        if middle in (least, most):
            break
        found = (*choose(scores, cost, middle, measure), middle)
        if found[1] <= tolerated:
            best, most = found, middle
        else:
            least = middle
    return best
