"""The README and the pages cannot lie: their commands parse; the README's file tree is the real one, its make targets exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from bitatlas.cli.main import app
from pages import commands

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
PAGES = [
    page for page in (ROOT / "docs").rglob("*.md") if page.name not in ("extend.md",)
]  # what extend.md adds is tested with it


COMMANDS = commands(README)
EVERYWHERE = sorted({line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))} | set(COMMANDS))


@pytest.mark.parametrize("command", [line for line in EVERYWHERE if re.match("bitatlas [a-z]", line) and "[OPTIONS]" not in line])
def test_commands_parse(command: str):
    group = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    context = group.make_context("bitatlas", [words[0]])
    _, subcommand, _ = group.resolve_command(context, words)
    subcommand.make_context(words[0], words[1:], parent=context)  # raises on an unknown option or a missing argument


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert targets >= {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_tree_is_the_real_one():
    tree = next(block for block in BLOCKS if block.startswith("src/bitatlas/"))
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    package = ROOT / "src" / "bitatlas"
    real = {
        f"{p.name}/" if p.is_dir() else p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert listed == {name for name in real if not name.startswith("__")}


def test_every_option_that_is_named_exists():
    group = typer.main.get_command(app)
    help_texts = {
        option
        for command in (group, *group.commands.values())
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= help_texts
