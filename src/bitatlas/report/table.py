"""One table of the report: plain text, before any markup."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """`head` and `rows` hold plain text. `note` and `points` (sentences) stand above the rows, `empty` in their place."""

    key: str
    title: str
    note: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    empty: str = "Not measured."
    points: list[str] = field(default_factory=list)
