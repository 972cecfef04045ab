"""A survey's settings and files, for tests that run one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bitatlas.progress import Reporter
from bitatlas.records import Budget
from bitatlas.run.options import SurveyOptions
from bitatlas.run.settings import Settings

OUTPUTS = ("atlas.json", "plan.json", "report.md", "report.html")


QUIET = Reporter(quiet=True)


def survey_words(model: Path, text: Path, out: Path) -> list[object]:
    """Return the words of a short survey on the command line."""
    return ["survey", model, "--tokens", text, "--rows", "6,6,8", "--row-length", "24", "--quantizer", "rtn", "--out", out]


def settings_for(model: Path, text: Path, budget: Budget | None = None, **changes: Any) -> Settings:
    usual = SurveyOptions(
        model,
        tokens=text,
        formats=("int2_g32", "int4_g32"),
        quantizer="rtn",  # the quickest
        code_bits=3.0,
        rows=(8, 8, 8),
        row_length=24,
        tasks=(),
        limit=20,
        fuse=False,
    )
    settings = Settings.of(replace(usual, **changes))
    return replace(settings, budget=budget or settings.budget)
