"""Full disks, read-only folders, changed files: one clear line, nothing half written, and the same bytes once there is room again."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import tiny
from bitatlas.cli import main as cli
from bitatlas.progress import Reporter
from bitatlas.records import files

OUTPUTS = ("atlas.json", "plan.json", "report.html", "report.md")
FIRST = ("plan.json", "report.html")  # are there from the first plan on
DISK_MIB = 80  # a survey asks for a little more than 64 before it starts
LARGEST_FILE = 40_000  # bytes: more than a module of the bank, less than the journal and the outputs
# Where the disk gets full: the stage that begins, and what cannot be written in it.
MOMENTS = {"quantizing (rtn)": "bank", "layers": "run.sqlite", "writing the report": ".partial"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of our own; skips where none may be mounted."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [
        "survey", str(model), "--tokens", str(text), "--out", str(out), "--tasks", "none", "--rows", "2,2,4", "--row-length", "24",
        "--no-refine", "--formats", "int2_g32,int4_g32", "--quantizer", "rtn", "--quiet", *more,
    ]  # fmt: skip


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    monkeypatch.setattr(sys, "argv", ["bitatlas", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().err


def at_stage(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], None]) -> None:
    """`act` when the stage begins."""
    stage = Reporter.stage

    @contextmanager
    def watched(self: Reporter, begun: str) -> Iterator:
        if begun.startswith(name):
            act()
        with stage(self, begun) as progress:
            yield progress

    monkeypatch.setattr(Reporter, "stage", watched)


def fill(disk: Path) -> None:
    """Not a byte is left."""
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def written(out: Path) -> dict[str, bytes]:
    """Everything but the journal."""
    return {
        str(f.relative_to(out)): f.read_bytes()
        for f in sorted(out.rglob("*"))
        if f.is_file() and not f.name.startswith("run.sqlite")
    }


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        patch.setattr(sys, "argv", ["bitatlas", *command(tiny_llama, text, out)])
        cli.main()
    assert set(OUTPUTS) <= set(written(out))
    return written(out)


@pytest.mark.parametrize("stage", MOMENTS)
def test_a_full_disk_is_one_line_and_resumed_it_is_the_same(
    stage: str, disk: Path, tiny_llama: Path, text: Path, undisturbed: dict[str, bytes], monkeypatch, capsys
):
    words = command(tiny_llama, text, disk / "out")
    with monkeypatch.context() as patch:
        at_stage(patch, stage, lambda: fill(disk))
        code, line = run(words, patch, capsys)
    assert code == 2
    assert line.count("\n") == 1 and MOMENTS[stage] in line and "no space left" in line and "--resume" in line
    assert not [name for name in OUTPUTS if name not in FIRST and (disk / "out" / name).exists()]
    complete = {name: content for name, content in written(disk / "out").items() if content and name not in FIRST}
    assert complete.items() <= undisturbed.items()  # what is there is whole
    code, line = run([*words, "--resume"], monkeypatch, capsys)
    assert code == 2 and "MiB free on that disk" in line
    (disk / "ballast").unlink()
    assert run([*words, "--resume"], monkeypatch, capsys) == (0, "")
    assert written(disk / "out") == undisturbed


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be longer than so much: what a quota or an old file system does, and no mount is needed for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_is_one_line(tiny_llama: Path, text: Path, tmp_path: Path, small_files, monkeypatch, capsys):
    code, line = run(command(tiny_llama, text, tmp_path / "out"), monkeypatch, capsys)
    assert code == 2
    assert line.count("\n") == 1 and "run.sqlite" in line
    assert not [name for name in OUTPUTS if (tmp_path / "out" / name).exists()]


def test_outputs_of_an_earlier_run_stay_together_when_new_ones_do_not_fit(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch, capsys
):
    words = command(tiny_llama, text, tmp_path / "out")
    assert run(words, monkeypatch, capsys) == (0, "")
    before = written(tmp_path / "out")
    with monkeypatch.context() as patch:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        at_stage(patch, "writing the report", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, limit[1])))
        try:
            code, line = run([*words, "--resume", "--code-bits", "2.5"], patch, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2 and line.count("\n") == 1 and "file too large" in line
    assert written(tmp_path / "out") == before


def test_a_read_only_disk_is_one_line(disk: Path, tiny_llama: Path, text: Path, monkeypatch, capsys):
    words = command(tiny_llama, text, disk / "out")
    assert run(words, monkeypatch, capsys) == (0, "")
    before = written(disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    tries = [[*words, "--resume"], command(tiny_llama, text, disk / "other"), ["report", str(disk / "out")]]
    tries += [
        ["plan", str(disk / "out"), "--code-bits", "2.5"],
        ["plan", str(disk / "out"), "--curve", "--points", "1", "--quiet"],
    ]
    tries += [["apply", str(tiny_llama), str(disk / "out" / "plan.json"), "--out", str(disk / "packed"), "--quiet"]]
    for arguments in tries:
        code, line = run(arguments, monkeypatch, capsys)
        assert code == 2 and line.count("\n") == 1, arguments
        assert "read-only" in line or "readonly" in line, line
    assert written(disk / "out") == before
    assert sorted(path.name for path in disk.iterdir()) == ["out"]


def test_a_folder_without_permission_is_one_line(tmp_path: Path, monkeypatch, capsys):
    """Root may write anywhere, so it is somebody else for the length of a call."""
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    monkeypatch.setattr(cli, "app", lambda **_: files.write_text(folder / "plan.json", ""))
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(65534)
        code, line = run([], monkeypatch, capsys)
    finally:
        os.seteuid(before)
    assert (code, line.count("\n")) == (2, 1) and "plan.json: permission denied" in line
    assert list(folder.iterdir()) == []


def test_weights_that_change_before_the_report_are_told(tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch, capsys):
    """Even with its old date put back; a file that was only touched is the same file."""
    model = tiny.make_checkpoint(tmp_path / "model")
    file = model / "model.safetensors"

    def change() -> None:
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=times)

    words = command(model, text, tmp_path / "out")
    with monkeypatch.context() as patch:
        at_stage(patch, "uniform widths", change)
        code, line = run(words, patch, capsys)
    assert (code, line.count("\n")) == (2, 1) and "changed while it was in use" in line
    assert not [name for name in OUTPUTS if name not in FIRST and (tmp_path / "out" / name).exists()]
    code, line = run([*words, "--resume"], monkeypatch, capsys)
    assert code == 2 and "other weights" in line
    with monkeypatch.context() as patch:
        at_stage(patch, "layers", file.touch)
        assert run(command(model, text, tmp_path / "touched"), patch, capsys) == (0, "")
