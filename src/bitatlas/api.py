"""Give Python what the command line does, as functions that take and return objects.

A folder or a file may be given as text or as a path. A mistake raises `bitatlas.errors.UserError` with the line that the command
line would print. Left out: `plan --curve` and the reports, which a survey's folder has or the command line makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_type_hints

from bitatlas import records
from bitatlas.records.comparison import Comparison as ComparisonRecord
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.text import byte_size, interval, number, with_fewer_rows
from bitatlas.run.options import ApplyOptions, BudgetOptions, CompareOptions, StrPath, SurveyOptions, VerifyOptions

if TYPE_CHECKING:
    import torch

    from bitatlas.export.packed import Applied
    from bitatlas.run.verify import Verification

__all__ = ["Atlas", "Comparison", "Plan", "apply", "compare", "load_packed", "survey", "verify"]
P = ParamSpec("P")
Options = TypeVar("Options")
Result = TypeVar("Result")
Same = TypeVar("Same", bound="records.Plan | records.Atlas | ComparisonRecord")


@dataclass(frozen=True)
class Plan(records.Plan):
    """`plan.json`: which module has which format, its exact size, what was predicted and measured."""

    @classmethod
    def read(cls, file: StrPath) -> Plan:
        return _as(cls, read_record(Path(file), records.Plan))

    def write(self, file: StrPath) -> None:
        write_text(Path(file), to_json(self))

    def _repr_html_(self) -> str:
        return plan_html(self)


@dataclass(frozen=True)
class Atlas(records.Atlas):
    """`atlas.json`: everything that a survey measured."""

    @classmethod
    def read(cls, file: StrPath) -> Atlas:
        """Read a survey's folder, or its atlas.json."""
        path = Path(file)
        return _as(cls, read_record(path / "atlas.json" if path.is_dir() else path, records.Atlas))

    def best(self) -> Plan | None:
        """Return the survey's own plan."""
        return _as(Plan, self.plan) if self.plan else None

    def replan(
        self,
        *,
        code_bits: float | None = None,
        stored_bits: float | None = None,
        size: str | None = None,
        max_damage: float | None = None,
        vram: str | None = None,
        context: int | None = None,
    ) -> Plan:
        """Return the plan under another budget (give one), in seconds and without the model: its damage is predicted."""
        from bitatlas.errors import UserError
        from bitatlas.plan.judge import replan_atlas
        from bitatlas.run.settings import parse_budget

        budget = parse_budget(
            BudgetOptions(
                code_bits=code_bits, stored_bits=stored_bits, size=size, max_damage=max_damage, vram=vram, context=context
            )
        )
        if budget is None:
            raise UserError("give a budget: code_bits, stored_bits, size, vram or max_damage")
        return _as(Plan, replan_atlas(self, budget))

    def _repr_html_(self) -> str:
        return atlas_html(self)


def taking(record: Callable[P, Options]) -> Callable[[Callable[[Options], Result]], Callable[P, Result]]:
    """Give a function of a record of options the record's own parameters, for callers, `help()` and editors alike."""
    hints, signature = get_type_hints(record), inspect.signature(record)
    parameters = [field.replace(annotation=hints[name]) for name, field in signature.parameters.items()]

    def decorate(function: Callable[[Options], Result]) -> Callable[P, Result]:
        public = inspect.Signature(parameters, return_annotation=function.__annotations__["return"])

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                public.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(record(*args, **kwargs))

        call.__annotations__ = {name: hints[name] for name in public.parameters} | {"return": public.return_annotation}
        vars(call)["__signature__"] = public
        return call

    return decorate


@taking(SurveyOptions)
def survey(options: SurveyOptions) -> Atlas:
    """Measure a checkpoint, plan its precision, verify the plan, write everything to `out`. Without `model`: the bundled demo.

    `tasks`: None for the usual ones, an empty list for none. `margin`: a task is held where a loss of so much can be ruled out.
    `protect`: a budget by tasks, like `["svamp=1pp"]`: the smallest model found that holds them. `memory`: at most so much
    at the peak, like "6GiB". `ray`: measure on a Ray cluster, "auto" or an address (docs/distribution.md).
    """
    from bitatlas.progress import Reporter
    from bitatlas.run.settings import Settings
    from bitatlas.run.survey import run_survey

    reporter = Reporter(options.quiet)
    return _as(Atlas, run_survey(Settings.of(options), Path(options.out), options.resume, reporter, options.ray))


