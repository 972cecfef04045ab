"""A survey's settings and files, for tests that run one."""

from __future__ import annotations

from pathlib import Path

from bitatlas.progress import Reporter
from bitatlas.records import Budget
from bitatlas.run.prepare import default_settings
from bitatlas.run.settings import Settings

OUTPUTS = ("atlas.json", "plan.json", "report.md", "report.html")


QUIET = Reporter(quiet=True)


def settings_for(model: Path, text: Path, **changes: object) -> Settings:
    words = {
        "model": str(model), "formats": "int2_g32,int4_g32", "budget": Budget("code_bits", 3.0), "rows": "8,8,8", "tasks": "none",
        "tokens": str(text), "quantizer": "rtn", "row_length": 24, "task_data": None, "limit": 20, "tolerance": 0.05, "fuse": False, "refine": True,
        "device": "cpu", "revision": None, "seed": 0,
    }  # fmt: skip
    return default_settings(**{**words, **changes})
