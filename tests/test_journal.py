"""The journal: what was put is found again, by content; damage to the file is told."""

from pathlib import Path

import pytest

from bitatlas.errors import UserError
from bitatlas.journal import Journal, content_key


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
    assert again.count() == 1


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
