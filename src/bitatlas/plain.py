"""A console that text from outside cannot steer: brackets are brackets, and control characters are shown, not sent to the terminal.

Names of models, tensors, tasks and files come from whoever made them. Left out: look-alike letters of other alphabets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from bitatlas.words import visible


class PlainConsole(Console):
    """rich's console without markup in strings; styles and moves of the cursor are our own alone."""

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def render(self, *args: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
