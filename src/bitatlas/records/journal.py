"""`run.sqlite`: every finished measurement, keyed by what it is a measurement of, so that an interrupted run goes on where it stopped.

Keys are hashes of content (weights, tokens, formats, settings), never of time or order: a run with another budget finds what an
earlier one measured. SQLite in WAL mode survives a crash between two writes; each measurement is one committed row, with a hash of
itself, so that a byte that changed on the disk is told and not reported as a measurement. One process at a time has the journal.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitatlas.errors import MAKE_ROOM, UserError

VERSION = 3  # raise it when a measurement's meaning changes: older entries are then not found


def content_key(*parts: Any) -> str:
    """Return a hash of anything JSON can hold."""
    text = json.dumps([VERSION, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(key: str, value: str) -> str:
    return hashlib.sha256(f"{key} {value}".encode()).hexdigest()[:16]


class Journal:
    """Measurements on disk. `path=None` keeps them in memory."""

    def __init__(self, path: Path | None):
        self.path = path
        if path and path.parent.is_dir() and not os.access(path.parent, os.W_OK):
            raise UserError(
                f"{path.parent}: is read-only, but the run's journal goes there; choose another --out, or copy the folder"
            )
        with self._readable_errors():
            self._db = sqlite3.connect(path or ":memory:", timeout=1)
        try:
            with self._readable_errors():
                self._open()
        except UserError:
            self._db.close()
            raise

    def _open(self) -> None:
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS measured "
            "(key TEXT PRIMARY KEY, stage TEXT NOT NULL, value TEXT NOT NULL, hash TEXT NOT NULL)"
        )
        self._db.commit()
        damage = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise self._unusable(damage)

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turn SQLite's errors (damaged file, full disk, no permission) into one clear line."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: a damaged page in an error's own text
            if "locked" in str(error):
                raise UserError(
                    f"{self.path}: another program has the run's journal open (a second bitatlas?); wait for it, or choose another --out"
                ) from None
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise UserError(f"{self.path}: no space left on the disk; {MAKE_ROOM}") from None
            raise self._unusable(error) from None

    def _unusable(self, reason: object) -> UserError:
        line = " ".join(str(reason).split())
        return UserError(
            f"{self.path}: the run's journal cannot be used ({line}); repair the disk, or start again with another --out"
        )

    def get(self, key: str) -> Any | None:
        """Return the measurement under `key`, or None."""
        with self._readable_errors():
            row = self._db.execute("SELECT value, hash FROM measured WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if _checksum(key, row[0]) != row[1]:
            raise self._unusable("a measurement in it is not what was written")
        return json.loads(row[0])

    def put(self, key: str, stage: str, value: Any) -> None:
        """Record a measurement; on return it is safe from a crash of this process."""
        self.put_all(stage, {key: value})

    def put_all(self, stage: str, values: Mapping[str, Any]) -> None:
        """Record measurements by key, all of them or none."""
        texts = {key: json.dumps(value, allow_nan=False) for key, value in values.items()}
        with self._readable_errors():
            self._db.executemany(
                "INSERT OR REPLACE INTO measured VALUES (?, ?, ?, ?)",
                [(key, stage, text, _checksum(key, text)) for key, text in texts.items()],
            )
            self._db.commit()

    def entries(self) -> list[tuple[str, str, Any]]:
        """Return (key, stage, value) of every measurement."""
        with self._readable_errors():
            rows = self._db.execute("SELECT key, stage, value FROM measured").fetchall()
        return [(key, stage, json.loads(value)) for key, stage, value in rows]

    def claim(self, weights_sha256: str, model: str) -> None:
        """Tie the journal to one model; UserError where it already belongs to another."""
        with self._readable_errors():
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

    def close(self) -> None:
        """Close the file, so that another process may open it."""
        self._db.close()
