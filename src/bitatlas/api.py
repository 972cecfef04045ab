"""The Python names: what the command line does, as functions that take and return objects.

A folder or a file may be given as text or as a path. A mistake raises `bitatlas.errors.UserError` with the line that the command
line would print. Left out: `plan --curve` and the reports, which a survey's folder has or the command line makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bitatlas import records
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.text import byte_size, interval, number

if TYPE_CHECKING:
    from bitatlas.export.packed import Applied
    from bitatlas.run.compare import Comparison
    from bitatlas.run.verify import Verification

__all__ = ["Atlas", "Plan", "apply", "compare", "survey", "verify"]
Place = str | PathLike[str]
Rows = tuple[int, int, int]
Same = TypeVar("Same", bound="records.Plan | records.Atlas")


@dataclass(frozen=True)
class Plan(records.Plan):
    """`plan.json`: which module has which format, its exact size, what was predicted and measured."""

    @classmethod
    def read(cls, file: Place) -> Plan:
        return _as(cls, read_record(Path(file), records.Plan))

    def write(self, file: Place) -> None:
        write_text(Path(file), to_json(self))

    def _repr_html_(self) -> str:
        return plan_html(self)


@dataclass(frozen=True)
class Atlas(records.Atlas):
    """`atlas.json`: everything that a survey measured."""

    @classmethod
    def read(cls, place: Place) -> Atlas:
        """From a survey's folder, or its atlas.json."""
        path = Path(place)
        return _as(cls, read_record(path / "atlas.json" if path.is_dir() else path, records.Atlas))

    def best(self) -> Plan | None:
        """The survey's own plan."""
        return _as(Plan, self.plan) if self.plan else None

    def replan(
        self, *, code_bits: float | None = None, stored_bits: float | None = None, size: str | None = None,
        max_damage: float | None = None, vram: str | None = None, context: int | None = None,
    ) -> Plan:  # fmt: skip
        """The plan under another budget (give one), in seconds and without the model: its damage is predicted."""
        from bitatlas.errors import UserError
        from bitatlas.plan.judge import replan_atlas
        from bitatlas.run.settings import parse_budget

        budget = parse_budget(code_bits, stored_bits, size, max_damage, vram, context)
        if budget is None:
            raise UserError("give a budget: code_bits, stored_bits, size, vram or max_damage")
        return _as(Plan, replan_atlas(self, budget))

    def _repr_html_(self) -> str:
        return atlas_html(self)


def survey(
    model: Place | None = None, out: Place = "bitatlas-out", *, formats: Sequence[str] | None = None, quantizer: str = "rtn",
    code_bits: float | None = None, stored_bits: float | None = None, size: str | None = None, max_damage: float | None = None,
    vram: str | None = None, context: int | None = None, tokens: Place | None = None, rows: Rows = (24, 24, 64), row_length: int = 192,
    tasks: Sequence[str] | None = None, task_data: Place | None = None, limit: int | None = 300, few_shot: int = 0, tolerance: float = 0.05,
    margin: str = "2pp", protect: Sequence[str] = (), fuse: bool = True, refine: bool | None = None, curve: bool = True, device: str = "cpu",
    dtype: str = "auto", memory: str | None = None, ray: str | None = None, revision: str | None = None, seed: int = 0,
    resume: bool = False, quiet: bool = False,
) -> Atlas:  # fmt: skip
    """Measure a checkpoint, plan its precision, verify the plan, write everything to `out`. Without `model`: the bundled demo.

    `tasks`: None for the usual ones, an empty list for none. `margin`: a task is held where a loss of so much can be ruled out.
    `protect`: a budget by tasks, like `["svamp=1pp"]`: the smallest model found that holds them. `memory`: at most so much
    at the peak, like "6GiB". `ray`: measure on a Ray cluster, "auto" or an address (docs/distribution.md).
    """
    from bitatlas.progress import Reporter
    from bitatlas.records.sizes import parse_size
    from bitatlas.run.prepare import default_settings
    from bitatlas.run.settings import parse_budget
    from bitatlas.run.survey import run_survey
    from bitatlas.stats.margin import parse_points

    settings = default_settings(
        model=_text(model), formats=None if formats is None else ",".join(formats), quantizer=quantizer,
        budget=parse_budget(code_bits, stored_bits, size, max_damage, vram, context, protect=protect), tokens=_text(tokens),
        rows=",".join(map(str, rows)), row_length=row_length, tasks=_tasks(tasks), task_data=_text(task_data), limit=limit,
        few_shot=few_shot, tolerance=tolerance, fuse=fuse, refine=refine, curve=curve, device=device, dtype=dtype,
        memory_bytes=parse_size(memory, "memory") if memory else None, revision=revision, seed=seed,
        margin_points=parse_points(margin, "margin"),
    )  # fmt: skip
    return _as(Atlas, run_survey(settings, Path(out), resume, Reporter(quiet), ray))


