"""The command line in this process."""

from __future__ import annotations

import sys

import pytest

from bitatlas.cli.main import main


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["bitatlas", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err
