"""Why a module has its bits: what the next wider and the next narrower format would cost and save, and what else the bytes would buy.

Every amount is measured: the unit alone, one step between two neighbouring formats, as the mean of what it does at base uniform high and
at base uniform low, on the fit rows. That mean is a table that the planner chooses from (`planning.choose`), so the words are about the numbers
that decided. A refined plan was searched on from there with its interactions, which no single step shows.
The page's script says the same sentences about every other plan, from the same parts (`Steps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitatlas.plan.replan import scores_of, subject_of
from bitatlas.records import Atlas
from bitatlas.records.text import MINUS, byte_size, number


@dataclass(frozen=True)
class Step:
    """From a format to the next wider one: exact bytes, and damage saved, nats/token (negative where it does harm)."""

    bytes: int
    saved: float

    @property
    def parts(self) -> tuple[str, str, str]:
        """Bytes, what raising does, what lowering does, as text."""
        amount = number(abs(self.saved))
        up, down = ("save", "cost") if self.saved >= 0 else ("cost", "save")
        return byte_size(self.bytes), f"{up} {amount}", f"{down} {amount}"


@dataclass(frozen=True)
class Steps:
    """`steps[unit][k]`: from format k to k + 1 of `formats`, narrowest first. `names`, `modules`: how a unit is called, how many share it."""

    formats: list[str]
    steps: dict[str, list[Step]]
    names: dict[str, str]
    modules: dict[str, int]

    def raises(self, assignment: Mapping[str, int]) -> list[tuple[str, str]]:
        """The two best uses of more bytes in a plan (unit -> format's place), by damage saved a byte: (unit, sentence)."""
        open_ = [(unit, k) for unit, k in assignment.items() if k + 1 < len(self.formats)]
        best = sorted(
            open_, key=lambda one: (-self.steps[one[0]][one[1]].saved / max(1, self.steps[one[0]][one[1]].bytes), one[0])
        )
        return [(unit, self._use(unit, k)) for unit, k in best[:2]]

    def _use(self, unit: str, k: int) -> str:
        size, saves, _ = self.steps[unit][k].parts
        amount = saves.removeprefix("save ") if saves.startswith("save ") else f"{MINUS}{saves.removeprefix('cost ')}"
        return f"The best other use of more bytes: {self.names[unit]} to {self.formats[k + 1]}, {size} for {amount} nats/token."

    def sentence(self, unit: str, k: int, raises: list[tuple[str, str]]) -> str:
        """Why the unit has format `k`, in a plan with these `raises`."""
        others = self.modules[unit] - 1
        it = "it" if not others else f"it and the {others} that share{'s' if others == 1 else ''} its format"
        said = []
        if k + 1 < len(self.formats):
            size, up, _ = self.steps[unit][k].parts
            said.append(f"Raising {it} to {self.formats[k + 1]} would cost {size} and {up} nats/token.")
        if k > 0:
            size, _, down = self.steps[unit][k - 1].parts
            said.append(f"Lowering {it} to {self.formats[k - 1]} would free {size} and {down} nats/token.")
        other = next((use for name, use in raises if name != unit), "")
        return " ".join([*said, *([other] if other else [])])


def steps_of(atlas: Atlas) -> Steps | None:
    """The steps of every unit; None where the screens of units are not in the atlas."""
    if any(
        f"uniform:{name}" not in atlas.unit_damage or f"uniform:{name}" not in atlas.base_damage
        for name in (atlas.low, atlas.high)
    ):
        return None
    subject = subject_of(atlas)
    formats, units = list(subject.formats), subject.units
    table = scores_of(atlas).tables["mean of both"]  # [units, formats], nats/token
    sizes = {unit.name: [sum(atlas.module_bytes[m.name][name] for m in unit.modules) for name in formats] for unit in units}
    steps = {
        unit.name: [
            Step(sizes[unit.name][k + 1] - sizes[unit.name][k], float(row[k] - row[k + 1])) for k in range(len(formats) - 1)
        ]
        for unit, row in zip(units, table, strict=True)
    }
    names = {unit.name: f"layer {unit.layer} {unit.name.rpartition('.')[2]}" for unit in units}
    return Steps(formats, steps, names, {unit.name: len(unit.modules) for unit in units})


def basis(atlas: Atlas) -> str:
    """What the amounts rest on."""
    return (
        f"Costs and savings: the unit alone, mean of bases uniform:{atlas.high} and uniform:{atlas.low}, on fit rows "
        "(one number, no interval)."
    )
