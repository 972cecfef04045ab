"""What measuring code knows of other processes: a protocol. Who they are and how they are reached is decided in `run.ray`.

Workers measure ahead and journal what they measured; the caller then goes on as it would without them and finds everything in its
journal. So code that measures needs to say only what is missing, and in which pieces it can be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Share:
    """How things that are missing of a batch become a piece of work.

    `piece_of(things, batch)`: the arguments of the worker's `job`. `passes`: of the model, that one thing costs; `fixed`: that any
    piece costs besides.
    """

    job: str
    piece_of: Callable[[list[Any], Tensor], tuple[Any, ...]]
    passes: float
    fixed: float


class Workers(Protocol):
    """Other processes that measure for this one. `slots`: how many pieces they do at a time."""

    slots: int

    def spread(self, share: Share, missing: Sequence[tuple[Tensor, Sequence[Any]]], progress: Progress | None = None) -> None:
        """Measure the `missing` things of each batch [rows, tokens]: cut so that all workers are busy, journaled."""

    def share(self, job: str, pieces: Sequence[tuple[Any, ...]], progress: Progress | None = None) -> None:
        """Do `pieces` of a job, each a tuple of its arguments; what they measured is journaled."""