def apply(model: Place, plan: Place, out: Place, *, quiet: bool = False) -> Applied:
    """Write the packed checkpoint of a plan.json (where the survey wrote it, so that its bank is found) to the new folder `out`."""
    from bitatlas.export.packed import apply_plan
    from bitatlas.progress import Reporter

    return apply_plan(str(model), Path(plan), Path(out), Reporter(quiet))


def verify(
    model: Place, plan_or_checkpoint: Place, *, tokens: Place | None = None, rows: Rows = (24, 24, 64), row_length: int = 192,
    tasks: Sequence[str] | None = None, card: bool = False, device: str = "cpu", seed: int = 0, quiet: bool = False,
) -> Verification:  # fmt: skip
    """Measure a plan.json, a folder that `apply` wrote, or a GGUF, against what it promises; see `.kept`."""
    from bitatlas.progress import Reporter
    from bitatlas.run.settings import check_seed
    from bitatlas.run.verify import verify_plan

    check_seed(seed)
    names = ",".join(tasks) if tasks else None
    return verify_plan(
        str(model), Path(plan_or_checkpoint), _text(tokens), rows, row_length, device, seed, Reporter(quiet), names, card
    )


def compare(
    first: Place, second: Place, *, tokens: Place | None = None, rows: Rows = (2, 2, 64), row_length: int = 192,
    tasks: Sequence[str] | None = None, task_data: Place | None = None, limit: int | None = 300, few_shot: int = 0,
    margin: str = "2pp", device: str = "cpu", seed: int = 0, quiet: bool = False,
) -> Comparison:  # fmt: skip
    """Two checkpoints or plans, quantized or not, on the same rows and items, paired."""
    from bitatlas.progress import Reporter
    from bitatlas.run.compare import compare_models
    from bitatlas.run.settings import check_seed
    from bitatlas.stats.margin import parse_points

    check_seed(seed)
    return compare_models(
        str(first), str(second), _text(tokens), rows, row_length, _tasks(tasks), _text(task_data), limit, device, seed,
        Reporter(quiet), parse_points(margin, "margin"), few_shot,
    )  # fmt: skip


def _as(kind: type[Same], record: Any) -> Same:
    """The same record as the public class."""
    return kind(**{field.name: getattr(record, field.name) for field in fields(record)})


def _text(place: Place | None) -> str | None:
    return None if place is None else str(place)


def _tasks(tasks: Sequence[str] | None) -> str | None:
    return None if tasks is None else ",".join(tasks) or "none"


# --- notebook --------------------------------------------------------------------------------------------------------------

# A plan and an atlas as a notebook shows them: small tables in plain HTML, from records alone.
#
# Left out: charts; `report.html` has them.

COLOURS = {"critical": "#b42318", "safe": "#18794e", "light": "#7030d0", "uncertain": "#8a6100"}


def plan_html(plan: records.Plan) -> str:
    """Size, damage, simple plans beside it, and how many modules have which format."""
    damage = interval(plan.damage.measured, unit=True)
    if plan.damage.measured is None and plan.damage.predicted is not None:
        damage = f"{number(plan.damage.predicted)} nats/token (predicted)"
    rows = [["this plan", byte_size(plan.size.total_bytes), number(plan.size.code_bits), damage]]
    rows += [
        [baseline.name, "", number(baseline.code_bits), interval(baseline.damage, unit=True)]
        for baseline in plan.baselines
        if not baseline.is_random
    ]
    counts = {name: sum(given == name for given in plan.modules.values()) for name in plan.formats}
    used = ", ".join(f"{name} × {count}" for name, count in counts.items() if count)
    title = f"Plan for {plan.model.name} ({plan.quantizer}): {used}"
    return _table(title, ["", "size", "code bits", "damage"], rows) + (f"<p>{escape(plan.verdict)}</p>" if plan.verdict else "")


def atlas_html(atlas: records.Atlas) -> str:
    """The uniform widths, the layers with their verdicts, and the plan."""
    widths = [
        [u.format, byte_size(u.size.total_bytes), number(u.size.code_bits), interval(u.damage, unit=True)] for u in atlas.uniform
    ]
    layers = [[str(layer.layer), interval(layer.share), interval(layer.criticality), layer.verdict] for layer in atlas.layers]
    parts = [
        _table(f"Atlas of {atlas.model.name}: every module at one format", ["format", "size", "code bits", "damage"], widths),
        _table("Layers", ["layer", "share of damage", "criticality", "verdict"], layers),
    ]
    return "".join(parts) + (plan_html(atlas.plan) if atlas.plan else "")


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(text: str) -> str:
    style = f' style="color:{COLOURS[text]}"' if text in COLOURS else ""
    return f"<td{style}>{escape(text)}</td>"
