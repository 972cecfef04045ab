"""A survey on a real Ray cluster: the same bytes as without, also when a worker is killed; what cannot work is one clear line."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bitatlas.cli.main import main
from bitatlas.errors import UserError
from bitatlas.measure.damage import StateBudget
from bitatlas.measure.machine import LoadMode
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.run.options import SurveyOptions
from bitatlas.run.prepare import rows_and_items
from bitatlas.run.ray.cluster import TOKEN, Host, Requirements, Resources, check_host, parse_address, slots, versions
from bitatlas.run.ray.scheduler import pieces_per_batch
from bitatlas.run.ray.worker import WorkerConfig, work
from bitatlas.run.settings import Settings
from bitatlas.run.survey import run_survey

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install 'bitatlas[ray]')"
)
OUTPUTS = ("plan.json", "atlas.json", "report.md", "report.html")
QUIET = Reporter(quiet=True)
GIB = 2**30


def settings_for(model: Path, text: Path) -> Settings:
    options = SurveyOptions(
        model,
        tokens=text,
        formats=("int2_g32", "int4_g32"),
        quantizer="rtn",
        code_bits=3.0,
        rows=(20, 6, 8),
        row_length=16,
        tasks=["demo_questions"],
        limit=60,
        curve=False,
    )
    return Settings.of(options)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster on this machine with two workers, which this process is in."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    run_survey(settings_for(tiny_llama, text), out, False, QUIET)
    return out


class Killing(Reporter):
    """Once a stage begins, the next worker that is seen at work on a piece is killed."""

    def __init__(self, stage: str):
        super().__init__(quiet=True)
        self.at = stage
        self.killed: list[int] = []

    def stage(self, name: str):
        if name.startswith(self.at):
            threading.Thread(target=self._kill_one, daemon=True).start()
        return super().stage(name)

    def _kill_one(self) -> None:
        end = time.time() + 30
        while time.time() < end and not self.killed:
            with suppress(psutil.Error):  # processes come and go
                for process in psutil.Process().children(recursive=True):
                    if process.cmdline()[:1] == ["ray::work"]:
                        process.send_signal(signal.SIGKILL)
                        self.killed.append(process.pid)
                        return


@needs_ray
@pytest.mark.slow
def test_two_workers_one_killed_in_the_middle_the_same_bytes(
    cluster: None, alone: Path, tiny_llama: Path, text: Path, tmp_path: Path
):
    reporter, out = Killing("units, one at a time (base uniform:int2"), tmp_path / "out"
    run_survey(settings_for(tiny_llama, text), out, False, reporter, ray="auto")
    assert reporter.killed, "no worker was seen at work"
    for name in OUTPUTS:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in alone.iterdir())
    banks = [{f.relative_to(o): f.read_bytes() for f in (o / "bank").rglob("*") if f.is_file()} for o in (out, alone)]
    assert banks[0] == banks[1]


# --- what is refused -----------------------------------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    """The one line that the command line ends with, exit code 2 and nothing written."""
    monkeypatch.setattr(sys, "argv", ["bitatlas", "survey", "--out", str(out), "--quiet", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err
    assert (ended.value.code, len(message.splitlines()), out.exists()) == (2, 1, False), message
    return message


@needs_ray
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "nobody answers there"),
        ("ray://127.0.0.1:1", "nobody answers there"),
        ("somewhere", "give auto, host:port, or ray://host:port"),
        ("127.0.0.1:99999", "give auto, host:port, or ray://host:port"),
    ],
)
def test_a_wrong_address_is_one_line(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert f"--ray {address}: {reason}" in refused(monkeypatch, capsys, tmp_path / "out", "--ray", address)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else there(name, *rest))
    message = refused(monkeypatch, capsys, tmp_path / "out", "--ray", "auto")
    assert "pip install 'bitatlas[ray]'" in message


def test_addresses():
    assert parse_address("ray://head.example:10001") == ("head.example", 10001)
    assert parse_address("[::1]:6379") == ("::1", 6379)
    assert parse_address("http://head:1") is parse_address("head") is parse_address("head:") is None


def test_a_host_that_cannot_take_part_says_why(tmp_path: Path):
    (tmp_path / TOKEN).write_text("abc")
    required = Requirements(str(tmp_path), "abc", str(tmp_path), versions())
    assert check_host(required) == ""
    assert "does not see" in check_host(Requirements(str(tmp_path), "of another survey", str(tmp_path), versions()))
    assert "does not see the checkpoint's folder" in check_host(
        Requirements(str(tmp_path), "abc", str(tmp_path / "none"), versions())
    )
    other = check_host(Requirements(str(tmp_path), "abc", str(tmp_path), {**versions(), "torch": "1.0"}))
    assert f"has torch {versions()['torch']} (here: 1.0)" in other


def test_other_weights_on_a_host_are_refused(tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bitatlas.run.ray.worker._own_device", lambda device: device)
    (tmp_path / TOKEN).write_text("abc")
    settings, checkpoint = settings_for(tiny_llama, text), open_checkpoint(str(tiny_llama))
    rows, _ = rows_and_items(settings, checkpoint, checkpoint.load_tokenizer())
    required = Requirements(str(tmp_path), "abc", str(tiny_llama), versions())
    with pytest.raises(UserError, match=r"--ray: \S+ has other weights in "):
        work(
            WorkerConfig(required, settings, rows, {}, LoadMode(False, StateBudget(), 0, 0), "another hash", (), 1),
            "plans",
            ({}, rows.fit),
        )


def test_pieces_run_where_they_fit():
    hosts = [Host("a", "first", 8, 64 * GIB, 0), Host("b", "second", 4, 256 * GIB, 2), Host("c", "head", 0, 8 * GIB, 0)]
    assert slots(hosts, Resources(1, 20 * GIB, 0)) == 3 + 4
    assert slots(hosts, Resources(2, GIB, 0)) == 4 + 2
    assert slots(hosts, Resources(1, GIB, 1)) == 2
    with pytest.raises(UserError, match=r"a worker needs 1 processors, .* second has 4 processors"):
        slots(hosts, Resources(1, 300 * GIB, 0))
    with pytest.raises(UserError, match="and a GPU"):
        slots(hosts[:1], Resources(1, GIB, 1))


@pytest.mark.parametrize(
    ("batches", "passes", "fixed", "workers", "expected"),
    [
        (5, 100, 2, 2, 2),  # ten pieces, five rounds of 52, against three rounds of 102
        (4, 100, 2, 2, 1),  # even as it is
        (5, 5, 2, 2, 1),  # cutting would cost more than it levels out
        (1, 100, 2, 8, 8),
        (0, 0, 2, 8, 1),  # nothing to do
    ],
)
def test_batches_are_cut_so_that_all_are_done_soonest(batches: int, passes: float, fixed: float, workers: int, expected: int):
    assert pieces_per_batch(batches, passes, fixed, workers, 50 if passes else 0) == expected
