"""Write `docs/reference/`: the commands from the command line itself, the files from the records that they hold.

    python docs/reference.py

`tests/test_docs.py` fails where a page is not what this writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import typer

from bitatlas import records
from bitatlas.cli import main as cli
from bitatlas.records import comparison
from bitatlas.records.formats import Format
from bitatlas.records.plan import CacheLayers, MemoryShape, Workload

PLACE = Path(__file__).resolve().parent / "reference"
NOTE = "Written by `docs/reference.py`; do not edit.\n"
PLAN = (records.Plan, records.PlanModel, Format, records.Budget, Workload, records.Size, records.PlanDamage, records.Baseline, records.Measured)  # fmt: skip
COMPARISON = (
    comparison.Comparison, comparison.ModelFile, comparison.StoredKind, comparison.Domain, comparison.Candidate, comparison.Deviation, comparison.Bucket,
    comparison.Pair, comparison.Requirement,
)  # fmt: skip
# The columns of the long tables: those that are records, and those that stages make line by line.
TABLES: dict[str, tuple[str, Any]] = {
    "damage.parquet": ("one line a row of text, base and what was changed", {
        "base": "the model around which it was measured", "target": "`uniform:FORMAT`, `layer:N`, `kind:KIND` or `unit:NAME`",
        "format": "that the target has", "split": "`fit` or `test`", "row": "place of the row in its split", "damage_nats": "nats/token",
    }),
    "weights.parquet": ("one line a module", records.WeightProfile),
    "heads.parquet": ("one line a head and base", records.AttentionHead),
    "items.parquet": ("one line an item and precision", {
        "task": "its name", "precision": "`reference`, `uniform:FORMAT` or `plan`", "item": "its id", "correct": "true or false",
        "correct_norm": "of choices: by likelihood per character (acc_norm)",
        "answer": "the model's", "expected": "the right one", "truncated": "the prompt did not fit and lost its beginning", "output": "what the model wrote, as far as it is read",
    }),
}  # fmt: skip


def commands() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(cli.app)
    parts = ["# Commands", NOTE]
    parts.append(
        "Exit codes: 0 done; 2 wrong use or an impossible request, told in one line; 1 anything else, and a promise not kept.\n"
    )
    for name in cli.COMMANDS:
        command = group.commands[name]  # type: ignore[attr-defined]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(map(_called, arguments))
        parts += [f"## bitatlas {name}", f"{_sentence(command.help)}\n", f"```\nbitatlas {name} [OPTIONS] {usage}\n```\n"]
        parts.append("| argument or option | means | default |\n|---|---|---|")
        parts += [_parameter(p) for p in command.params]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _called(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{_called(parameter)}`"
    else:
        name = " / ".join(f"`{one}`" for one in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    told = "" if default is None or default is False or parameter.required else "yes" if default is True else f"`{default}`"
    return f"| {name} | {_cell(parameter.help or '')} | {'required' if parameter.required else told} |"


def files() -> str:
    """`plan.json`, `atlas.json` and the tables, from their records."""
    atlas = [one for one in _records() if one not in PLAN]
    parts = ["# Files", NOTE]
    parts.append(
        "What a survey writes into `--out`, field by field. JSON files name their schema; a list or a table of another record is "
        "linked. Numbers that were measured are a `Measured`.\n"
    )
    parts += ["## plan.json", f"Schema `{records.PLAN_SCHEMA}`.\n", *(_record(one) for one in PLAN)]
    parts += ["## comparison.json", f"Schema `{comparison.COMPARISON_SCHEMA}`.\n", *(_record(one) for one in COMPARISON)]
    parts += ["## atlas.json", f"Schema `{records.ATLAS_SCHEMA}`.\n", *(_record(one) for one in atlas)]
    parts += ["## Tables", "Parquet files in `tables/`; a table without lines is not written.\n"]
    for name, (told, columns) in TABLES.items():
        if dataclasses.is_dataclass(columns):
            parts.append(f"### {name}\n\nOf {told}: the fields of [{columns.__name__}](#{columns.__name__.lower()}).\n")
        else:
            lines = "\n".join(f"| `{column}` | {text} |" for column, text in columns.items())
            parts.append(f"### {name}\n\nOf {told}:\n\n| column | holds |\n|---|---|\n{lines}\n")
    return "\n".join(parts).rstrip() + "\n"


def _records() -> list[type]:
    """The atlas first, then its parts in the order of their names."""
    exported = sorted(
        (value for value in vars(records).values() if dataclasses.is_dataclass(value)), key=lambda record: record.__name__
    )
    return [records.Atlas, *(record for record in [*exported, MemoryShape, CacheLayers] if record is not records.Atlas)]


def _record(record: type) -> str:
    """One record: what its docstring says, and its fields with the comments that stand beside them in the source."""
    source = inspect.getsource(record)
    doc = inspect.getdoc(record) or ""
    told = "" if doc.startswith(f"{record.__name__}(") else _sentence(doc)
    lines = [f"### {record.__name__}", "", *([told, ""] if told else []), "| field | type | holds |", "|---|---|---|"]
    for field in dataclasses.fields(record):
        found = re.search(rf"^    {field.name}: (.*?)(?:  # (.*))?$", source, re.MULTILINE)
        assert found is not None, f"{record.__name__}.{field.name}"
        kind = re.sub(r" = field\(.*\)$| = [^=]*$", "", found[1])
        lines.append(f"| `{field.name}` | {_linked(kind)} | {_cell(found[2] or '')} |")
    return "\n".join(lines) + "\n"


def _linked(kind: str) -> str:
    """A type, with a link where one of the records is in it."""
    known = {one.__name__ for one in (*PLAN, *COMPARISON, *_records())}
    inside = [name for name in re.findall(r"[A-Z]\w+", kind) if name in known]
    link = f" ([{inside[0]}](#{inside[0].lower()}))" if inside else ""
    return f"`{_cell(kind)}`{link}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _sentence(text: str | None) -> str:
    return " ".join((text or "").replace("<", "&lt;").split())


PAGES = {"commands.md": commands, "files.md": files}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (PLACE / page).write_text(write(), encoding="utf-8")
