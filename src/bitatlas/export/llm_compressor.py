"""llm-compressor: a recipe with one config group a format, for `oneshot`.

`recipe.yaml` quantizes with its GPTQ, `recipe-rtn.yaml` to nearest without data; both name modules in full, so nothing else is touched.
What comes out is a compressed-tensors checkpoint that vLLM is made for. vLLM runs q/k/v and gate/up as one matrix: a plan that gives
them different formats is exported, with a note.
Source: llm-compressor 0.14, `modifiers/quantization`; compressed-tensors 0.19.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.export.target import Integers, Job, Target
from bitatlas.export.words import write_recipe, yaml_text
from bitatlas.formats import Format
from bitatlas.planning.budget import unlike_partners

USE = """```
pip install llmcompressor
python quantize.py MODEL OUT --dataset TEXT_FILE      # recipe.yaml: GPTQ
python quantize.py MODEL OUT                          # recipe-rtn.yaml: round to nearest, no data
```"""


def recipe(job: Job, modifier: str) -> dict[str, Any]:
    """The recipe: `modifier` with a group a format, in the order in which the formats come."""
    groups: dict[str, Any] = {}
    for name, fmt in job.formats.items():
        groups.setdefault(fmt.name, {"targets": [], "weights": _weights(fmt)})["targets"].append(name)
    return {"default_stage": {"default_modifiers": {modifier: {"ignore": ["lm_head", *job.kept], "config_groups": groups}}}}


def _weights(fmt: Format) -> dict[str, Any]:
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "group",
        "group_size": fmt.group_size,
        "dynamic": False,
    }


def write(job: Job, folder: Path) -> list[str]:
    modifiers = {"recipe.yaml": "GPTQModifier", "recipe-rtn.yaml": "QuantizationModifier"}
    files = {name: yaml_text(recipe(job, modifier)) for name, modifier in modifiers.items()}
    notes = [write_recipe(folder, job, "llm-compressor", files, "llm_compressor", USE)]
    if unlike := unlike_partners(job.plan):
        notes.append(
            f"vLLM runs {unlike[2]} and {unlike[0]} as one matrix, and this plan gives them different formats: transformers alone"
        )
    return notes


TARGET = Target(
    "llm-compressor",
    "recipes for llm-compressor's `oneshot` (GPTQ, and round to nearest), and a script that runs them",
    Integers(bits=(2, 3, 4, 8)),
    write,
    whole_groups=True,
)
