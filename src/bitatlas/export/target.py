"""What a runtime is to an export: its name, what its formats can hold, and the function that writes its files.

A target is a file in this folder with a `Target` in it, listed in `targets.py`, or a row of `recipes.py` where the library quantizes by itself. `write` gets a `Job` that was checked against
`holds` and the other fields, and an empty folder; it refuses (UserError) what only it knows to be impossible, before it writes.
Left out: running the runtime. `benchmarks/runtimes.py` does that, in environments of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitatlas.model.checkpoint import Checkpoint
from bitatlas.progress import Reporter
from bitatlas.records import Module, Plan
from bitatlas.records.formats import Format
from bitatlas.records.runtimes import Holds


@dataclass(frozen=True)
class Job:
    """One export. `modules`: all that the model has, from --model or the atlas beside the plan; empty where neither is at hand."""

    plan: Plan
    plan_file: Path
    checkpoint: Checkpoint | None  # of --model
    modules: Sequence[Module]
    reporter: Reporter
    model: str = ""  # as --model gave it

    @property
    def formats(self) -> dict[str, Format]:
        """Module -> format, in the model's order where that is known."""
        order = [module.name for module in self.modules if module.name in self.plan.modules] or list(self.plan.modules)
        return {name: self.plan.formats[self.plan.modules[name]] for name in order}

    @property
    def usual(self) -> Format:
        """The format that most modules have: runtimes want one for the whole model, and exceptions from it."""
        return Counter(self.formats.values()).most_common(1)[0][0]

    @property
    def kept(self) -> list[str]:
        """Linear modules of the decoder layers that the plan leaves as they are, as far as the model's modules are known."""
        return [module.name for module in self.modules if module.name not in self.plan.modules]


@dataclass(frozen=True)
class Target:
    """A runtime. `write(job, folder)` returns lines that the command prints: what to run next, what is not carried over."""

    name: str  # after --to
    about: str  # a line for the help and the docs: what is written
    holds: Holds
    write: Callable[[Job, Path], list[str]]
    needs_model: bool = False  # --model must be given
    whole_groups: bool = False  # a group size must divide the rows
    transposed: bool = False  # it knows Conv1D, GPT-2's transposed linear layer
    fused: bool = False  # it runs q/k/v, and gate/up, as one matrix: one format for all of them
