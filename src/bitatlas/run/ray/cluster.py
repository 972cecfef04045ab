"""Join the Ray cluster that a survey runs on, or start one on this machine's own processors and stop it again.

`auto`: the cluster of RAY_ADDRESS, else the one that `ray start` left on this machine, else a local one; an address: that cluster.
Nothing is sent to anybody but the cluster: no usage statistics, no dashboard. A local cluster's logs lie in a temporary folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitatlas.errors import UserError
from bitatlas.records.text import byte_size

AUTO = "auto"
STORE_BYTES = 2**27  # of a local cluster's shared memory: pieces and results are small, workers need the rest
CONNECT_SECONDS = 5
TEMPORARY = "/tmp"  # sockets' paths may have 100 letters or so: the system's own temporary folder is often too long


class Cluster:
    """Joined when made; `local`: started here, and stopped by `close`."""

    def __init__(self, address: str):
        import ray

        self.ray: Any = ray
        self.local = self.joined = False
        self._folder: str | None = None
        if not ray.is_initialized():  # a program that is in a cluster already stays in it
            self._join(address)

    def _join(self, address: str) -> None:
        running = running_address() if address == AUTO else address
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "address": running}
        if not running:
            self.local = True
            self._folder = tempfile.mkdtemp(prefix="bitatlas-", dir=TEMPORARY if Path(TEMPORARY).is_dir() else None)
            options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES, "_temp_dir": self._folder}
            options["address"] = "local"
            if not any(name.startswith("RAY_AUTH") for name in os.environ):
                os.environ["RAY_AUTH_TOKEN"] = uuid.uuid4().hex  # else Ray would write one into the home folder
        try:
            with _silent():
                self.ray.init(**options)
        except Exception as error:  # Ray raises whatever it likes
            self.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"--ray {address}: {'the cluster' if running else 'a local cluster'} cannot be used ({reason})"
            ) from None
        self.joined = True

    def hosts(self) -> list[Host]:
        """Return the hosts that are alive, by name."""
        alive = [
            Host(node["NodeID"], node["NodeManagerHostname"], has.get("CPU", 0), has.get("memory", 0), has.get("GPU", 0))
            for node in self.ray.nodes()
            if node["Alive"]
            for has in [node["Resources"]]
        ]
        return sorted(alive, key=lambda host: (host.name, host.node))

    def close(self) -> None:
        """Leave the cluster; of a local one, end its processes and remove its folder."""
        if self.joined or self.local:
            self.ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what Ray's core writes to stderr as it tries: what matters is raised."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def check_ray(address: str) -> None:
    """Refuse where Ray is not installed, or nobody listens at the address. Quick: nothing is started."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"--ray {address}: needs a package that is not here: pip install 'bitatlas[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray would otherwise warn about
    if address == AUTO:
        return
    endpoint = parse_address(address)
    if endpoint is None:
        raise UserError(f"--ray {address}: give auto, host:port, or ray://host:port")
    if not listens(*endpoint):
        raise UserError(f"--ray {address}: nobody answers there; `ray status` on the cluster's first host prints its address")


def parse_address(address: str) -> tuple[str, int] | None:
    """Parse `host:port` or `ray://host:port` -> (host, port), else None."""
    match = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[^:/\s]+):([0-9]{1,5})", address)
    return (match[1].strip("[]"), int(match[2])) if match and int(match[2]) < 65536 else None


def listens(host: str, port: int) -> bool:
    """Return whether somebody answers there."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def running_address() -> str | None:
    """Return the cluster of RAY_ADDRESS, else "auto" where the one that `ray start` noted on this machine still runs, else None.

    Without such a note, Ray's own `auto` would take any cluster that it finds on the machine, another survey's local one too.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named != AUTO:
        check_ray(named)
        return named
    try:
        noted = (Path(os.environ.get("RAY_TMPDIR", TEMPORARY)) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    endpoint = parse_address(noted)
    return AUTO if endpoint and listens(*endpoint) else None  # by this word Ray takes the cluster's own access token, too


# --- hosts -----------------------------------------------------------------------------------------------------------------

# Check whether a host can take part in a survey, and count how many pieces of work run at once.
#
# Arithmetic: on every host as many as its processors, its memory and its GPUs allow. A piece that fits nowhere would wait for ever, so that
# is refused. Imports nothing heavy: hosts are asked before anything slow. Left out: clusters that grow when asked (the hosts that are there
# count).

TOKEN = ".ray"  # file in the run's folder, there while the survey runs: a worker that sees it sees the bank
LIBRARIES = ("bitatlas", "torch", "transformers", "numpy", "lm_eval")  # whose version a measurement may depend on


@dataclass(frozen=True)
class Host:
    """A host of the cluster, and what Ray may give away of it."""

    node: str
    name: str
    processors: float
    memory: float  # bytes
    gpus: float


@dataclass(frozen=True)
class Resources:
    """What one piece of work takes."""

    processors: int
    memory: int  # bytes
    gpus: int


def slots(hosts: list[Host], resources: Resources) -> int:
    """Return how many pieces can run at once; UserError where there is none."""
    count = sum(_slots_of(host, resources) for host in hosts)
    if not count:
        wanted = f"{resources.processors} processors, {byte_size(resources.memory)} of memory" + " and a GPU" * bool(
            resources.gpus
        )
        have = "; ".join(
            f"{host.name} has {host.processors:g} processors, {byte_size(int(host.memory))}, {host.gpus:g} GPUs" for host in hosts
        )
        raise UserError(f"--ray: a worker needs {wanted}, and no host has that ({have or 'no host is there'})")
    return count


def _slots_of(host: Host, resources: Resources) -> int:
    fits = [host.processors // resources.processors, host.memory // resources.memory]
    return int(min([*fits, host.gpus // resources.gpus] if resources.gpus else fits))


@dataclass(frozen=True)
class Requirements:
    """Where the survey is, and what a host must have to take part. Paths are the same on all hosts."""

    out: str
    token: str
    checkpoint: str
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Return the versions of what measures, on this host."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def check_host(required: Requirements) -> str:
    """Return what is wrong with this host, as the rest of a sentence; nothing where all is well."""
    here = versions()
    differing = [f"{name} {here[name]} (here: {wanted})" for name, wanted in required.versions.items() if here[name] != wanted]
    if differing:
        return f"has {', '.join(differing)}; the same versions are needed everywhere"
    try:
        seen = (Path(required.out) / TOKEN).read_text(encoding="utf-8") == required.token
    except OSError:
        seen = False
    if not seen:
        return f"does not see {required.out}; --out must be on a disk that all hosts share, under the same path"
    if not Path(required.checkpoint).is_dir():
        return f"does not see the checkpoint's folder {required.checkpoint}; it must be there under the same path on all hosts"
    return ""