@taking(ApplyOptions)
def apply(options: ApplyOptions) -> Applied:
    """Write the packed checkpoint of a plan.json, read where the survey wrote it, beside its bank, to the new folder `out`.

    `tune`: train the codes first for so long, like "10min" (docs/quantizers.md).
    """
    from bitatlas.run.tune import apply_tuned

    return apply_tuned(options)[0]


def load_packed(folder: StrPath, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Open a folder that `apply` wrote as a model of transformers, its weights unpacked in `dtype` (None: float32).

    Any plan's, also with what transformers alone does not load: packed embeddings, experts in several formats, GPT-2's transposed layers.
    """
    import torch

    from bitatlas.export import trial

    return trial.load_packed(Path(folder), device, dtype or torch.float32)


@taking(VerifyOptions)
def verify(options: VerifyOptions) -> Verification:
    """Measure a plan.json, a folder that `apply` wrote, or a GGUF, against what it promises; see `.kept`."""
    from bitatlas.run.verify import verify_plan

    return verify_plan(options)


@dataclass(frozen=True)
class Comparison(ComparisonRecord):
    """`comparison.json`: files of one model, ranked by what they do to its predictions."""

    @classmethod
    def read(cls, file: StrPath) -> Comparison:
        """Read a folder that `compare` wrote, or its comparison.json."""
        path = Path(file)
        return _as(cls, read_record(path / "comparison.json" if path.is_dir() else path, ComparisonRecord))

    def markdown(self) -> str:
        """Return a table for a model card."""
        from bitatlas.report.comparison import comparison_markdown

        return comparison_markdown(self)

    def _repr_html_(self) -> str:
        from bitatlas.report.comparison import comparison_notebook_html

        return comparison_notebook_html(self)


@taking(CompareOptions)
def compare(options: CompareOptions) -> Comparison:
    """Compare files of a model with it and with each other; `reference` may be a list that begins with it, and `files` is then left out.

    Everything is written to `out`, `compare.html` with it; a later call with the same `out` goes on from there (docs/compare.md).
    """
    from bitatlas.run.compare import compare_models

    if isinstance(options.reference, list | tuple):
        files = [*options.reference, *options.files]
        options = replace(options, reference=files[0] if files else "", files=files[1:])
    return _as(Comparison, compare_models(options))


def _as(kind: type[Same], record: Any) -> Same:
    """Return the record as the public class."""
    return kind(**{field.name: getattr(record, field.name) for field in fields(record)})


# --- notebook --------------------------------------------------------------------------------------------------------------

# A plan and an atlas as a notebook shows them: small tables in plain HTML, from records alone.
#
# Left out: charts; `report.html` has them.

COLOURS = {"critical": "#b42318", "safe": "#18794e", "light": "#7030d0", "uncertain": "#8a6100"}


def plan_html(plan: records.Plan) -> str:
    """Return HTML of size, damage, simple plans beside it, and how many modules have which format."""
    damage = interval(plan.damage.measured, unit=True)
    if plan.damage.measured is None and plan.damage.predicted is not None:
        damage = f"{number(plan.damage.predicted)} nats/token (predicted)"
    rows = [["this plan", byte_size(plan.size.total_bytes), number(plan.size.code_bits), damage]]
    rows += [
        [
            with_fewer_rows(baseline.name, baseline.damage, plan),
            "",
            number(baseline.code_bits),
            interval(baseline.damage, unit=True),
        ]
        for baseline in plan.baselines
        if not baseline.is_random
    ]
    counts = {name: sum(given == name for given in plan.modules.values()) for name in plan.formats}
    used = ", ".join(f"{name} × {count}" for name, count in counts.items() if count)
    title = f"Plan for {plan.model.name} ({plan.quantizer}): {used}"
    return _table(title, ["", "size", "code bits", "damage"], rows) + (f"<p>{escape(plan.verdict)}</p>" if plan.verdict else "")


def atlas_html(atlas: records.Atlas) -> str:
    """Return HTML of the uniform widths, the layers with their verdicts, and the plan."""
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
