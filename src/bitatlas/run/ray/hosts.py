"""Check whether a host can take part in a survey, and count how many pieces of work run at once.

Arithmetic: on every host as many as its processors, its memory and its GPUs allow. A piece that fits nowhere would wait for ever, so that
is refused. Imports nothing heavy: hosts are asked before anything slow. Left out: clusters that grow when asked (the hosts that are there
count).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bitatlas.errors import UserError
from bitatlas.records.text import byte_size

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
