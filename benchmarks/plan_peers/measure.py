"""Run a command and write down how long it took and how much memory it needed at most. Standard library only.

    python measure.py ANSWER.json COMMAND...

A process of its own, because Linux counts the memory of the process that forks as the child's: started from the benchmark itself,
which holds a model, every peer would seem to need at least as much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

KIBIBYTE = 1024 if sys.platform != "darwin" else 1  # ru_maxrss counts KiB on Linux, bytes on macOS


def main() -> int:
    answer, command = Path(sys.argv[1]), sys.argv[2:]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    answer.write_text(json.dumps({"seconds": seconds, "peak_bytes": used.ru_maxrss * KIBIBYTE, "code": code}))
    return 0 if code == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
