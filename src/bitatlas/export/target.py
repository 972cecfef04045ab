"""What a runtime is to an export: its name, what its formats can hold, the function that writes its files, and the README of each.

A target is a file in this folder with a `Target` in it, listed in `targets.py`, or a row of `recipes.py` where the library quantizes by
itself. `write` gets a `Job` that was checked against
`holds` and the other fields, and an empty folder; it refuses (UserError) what only it knows to be impossible, before it writes.
Left out: running the runtime. `benchmarks/runtimes.py` does that, in environments of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bitatlas.model.checkpoint import Checkpoint
from bitatlas.progress import Reporter
from bitatlas.records import Module, Plan
from bitatlas.records.formats import Format
from bitatlas.records.runtimes import Holds
from bitatlas.records.text import byte_size, interval, number


@dataclass(frozen=True)
class Job:
    """One export. `modules`: all that the model has, from --model or the atlas beside the plan; empty where neither is at hand."""

    plan: Plan
    plan_file: Path
    checkpoint: Checkpoint | None  # of --model
    modules: Sequence[Module]
    reporter: Reporter
    model: str = ""  # as --model gave it
    base_gguf: Path | None = None  # a GGUF of the model, whose metadata is taken

    @property
    def formats(self) -> dict[str, Format]:
        """Return module -> format, in the model's order where that is known."""
        order = [module.name for module in self.modules if module.name in self.plan.modules] or list(self.plan.modules)
        return {name: self.plan.formats[self.plan.modules[name]] for name in order}

    @property
    def usual(self) -> Format:
        """Return the format that most modules have: runtimes want one for the whole model, and exceptions from it."""
        return Counter(self.formats.values()).most_common(1)[0][0]

    @property
    def unquantized(self) -> list[str]:
        """Return the linear modules of the decoder layers that the plan leaves as they are, as far as the model's modules are known."""
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


# --- READMEs ------------------------------------------------------------------------------------------------------------


def template(name: str) -> str:
    """Return the text of a file in `templates/`."""
    return resources.files("bitatlas.export").joinpath("templates", name).read_text(encoding="utf-8")


def write_readme(folder: Path, job: Job, title: str, *parts: str) -> None:
    """Write README.md: what plan this is, then the target's own paragraphs."""
    (folder / "README.md").write_text(
        "\n\n".join([f"# {title}", plan_text(job), *(part.rstrip() for part in parts)]) + "\n", encoding="utf-8"
    )


def plan_text(job: Job) -> str:
    """Return the plan in a few lines, with what was promised and how that is known."""
    plan = job.plan
    counts = ", ".join(f"{count} at {name}" for name, count in sorted(Counter(plan.modules.values()).items()))
    if plan.damage.measured:
        damage = f"{interval(plan.damage.measured, unit=True)}, measured on {plan.damage.measured.rows} rows of its survey"
    elif plan.damage.predicted is not None:
        damage = f"{number(plan.damage.predicted)} nats/token, predicted and not measured"
    else:
        damage = "not measured"
    return (
        f"A plan of bitatlas for {plan.model.name} (weights with sha256 `{plan.model.weights_sha256}`): "
        f"{len(plan.modules)} modules, {counts}; {number(plan.size.code_bits)} bits of codes a weight, "
        f"{byte_size(plan.size.total_bytes)} by its own count. Damage (KL to the unquantized model) of {plan.quantizer} codes: {damage}. "
        "`plan.json` is the plan."
    )
