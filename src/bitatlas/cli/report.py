"""`bitatlas report`: the pages again, from the atlas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitatlas.cli.options import Json


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished survey.")],
    with_figures: Annotated[
        bool, typer.Option("--figures", help="Also every figure as SVG and PNG, into FOLDER/figures (extra: figures).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write report.md and report.html again from atlas.json."""
    from bitatlas.cli.show import print_files
    from bitatlas.records import Atlas
    from bitatlas.records.files import all_or_none, read_record
    from bitatlas.report.charts.standalone import write_figures
    from bitatlas.report.html import write_reports

    atlas = read_record(folder / "atlas.json", Atlas)
    with all_or_none(folder) as place:
        figures = write_figures(atlas, place) if with_figures else []
        write_reports(atlas, place)
    files = [folder / "report.html", folder / "report.md", *(folder / file.relative_to(place) for file in figures)]
    if as_json:
        print_files(files)
        return
    print(*([files[0], files[-1].parent] if figures else files[:1]), sep="\n")
