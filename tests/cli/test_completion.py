"""Shell completion: what the shell asks of the command, asked as bash does it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitatlas.cli.main import COMMANDS
from bitatlas.export.targets import TARGETS
from bitatlas.quantize import QUANTIZERS
from bitatlas.run import options


def completed(line: str) -> list[str]:
    """What bash would offer at the end of `line`."""
    words = line.split(" ")
    environment = {
        **os.environ, "_BITATLAS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    code = "import sys; sys.argv[0] = 'bitatlas'; from bitatlas.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("bitatlas sur", ["survey"]),
        ("bitatlas survey --quantizer g", ["gptq"]),
        ("bitatlas export plan.json --to ll", ["llm-compressor", "llama.cpp"]),
        ("bitatlas survey --formats int2_g32,int4_g1", ["int2_g32,int4_g128", "int2_g32,int4_g128_sym"]),
        ("bitatlas compare a b --tasks svamp,gs", ["svamp,gsm8k"]),
    ],
)
def test_completion(line: str, offered: list[str]):
    assert completed(line) == offered


def test_every_command_is_offered():
    assert set(completed("bitatlas ")) == set(COMMANDS)


def test_the_names_that_are_offered_are_the_registries():
    assert tuple(QUANTIZERS) == options.QUANTIZER_NAMES
    assert tuple(TARGETS) == options.RUNTIME_NAMES
