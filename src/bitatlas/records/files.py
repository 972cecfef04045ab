"""Records -> JSON files and back.

Reading validates types (pydantic reads plain dataclasses), so a damaged file is one clear line and not a traceback later.
Writing is whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from bitatlas.errors import UserError
from bitatlas.records import ATLAS_SCHEMA, PLAN_SCHEMA, Atlas, Plan

CURVE_FOLDER = "curve"  # of a survey's folder: verified plans at other sizes
PARTIAL = ".partial"  # folder of files on their way, in the one that they go to
Record = TypeVar("Record", Plan, Atlas)


def to_json(record: Plan | Atlas) -> str:
    """JSON text, schema first; the same record gives the same bytes."""
    content = asdict(record)
    content = {"schema": content.pop("schema"), **content}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read and validate a `plan.json` or `atlas.json`; UserError where it is missing, damaged or of another schema."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    return parse_record(text, str(path), kind)


def parse_record(text: str, path: str, kind: type[Record]) -> Record:
    """The same from JSON text; `path` is where it was found, for messages."""
    from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    expected = PLAN_SCHEMA if kind is Plan else ATLAS_SCHEMA
    found = content.get("schema") if isinstance(content, dict) else None
    if found != expected:
        raise UserError(f"{path}: schema is {found!r}, expected {expected!r}")
    try:
        record = TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place}: {first['msg']}") from None
    for plan in _plans_in(record):
        unknown = sorted(set(plan.modules.values()) - set(plan.formats))
        if unknown:
            raise UserError(f"{path}: modules have the format {unknown[0]!r}, which formats does not describe")
    return record


def _plans_in(record: Plan | Atlas) -> list[Plan]:
    if isinstance(record, Plan):
        return [record]
    return [*([record.plan] if record.plan else []), *record.plans]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def plan_place(plan: Plan) -> str:
    """Where a plan of the curve lies, from the survey's folder."""
    return f"{CURVE_FOLDER}/plan-{plan.budget.value:.0f}.json"


def write_plans(folder: Path, plans: Sequence[Plan]) -> None:
    """The curve's plans as files; no new folder for none."""
    if plans:
        (folder / CURVE_FOLDER).mkdir(exist_ok=True)
    for plan in plans:
        write_text(folder / plan_place(plan), to_json(plan))


def drop_other_plans(folder: Path, plans: Sequence[Plan]) -> None:
    """Away with the plans of an earlier curve."""
    for old in set((folder / CURVE_FOLDER).glob("plan-*.json")) - {folder / plan_place(plan) for plan in plans}:
        old.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write beside, then rename: a reader never sees half a file. `sync`: and a power cut loses nothing."""
    with writing(path):
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong in the block goes wrong with `path`: a full disk's error does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno) if error.errno else str(error), str(path)) from None


@contextmanager
def all_or_none(folder: Path) -> Iterator[Path]:
    """A folder to write files to, which go to their places in `folder` together when the block ends well.

    If it does not, as on a full disk, `folder` stays as it was. What a killed process left is removed by the next.
    """
    beside = folder / PARTIAL
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in sorted(file for file in beside.rglob("*") if file.is_file()):
            place = folder / file.relative_to(beside)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
