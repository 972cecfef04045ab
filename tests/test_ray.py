"""A survey on a real Ray cluster: the same bytes as without, also when a worker is killed; what cannot work is one clear line."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tiny
from bitatlas.crew.cluster import Host, Needs, parse_address, slots
from bitatlas.crew.crew import parts
from bitatlas.errors import UserError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install 'bitatlas[ray]')")
OUTPUTS = ("plan.json", "atlas.json", "report.md")
GIB = 2**30


def survey(model: Path, text: Path, out: Path, *options: str, python: tuple[str, ...] = ("-m", "bitatlas")) -> subprocess.Popen:
    command = [sys.executable, *python, "survey", str(model), "--tokens", str(text), "--out", str(out)]
    command += ["--rows", "8,8,8", "--row-length", "24", "--formats", "int2_g32,int4_g32", "--tasks", "demo_questions", "--limit", "60"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def refused(process: subprocess.Popen) -> str:
    """The one line that a survey ended with."""
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2, told
    lines = [line for line in told.splitlines() if line.startswith("bitatlas:")]
    assert len(lines) == 1, told
    assert "Traceback" not in told
    return lines[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny.TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster on this machine with two workers of one thread each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, object_store_memory=2**27)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    process = survey(tiny_llama, text, out)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    return out


def workers(out: Path) -> list[psutil.Process]:
    """The processes of Ray that have a survey open, by what they are called while they work on a piece."""
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::work")]


@needs_ray
@pytest.mark.slow
def test_the_same_bytes_on_two_workers_one_killed_in_the_middle(
    cluster: str, alone: Path, tiny_llama: Path, text: Path, tmp_path: Path
):
    process = survey(tiny_llama, text, tmp_path / "out", "--ray", cluster)
    assert process.stderr
    told, killed = [], []
    for line in process.stderr:
        told.append(line)
        if line.startswith("uniform widths:"):  # the bank is there, all screens are yet to come
            thread = threading.Thread(target=lambda: killed.append(kill_one(tmp_path / "out")))
            thread.start()
    assert process.wait(timeout=200) == 0, "".join(told)
    assert killed and killed[0], "no worker was seen at work"
    for name in OUTPUTS:
        assert (tmp_path / "out" / name).read_bytes() == (alone / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in alone.iterdir())
    assert any(re.match(r"Ray: 2 at a time on 1 host, 1 thread", line) for line in told), told


def kill_one(out: Path) -> int:
    """SIGKILL to the first worker that is seen at work on a piece; its process id, 0 if none was."""
    end = time.time() + 60
    while time.time() < end:
        for process in workers(out):
            process.send_signal(signal.SIGKILL)
            return process.pid
        time.sleep(0.01)
    return 0
