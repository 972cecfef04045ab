"""What a Ray worker does: open the survey once in its process, then measure one piece after the other.

A worker calls the very functions that a survey without Ray calls, with a journal in memory, and returns what they wrote into it; only the
survey's own process touches `run.sqlite`. So there is one implementation of every measurement, and one writer.

Ray keeps worker processes: the model, the bank's codes and the reference's log-probabilities stay for the next piece.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitatlas.data.rows import Rows
from bitatlas.data.tasks import Item
from bitatlas.errors import UserError
from bitatlas.measure.curvature import expand
from bitatlas.measure.damage import Assignment, Swap
from bitatlas.measure.interactions import swap_interactions
from bitatlas.measure.memory_need import LoadMode
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.records import Module
from bitatlas.records.journal import Journal
from bitatlas.run.prepare import Run, model_of, run_of
from bitatlas.run.ray.cluster import Place, greet
from bitatlas.run.settings import Settings

Entry = tuple[str, str, Any]  # of the journal: key, stage, value


@dataclass(frozen=True)
class Brief:
    """All that a worker needs to open the survey as its own process has it."""

    place: Place
    settings: Settings  # with the checkpoint's folder and the device in full
    rows: Rows
    load_mode: LoadMode
    weights_sha256: str
    identity: tuple[str, ...]  # of the meter: everything that makes its measurements what they are
    threads: int


def work(brief: Brief, job: str, piece: tuple[Any, ...]) -> list[Entry]:
    """Measure one piece; what it wrote into the journal. UserError, naming this host, for whatever goes wrong."""
    try:
        run = _opened(brief)
        run.journal = run.meter.journal = Journal(None)
        JOBS[job](run, *piece)
        return run.journal.entries()
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"failed ({type(error).__name__}: {error})"
        raise UserError(f"--ray: {socket.gethostname()} {' '.join(reason.split())}") from error


_open: list[tuple[tuple[str, str], Run]] = []  # at most one: the survey that this process has open, and on which device


def _opened(brief: Brief) -> Run:
    device = _own_device(brief.settings.device)
    key = (brief.place.token, device)
    if not _open or _open[0][0] != key:
        _open.clear()  # the memory of another survey, before this one's is taken
        _open.append((key, _open_run(brief, device)))
    return _open[0][1]


def _open_run(brief: Brief, device: str) -> Run:
    """UserError where this host has other weights, or measures what the survey's own process would not."""
    torch.set_num_threads(brief.threads)
    if wrong := greet(brief.place):
        raise UserError(wrong)
    settings = brief.settings
    checkpoint = open_checkpoint(settings.model, settings.revision, settings.fuse)
    if checkpoint.info.weights_sha256 != brief.weights_sha256:
        raise UserError(f"has other weights in {settings.model}; they must be the same on all hosts")
    decoder, tokenizer = model_of(settings, checkpoint, brief.load_mode, device), checkpoint.load_tokenizer()
    out, quiet = Path(brief.place.out), Reporter(quiet=True)
    run = run_of(settings, out, checkpoint, brief.load_mode, decoder, tokenizer, brief.rows, {}, Journal(None), quiet)
    if run.meter.identity != brief.identity:
        raise UserError(f"would measure another model: {run.meter.identity}, not {brief.identity}")
    return run


def _own_device(device: str) -> str:
    """The GPU that Ray gave this task, by its number on the host.

    Ray hides the others by CUDA_VISIBLE_DEVICES, which a process reads once; the next task in it may be given another.
    """
    import ray

    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not device.startswith("cuda") or not given:
        return device
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return f"cuda:{given[0]}"


# --- the jobs ------------------------------------------------------------------------------------------------------------


def _bank(run: Run, modules: Sequence[str], formats: Sequence[str]) -> None:
    run.bank.ready([(module, name) for module in modules for name in formats])


def _plans(run: Run, plans: Mapping[str, Assignment], batch: Tensor) -> None:
    run.meter.plans(plans, batch)


def _swaps(run: Run, base: Assignment, swaps: Mapping[str, Swap], batch: Tensor) -> None:
    run.meter.swaps(base, swaps, batch)


def _interactions(run: Run, base: Assignment, swaps: Sequence[Swap], batch: Tensor, seed: int) -> None:
    swap_interactions(run.meter, base, swaps, batch, seed)


def _curvature(
    run: Run, modules: Sequence[Module], formats: Sequence[str], base: Assignment, batch: Tensor, seed: int, draws: int
) -> None:
    expand(run.meter, modules, formats, base, batch, seed, draws)


def _tasks(run: Run, task: str, items: list[Item], assignment: Assignment) -> None:
    run.answers(task, items, assignment, "")


JOBS: dict[str, Callable[..., None]] = {
    "bank": _bank,
    "plans": _plans,
    "swaps": _swaps,
    "interactions": _interactions,
    "curvature": _curvature,
    "tasks": _tasks,
}
