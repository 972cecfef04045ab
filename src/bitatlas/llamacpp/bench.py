"""Tokens a second and memory of a GGUF in llama.cpp on this machine's CPU, against another one.

Each file has a process of its own, loaded once. A repeat reads a prompt in one pass and then generates token by token; the two processes
take turns, the first of a pair changing, so that what else the machine does meets both. The ratio is that of a pair; its interval is the
exact one of a median (order statistics, 95 % or a little more), which supposes nothing of how times are spread.
Memory is what the process holds after the last repeat, less what it held before it loaded the file: weights that were read, cache, buffers.
Left out: sampling and its cost, batches of several sequences, GPUs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bitatlas.errors import UserError
from bitatlas.llamacpp.library import check_packages
from bitatlas.progress import Reporter

LEAST_REPEATS = 6  # below, no interval of a median has 95 %
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
PHASES = ("prompt", "generation")


@dataclass(frozen=True)
class Speed:
    """One file's run. `rates`: phase -> tokens/s, one a repeat."""

    file: Path
    file_bytes: int
    memory_bytes: int
    rates: dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """Of two rates: median and 95 % interval over the pairs."""

    median: float
    ci95: tuple[float, float]

    @property
    def word(self) -> str:
        low, high = self.ci95
        return "faster" if low > 1 else "slower" if high < 1 else "inconclusive"


@dataclass(frozen=True)
class Benchmark:
    speed: Speed
    reference: Speed | None
    tokens: dict[str, int]  # phase -> tokens
    threads: int
    ratios: dict[str, Ratio] = field(default_factory=dict)


def bench(
    file: Path, reference: Path | None, prompt: int, generate: int, repeats: int, threads: int | None, reporter: Reporter
) -> Benchmark:
    """Run both files in turns; UserError where one cannot be run, or the numbers make no sense."""
    check_packages("bench-model")
    for flag, value, least in (("--prompt", prompt, 1), ("--generate", generate, 1), ("--repeats", repeats, LEAST_REPEATS)):
        if value < least:
            raise UserError(f"{flag} {value}: at least {least}")
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: at least 1")
    used = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    files = [file] if reference is None else [file, reference]
    for one in files:
        if not one.is_file():
            raise UserError(f"{one}: no such file")
    runners: list[_Runner] = []
    try:
        for one in files:
            runners.append(_Runner(one, prompt, generate, used))
        with reporter.stage("running in turns") as progress:
            for number in range(repeats + 1):  # the first warms up and does not count
                for runner in runners if number % 2 else runners[::-1]:
                    runner.turn(counts=number > 0)
                progress(number, repeats)
        speeds = [runner.finish() for runner in runners]
    finally:
        for runner in runners:
            runner.kill()
    ratios = {phase: ratio_of(speeds[0].rates[phase], speeds[1].rates[phase]) for phase in PHASES} if reference else {}
    return Benchmark(speeds[0], speeds[1] if reference else None, {"prompt": prompt, "generation": generate}, used, ratios)


def bench_beside(
    file: Path, reference: Path | None, model_name: str | None, prompt: int, generate: int, repeats: int, threads: int | None,
    reporter: Reporter,
) -> Benchmark:  # fmt: skip
    """The same, where the reference may be a checkpoint's name: its float16 GGUF is written for the while."""
    if model_name is None:
        return bench(file, reference, prompt, generate, repeats, threads, reporter)
    if reference is not None:
        raise UserError("--reference, --model: give one of them")
    check_packages("bench-model")
    from bitatlas.checkpoint import check_finite, open_checkpoint
    from bitatlas.llamacpp.write import draw, write_gguf

    checkpoint = open_checkpoint(model_name, fuse=False)
    check_finite(checkpoint)
    with TemporaryDirectory() as folder:
        reference = Path(folder) / "reference-f16.gguf"
        with reporter.stage("writing the reference") as progress:
            write_gguf(reference, checkpoint, None, None, draw(checkpoint, None, "f16"), progress)
        return bench(file, reference, prompt, generate, repeats, threads, reporter)


def ratio_of(rates: Sequence[float], others: Sequence[float]) -> Ratio:
    """Of rates that were measured in pairs."""
    found = sorted(one / other for one, other in zip(rates, others, strict=True))
    depth = median_depth(len(found))
    return Ratio(median(found), (found[depth], found[-1 - depth]))


def median_depth(count: int) -> int:
    """How many of `count` sorted values may be left out at each end so that the others cover the median with 95 % or more."""
    ways, total, depth = 1, 0, 0
    while total + ways <= 0.025 * 2**count:
        total += ways
        depth += 1
        ways = ways * (count - depth + 1) // depth
    if depth == 0:
        raise ValueError(f"{count} values: no interval of their median has 95 %")
    return depth - 1


class _Runner:
    """The process of one file."""

    def __init__(self, file: Path, prompt: int, generate: int, threads: int):
        self.file, self.tokens = file, {"prompt": prompt, "generation": generate}
        self.rates: dict[str, list[float]] = {phase: [] for phase in PHASES}
        words = [sys.executable, "-m", __name__, str(file), str(prompt), str(generate), str(threads)]
        path = os.pathsep.join(word for word in sys.path if word)
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        self._answer()

    def turn(self, counts: bool) -> None:
        self._ask("go")
        answer = self._answer()
        for phase in PHASES:
            if counts:
                self.rates[phase].append(self.tokens[phase] / answer[phase])

    def finish(self) -> Speed:
        self._ask("end")
        return Speed(self.file, self.file.stat().st_size, int(self._answer()["memory"]), self.rates)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, word: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        answer = json.loads(line) if line.startswith("{") else {"error": f"{self.file}: the process that ran it ended"}
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


# --- in the process of one file ----------------------------------------------------------------------------------------


def _held() -> int:
    """Bytes of memory that this process holds now; where the system does not say, at most so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES


def _serve(file: Path, prompt: int, generate: int, threads: int) -> None:
    from bitatlas.llamacpp.run import library, opened

    library()
    before = _held()
    with opened(file, prompt + generate, threads, every=False) as session:
        draw = random.Random(0)
        tokens = [draw.randrange(session.vocabulary) for _ in range(prompt + generate)]
        _say({"ready": 1})
        for line in sys.stdin:
            if line.strip() != "go":
                break
            session.clear()
            times = [time.perf_counter()]
            session.decode(tokens[:prompt])
            times.append(time.perf_counter())
            for token in tokens[prompt:]:
                session.decode([token])
            times.append(time.perf_counter())
            _say({"prompt": times[1] - times[0], "generation": times[2] - times[1]})
        _say({"memory": _held() - before})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
    except UserError as error:
        _say({"error": str(error)})
