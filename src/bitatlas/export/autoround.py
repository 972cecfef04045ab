"""AutoRound: `layer_config` for its quantizer, and the `extra_config` that its quantized checkpoints carry.

`layer_config` names every module of the plan with bits, group size and symmetry; modules that the plan leaves out get 16 bits, which
AutoRound takes for "not quantized". `extra_config` is the same as its checkpoints hold it: the exceptions from the scheme.
Source: auto_round 0.16.1, `AutoRound(layer_config=...)` and the export of the format `auto_round`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.export.target import Integers, Job, Target
from bitatlas.export.words import json_text, write_recipe
from bitatlas.formats import Format

FILE = "autoround.json"
AS_IT_WAS = {"bits": 16, "data_type": "float"}
USE = """```
pip install auto-round
python quantize.py MODEL OUT --dataset TEXT_FILE
```

`autoround.json` has the `scheme` of the whole model, a `layer_config` for the API, and the `extra_config` that the quantized
checkpoint's `config.json` will have."""


def config(job: Job) -> dict[str, Any]:
    """The content of `autoround.json`."""
    usual = job.usual
    layers = {name: _scheme(fmt) for name, fmt in job.formats.items()} | dict.fromkeys(job.kept, AS_IT_WAS)
    exceptions = {name: _difference(told, _scheme(usual)) for name, told in layers.items() if told != _scheme(usual)}
    scheme = {key: value for key, value in _scheme(usual).items() if key != "data_type"}
    return {"scheme": scheme, "layer_config": layers, "extra_config": exceptions}


def _difference(told: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if value != usual[key]}


def _scheme(fmt: Format) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric, "data_type": "int"}


def write(job: Job, folder: Path) -> list[str]:
    return [write_recipe(folder, job, "AutoRound", {FILE: json_text(config(job))}, "autoround", USE)]


TARGET = Target(
    "autoround",
    "`layer_config` and `extra_config` for AutoRound, and a script that quantizes with them",
    Integers(
        bits=(2, 3, 4, 8), but=((8, False),)
    ),  # its checkpoints with 8 bits and zero-points are read by few, so it refuses them
    write,
    whole_groups=True,
    transposed=True,
)
