"""The long tables beside the atlas, as Parquet: one line a row, module, head or item, readable by any data tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bitatlas.files import writing


def write_tables(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write `folder`/NAME.parquet for each table with lines in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        if not lines:
            continue
        columns = dict.fromkeys(column for line in lines for column in line)  # Arrow would take the first line's alone
        with writing(folder / f"{name}.parquet"):
            table = pa.table({column: [line.get(column) for line in lines] for column in columns})
            pq.write_table(table, folder / f"{name}.parquet")
