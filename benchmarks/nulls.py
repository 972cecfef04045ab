"""Count how often five nulls call a measure related to damage where it is not; write the table of `docs/method.md`.

    python benchmarks/nulls.py [--runs 400]

Random orders of the layers, circular shifts (both ways round), random phases, the effective number of layers (Pyper & Peterman 1998), and the
random signs of shapes that the package uses, at 5 %, in worlds of `simulations.measures`; and how often each finds a measure that follows damage.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from bitatlas.findings.correlations import chance_p
from simulations.measures import Curve, alike_neighbours, smooth, trend

PAGE = Path(__file__).resolve().parent.parent / "docs" / "method.md"
BEGIN, END = "<!-- nulls: begin -->", "<!-- nulls: end -->"
DRAWS = 1000
Null = Callable[[np.ndarray, np.ndarray, np.random.Generator], float]  # two centred and scaled rows of ranks, generator -> p
WORLDS: dict[str, Curve] = {
    "alike neighbours (0.6)": alike_neighbours(0.6),
    "both have a trend": trend,
    "both slow curves": smooth,
}


def tail(surrogates: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Return the p-value of x and y being related; surrogates: of y, [draws, layers]."""
    return float((np.abs(surrogates @ x) >= abs(x @ y) - 1e-9).mean())


def orders(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    return tail(rng.permuted(np.tile(y, (DRAWS, 1)), axis=1), x, y)


def shifts(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    return tail(np.array([np.roll(values, by) for values in (y, y[::-1]) for by in range(len(y))]), x, y)


def phases(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    spectrum = np.fft.rfft(y)
    turned = np.exp(2j * np.pi * rng.random((DRAWS, len(spectrum))))
    turned[:, -1] = rng.choice([-1, 1], DRAWS)  # of an even number of layers that one is real
    return tail(np.fft.irfft(spectrum * turned, len(y), axis=1), x, y)


def effective(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    layers = len(x)
    lags = range(1, 1 + layers // 5)
    inverse = 1 / layers + 2 / layers * sum((x[lag:] @ x[:-lag]) * (y[lag:] @ y[:-lag]) for lag in lags)
    n = float(np.clip(1 / inverse if inverse > 0 else layers, 2.01, layers))
    rho = x @ y
    return float(2 * stats.t.sf(abs(rho) * np.sqrt((n - 2) / max(1e-12, 1 - rho**2)), n - 2))


def signs(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    return chance_p(x, y)


NULLS: dict[str, Null] = {
    "random orders": orders,
    "circular shifts, both ways": shifts,
    "random phases": phases,
    "effective number of layers": effective,
    "random signs of shapes": signs,
}


def ranks(values: np.ndarray) -> np.ndarray:
    centred = stats.rankdata(values) - (len(values) + 1) / 2
    return centred / np.linalg.norm(centred)


def unrelated(curve: Curve, layers: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return curve(layers, rng), curve(layers, rng)


def related(layers: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the same curve, each with noise of its own: a correlation of 0.8."""
    common = alike_neighbours(0.5)(layers, rng)
    return common + 0.5 * rng.standard_normal(layers), common + 0.5 * rng.standard_normal(layers)


def row(name: str, runs: int) -> str:
    """Return a line of the table."""

    def rate(draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]) -> str:
        called = 0
        for seed in range(runs):
            rng = np.random.default_rng(seed)
            x, y = (ranks(values) for values in draw(rng))
            called += NULLS[name](x, y, rng) <= 0.05
        return f"{100 * called / runs:.0f}"

    cells = [", ".join(rate(lambda rng, c=curve, n=n: unrelated(c, n, rng)) for n in (16, 32)) for curve in WORLDS.values()]  # type: ignore[misc]
    return f"| {' | '.join([name, *cells, rate(lambda rng: related(16, rng))])} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=400)
    runs = parser.parse_args().runs
    head = ["null", *WORLDS, "found, where a measure follows damage (16 layers)"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in NULLS:
        lines.append(row(name, runs))
        print(lines[-1], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
