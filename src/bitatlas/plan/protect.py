"""The smallest model found that holds named tasks: paired loss on each within its margin, shown on items that did not choose it.

The items of a task are cut in two. On the first half, sizes are bisected for the smallest plan that loses no more than half the margin
there. That only says how far down to look, so it may be generous. The other half judges: the widest format everywhere, then plans of a few
sizes evenly spaced down to that one, each by "no loss within the margin" at 5 %, and the walk ends at the first that fails. A fixed order
with a stop keeps the probability of any false claim below 5 % without a correction, and all protected tasks must pass, which needs none
either (an intersection-union test). Where the widest format fails, nothing smaller is claimed.

The model is reached through two callables alone, so nothing here needs torch.
Left out: a new candidate after the walk has failed, which would need items that have judged nothing yet.
Sources: Maurer, Hothorn & Lehmacher 1995 (fixed sequence); Berger 1982 (intersection-union).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitatlas.errors import UserError
from bitatlas.plan.knapsack import Ints, total_cost
from bitatlas.plan.search import Candidate
from bitatlas.records import Budget
from bitatlas.records.text import given, number
from bitatlas.stats.margin import ALPHA, least_items, least_margin, no_loss_p, round_up, tango_interval
from bitatlas.stats.paired import above_chance_p, within

STEPS = 6  # halvings of the range of sizes
WALK = 5  # sizes between the widest format and the smallest candidate that are judged
SPENT_ON_CHOOSING = 0.5  # of the margin: what a candidate may lose on the items that choose

Outcomes = Mapping[str, np.ndarray]  # task -> right or wrong, bool [items]
FindPlan = Callable[[int, Candidate], Candidate]  # (most that a plan may cost, the last plan) -> the best plan found
ScoreTasks = Callable[[Ints, str], Outcomes]  # (choice, "choosing" or "judging") -> outcomes on those items
CHOOSING, JUDGING = "choosing", "judging"


@dataclass(frozen=True)
class MarginTest:
    """One task on the items that judge. `ci90`: of the difference, points."""

    task: str
    margin_points: float
    n: int
    lost: int
    gained: int
    ci90: tuple[float, float]
    p: float  # one-sided: a loss of the margin or more
    held: bool


@dataclass(frozen=True)
class ProtectedPlan:
    """`candidate`: the plan. `next`: what the plan that ended the walk showed, None if all were held; `judged`: how many were."""

    candidate: Candidate
    tests: list[MarginTest]
    next: list[MarginTest] | None
    judged: int

    @property
    def text(self) -> str:
        """Return the sentence for the plan's verdict."""
        return "; ".join(map(margin_text, self.tests)) + f" ({self.tests[0].n} items that did not choose the plan)"

    def recorded(self) -> dict[str, Any]:
        """Return what the plan's record says, as JSON gives it back."""
        held, failed = ([{**asdict(t), "ci90": list(t.ci90)} for t in tests] for tests in (self.tests, self.next or []))
        return {"held": held, "next_smaller": None if self.next is None else failed, "judged": self.judged}


def margin_text(test: MarginTest) -> str:
    low, high = (number(end, 1) for end in test.ci90)
    shown = within(test.margin_points) if test.held else f"{within(test.margin_points)} is not shown"
    return f"{test.task}: {shown}, {test.lost} of {test.n} lost, {test.gained} gained, 90% interval [{low}, {high}] points"


# --- refusals ----------------------------------------------------------------------------------------------------------


