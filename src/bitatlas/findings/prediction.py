"""Does the prediction of damage hold around the plan? A word, and the sentence that carries the numbers.

*Holds*: rank correlation of at least 0.95 whose interval stays above 0.90. *Does not hold*: the whole interval is below 0.95.
Otherwise inconclusive: too low, or known too roughly, to be relied on.
"""

from __future__ import annotations

from bitatlas.findings.folk import FAILS, HOLDS, OPEN
from bitatlas.records import Calibration, Correlation, Finding, Measured
from bitatlas.records.text import interval, listed, number

GOOD = 0.95  # rank correlation
SURE = 0.90  # that its interval must stay above
CLAIM = "the damage of plans around this one is predicted"


def calibration_findings(calibration: Calibration | None) -> list[Finding]:
    """One statement; none where it was not tested."""
    if calibration is None:
        return []
    return [Finding("plan", CLAIM, verdict_on(calibration), sentence(calibration), as_measured(calibration.prediction))]


def verdict_on(calibration: Calibration) -> str:
    """The word, from the rank correlation and its interval."""
    rho = calibration.prediction
    low, high = rho.ci95 or (-1.0, 1.0)
    if rho.rho >= GOOD and low >= SURE:
        return HOLDS
    return FAILS if high < GOOD else OPEN


def sentence(calibration: Calibration) -> str:
    """What was compared, how well the ranks agree, the line, the error, and why the word is not "holds"."""
    changed = [point.changed for point in calibration.points]
    others = [f"{interval(as_measured(other))} for the {other.measure}" for other in calibration.others]
    beside = f" ({'; '.join(others)})" if others else ""
    return (
        f"Of {len(changed)} random plans with {_span(changed)} units changed, damage predicted from fit rows and measured on "
        f"{_rows(calibration)} rows agree in rank with ρ = {interval(as_measured(calibration.prediction))}{beside}. "
        f"The line of measured on predicted has {line_text(calibration)}; the mean error is "
        f"{interval(calibration.relative_error)} of the damage.{_doubt(calibration)}"
    )


def line_text(calibration: Calibration) -> str:
    """The calibration line: measured on predicted, with intervals."""
    return f"slope {interval(calibration.slope)}, intercept {interval(calibration.intercept, unit=True)}"


def _span(changed: list[int]) -> str:
    low, high = min(changed), max(changed)
    return str(low) if low == high else f"{low} to {high}"


def _doubt(calibration: Calibration) -> str:
    rho, word = calibration.prediction, verdict_on(calibration)
    if word == HOLDS:
        return ""
    if word == FAILS:
        return f" The whole interval is below {number(GOOD, 2)}: predicted ranks are rough here, and only measured plans should be compared."
    low = rho.ci95[0] if rho.ci95 else -1.0
    reasons = [f"ρ is below {number(GOOD, 2)}"] if rho.rho < GOOD else []
    reasons += [f"its interval reaches below {number(SURE, 2)}"] if low < SURE else []
    return f" That is not settled: {listed(reasons)}.{_ceiling(calibration)}"


def _ceiling(calibration: Calibration) -> str:
    """Whether the rows are what is missing: the plans themselves, measured on the fit rows, do not clearly rank better."""
    of_rows = calibration.on_fit
    if of_rows.rho >= GOOD and (of_rows.ci95 or (-1.0, 1.0))[0] >= SURE:
        return ""
    shown = interval(as_measured(of_rows))
    return f" Even the same plans measured on fit rows are not sure to rank as they do on {_rows(calibration)} rows ({shown}): more rows (--rows) would tell."


def _rows(calibration: Calibration) -> str:
    return calibration.centre.measured.rows


def as_measured(one: Correlation) -> Measured:
    """A rank correlation as a number with its interval."""
    return Measured(one.rho, one.ci95, "ratio", "plan", "plans around it", one.n)
