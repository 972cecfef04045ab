"""`bitatlas report`: the pages again, from the atlas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="Folder of a finished survey.")]) -> None:
    """Write report.md and report.html again from atlas.json."""
    from bitatlas.files import read_record
    from bitatlas.records import Atlas
    from bitatlas.report.html import write_reports

    write_reports(read_record(folder / "atlas.json", Atlas), folder)
    print(folder / "report.html")
