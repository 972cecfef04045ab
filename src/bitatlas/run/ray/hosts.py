"""Where a survey is, and whether a host can take part: same versions, same folders. Asked before anything slow; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TOKEN = ".ray"  # file in the run's folder, there while the survey runs: a worker that sees it sees the bank
LIBRARIES = ("bitatlas", "torch", "transformers", "numpy", "lm_eval")  # whose version a measurement may depend on


@dataclass(frozen=True)
class Place:
    """Where the survey is, and what a worker must have to take part. Paths are the same on all hosts."""

    out: str
    token: str
    checkpoint: str
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Of what measures, on this host."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def greet(place: Place) -> str:
    """What is wrong with this host, as the rest of a sentence; nothing where all is well."""
    theirs = versions()
    differing = [f"{name} {theirs[name]} (here: {own})" for name, own in place.versions.items() if theirs[name] != own]
    if differing:
        return f"has {', '.join(differing)}; the same versions are needed everywhere"
    try:
        seen = (Path(place.out) / TOKEN).read_text(encoding="utf-8") == place.token
    except OSError:
        seen = False
    if not seen:
        return f"does not see {place.out}; --out must be on a disk that all hosts share, under the same path"
    if not Path(place.checkpoint).is_dir():
        return f"does not see the checkpoint's folder {place.checkpoint}; it must be there under the same path on all hosts"
    return ""
