"""GPTQModel: a `QuantizeConfig` whose `dynamic` has one rule a module.

A rule is a regular expression that GPTQModel matches from the beginning of a module's name, first match first. Every rule here is one
module's name, escaped, between ^ and $, so that layer 1 is not layer 10 and the order does not matter; `-:` before it leaves the module
unquantized. GPTQModel knows such literal rules and looks them up instead of searching.
Source: GPTQModel 7.7, `quantization/config.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bitatlas.export.target import Integers, Job, Target
from bitatlas.export.words import json_text, write_recipe
from bitatlas.formats import Format

FILE = "quantize_config.json"
USE = """```
pip install gptqmodel
python quantize.py MODEL OUT --dataset TEXT_FILE
```

`quantize_config.json` has the arguments of `QuantizeConfig`: the bits, group size and symmetry that most modules have, and `dynamic`, a
rule for every module. vLLM reads such checkpoints too, but runs q/k/v and gate/up as one matrix under another name, which these rules
do not match: load what you made with GPTQModel or transformers."""


def config(job: Job) -> dict[str, Any]:
    """The arguments of `QuantizeConfig`."""
    rules = {rule(name): _settings(fmt) for name, fmt in job.formats.items()}
    kept: dict[str, Any] = {f"-:{rule(name)}": {} for name in job.kept}
    return {**_settings(job.usual), "desc_act": False, "dynamic": {**kept, **rules}}


def rule(name: str) -> str:
    """A regular expression that matches this module alone."""
    return f"^{re.escape(name)}$"


def _settings(fmt: Format) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric}


def write(job: Job, folder: Path) -> list[str]:
    return [write_recipe(folder, job, "GPTQModel", {FILE: json_text(config(job))}, "gptqmodel", USE)]


TARGET = Target(
    "gptqmodel",
    "a `QuantizeConfig` with `dynamic` rules for GPTQModel, and a script that quantizes with it",
    Integers(bits=(2, 3, 4, 8)),
    write,
    whole_groups=True,
    transposed=True,
)
