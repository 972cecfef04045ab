"""Gives the exported recipe to ExLlamaV3's own function that makes a strategy of it; nothing is converted, which needs CUDA.

    python check_exllamav3.py FOLDER MODEL JOB.json

The package cannot be imported without its CUDA extension, so its `conversion/allocation.py` alone is, with stand-ins for the modules of
a model: one a linear module of the checkpoint, and the head.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import yaml


class Linear:
    """What the function asks of a module."""

    qmap = "block"
    modules: tuple = ()
    select_hq_bits = 0

    def __init__(self, key: str, qbits_key: str = "bits"):
        self.key, self.qbits_key = key, qbits_key

    def weights_numel(self) -> int:
        return 1


def main() -> None:
    folder, _, job_file = sys.argv[1:4]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    package = importlib.metadata.distribution("exllamav3")
    for name, names in {"exllamav3": {}, "exllamav3.conversion": {}, "exllamav3.modules": {}, "exllamav3.modules.linear": {"Linear": Linear}}.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[name] = module
    spec = importlib.util.spec_from_file_location(
        "exllamav3.conversion.allocation", package.locate_file("exllamav3/conversion/allocation.py")
    )
    allocation = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = allocation
    spec.loader.exec_module(allocation)
    recipe = yaml.safe_load((Path(folder) / "recipe.yaml").read_text(encoding="utf-8"))
    model = types.SimpleNamespace(modules=[Linear(name) for name in job["paths"]] + [Linear("lm_head", "head_bits")])
    strategy, _ = allocation.create_q_strategy_from_recipe(model, None, None, recipe["tensors"], recipe["head_bits"], 4)
    wanted = {name: told["bits"] for name, told in job["modules"].items()} | dict.fromkeys([*job["kept"], "lm_head"], 16)
    print(json.dumps({"package": f"exllamav3 {package.version}", "as_planned": strategy == wanted}))


main()
