"""Who does what: missing measurements become pieces, pieces become Ray tasks, and what they return goes into the journal as it comes.

Afterwards the caller goes on as it would without Ray, and finds everything in its journal. So results cannot depend on how the work was
cut or on who did it, as long as one piece alone gives the same numbers everywhere: same weights (hashed by every worker), same
versions, same device, and on a CPU as many threads (OMP_NUM_THREADS, else one).

A worker that dies, or a host that goes away: Ray gives its piece to another. A piece that fails in any other load_mode ends the run with one line.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.measure.workers import Progress, Share
from bitatlas.model.checkpoint import Checkpoint
from bitatlas.progress import Reporter
from bitatlas.records.text import byte_size
from bitatlas.run.prepare import Run
from bitatlas.run.ray.cluster import TOKEN, Cluster, Needs, Place, check_ray, greet, slots, versions
from bitatlas.run.ray.worker import Brief, work

RETRIES = 5  # of a piece whose worker or host was lost
PATIENCE = 30.0  # seconds without a result, after which is looked whether any host is left
WORKER_BYTES = 2**30  # of a process that has imported everything and loaded nothing
MOST_PARTS = 64  # of one batch


class Crew:
    """Workers for one survey. Made at once; `join` connects, `brief` tells what the survey is, `leave` ends it."""

    def __init__(self, address: str, reporter: Reporter):
        check_ray(address)
        self.address = address
        self.reporter = reporter
        self.slots = 1
        self._cluster: Cluster | None = None
        self._token: Path | None = None
        self._threads_before = torch.get_num_threads()

    # --- joining and leaving ---------------------------------------------------------------------------------------------

    def join(self, out: Path, checkpoint: Checkpoint) -> None:
        """Connect, and ask every host whether it can take part; UserError naming the first that cannot."""
        with self.reporter.stage("joining the Ray cluster"):
            self._cluster = Cluster(self.address)
            token = secrets.token_hex(16)
            folder = str(checkpoint.folder.absolute())
            self._place = Place(str(out.absolute()), token, folder, versions())
            made = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            self._token = out / TOKEN
            self._token.write_text(token, encoding="utf-8")
            try:
                self._greet()
            except BaseException:
                self._token.unlink()
                if made:
                    out.rmdir()
                raise

    def _greet(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        hosts = self._here.hosts()
        task = self._here.ray.remote(greet)
        asked = [
            task.options(num_cpus=0, scheduling_strategy=On(host.node, soft=False)).remote(self._place)
            for host in hosts
            if host.processors
        ]
        for host, answer in zip((host for host in hosts if host.processors), asked, strict=True):
            if wrong := self._result(answer):
                raise UserError(f"--ray: {host.name} {wrong}")

    def brief(self, run: Run) -> None:
        """Tell what is measured; UserError where no host has the memory for it."""
        device = run.decoder.device.type
        settings = replace(run.settings, model=self._place.checkpoint, revision=None, device=device)
        threads = threads_of(device)
        torch.set_num_threads(threads)
        needs = Needs(threads, worker_bytes(run, device), int(device == "cuda"))
        hosts = self._here.hosts()
        self.slots = slots(hosts, needs)
        self._run = run
        brief = Brief(self._place, settings, run.rows, run.load_mode, run.checkpoint.info.weights_sha256, run.meter.identity, threads)
        self._brief = self._here.ray.put(brief)
        # max_calls=0: also with a GPU, a worker's process and its model stay for the next piece
        placed = {"num_cpus": needs.processors, "memory": needs.memory, "num_gpus": needs.gpus}
        self._work = self._here.ray.remote(**placed, max_retries=RETRIES, max_calls=0)(work)
        self._needs = needs
        self.reporter.say(
            f"Ray: {self.slots} at a time on {len(hosts)} host{'s' * (len(hosts) > 1)}{' (started here)' * self._here.local}, "
            f"{threads} thread{'s' * (threads > 1)} and up to {byte_size(needs.memory)} each"
        )

    def leave(self) -> None:
        torch.set_num_threads(self._threads_before)
        if self._token:
            self._token.unlink(missing_ok=True)
        if self._cluster:
            self._cluster.leave()

    @property
    def _here(self) -> Cluster:
        assert self._cluster is not None, "join first"
        return self._cluster

    # --- work ------------------------------------------------------------------------------------------------------------

    def spread(self, share: Share, missing: Sequence[tuple[Tensor, Sequence[Any]]], progress: Progress | None = None) -> None:
        """Measure what is `missing` of each batch: cut so that all workers are busy, sent out, journaled."""
        todo = [(batch, things) for batch, things in missing if things]
        most = max((len(things) for _, things in todo), default=0)
        count = parts(len(todo), most * share.passes, share.fixed, self.slots, min(most, MOST_PARTS))
        pieces = [
            # A batch is a view of all rows, which would travel whole. Things are dealt out, so that early and late layers mix.
            share.piece_of(list(things[part::count]), batch.clone())
            for batch, things in todo
            for part in range(min(count, len(things)))
        ]
        self.share(share.job, pieces, progress)

    def make_codes(self, missing: Mapping[str, list[str]], progress: Progress | None = None) -> None:
        """Quantize what is missing of the bank (module -> formats), by the workers into its folder."""
        by_names = {tuple(names): [module for module, own in missing.items() if own == names] for names in missing.values()}
        pieces_of = self._run.bank.quantizer.pieces
        pieces = [piece for names, modules in by_names.items() for piece in pieces_of(modules, names, self.slots)]
        self.share("bank", pieces, progress)

    def share(self, job: str, pieces: Sequence[tuple[Any, ...]], progress: Progress | None = None) -> None:
        """Each piece to a worker, its measurements into the journal. A single piece is left to the caller, who would only wait."""
        if len(pieces) < 2:
            return
        ray = self._here.ray
        waiting = {self._work.remote(self._brief, job, piece) for piece in pieces}
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=PATIENCE)
                if not done:
                    slots(self._here.hosts(), self._needs)
                for answer in done:
                    waiting.discard(answer)
                    for entry in self._result(answer):
                        self._run.journal.put(*entry)
                    if progress:
                        progress(len(pieces) - len(waiting), len(pieces))
        finally:
            for answer in waiting:  # interrupted, or one failed
                with suppress(Exception):
                    ray.cancel(answer, force=True)

    def _result(self, answer: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._here.ray.get(answer)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise UserError(f"--ray: a worker failed ({_line(cause or error)})") from error
        except RayError as error:  # retries are spent
            raise UserError(f"--ray: a worker was lost more than {RETRIES} times on the same piece ({_line(error)})") from error


@contextmanager
def hired(address: str | None, reporter: Reporter) -> Iterator[Crew | None]:
    """The crew for `--ray ADDRESS`, which leaves when the block ends; None without an address."""
    if address is None:
        yield None
        return
    crew = Crew(address, reporter)
    try:
        yield crew
    finally:
        crew.leave()


def parts(batches: int, passes: float, fixed: float, slots: int, most: int) -> int:
    """Into how many pieces a batch is cut, so that all are done soonest: pieces cost `passes` / parts + `fixed`, in rounds of `slots`."""
    return min(range(1, most + 1), key=lambda k: (-(-batches * k // slots) * (passes / k + fixed), k), default=1)


def threads_of(device: str) -> int:
    """Of a worker, and of the survey's own process, whose results must be the same."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if device == "cpu" and told.isdigit() and int(told) else 1


def worker_bytes(run: Run, device: str) -> int:
    """Host memory of one worker, at most: what the survey itself was predicted to need, or on a GPU codes at hand."""
    return run.load_mode.predicted_bytes if device == "cpu" else WORKER_BYTES + run.load_mode.kept_bytes


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
