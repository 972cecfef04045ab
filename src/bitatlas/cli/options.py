"""Make typer commands of records of options (`bitatlas.run.options`): one parameter a field."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from bitatlas.run.options import Argument, Option, split_names

Json = Annotated[bool, Option("For scripts: one JSON object on stdout instead of tables.", ("--json",))]
PLAIN = {bool, int, float, str, type(None)}  # what a word on the command line is read as without help


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return for typer a function of a record of options, and of flags that the command line alone has."""
    first, *flags = inspect.signature(function, eval_str=True).parameters.values()
    hints = get_type_hints(first.annotation, include_extras=True)
    fields = [p.replace(annotation=hints[p.name]) for p in inspect.signature(first.annotation).parameters.values()]
    shown = list(fields)
    for flag in flags:
        before = _option(flag).before
        shown.insert([field.name for field in shown].index(before) if before else len(shown), flag)

    def run(**words: Any) -> None:
        options = first.annotation(**{field.name: _value(field, words.pop(field.name)) for field in fields})
        function(options, **words)

    run.__doc__, run.__annotations__ = function.__doc__, {}
    vars(run)["__signature__"] = inspect.Signature([_parameter(field) for field in shown])
    return run


def _option(field: inspect.Parameter) -> Option:
    return field.annotation.__metadata__[0]


def _value(field: inspect.Parameter, word: Any) -> Any:
    """Return what the record has for a word; its own default where there is none."""
    if word is None:
        return field.default
    parse = _option(field).parse
    return parse(word) if parse else word


def _parameter(field: inspect.Parameter) -> inspect.Parameter:
    """Return a record's field, `Annotated[type, Option]`, with typer's own type, default and description."""
    option, kind, default = _option(field), field.annotation.__origin__, field.default
    kinds = set(get_args(kind) if isinstance(kind, UnionType) else [kind])
    if not kinds <= PLAIN:
        kind = Path if option.parse is Path else list[str] if option.parse is tuple else str
        if type(None) in kinds or default == ():
            kind, default = kind | None, None
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    extra: dict[str, Any] = {"help": option.help, "autocompletion": _completing(option) if option.values else None}
    if kind in (str, str | None) and not option.may_be_empty:
        extra["callback"] = _not_empty
    info = typer.Option(*(option.flags or [f"--{field.name.replace('_', '-')}"]), **extra)
    if isinstance(option, Argument):
        info = typer.Argument(metavar=option.metavar, **extra)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _not_empty(text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise typer.BadParameter("is empty")
    return text


def _completing(option: Option) -> Callable[[str], list[str]]:
    """Return what a shell offers for the value that was begun; of a list with commas, for its last name."""

    def complete(incomplete: str) -> list[str]:  # typer asks for that name
        before, comma, last = incomplete.rpartition(",") if option.parse is split_names else ("", "", incomplete)
        chosen = before.split(",")
        names = option.values() if option.values else ()
        return [before + comma + name for name in names if name.startswith(last) and name not in chosen]

    return complete
