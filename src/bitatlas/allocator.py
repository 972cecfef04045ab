"""glibc's malloc, told to hand back what is free: for a run that is promised to stay below some memory. Other C libraries have their own ways.

By itself glibc learns to keep blocks of a layer's size, in pieces into which the next layer no longer fits.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

MMAP_THRESHOLD = -3  # mallopt's number of it, in malloc.h
# Larger blocks are handed back at once. Below, making each anew would cost more time (a third of a run at 1 MiB) than keeping costs memory.
LARGE_BYTES = 2**25


def return_large() -> None:
    """From now on, large blocks go back to the system as soon as they are free."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BYTES)


def trim() -> None:
    """What is free now goes back to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
