"""Write records as JSON files and read them, and write any file whole or not at all.

Reading validates types (pydantic reads plain dataclasses), so a damaged file is one clear line and not a traceback later.
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
from typing import Any, TypeVar

from bitatlas.errors import UserError
from bitatlas.records import ATLAS_SCHEMA, PLAN_SCHEMA, Atlas, Plan
from bitatlas.records.comparison import COMPARISON_SCHEMA, Comparison

CURVE_FOLDER = "curve"  # of a survey's folder: verified plans at other sizes
PARTIAL = ".partial"  # folder of files on their way, in the one that they go to
Record = TypeVar("Record", Plan, Atlas, Comparison)
SCHEMAS = {Plan: PLAN_SCHEMA, Atlas: ATLAS_SCHEMA, Comparison: COMPARISON_SCHEMA}


def to_json(record: Plan | Atlas | Comparison) -> str:
    """Return a record as JSON text, schema first; equal records give equal bytes."""
    content = asdict(record)
    content = {"schema": content.pop("schema"), **content}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read and validate a `plan.json`, `atlas.json` or `comparison.json`; UserError where it is missing, damaged or of another schema."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    return parse_record(text, str(path), kind)


def parse_record(text: str, path: str, kind: type[Record]) -> Record:
    """Validate the JSON text of a record; `path` is where it came from, for messages. UserError as of `read_record`."""
    from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    expected = SCHEMAS[kind]
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != expected:
        raise UserError(f"{path}: schema is {schema!r}, expected {expected!r}")
    try:
        record: Any = TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    plans = [record.plan, *record.plans] if isinstance(record, Atlas) else [record] if isinstance(record, Plan) else []
    for plan in filter(None, plans):
        unknown = sorted(set(plan.modules.values()) - set(plan.formats))
        if unknown:
            raise UserError(f"{path}: modules have the format {unknown[0]!r}, which formats does not describe")
    return record  # type: ignore[no-any-return]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def plan_place(plan: Plan) -> str:
    """Return the path of a plan of the curve, relative to the survey's folder."""
    return f"{CURVE_FOLDER}/plan-{plan.budget.value:.0f}.json"


def write_plans(folder: Path, plans: Sequence[Plan]) -> None:
    """Write the curve's plans as files of the survey's `folder`; no new folder for none."""
    if plans:
        (folder / CURVE_FOLDER).mkdir(exist_ok=True)
    for plan in plans:
        write_text(folder / plan_place(plan), to_json(plan))


def drop_other_plans(folder: Path, plans: Sequence[Plan]) -> None:
    """Delete the plans of an earlier curve."""
    for old in set((folder / CURVE_FOLDER).glob("plan-*.json")) - {folder / plan_place(plan) for plan in plans}:
        old.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file whole or not at all: beside it first, then renamed. `sync`: a power cut loses nothing either."""
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
    """Give an OSError of the block the file name `path`: a full disk's error does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno) if error.errno else str(error), str(path)) from None


@contextmanager
def all_or_none(folder: Path) -> Iterator[Path]:
    """Give a folder to write files to, which go to their places in `folder` together when the block ends well.

    If it does not, as on a full disk, `folder` stays as it was. What a killed process left is removed by the next.
    """
    beside = folder / PARTIAL
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in sorted(file for file in beside.rglob("*") if file.is_file()):
            target = folder / file.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
