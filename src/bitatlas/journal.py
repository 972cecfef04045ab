"""`run.sqlite`: every finished measurement, keyed by what it is a measurement of, so that an interrupted run goes on where it stopped.

Keys are hashes of content (weights, tokens, formats, settings), never of time or order: a run with another budget finds what an
earlier one measured. SQLite in WAL mode survives a crash between two writes; each measurement is one committed row.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitatlas.errors import UserError

VERSION = 2  # raise it when a measurement's meaning changes: older entries are then not found


def content_key(*parts: Any) -> str:
    """A hash of anything JSON can hold."""
    text = json.dumps([VERSION, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """Measurements on disk. `path=None` keeps them in memory."""

    def __init__(self, path: Path | None):
        self.path = path
        with self._told():
            self._db = sqlite3.connect(path or ":memory:")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS measurements (key TEXT PRIMARY KEY, stage TEXT NOT NULL, value TEXT NOT NULL)"
            )
            self._db.commit()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn SQLite's errors (damaged file, full disk, no permission) into one clear line."""
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path}: the run's journal cannot be used ({error}); repair the disk, or start again with another --out"
            ) from None

    def get(self, key: str) -> Any | None:
        """The measurement under `key`, or None."""
        with self._told():
            row = self._db.execute("SELECT value FROM measurements WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, stage: str, value: Any) -> None:
        """Record a measurement; on return it is safe from a crash of this process."""
        with self._told():
            self._db.execute(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", (key, stage, json.dumps(value, allow_nan=False))
            )
            self._db.commit()

    def claim(self, weights_sha256: str, model: str) -> None:
        """Tie the journal to one model; UserError where it already belongs to another."""
        with self._told():
            row = self._db.execute("SELECT value FROM run WHERE name = 'weights_sha256'").fetchone()
            if row is None:
                self._db.executemany("INSERT INTO run VALUES (?, ?)", [("weights_sha256", weights_sha256), ("model", model)])
                self._db.commit()
                return
            owner = self._db.execute("SELECT value FROM run WHERE name = 'model'").fetchone()
        if row[0] != weights_sha256:
            raise UserError(
                f"--out {self.path.parent if self.path else ''}: holds a run of {owner[0]} with other weights; choose another folder"
            )

    def count(self) -> int:
        with self._told():
            return int(self._db.execute("SELECT COUNT(*) FROM measurements").fetchone()[0])

    def close(self) -> None:
        self._db.close()
