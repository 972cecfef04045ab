"""Recipes for libraries that quantize by themselves.

Of a plan only the formats carry over: the codes, and so the damage, are the library's own. Each library is a function that makes the
files that it reads, and a row of `LIBRARIES`; all but ExLlamaV3 come with a program that quantizes by these files.

- torchao: an `FqnToConfig` in torchao's own JSON, which transformers keeps in a checkpoint's config. Modules without an entry are not touched.
- llm-compressor: a config group a format, modules named in full; `recipe.yaml` is its GPTQ, `recipe-rtn.yaml` rounds to nearest.
- GPTQModel: a regular expression a module, matched from the beginning of a name, first match first; `-:` before it leaves the module out.
- AutoRound: every module by name, 16 bits for "not quantized"; `extra_config` is what differs from the scheme, as its checkpoints say it.
- ExLlamaV3: the bits of every linear module of the layers, and of no other. EXL3 is a codebook format: not even bytes carry over.

Sources: torchao 0.18 `quantization/quant_api.py`, `core/config.py`; llm-compressor 0.14 `modifiers/quantization`; GPTQModel 7.7
`quantization/config.py`; auto_round 0.16.1 `AutoRound(layer_config=...)`; exllamav3 1.6.5 `conversion/convert_model.py`, `allocation.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bitatlas.errors import UserError
from bitatlas.export.target import Job, Target, template, write_readme
from bitatlas.records.formats import Format
from bitatlas.records.runtimes import WIDTHS, Integers
from bitatlas.records.sizes import unlike_partners

HELD = Integers(bits=WIDTHS)
AS_IT_WAS = 16  # "bits" of a module that is not quantized


# --- what each library reads: file name -> content ----------------------------------------------------------------------


def torchao(job: Job) -> dict[str, Any]:
    """Return an `FqnToConfig` of `IntxWeightOnlyConfig`, for `torchao.core.config.config_from_dict`."""
    modules = {name: _weight_only(fmt) for name, fmt in job.formats.items()}
    data = {"fqn_to_config": modules, "module_fqn_to_config": {}}
    return {"torchao.json": {"_type": "FqnToConfig", "_version": 1, "_data": data}}


def _weight_only(fmt: Format) -> dict[str, Any]:
    data = {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{fmt.bits}"},
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": fmt.group_size}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if fmt.symmetric else "ASYMMETRIC"},
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def llm_compressor(job: Job) -> dict[str, Any]:
    """Return two recipes: a group a format, in the order in which the formats come."""
    groups: dict[str, Any] = {}
    for name, fmt in job.formats.items():
        weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric, "strategy": "group", "group_size": fmt.group_size, "dynamic": False}  # fmt: skip
        groups.setdefault(fmt.name, {"targets": [], "weights": weights})["targets"].append(name)
    modifier = {"ignore": ["lm_head", *job.unquantized], "config_groups": groups}
    names = {"recipe.yaml": "GPTQModifier", "recipe-rtn.yaml": "QuantizationModifier"}
    return {file: _yaml({"default_stage": {"default_modifiers": {name: modifier}}}) for file, name in names.items()}


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)


def gptqmodel(job: Job) -> dict[str, Any]:
    """Return the arguments of `QuantizeConfig`."""
    rules = {rule(name): _bits_and_groups(fmt) for name, fmt in job.formats.items()}
    kept: dict[str, Any] = {f"-:{rule(name)}": {} for name in job.unquantized}
    return {"quantize_config.json": {**_bits_and_groups(job.usual), "desc_act": False, "dynamic": {**kept, **rules}}}


def rule(name: str) -> str:
    """Return a regular expression that matches this module alone: layer 1 is not layer 10. GPTQModel looks such literal rules up."""
    return f"^{re.escape(name)}$"


def autoround(job: Job) -> dict[str, Any]:
    """Return the scheme that most modules have, `layer_config` for the API, `extra_config` of the checkpoint that it will make."""
    scheme = _bits_and_groups(job.usual)
    layers = {name: {**_bits_and_groups(fmt), "data_type": "int"} for name, fmt in job.formats.items()}
    layers |= {name: {"bits": AS_IT_WAS, "data_type": "float"} for name in job.unquantized}
    usual = {**scheme, "data_type": "int"}
    differences = {name: {key: layer[key] for key in layer if layer[key] != usual[key]} for name, layer in layers.items()}
    exceptions = {name: difference for name, difference in differences.items() if difference}
    return {"autoround.json": {"scheme": scheme, "layer_config": layers, "extra_config": exceptions}}


def _bits_and_groups(fmt: Format) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric}


def exllamav3(job: Job) -> dict[str, Any]:
    """Return the recipe of bits a tensor. Bits a weight are those of the quantized tensors alone, as the converter counts them."""
    if not job.modules:
        raise UserError("--to exllamav3: its recipe names every linear module of the model, so it needs --model")
    tensors = {module.name: job.formats[module.name].bits if module.name in job.formats else AS_IT_WAS for module in job.modules}
    weights = {module.name: module.weights for module in job.modules if module.name in job.formats}
    mean = round(sum(weights[name] * tensors[name] for name in weights) / sum(weights.values()), 4)
    recipe = _yaml({"target_bpw": mean, "achieved_bpw": mean, "head_bits": AS_IT_WAS, "tensors": tensors})
    comment = "# Only bits a tensor: EXL3 is a codebook format, so no codes, scales or bytes of the plan carry over.\n"
    return {"recipe.yaml": comment + recipe}


# --- the table ----------------------------------------------------------------------------------------------------------

CODES = (
    "The formats carry over, the codes do not: the library quantizes by itself. The damage above is that of other codes in the same "
    "formats, so measure what comes out."
)


@dataclass(frozen=True)
class Library:
    """A library that quantizes by itself. `templates/TARGET.md` is the README's part about it, `TARGET.py.txt` the program."""

    target: str  # after --to
    name: str
    about: str
    files: Callable[[Job], Mapping[str, Any]]
    holds: Integers = HELD
    whole_groups: bool = True
    transposed: bool = False
    program: bool = True
    codes: str = ""  # what the command says of the codes that it will make
    for_vllm: bool = False  # vLLM runs what it makes