def halves(n: int) -> tuple[slice, slice]:
    """Return, of n items in order, those that choose and those that judge."""
    return slice(0, n // 2), slice(n // 2, n)


def protect_flag(task: str, points: float) -> str:
    return f"--protect {task}={given(points)}pp"


def check_items(budget: Budget, counts: Mapping[str, int]) -> None:
    """Refuse what so few items could never show. counts: task -> items that are scored."""
    for task, points in (budget.protect or {}).items():
        if task not in counts:
            raise UserError(f"{protect_flag(task, points)}: {task} is not among --tasks ({', '.join(counts) or 'none'})")
        n = counts[task]
        judging = n - n // 2
        needed = least_items(points / 100)
        if judging < needed:
            shown = 100 * least_margin(judging) if judging else 100.0
            raise UserError(
                f"{protect_flag(task, points)}: {n} items ({judging} of them to judge) cannot show {within(points)}; about {round_up(2 * needed)} would; "
                f"the smallest margin that these items can show is {np.ceil(10 * shown) / 10:g} points"
            )


def check_reference(budget: Budget, right: Outcomes, chance: Mapping[str, float]) -> None:
    """Refuse a task that the unquantized model does not do, or a margin that allows losing all of it."""
    for task, points in (budget.protect or {}).items():
        k, n = int(np.sum(right[task])), len(right[task])
        guessing = f"guessing gets {number(chance[task] * n, 0)}"
        if above_chance_p(k, n, chance[task]) >= ALPHA:
            raise UserError(
                f"{protect_flag(task, points)}: the reference gets {k} of {n} right where {guessing}: at chance, so there is nothing to protect"
            )
        room = 100 * (k / n - chance[task])
        if room <= points:
            raise UserError(
                f"{protect_flag(task, points)}: the reference is {room:.1f} points above chance; give a margin below that"
            )


# --- the search --------------------------------------------------------------------------------------------------------


def find_protected(
    cost: Ints,
    margins: Mapping[str, float],
    widest: Candidate,
    find: FindPlan,
    score: ScoreTasks,
    reference: Mapping[str, Outcomes],
) -> ProtectedPlan:
    """Return the smallest plan found that holds every task.

    cost: [units, formats]; `margins`: task -> points; `widest`: the widest format everywhere; `reference`: part -> task -> outcomes.
    Raises UserError where not even the widest is shown to hold them.
    """
    smallest = _smallest(cost, margins, widest, find, score, reference[CHOOSING])
    held: tuple[Candidate, list[MarginTest]] | None = None
    failed: list[MarginTest] | None = None
    judged = 0
    for candidate in _walk(cost, widest, smallest, find):
        right = score(candidate.choice, JUDGING)
        tests = [_margin_test(task, points, reference[JUDGING][task], right[task]) for task, points in margins.items()]
        judged += 1
        if not all(test.held for test in tests):
            failed = tests
            break
        held = candidate, tests
    if held is None:
        assert failed is not None
        first = next(test for test in failed if not test.held)
        raise UserError(
            f"{protect_flag(first.task, first.margin_points)}: not even the widest of --formats everywhere is shown to hold it "
            f"({margin_text(first)}); add a wider format, give more items (--limit), or a larger margin"
        )
    return ProtectedPlan(*held, failed, judged)


def _smallest(
    cost: Ints, margins: Mapping[str, float], widest: Candidate, find: FindPlan, score: ScoreTasks, reference: Outcomes
) -> Candidate:
    """Return the smallest plan found that loses little on the items that choose; the widest format where none does."""

    def promising(candidate: Candidate) -> bool:
        right = score(candidate.choice, CHOOSING)
        loss = {task: 100 * float(np.mean(reference[task]) - np.mean(right[task])) for task in margins}
        return all(loss[task] <= SPENT_ON_CHOOSING * points for task, points in margins.items())

    least, most = int(cost.min(axis=1).sum()), total_cost(cost, widest.choice)
    best, limit = widest, least  # the narrowest format everywhere may do
    for _ in range(STEPS + 1):
        candidate = find(limit, best)
        if promising(candidate):
            best, most = candidate, total_cost(cost, candidate.choice)
        else:
            least = limit
        limit = (least + most) // 2
        if limit <= least or limit >= most:
            break
    return best


def _walk(cost: Ints, widest: Candidate, smallest: Candidate, find: FindPlan) -> Iterator[Candidate]:
    """Yield plans from the widest to the smallest, each found when it is its turn."""
    yield widest
    last = widest
    for size in np.linspace(total_cost(cost, widest.choice), total_cost(cost, smallest.choice), WALK + 2)[1:-1]:
        candidate = find(int(size), last)
        if total_cost(cost, smallest.choice) < total_cost(cost, candidate.choice) < total_cost(cost, last.choice):
            yield candidate
            last = candidate
    if total_cost(cost, smallest.choice) < total_cost(cost, last.choice):
        yield smallest


def _margin_test(task: str, points: float, before: np.ndarray, after: np.ndarray) -> MarginTest:
    """Return the test of "no loss within so many points". before, after: bool [items]"""
    lost, gained, n = int((before & ~after).sum()), int((~before & after).sum()), len(before)
    low, high = tango_interval(lost, gained, n, 1 - 2 * ALPHA)
    p = no_loss_p(lost, gained, n, points / 100)
    return MarginTest(task, points, n, lost, gained, (100 * low, 100 * high), p, p < ALPHA)
