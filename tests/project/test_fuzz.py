"""Damaged files: whatever a reader is given, it answers, or raises one clear line; it never writes, hangs or shows a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import task_files
from atlas_factory import make_atlas
from bitatlas.data.tasks import load_items
from bitatlas.data.texts import read_documents
from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.folder import weight_files
from bitatlas.model.tensor_files import read_header
from bitatlas.records import Atlas, Plan
from bitatlas.records.files import read_record, to_json
from bitatlas.records.journal import Journal
from task_files import PROBLEMS, QUESTIONS

SPENT = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
FEW = settings(SPENT, max_examples=40)  # of what is slow to draw or to read
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12),
    st.sampled_from(["", "../x", "/etc/passwd", "int2_g64", "a\u0000b", "\ud800", "<script>", "9" * 400]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6
)


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every path into a JSON value."""
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


@st.composite
def changed_values(draw: st.DrawFn, content: Any) -> Any:
    """`content` with one to three values replaced or taken out."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(content))))
        value = draw(VALUES)
        if not path:
            content = value
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = value
        else:
            del parent[path[-1]]
    return content


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut short, or with a few bytes replaced, taken out or put in."""
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 9)))
        content = content[:start] + draw(st.binary(max_size=9)) + content[end:]
    return content


def damaged(content: Any) -> st.SearchStrategy[bytes]:
    """A JSON file's bytes, damaged in its values or in its bytes."""
    text = json.dumps(content).encode()
    return changed_values(content).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")) | changed_bytes(text)


def lines_of(records: list[dict]) -> st.SearchStrategy[bytes]:
    """A JSON Lines file's bytes, damaged."""
    text = "\n".join(map(json.dumps, records)).encode()
    return changed_values(records).map(as_lines) | changed_bytes(text)


def as_lines(value: Any) -> bytes:
    return "\n".join(map(json.dumps, value if isinstance(value, list) else [value])).encode("utf-8", "surrogatepass")


def answers(read: Callable[[Path], Any], name: str, content: bytes) -> None:
    """Read a file of these bytes: a value or one clear line, and nothing written beside it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            read(file)
        assert [path.name for path in Path(folder).iterdir()] == [name] and file.read_bytes() == content


ATLAS = make_atlas()
assert ATLAS.plan is not None


@FEW
@given(damaged(json.loads(to_json(ATLAS.plan))))
def test_plans(content: bytes):
    answers(lambda file: read_record(file, Plan), "plan.json", content)


@FEW
@given(damaged(json.loads(to_json(ATLAS))))
def test_atlases(content: bytes):
    answers(lambda file: read_record(file, Atlas), "atlas.json", content)


@pytest.mark.parametrize(("task", "name", "records"), [("arc_easy", "ARC-Easy-test.jsonl", QUESTIONS)])
@SPENT
@given(data=st.data())
def test_questions(task: str, name: str, records: list[dict], data: st.DataObject):
    answers(lambda file: load_items(task, file.parent, 3, seed=0), name, data.draw(lines_of(records)))


@SPENT
@given(damaged(PROBLEMS))
def test_problems(content: bytes):
    answers(lambda file: load_items("svamp", file.parent, 3, seed=0), "SVAMP.json", content)


@SPENT
@given(lines_of([{"text": "one"}, {"text": "two", "id": 3}]))
def test_texts(content: bytes):
    answers(lambda file: read_documents(str(file)), "text.jsonl", content)


@SPENT
@given(st.data())
def test_headers(tiny_llama: Path, data: st.DataObject):
    whole = (tiny_llama / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = data.draw(damaged(json.loads(whole[8 : 8 + length])))
    content = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    answers(read_header, "model.safetensors", data.draw(st.just(content) | changed_bytes(content[:4096])))


@SPENT
@given(
    damaged({"metadata": {"total_size": 9}, "weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}})
)
def test_indexes(content: bytes):
    answers(lambda file: weight_files(file.parent), "model.safetensors.index.json", content)


@pytest.mark.slow
@FEW
@given(st.data())
def test_configs(tiny_llama: Path, data: st.DataObject):
    config = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(tiny_llama, Path(temporary) / "model")
        (folder / "config.json").write_bytes(data.draw(damaged(config)))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with contextlib.suppress(UserError):
            open_checkpoint(str(folder))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def journal_file(folder: Path) -> bytes:
    written = Journal(folder / "run.sqlite")
    for key in ("a", "b"):
        written.put(key, "damage", [1.0, 2.0])
    written.close()
    return (folder / "run.sqlite").read_bytes()


@FEW
@given(st.data())
def test_journals(data: st.DataObject):
    """SQLite leaves files of its own beside it; what is found must be what was written, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.sqlite"
        file.write_bytes(data.draw(changed_bytes(journal_file(Path(folder)))))
        with contextlib.suppress(UserError):
            found = Journal(file)
            try:
                assert all(found.get(key) in (None, [1.0, 2.0]) for key in ("a", "b"))
            finally:
                found.close()


def test_what_fuzzing_found(tmp_path: Path):
    """A name that no file system takes."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "9" * 400}}))
    with pytest.raises(UserError, match="outside the folder"):
        weight_files(tmp_path)


@pytest.mark.slow
def test_every_reader_with_coverage_guided_inputs(tmp_path: Path):
    """A moment of what `fuzz_readers.py` does by hand for long."""
    pytest.importorskip("atheris", reason="atheris is not installed")
    script = Path(task_files.__file__).with_name("fuzz_readers.py")
    words = [sys.executable, str(script), "all", "--seconds", "1", "--findings", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("Done ") == done.stderr.count("--- ") > 10
    assert list(tmp_path.iterdir()) == []
