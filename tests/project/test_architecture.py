"""The house: which package may import which (arrows one way), no private name across packages, no import in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bitatlas

PACKAGE = Path(bitatlas.__file__).parent

# Every package and the packages that it may import; from below to above. "export.gguf" and the like belong to "export".
MAY_IMPORT = {
    "errors": "",
    "records": "errors",
    "progress": "errors records",
    "stats": "errors records",
    "data": "errors records",
    "model": "errors records progress",
    "quantize": "errors records progress model data",
    "plan": "errors records progress stats",
    "measure": "errors records progress stats data model quantize plan",
    "findings": "errors records stats plan measure",
    "report": "errors records plan findings",
    "export": "errors records progress model quantize measure",
    "run": "errors records progress stats data model quantize plan measure findings report export",
    "api": "errors records progress stats plan report export run",
    "cli": "errors records progress stats plan findings report export run",
}
HALL = {"__init__": {"api"}, "__main__": {"cli"}}  # the lazy public names, and `python -m bitatlas`
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(file: Path) -> list[tuple[str, str]]:
    """(module within the package, name imported of it), of the whole file: inside functions and for types too."""
    pairs = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bitatlas":
            pairs += [(node.module.partition(".")[2], alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            pairs += [(alias.name.partition(".")[2], "") for alias in node.names if alias.name.startswith("bitatlas.")]
    return pairs


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_arrows_run_one_way(file: Path):
    package = name_of(file).split(".")[0]
    allowed = HALL.get(package) or {package, *MAY_IMPORT[package].split()}
    for module, name in imports_of(file):
        target = (module or name).split(".")[0]
        assert target in allowed, f"{package} may not import {module or name}"
        assert target == package or not name.startswith("_"), f"{name} is private to {target}"


def test_the_packages_stand_in_an_order():
    assert set(MAY_IMPORT) | set(HALL) == {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    TopologicalSorter({package: may.split() for package, may in MAY_IMPORT.items()}).prepare()  # raises CycleError


def test_no_two_files_import_each_other():
    names = {name_of(file) for file in FILES}
    graph = {
        name_of(file): {
            target if (target := f"{module}.{name}".strip(".")) in names else module for module, name in imports_of(file)
        }
        - {name_of(file)}
        for file in FILES
        if file.parent != PACKAGE
    }
    TopologicalSorter(graph).prepare()