LIBRARIES = (
    Library(
        "torchao",
        "torchao",
        "an `FqnToConfig` of `IntxWeightOnlyConfig` for torchao, and a script that quantizes with it",
        torchao,
        codes="torchao rounds by itself, and holds every code in a byte",
    ),
    Library(
        "llm-compressor",
        "llm-compressor",
        "recipes for llm-compressor's `oneshot` (GPTQ, and round to nearest), and a script that runs them",
        llm_compressor,
        for_vllm=True,
    ),
    Library(
        "gptqmodel",
        "GPTQModel",
        "a `QuantizeConfig` with `dynamic` rules for GPTQModel, and a script that quantizes with it",
        gptqmodel,
        transposed=True,
    ),
    Library(
        "autoround",
        "AutoRound",
        "`layer_config` and `extra_config` for AutoRound, and a script that quantizes with them",
        autoround,
        Integers(bits=WIDTHS, but=((8, False),)),  # few read its checkpoints with 8 bits and zero-points, so it refuses them
        transposed=True,
    ),
    Library(
        "exllamav3",
        "ExLlamaV3",
        "the recipe of bits a tensor for ExLlamaV3's `convert.py -rcp`; only the bits carry over",
        exllamav3,
        whole_groups=False,
        program=False,
    ),
)


def write_recipe(library: Library, job: Job, folder: Path) -> list[str]:
    """Write a library's files, its program and a README. Return what the command prints."""
    for name, content in library.files(job).items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    if not library.program:
        write_readme(folder, job, f"For {library.name}", template(f"{library.target}.md"))
        return ["only bits a tensor carry over: EXL3 is a codebook format, whose bytes and damage are its own"]
    (folder / "quantize.py").write_text(template(f"{library.target}.py.txt"), encoding="utf-8")
    write_readme(folder, job, f"For {library.name}", CODES, template(f"{library.target}.md"))
    codes = library.codes or f"quantize.py makes {library.name}'s own"
    notes = [f"the formats carry over, the codes do not: {codes}"]
    if library.for_vllm and (unlike := unlike_partners(job.plan)):
        notes.append(
            f"vLLM runs {unlike[2]} and {unlike[0]} as one matrix, and this plan gives them different formats: transformers alone"
        )
    return notes


TARGETS = tuple(
    Target(
        library.target,
        library.about,
        library.holds,
        partial(write_recipe, library),
        whole_groups=library.whole_groups,
        transposed=library.transposed,
    )
    for library in LIBRARIES
)
