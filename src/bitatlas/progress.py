"""Show what a long run is doing: on a terminal a bar over the results so far, one plain line a stage elsewhere.

The live part of a terminal is redrawn while a stage runs and gone after it; what is said stays. Names of models, tensors, tasks and files
come from whoever made them, so the console takes brackets for brackets and shows control characters instead of sending them.
What the whole run still takes is what its later stages were expected to take, times the pace of those that are done.
Left out: look-alike letters of other alphabets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from bitatlas.records.text import duration, number, visible

Advance = Callable[[int, int], None]
KNOWN = 0.1  # of the expected time: a stage that took less had been measured before


class Reporter:
    """Progress on stderr, so that stdout holds results alone."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or SafeConsole(stderr=True, quiet=quiet)
        self.start = time.monotonic()
        self.results: dict[str, str] = {}  # of the run so far, by name
        self.only: Sequence[str] | None = None  # the stages of a run that ends early; None: all
        self._expected: dict[str, float] = {}  # seconds of the stages to come
        self._pace = [0.0, 0.0]  # seconds taken, and expected, of those that are done
        self._last = self.start

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def found(self, name: str, text: str) -> None:
        """Show a result of the run so far: under the bar on a terminal until another of its name comes, as a line elsewhere."""
        if self.results.get(name) == text:
            return
        self.results[name] = text
        if not self.console.is_terminal:
            self.say(f"{name}: {text}")

    def expect(self, stages: Mapping[str, float]) -> None:
        """Begin a run whose stages take so many seconds, about."""
        self._expected, self._pace, self._last = dict(stages), [0.0, 0.0], time.monotonic()

    def passed(self, *names: str) -> None:
        """Say what is left of the run, now that all of the stages `names` are done. Those that took next to nothing, being known, tell no pace."""
        expected, now = sum(self._expected.pop(name, 0.0) for name in names), time.monotonic()
        taken, self._last = now - self._last, now
        if not expected or not self._expected:
            return
        if taken > KNOWN * expected:
            self._pace = [self._pace[0] + taken, self._pace[1] + expected]
        pace = self._pace[0] / self._pace[1] if self._pace[1] else 1.0
        self.found("left", f"about {duration(pace * sum(self._expected.values()))}")

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Give `advance(done, total)`, which need not be called, and print at the end how long the stage took."""
        start = time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            with Live(self.console, self.results, self.start) as live:
                task = live.add_task(name, total=None)
                yield lambda done, total: live.update(task, completed=done, total=total)
        else:
            yield lambda done, total: None
        self.say(f"{name}: {time.monotonic() - start:.1f} s")


class Live(progress.Progress):
    """A stage's bar with its pace and the time left for it; under it the results so far and the time of the whole run."""

    def __init__(self, console: Console, results: Mapping[str, str], start: float):
        self.results, self.run_start = results, start
        super().__init__(
            progress.TextColumn("{task.description}", "bold", markup=False), progress.BarColumn(bar_width=30), progress.MofNCompleteColumn(), Pace(),
            progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, text in self.results.items():
            table.add_row(Text(name, "dim"), Text(text))
        minutes, seconds = divmod(int(time.monotonic() - self.run_start), 60)
        table.add_row(Text("so far", "dim"), Text(f"{minutes}:{seconds:02d}"))
        yield table


class Pace(progress.ProgressColumn):
    """Steps a second, over the last half minute; from rich's own estimate."""

    def render(self, task: progress.Task) -> Text:
        return Text(f"{number(task.speed)}/s" if task.speed else "", "dim")


class SafeConsole(Console):
    """A console that text from outside cannot steer: no markup in strings; styles and moves of the cursor are our own alone."""

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def render(self, *args: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
