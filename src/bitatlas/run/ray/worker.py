"""Measure pieces of a survey in a Ray worker: open the survey once in its process, then one piece after the other.

A worker calls the very functions that a survey without Ray calls, with a journal in memory, and returns what they wrote into it; only the
survey's own process touches `run.sqlite`. So there is one implementation of every measurement, and one writer.

Ray keeps worker processes: the model, the bank's codes and the reference's log-probabilities stay for the next piece.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitatlas.data.rows import Rows
from bitatlas.errors import UserError
from bitatlas.measure.interactions import swap_interactions
from bitatlas.measure.machine import LoadMode
from bitatlas.progress import Reporter
from bitatlas.records.journal import Journal
from bitatlas.run.prepare import Session, load_decoder, open_planned, read_importance
from bitatlas.run.ray.cluster import Requirements, check_host
from bitatlas.run.settings import Settings

Entry = tuple[str, str, Any]  # of the journal: key, stage, value


@dataclass(frozen=True)
class WorkerConfig:
    """All that a worker needs to open the survey as its own process has it."""

    required: Requirements
    settings: Settings  # with the checkpoint's folder and the device in full
    rows: Rows
    tensor_names: Mapping[str, str]
    load_mode: LoadMode
    weights_sha256: str
    identity: tuple[str, ...]  # of the meter: everything that makes its measurements what they are
    threads: int


def work(config: WorkerConfig, job: str, piece: tuple[Any, ...]) -> list[Entry]:
    """Measure one piece; returns what was written into the journal. UserError, naming this host, for whatever goes wrong."""
    try:
        session = _session(config)
        session.journal = session.meter.journal = Journal(None)
        JOBS[job](session, *piece)
        return session.journal.entries()
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"failed ({type(error).__name__}: {error})"
        raise UserError(f"--ray: {socket.gethostname()} {' '.join(reason.split())}") from error


_open: list[tuple[tuple[str, str], Session]] = []  # at most one: the survey that this process has open, and on which device


def _session(config: WorkerConfig) -> Session:
    device = _own_device(config.settings.device)
    key = (config.required.token, device)
    if not _open or _open[0][0] != key:
        _open.clear()  # the memory of another survey, before this one's is taken
        _open.append((key, _open_session(config, device)))
    return _open[0][1]


def _open_session(config: WorkerConfig, device: str) -> Session:
    """Open the survey; UserError where this host has other weights, or measures what the survey's own process would not."""
    torch.set_num_threads(config.threads)
    if wrong := check_host(config.required):
        raise UserError(wrong)
    settings, load_mode = config.settings, config.load_mode
    checkpoint = open_planned(settings)
    if checkpoint.info.weights_sha256 != config.weights_sha256:
        raise UserError(f"has other weights in {settings.model}; they must be the same on all hosts")
    decoder, tokenizer = load_decoder(settings, checkpoint, load_mode, device), checkpoint.load_tokenizer()
    out, quiet = Path(config.required.out), Reporter(quiet=True)
    importance = read_importance(settings, checkpoint, config.tensor_names, quiet)
    session = Session(
        settings,
        checkpoint,
        load_mode,
        decoder,
        tokenizer,
        config.rows,
        {},
        importance,
        config.tensor_names,
        out,
        Journal(None),
        quiet,
    )
    if session.meter.identity != config.identity:
        raise UserError(f"would measure another model: {session.meter.identity}, not {config.identity}")
    return session


def _own_device(device: str) -> str:
    """Return the GPU that Ray gave this task, by its number on the host.

    Ray hides the others by CUDA_VISIBLE_DEVICES, which a process reads once; the next task in it may be given another.
    """
    import ray

    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not device.startswith("cuda") or not given:
        return device
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return f"cuda:{given[0]}"


# Of each job what it calls, with the arguments that the piece holds: those that its `Share`, or the call of `share`, puts there.
JOBS: dict[str, Callable[..., object]] = {
    "bank": lambda session, modules, formats: session.bank.ready([(module, name) for module in modules for name in formats]),
    "plans": lambda session, *piece: session.meter.plans(*piece),
    "swaps": lambda session, *piece: session.meter.swaps(*piece),
    "interactions": lambda session, *piece: swap_interactions(session.meter, *piece),
    "tasks": lambda session, task, items, assignment: session.answers(task, items, assignment, ""),
}
