"""Commands that pages show."""

from __future__ import annotations

import re


def commands(text: str) -> list[str]:
    """The lines of the blocks that name no language, without their comments."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [line.partition("#")[0].strip() for language, block in blocks if not language for line in block.splitlines()]
