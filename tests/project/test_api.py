"""The Python names: the page about them runs, they are functions whatever is imported, and importing them is free."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitatlas
import bitatlas.export.packed
import bitatlas.run.compare
import bitatlas.run.survey
import bitatlas.run.verify
from atlas_factory import make_atlas
from bitatlas import api, records
from bitatlas.cli.main import COMMANDS
from bitatlas.errors import UserError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(EXAMPLE, "docs/python.md", "exec"), names)
    assert names["result"].kept
    (task,) = names["result"].tasks
    assert task.found.correct == task.promised and task.n == 20  # the same weights answer alike
    assert names["plan"] == names["atlas"].best()
    assert names["smaller"].size.code_bits <= 2.5
    assert capsys.readouterr().out.count("\n") >= 16


def test_the_page_uses_every_name():
    used = {node.attr for node in ast.walk(ast.parse(EXAMPLE)) if isinstance(node, ast.Attribute)}
    assert used >= set(bitatlas.__all__) - {"__version__"}


def test_the_names_are_typed_functions():
    for name in ("survey", "apply", "verify", "compare"):
        assert inspect.isfunction(getattr(bitatlas, name))
        assert all(p.annotation is not p.empty for p in inspect.signature(getattr(bitatlas, name)).parameters.values())
    with pytest.raises(AttributeError, match="no attribute 'surveys'"):
        _ = bitatlas.surveys


@pytest.mark.parametrize("name", ["survey", "compare"])
def test_what_the_command_takes_the_function_takes(name: str):
    command, function = inspect.signature(COMMANDS[name]).parameters, inspect.signature(getattr(api, name)).parameters
    assert set(command) - {"as_json", "draft", "dry_run"} == set(function)  # one is about stdout, the others make no atlas
    with pytest.raises(UserError, match="margin 0pp: give percentage points"):
        getattr(api, name)("nothing", "nowhere", margin="0pp")


def test_a_function_names_what_it_does_not_take():
    with pytest.raises(TypeError, match=r"survey\(\) got an unexpected keyword argument 'formatz'"):
        api.survey(formatz=["int2_g64"])
    with pytest.raises(TypeError, match=r"verify\(\) missing a required argument: 'plan_or_checkpoint'"):
        api.verify("a model")


def test_importing_is_free():
    code = "import sys, bitatlas; dir(bitatlas); print(sorted({'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys; from bitatlas import Atlas, Plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_records_go_through_files(tmp_path: Path):
    example = make_atlas()
    atlas = api._as(bitatlas.Atlas, example)
    plan = atlas.best()
    assert plan is not None and isinstance(plan, records.Plan)
    plan.write(tmp_path / "plan.json")
    assert bitatlas.Plan.read(str(tmp_path / "plan.json")) == plan
    with pytest.raises(UserError, match="no such file"):
        bitatlas.Atlas.read(tmp_path)
    with pytest.raises(UserError, match="give a budget"):
        atlas.replan()


def test_notebooks_show_tables():
    atlas = api._as(bitatlas.Atlas, make_atlas())
    plan = atlas.best()
    assert plan is not None
    for page in (atlas._repr_html_(), plan._repr_html_()):
        assert page.count("<table>") == page.count("</table>") > 0
        assert page.count("<tr>") == page.count("</tr>") and page.count("<td") == page.count("</td>")
    for layer in atlas.layers:
        assert f"<td>{layer.layer}</td>" in atlas._repr_html_()
    assert plan.model.name in plan._repr_html_()
    odd = api._as(bitatlas.Plan, plan)
    object.__setattr__(odd, "verdict", "<script>")
    assert "<script>" not in odd._repr_html_()
