"""The journal: what was put is found again, by content; damage to the file is told."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from bitatlas.errors import UserError
from bitatlas.records.journal import Journal, content_key


def test_keys_are_content():
    assert content_key("a", {"x": 1, "y": 2}) == content_key("a", {"y": 2, "x": 1})
    assert content_key("a", [1]) != content_key("a", [2])


def test_values_come_back_exactly(tmp_path: Path):
    journal = Journal(tmp_path / "run.sqlite")
    values = [0.1 + 0.2, 1e-300, 2**53 + 1.0, -0.0]
    journal.put("k", "damage", values)
    journal.close()
    again = Journal(tmp_path / "run.sqlite")
    assert [v.hex() for v in again.get("k")] == [v.hex() for v in values]
    assert again.get("other") is None
    assert len(again.entries()) == 1


def test_another_models_run_is_refused(tmp_path: Path):
    journal = Journal(tmp_path / "run.sqlite")
    journal.claim("aaa", "first")
    journal.claim("aaa", "first")
    with pytest.raises(UserError, match="holds a run of first"):
        journal.claim("bbb", "second")


def test_a_damaged_journal_is_one_clear_line(tmp_path: Path):
    (tmp_path / "run.sqlite").write_bytes(b"this is not a database" * 100)
    with pytest.raises(UserError, match="journal cannot be used"):
        Journal(tmp_path / "run.sqlite")


def test_not_a_number_is_never_recorded(tmp_path: Path):
    with pytest.raises(ValueError):
        Journal(tmp_path / "run.sqlite").put("k", "damage", [float("nan")])


def read_all(file: Path, keys: list[str]) -> tuple[dict, str]:
    """What is found under each key until something is wrong, and the line that says what."""
    found: dict = {}
    try:
        journal = Journal(file)
    except UserError as error:
        return found, str(error)
    try:
        for key in keys:
            found[key] = journal.get(key)
    except UserError as error:
        return found, str(error)
    finally:
        journal.close()
    return found, ""


def test_a_changed_byte_is_told_or_harmless(tmp_path: Path):
    """Wherever a byte changes on the disk: the value that was written, or none (it is measured again), or one clear line."""
    whole = tmp_path / "run.sqlite"
    journal = Journal(whole)
    values = {content_key(n): [n / m for m in range(1, 100)] for n in range(40)}
    for key, value in values.items():
        journal.put(key, "damage", value)
    journal.close()
    content, chance, told = whole.read_bytes(), random.Random(0), 0
    damaged = tmp_path / "damaged.sqlite"
    for _ in range(150):
        place = chance.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        damaged.write_bytes(changed)
        found, line = read_all(damaged, list(values))
        if line:
            told += 1
            assert "journal cannot be used" in line and "\n" not in line
        assert all(value is None or value == values[key] for key, value in found.items()), place
    assert told > 75  # the hash is what tells of a changed value: without it most of these would pass for measurements


KILLED = """
import os, sys, pathlib, bitatlas.records.journal as j
journal = j.Journal(pathlib.Path(sys.argv[1]))
for n in range(40):
    journal.put(j.content_key(n), "damage", [n / m for m in range(1, 100)])
os._exit(9)
"""


def test_what_a_killed_process_left_is_read_and_damage_to_it_told(tmp_path: Path):
    """The last writes lie in a file beside the journal: cut short, or changed anywhere, it holds what it held or less."""
    whole = tmp_path / "run.sqlite"
    subprocess.run([sys.executable, "-c", KILLED, str(whole)], check=False)
    main, log = whole.read_bytes(), (tmp_path / "run.sqlite-wal").read_bytes()
    assert len(log) > 40 * 4096
    values = {content_key(n): [n / m for m in range(1, 100)] for n in range(40)}
    assert read_all(whole, list(values)) == (values, "")
    chance, seen = random.Random(1), set()
    for number in range(60):
        place, content = tmp_path / f"{number}" / "run.sqlite", bytearray(log)
        place.parent.mkdir()
        if number % 2:
            content = content[: chance.randrange(len(content))]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        place.write_bytes(b"" if number % 7 == 0 else main)
        place.with_name("run.sqlite-wal").write_bytes(content)
        found, line = read_all(place, list(values))
        assert not line or ("journal cannot be used" in line and "\n" not in line)
        assert all(value is None or value == values[key] for key, value in found.items()), number
        seen.add(sum(value is not None for value in found.values()))
    assert len(seen) > 10  # some keep more, some less


def test_an_empty_file_is_an_empty_journal(tmp_path: Path):
    (tmp_path / "run.sqlite").touch()
    assert Journal(tmp_path / "run.sqlite").entries() == []


def test_one_process_at_a_time(tmp_path: Path):
    journal = Journal(tmp_path / "run.sqlite")
    code = "import sys, pathlib, bitatlas.records.journal as j; j.Journal(pathlib.Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.sqlite")], capture_output=True, text=True)
    assert "another program has the run's journal open" in other.stderr
    journal.close()
    assert Journal(tmp_path / "run.sqlite").entries() == []
