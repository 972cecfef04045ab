"""The script runs on any survey's folder; the notebook is valid, was run from top to bottom, and its code still runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat

from atlas_factory import make_atlas
from bitatlas.records.files import to_json

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def survey(folder: Path) -> Path:
    (folder / "atlas.json").write_text(to_json(make_atlas()), encoding="utf-8")
    return folder


def test_the_script_runs(tmp_path: Path):
    script = [sys.executable, EXAMPLES / "atlas.py", survey(tmp_path)]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum("predicted" in line for line in lines) == 3
    assert lines[-1].startswith("the survey's own plan")


def test_the_notebook_was_run():
    notebook = nbformat.read(EXAMPLES / "demo.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs and not any(output.output_type == "error" for output in cell.outputs) for cell in code)
    assert "/home" not in json.dumps(notebook) and "/tmp" not in json.dumps(notebook)


def test_the_notebooks_code_runs(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SURVEY", str(survey(tmp_path)))
    names: dict = {}
    for cell in nbformat.read(EXAMPLES / "demo.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and "IPython" not in cell.source:  # which only notebooks have
            exec(compile(cell.source, "demo.ipynb", "exec"), names)
    assert names["plan"].modules
