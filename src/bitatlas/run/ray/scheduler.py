"""Cut missing measurements into pieces, send these as Ray tasks, and put what they return into the journal as it comes.

Afterwards the caller goes on as it would without Ray, and finds everything in its journal. So results cannot depend on how the work was
cut or on who did it, as long as one piece alone gives the same numbers everywhere: same weights (hashed by every worker), same
versions, same device, and on a CPU as many threads (OMP_NUM_THREADS, else one).

A worker that dies, or a host that goes away: Ray gives its piece to another. A piece that fails in any other way ends the run with one line.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from bitatlas.run.prepare import Session
from bitatlas.run.ray.cluster import TOKEN, Cluster, Requirements, Resources, check_host, check_ray, slots, versions
from bitatlas.run.ray.worker import WorkerConfig, work

RETRIES = 5  # of a piece whose worker or host was lost
PATIENCE = 30.0  # seconds without a result, after which is looked whether any host is left
WORKER_BYTES = 2**30  # of a process that has imported everything and loaded nothing
MOST_PIECES = 64  # of one batch


class Scheduler:
    """The workers of one survey. Made at once; `connect` joins the cluster, `configure` says what the survey is, `close` ends it."""

    def __init__(self, address: str, reporter: Reporter):
        check_ray(address)
        self.address = address
        self.reporter = reporter
        self.slots = 1
        self._cluster: Cluster | None = None
        self._token: Path | None = None
        self._threads_before = torch.get_num_threads()

    def connect(self, out: Path, checkpoint: Checkpoint) -> None:
        """Join the cluster, and ask every host whether it can take part; UserError naming the first that cannot."""
        with self.reporter.stage("joining the Ray cluster"):
            self._cluster = Cluster(self.address)
            token = secrets.token_hex(16)
            folder = str(checkpoint.folder.absolute())
            self._required = Requirements(str(out.absolute()), token, folder, versions())
            is_new = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            self._token = out / TOKEN
            self._token.write_text(token, encoding="utf-8")
            try:
                self._check_hosts()
            except BaseException:
                self._token.unlink()
                if is_new:
                    out.rmdir()
                raise

    def _check_hosts(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        hosts = [host for host in self._joined.hosts() if host.processors]
        task = self._joined.ray.remote(check_host)
        answers = [
            task.options(num_cpus=0, scheduling_strategy=On(host.node, soft=False)).remote(self._required) for host in hosts
        ]
        for host, answer in zip(hosts, answers, strict=True):
            if wrong := self._result(answer):
                raise UserError(f"--ray: {host.name} {wrong}")

    def configure(self, session: Session) -> None:
        """Tell workers what is measured, and have them measure for `session`; UserError where no host has the memory for it."""
        device, load_mode = session.decoder.device.type, session.load_mode
        settings = replace(session.settings, model=self._required.checkpoint, revision=None, device=device)
        threads = worker_threads(device)
        torch.set_num_threads(threads)
        # Host memory of one worker, at most: what the survey itself was predicted to need, or on a GPU codes at hand.
        memory = load_mode.predicted_bytes if device == "cpu" else WORKER_BYTES + load_mode.cache_bytes
        self._resources = Resources(threads, memory, int(device == "cuda"))
        hosts = self._joined.hosts()
        self.slots = slots(hosts, self._resources)
        self._session = session
        sha, identity = session.checkpoint.info.weights_sha256, session.meter.identity
        self._config = self._joined.ray.put(
            WorkerConfig(self._required, settings, session.rows, session.tensor_names, load_mode, sha, identity, threads)
        )
        # max_calls=0: also with a GPU, a worker's process and its model stay for the next piece
        options = {"num_cpus": threads, "memory": memory, "num_gpus": self._resources.gpus}
        self._work = self._joined.ray.remote(**options, max_retries=RETRIES, max_calls=0)(work)
        self.reporter.say(
            f"Ray: {self.slots} at a time on {len(hosts)} host{'s' * (len(hosts) > 1)}{' (started here)' * self._joined.local}, "
            f"{threads} thread{'s' * (threads > 1)} and up to {byte_size(memory)} each"
        )
        session.meter.workers, session.bank.helper = self, self.make_codes

    def close(self) -> None:
        """Leave the cluster, and remove what was put into the run's folder for it."""
        torch.set_num_threads(self._threads_before)
        if self._token:
            self._token.unlink(missing_ok=True)
        if self._cluster:
            self._cluster.close()

    @property
    def _joined(self) -> Cluster:
        assert self._cluster is not None, "connect first"
        return self._cluster

    # --- work ------------------------------------------------------------------------------------------------------------

    def spread(self, share: Share, missing: Sequence[tuple[Tensor, Sequence[Any]]], progress: Progress | None = None) -> None:
        """Measure what is `missing` of each batch [rows, tokens]: cut so that all workers are busy, sent out, journaled."""
        batches = [(batch, things) for batch, things in missing if things]
        most = max((len(things) for _, things in batches), default=0)
        count = pieces_per_batch(len(batches), most * share.passes, share.fixed, self.slots, min(most, MOST_PIECES))
        pieces = [
            # A batch is a view of all rows, which would travel whole. Things are dealt out, so that early and late layers mix.
            share.piece_of(list(things[index::count]), batch.clone())
            for batch, things in batches
            for index in range(min(count, len(things)))
        ]
        self.share(share.job, pieces, progress)

    def make_codes(self, missing: Mapping[str, list[str]], progress: Progress | None = None) -> None:
        """Quantize what is missing of the bank (module -> formats), by the workers into its folder."""
        modules_of: dict[tuple[str, ...], list[str]] = {}  # formats -> modules that lack these
        for module, formats in missing.items():
            modules_of.setdefault(tuple(formats), []).append(module)
        pieces_of = self._session.bank.quantizer.pieces
        pieces = [piece for formats, modules in modules_of.items() for piece in pieces_of(modules, formats, self.slots)]
        self.share("bank", pieces, progress)

    def share(self, job: str, pieces: Sequence[tuple[Any, ...]], progress: Progress | None = None) -> None:
        """Send each piece to a worker, and journal what it measured. A single piece is left to the caller, who would only wait."""
        if len(pieces) < 2:
            return
        ray = self._joined.ray
        waiting = {self._work.remote(self._config, job, piece) for piece in pieces}
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=PATIENCE)
                if not done:
                    slots(self._joined.hosts(), self._resources)
                for answer in done:
                    waiting.discard(answer)
                    for entry in self._result(answer):
                        self._session.journal.put(*entry)
                    if progress:
                        progress(len(pieces) - len(waiting), len(pieces))
        finally:
            for answer in waiting:  # interrupted, or one failed
                with suppress(Exception):
                    ray.cancel(answer, force=True)

    def _result(self, answer: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._joined.ray.get(answer)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise UserError(f"--ray: a worker failed ({_line(cause or error)})") from error
        except RayError as error:  # retries are spent
            raise UserError(f"--ray: a worker was lost more than {RETRIES} times on the same piece ({_line(error)})") from error


def pieces_per_batch(batches: int, passes: float, fixed: float, slots: int, most: int) -> int:
    """Return how many pieces a batch is cut into, so that all are done soonest.

    A piece costs `passes` / pieces + `fixed`; they run in rounds of `slots`. `most`: pieces of a batch.
    """
    return min(range(1, most + 1), key=lambda k: (-(-batches * k // slots) * (passes / k + fixed), k), default=1)


def worker_threads(device: str) -> int:
    """Return the threads of a worker, and of the survey's own process, whose results must be the same."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if device == "cpu" and asked.isdigit() and int(asked) else 1


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
