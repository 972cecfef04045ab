"""Measure how large report.html is, how long writing it takes, and how long a browser needs to open it, for made-up atlases of more and more layers.

    PYTHONPATH=tests/support python benchmarks/report.py

Needs what the browser tests need (playwright, Chromium). Opening is the navigation's loadEventEnd, the best of three.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from atlas_factory import Recipe, make_atlas
from bitatlas.report.html import write_reports
from browser import launched, opened

LAYERS = (16, 32, 80)
OPENED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, launched() as browser:
        for layers in LAYERS:
            atlas, folder = make_atlas(Recipe(layers=layers, zones=5)), Path(temporary)
            start = time.perf_counter()
            write_reports(atlas, folder)
            written, page = time.perf_counter() - start, folder / "report.html"
            times = []
            for _ in range(3):
                with opened(browser, page.as_uri()) as seen:
                    times.append(seen.page.evaluate(OPENED) / 1000)
            print(
                f"{layers} layers: {page.stat().st_size / 1e6:.2f} MB, written in {written:.2f} s, opened in {min(times):.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
