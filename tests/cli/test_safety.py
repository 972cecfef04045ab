"""Inputs that want more than to be read: pickle, code, paths, markup, escape sequences; and what a survey opens, writes and connects to."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from bitatlas.cli.main import main
from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter, SafeConsole
from bitatlas.records import Atlas
from bitatlas.records.files import read_record
from tiny import make_checkpoint


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "given" / "model")


# --- pickle ------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def as_pickle(folder: Path, **others: object) -> None:
    """The folder's weights as transformers used to store them."""
    torch.save(load_file(folder / "model.safetensors") | others, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_pickle_is_refused_and_not_run(copy: Path, tmp_path: Path):
    as_pickle(copy, bomb=Bomb(str(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"is pickle, which can run code as it is read: if you trust it, ") as error:
        open_checkpoint(str(copy))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_what_the_refusal_of_pickle_tells_to_do_gives_the_same_model(copy: Path, tmp_path: Path, tiny_llama: Path):
    as_pickle(copy)
    with pytest.raises(UserError) as error:
        open_checkpoint(str(copy))
    message = re.search(r'AutoModelForCausalLM\.from_pretrained\("(.*)"\)\.save_pretrained\("NEW_FOLDER"\)', str(error.value))
    assert message
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(message[1]).save_pretrained(tmp_path / "new")
    written, original = open_checkpoint(str(tmp_path / "new")), open_checkpoint(str(tiny_llama))
    ids = torch.arange(20)[None]
    assert torch.equal(written.load_model().model(ids).logits, original.load_model().model(ids).logits)
    assert written.load_tokenizer().get_vocab() == original.load_tokenizer().get_vocab()


# --- code that comes with a model ----------------------------------------------------------------------------------------

BOMB_CODE = "import os\nos.mkdir(os.environ['BITATLAS_BOMB'])\nfrom transformers import LlamaConfig as Own\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}, "needs Python code of its own"),
        ({"attn_implementation": "somebody/kernel"}, "asks for code from the hub"),
    ],
)  # fmt: skip
def test_code_of_a_model_is_refused(copy: Path, tmp_path: Path, monkeypatch, change: dict, message: str):
    monkeypatch.setenv("BITATLAS_BOMB", str(tmp_path / "ran"))
    (copy / "own.py").write_text(BOMB_CODE)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(copy))
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_known_model_or_tokenizer_is_not_run(copy: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("BITATLAS_BOMB", str(tmp_path / "ran"))
    (copy / "own.py").write_text(BOMB_CODE)
    for name, auto in (("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}), ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]})):  # fmt: skip
        content = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(content | {"auto_map": auto}))
    checkpoint = open_checkpoint(str(copy))
    checkpoint.load_model()
    checkpoint.load_tokenizer()
    assert not (tmp_path / "ran").exists()


# --- names that would steer a terminal or a page ---------------------------------------------------------------------------

EVIL = "<script>alert(1)</script>[red]x[/red][/]\x1b[31m\x9b1m\u202eolleh"


def test_a_terminal_is_sent_no_escape_and_no_markup_of_others():
    message = io.StringIO()
    console = SafeConsole(file=message, force_terminal=True, width=300)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL, "green"))
    console.print(table)
    console.print(EVIL, soft_wrap=True)
    ours = re.sub(r"\x1b\[[0-9;]*m", "", message.getvalue())
    assert not re.search(r"[\x1b\x9b\u202e]", ours)
    assert ours.count("<script>alert(1)</script>[red]x[/red][/]") == 5
    assert "\\x1b[31m\\x9b1m\\u202eolleh" in ours
    assert "\x1b[31m" not in message.getvalue()  # red is nothing of ours here


def test_progress_is_sent_none_either(capsys):
    reporter = Reporter()
    with reporter.stage(EVIL):
        reporter.say(EVIL)
    shown = Reporter()
    shown.console = SafeConsole(file=(message := io.StringIO()), force_terminal=True, width=300)
    with shown.stage(EVIL) as advance:
        advance(1, 2)
    assert "\x1b[31m" not in capsys.readouterr().err + message.getvalue()


@pytest.mark.parametrize("words", [["report", f"/nowhere/{EVIL}"], ["survey", EVIL], [EVIL], ["survey", "--tasks", EVIL]])
def test_errors_are_sent_none_either(words: list[str], monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bitatlas", *words])
    with pytest.raises(SystemExit) as end:
        main()
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert not re.search(r"[\x1b\x9b\u202e]", line)


# --- what a survey touches ---------------------------------------------------------------------------------------------

WATCHER = textwrap.dedent("""
    import json, os, sys
    log = open(os.environ["BITATLAS_WATCH"], "a", buffering=1)
    def watch(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
            log.write(json.dumps([event, repr(args[1:])]) + "\\n")
    sys.addaudithook(watch)
""")

PROBE = json.dumps(["socket.bind", "(('::1', 0),)"])  # urllib3, as it is imported: is there IPv6? Nothing leaves the machine


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    return {
        str(file): (file.stat().st_size, file.stat().st_mtime_ns)
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.slow
def test_a_survey_writes_only_to_its_folder_and_connects_to_nothing(tmp_path: Path):
    """Of a hostile-looking local model, with tasks: a process of its own, whose home, cache and working folder are watched."""
    name = "<img src=x onerror=alert(1)>[red]\x1b[31m"
    model = make_checkpoint(tmp_path / "given" / name)
    (tmp_path / "given" / "text.txt").write_text(tiny.TEXT)
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCHER)
    paths = {
        "HOME": "home",
        "XDG_CACHE_HOME": "cache",
        "HF_HOME": "cache/hf",
        "TMPDIR": "tmp",
        "XDG_CONFIG_HOME": "config",
        "PWD": "here",
    }
    for path in (*paths.values(), "out"):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
    watched = [tmp_path / part for part in ("given", "home", "tmp", "config", "here", "watch")]
    before = listing(*watched)
    environment = {
        **os.environ, **{key: str(tmp_path / path) for key, path in paths.items()}, "BITATLAS_WATCH": str(tmp_path / "connections"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "watch"), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    words = [
        "survey", str(model), "--tokens", str(tmp_path / "given" / "text.txt"), "--rows", "2,2,4", "--row-length", "24",
        "--formats", "int2_g32,int4_g32", "--tasks", "demo_questions", "--limit", "2", "--no-refine", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bitatlas", *words],
        env=environment,
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    connections = (tmp_path / "connections").read_text().splitlines()
    assert set(connections) <= {PROBE}
    assert listing(*watched) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {"connections", "given", "home", "cache", "tmp", "config", "here", "watch", "out"}
    )
    atlas = read_record(tmp_path / "out" / "atlas.json", Atlas)
    assert atlas.model.name == name
    output = (done.stdout + done.stderr).removesuffix(f"{tmp_path}/out/report.html\n")
    assert "\x1b" not in output and "\\x1b[31m" in output and "[red]" in output
    assert "<img" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "<img" not in text.replace("\\<", "") and "\x1b" not in text
