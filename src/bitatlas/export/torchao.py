"""torchao: an `FqnToConfig` in torchao's own JSON, which `config_from_dict` reads and transformers keeps in a checkpoint's config.

Every module of the plan has an `IntxWeightOnlyConfig` under its full name; modules without one are not touched. torchao rounds to
nearest between each group's least and greatest weight, without the clipping that `rtn` here searches for.
Source: torchao 0.18, `quantization/quant_api.py` and `core/config.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.export.target import Integers, Job, Target
from bitatlas.export.words import json_text, write_recipe
from bitatlas.formats import Format

FILE = "torchao.json"
USE = """```
pip install torchao transformers
python quantize.py MODEL OUT
```

`torchao.json` is an `FqnToConfig` for `torchao.core.config.config_from_dict`. `IntxWeightOnlyConfig` holds every code in a byte, whatever
its width: the quality is that of the widths, the memory is that of 8 bits, until the model is lowered for a device that packs them."""


def config(job: Job) -> dict[str, Any]:
    """The content of `torchao.json`."""
    return {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {"fqn_to_config": {name: _weight_only(fmt) for name, fmt in job.formats.items()}, "module_fqn_to_config": {}},
    }


def _weight_only(fmt: Format) -> dict[str, Any]:
    data = {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{fmt.bits}"},
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": fmt.group_size}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if fmt.symmetric else "ASYMMETRIC"},
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def write(job: Job, folder: Path) -> list[str]:
    return [
        write_recipe(
            folder,
            job,
            "torchao",
            {FILE: json_text(config(job))},
            "torchao",
            USE,
            "torchao rounds by itself, and holds every code in a byte",
        )
    ]


TARGET = Target(
    "torchao",
    "an `FqnToConfig` of `IntxWeightOnlyConfig` for torchao, and a script that quantizes with it",
    Integers(bits=(2, 3, 4, 8)),
    write,
    whole_groups=True,
)
