"""Where a command writes a folder: checked before, written beside under a hidden name, renamed when it is whole.

Also what of a checkpoint's folder belongs to the model beside its weights and config, and is carried over as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitatlas.checkpoint import free_bytes
from bitatlas.errors import UserError
from bitatlas.folder import weight_files
from bitatlas.words import byte_size

CARRIED = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "*processor_config.json", "chat_template*", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip


def check_out(out: Path) -> None:
    """UserError unless `out` can become a folder: new, or empty, in a folder that is there."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: is not a folder; give a new one")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: exists and is not empty; choose another folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")


def check_room(out: Path, needed_bytes: int) -> None:
    """UserError where the disk of `out` is too full."""
    free = free_bytes(out.absolute().parent)
    if free < needed_bytes:
        raise UserError(f"--out {out}: only {byte_size(free)} free on that disk; {byte_size(needed_bytes)} are needed")


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` if the block ends well and goes away if it does not."""
    folder = out.absolute().parent / f".{out.absolute().name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def carried(folder: Path) -> list[Path]:
    """What else belongs to a model: tokenizer, processor (of a model that also sees), generation config, chat template, licence."""
    files = {file for pattern in CARRIED for file in folder.glob(pattern) if file.is_file()}
    return sorted(files - set(weight_files(folder)))
