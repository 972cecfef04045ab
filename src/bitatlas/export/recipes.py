"""Recipes for libraries that quantize by themselves, and the README of every export.

Of a plan only the formats carry over: the codes, and so the damage, are the library's own. Each library is a function that says a plan in
its words, by file name, and a row of `TARGETS`; all but ExLlamaV3 come with a program that quantizes by these files.

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
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import yaml

from bitatlas.errors import UserError
from bitatlas.export.target import Job, Target
from bitatlas.records.formats import Format
from bitatlas.records.runtimes import Integers
from bitatlas.records.sizes import unlike_partners
from bitatlas.records.text import byte_size, interval, number

WIDTHS = (2, 3, 4, 8)
AS_IT_WAS = 16  # "bits" of a module that is not quantized


# --- what each library reads: file name -> content ----------------------------------------------------------------------


def torchao(job: Job) -> dict[str, Any]:
    """An `FqnToConfig` of `IntxWeightOnlyConfig`, for `torchao.core.config.config_from_dict`."""
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
    """Two recipes: a group a format, in the order in which the formats come."""
    groups: dict[str, Any] = {}
    for name, fmt in job.formats.items():
        weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric, "strategy": "group", "group_size": fmt.group_size, "dynamic": False}  # fmt: skip
        groups.setdefault(fmt.name, {"targets": [], "weights": weights})["targets"].append(name)
    modifier = {"ignore": ["lm_head", *job.kept], "config_groups": groups}
    names = {"recipe.yaml": "GPTQModifier", "recipe-rtn.yaml": "QuantizationModifier"}
    return {file: {"default_stage": {"default_modifiers": {name: modifier}}} for file, name in names.items()}


def gptqmodel(job: Job) -> dict[str, Any]:
    """The arguments of `QuantizeConfig`."""
    rules = {rule(name): _bits_and_groups(fmt) for name, fmt in job.formats.items()}
    kept: dict[str, Any] = {f"-:{rule(name)}": {} for name in job.kept}
    return {"quantize_config.json": {**_bits_and_groups(job.usual), "desc_act": False, "dynamic": {**kept, **rules}}}


def rule(name: str) -> str:
    """A regular expression that matches this module alone: layer 1 is not layer 10. GPTQModel looks such literal rules up."""
    return f"^{re.escape(name)}$"


def autoround(job: Job) -> dict[str, Any]:
    """The scheme that most modules have, `layer_config` for the API, `extra_config` of the checkpoint that it will make."""
    scheme = _bits_and_groups(job.usual)
    layers = {name: {**_bits_and_groups(fmt), "data_type": "int"} for name, fmt in job.formats.items()}
    layers |= {name: {"bits": AS_IT_WAS, "data_type": "float"} for name in job.kept}
    usual = {**scheme, "data_type": "int"}
    differences = {name: {key: layer[key] for key in layer if layer[key] != usual[key]} for name, layer in layers.items()}
    exceptions = {name: difference for name, difference in differences.items() if difference}
    return {"autoround.json": {"scheme": scheme, "layer_config": layers, "extra_config": exceptions}}


def _bits_and_groups(fmt: Format) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric}


def exllamav3(job: Job) -> dict[str, Any]:
    """The recipe of bits a tensor. Bits a weight are those of the quantized tensors alone, as the converter counts them."""
    if not job.modules:
        raise UserError("--to exllamav3: its recipe names every linear module of the model, so it needs --model")
    tensors = {module.name: job.formats[module.name].bits if module.name in job.formats else AS_IT_WAS for module in job.modules}
    weights = {module.name: module.weights for module in job.modules if module.name in job.formats}
    mean = round(sum(weights[name] * tensors[name] for name in weights) / sum(weights.values()), 4)
    return {"recipe.yaml": {"target_bpw": mean, "achieved_bpw": mean, "head_bits": AS_IT_WAS, "tensors": tensors}}


# --- the programs that come with them -----------------------------------------------------------------------------------

MAIN = r"""def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
"""
TORCHAO = r'''"""Quantize a model with torchao as the plan beside this file says, and save it with transformers.

    pip install torchao transformers
    python quantize.py MODEL OUT

torchao rounds to nearest by itself, so measure the result: the plan's damage is that of other codes in the same formats.
"""

import argparse
import json
from pathlib import Path

from torchao.core.config import config_from_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig


$main    args = parser.parse_args()
    modules = config_from_dict(json.loads((Path(__file__).parent / "torchao.json").read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", quantization_config=TorchAoConfig(modules))
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
'''
LLM_COMPRESSOR = r'''"""Quantize a model with llm-compressor as the plan beside this file says.

    pip install llmcompressor
    python quantize.py MODEL OUT [--dataset TEXT_FILE] [--nsamples 256] [--seqlen 2048]

With a text: GPTQ (recipe.yaml). Without: round to nearest (recipe-rtn.yaml). It chooses its own codes, so measure the result.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def samples(tokenizer: Any, text: str, count: int, length: int) -> Dataset:
    """Consecutive pieces of the text, `length` tokens each."""
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    return Dataset.from_dict({"input_ids": pieces, "attention_mask": [[1] * len(piece) for piece in pieces]})


$main    parser.add_argument("--dataset", help="a text file")
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    here = Path(__file__).parent
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.dataset:
        data = samples(tokenizer, Path(args.dataset).read_text(encoding="utf-8"), args.nsamples, args.seqlen)
        oneshot(
            model=model, recipe=str(here / "recipe.yaml"), dataset=data, num_calibration_samples=len(data), max_seq_length=args.seqlen
        )  # fmt: skip
    else:
        oneshot(model=model, recipe=str(here / "recipe-rtn.yaml"))
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
'''
GPTQMODEL = r'''"""Quantize a model with GPTQModel as the plan beside this file says.

    pip install gptqmodel
    python quantize.py MODEL OUT --dataset TEXT_FILE [--nsamples 256] [--seqlen 2048]

GPTQModel chooses its own codes, so measure the result: the plan's damage is that of other codes in the same formats.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

if (os.cpu_count() or 1) < 3:  # GPTQModel 7.7 needs two workers, and makes one by itself where there are two cores
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer


def samples(tokenizer: Any, text: str, count: int, length: int) -> list[dict]:
    """Consecutive pieces of the text, `length` tokens each."""
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    return [{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in pieces]


$main    parser.add_argument("--dataset", required=True, help="a text file")
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    told = json.loads((Path(__file__).parent / "quantize_config.json").read_text(encoding="utf-8"))
    text = Path(args.dataset).read_text(encoding="utf-8")
    data = samples(AutoTokenizer.from_pretrained(args.model), text, args.nsamples, args.seqlen)
    model = GPTQModel.load(args.model, QuantizeConfig(**told))
    model.quantize(data, batch_size=1)
    model.save(args.out)


if __name__ == "__main__":
    main()
'''
AUTOROUND = r'''"""Quantize a model with AutoRound as the plan beside this file says.

    pip install auto-round
    python quantize.py MODEL OUT [--dataset TEXT_FILE] [--iters 200] [--nsamples 128] [--seqlen 2048]

AutoRound learns its own codes, so measure the result: the plan's damage is that of other codes in the same formats.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8  # rows


def samples(tokenizer: Any, text: str, count: int, length: int) -> list[torch.Tensor]:
    """Consecutive pieces of the text, in batches [rows, length]."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)[:count]
    return list(rows.split(BATCH))


$main    parser.add_argument("--dataset", help="a text file; default: AutoRound's own, from the hub")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    told = json.loads((Path(__file__).parent / "autoround.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    more = {}
    if args.dataset:
        more["dataset"] = samples(tokenizer, Path(args.dataset).read_text(encoding="utf-8"), args.nsamples, args.seqlen)
    rounding = AutoRound(
        model, tokenizer, **told["scheme"], layer_config=told["layer_config"], iters=args.iters, nsamples=args.nsamples,
        seqlen=args.seqlen, batch_size=BATCH, enable_torch_compile=torch.cuda.is_available(), **more
    )  # fmt: skip
    rounding.quantize_and_save(args.out, format="auto_round")


if __name__ == "__main__":  # AutoRound starts processes
    main()
'''


# --- the READMEs, and the targets ---------------------------------------------------------------------------------------

CODES = (
    "The formats carry over, the codes do not: the library quantizes by itself. The damage above is that of other codes in the same "
    "formats, so measure what comes out."
)


@dataclass(frozen=True)
class Recipe:
    """A library. `use` is the README's part about it; `codes` what the command says of the codes that it will make."""

    library: str
    files: Callable[[Job], Mapping[str, Any]]
    program: str
    use: str
    codes: str = ""


def write_recipe(recipe: Recipe, job: Job, folder: Path) -> list[str]:
    """Write a library's files, its program and a README. Return what the command prints."""
    _write_files(folder, recipe.files(job))
    program = Template(recipe.program).substitute(main=MAIN)
    (folder / "quantize.py").write_text(program, encoding="utf-8")
    write_readme(folder, job, f"For {recipe.library}", CODES, recipe.use)
    codes = recipe.codes or f"quantize.py makes {recipe.library}'s own"
    return [f"the formats carry over, the codes do not: {codes}"]


def _write_llm_compressor(recipe: Recipe, job: Job, folder: Path) -> list[str]:
    notes = write_recipe(recipe, job, folder)
    if unlike := unlike_partners(job.plan):
        notes.append(
            f"vLLM runs {unlike[2]} and {unlike[0]} as one matrix, and this plan gives them different formats: transformers alone"
        )
    return notes


def _write_exllamav3(job: Job, folder: Path) -> list[str]:
    comment = "# Only bits a tensor: EXL3 is a codebook format, so no codes, scales or bytes of the plan carry over.\n"
    _write_files(folder, exllamav3(job), comment)
    write_readme(folder, job, "For ExLlamaV3", EXL3_USE)
    return ["only bits a tensor carry over: EXL3 is a codebook format, whose bytes and damage are its own"]


def _write_files(folder: Path, contents: Mapping[str, Any], comment: str = "") -> None:
    for name, content in contents.items():
        if name.endswith(".yaml"):
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)
        else:
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(comment + text, encoding="utf-8")


def write_readme(folder: Path, job: Job, title: str, *parts: str) -> None:
    """Write README.md: what plan this is, then the target's own paragraphs."""
    (folder / "README.md").write_text("\n\n".join([f"# {title}", plan_text(job), *parts]) + "\n", encoding="utf-8")


def plan_text(job: Job) -> str:
    """Return the plan in a few lines, with what was promised and how that is known."""
    plan = job.plan
    counts = ", ".join(f"{count} at {name}" for name, count in sorted(Counter(plan.modules.values()).items()))
    if plan.damage.measured:
        damage = f"{interval(plan.damage.measured, unit=True)}, measured on {plan.damage.measured.rows} rows of its survey"
    elif plan.damage.predicted is not None:
        damage = f"{number(plan.damage.predicted)} nats/token, predicted and not measured"
    else:
        damage = "not measured"
    return (
        f"A plan of bitatlas for {plan.model.name} (weights with sha256 `{plan.model.weights_sha256}`): "
        f"{len(plan.modules)} modules, {counts}; {number(plan.size.code_bits)} bits of codes a weight, "
        f"{byte_size(plan.size.total_bytes)} by its own count. Damage (KL to the unquantized model) of {plan.quantizer} codes: {damage}. "
        "`plan.json` is the plan."
    )


TORCHAO_USE = """```
pip install torchao transformers
python quantize.py MODEL OUT
```

`torchao.json` is an `FqnToConfig` for `torchao.core.config.config_from_dict`. `IntxWeightOnlyConfig` holds every code in a byte, whatever
its width: the quality is that of the widths, the memory is that of 8 bits, until the model is lowered for a device that packs them."""
LLM_COMPRESSOR_USE = """```
pip install llmcompressor
python quantize.py MODEL OUT --dataset TEXT_FILE      # recipe.yaml: GPTQ
python quantize.py MODEL OUT                          # recipe-rtn.yaml: round to nearest, no data
```"""
GPTQMODEL_USE = """```
pip install gptqmodel
python quantize.py MODEL OUT --dataset TEXT_FILE
```

`quantize_config.json` has the arguments of `QuantizeConfig`: the bits, group size and symmetry that most modules have, and `dynamic`, a
rule for every module. vLLM reads such checkpoints too, but runs q/k/v and gate/up as one matrix under another name, which these rules
do not match: load what you made with GPTQModel or transformers."""
AUTOROUND_USE = """```
pip install auto-round
python quantize.py MODEL OUT --dataset TEXT_FILE
```

`autoround.json` has the `scheme` of the whole model, a `layer_config` for the API, and the `extra_config` that the quantized
checkpoint's `config.json` will have."""
EXL3_USE = """EXL3 is a codebook format: **only the bits of every tensor carry over.** Codes, scales, bytes and the damage above do not; EXL3's own
damage at the same bits is another one. What the plan leaves as it is, the head too, is stored unquantized (16).

```
python convert.py -i MODEL -o OUT -w WORK_FOLDER -rcp recipe.yaml        # in a clone of exllamav3; needs a CUDA GPU
```"""
TORCHAO_CODES = "torchao rounds by itself, and holds every code in a byte"

TARGETS = (
    Target(
        "torchao",
        "an `FqnToConfig` of `IntxWeightOnlyConfig` for torchao, and a script that quantizes with it",
        Integers(bits=WIDTHS),
        partial(write_recipe, Recipe("torchao", torchao, TORCHAO, TORCHAO_USE, TORCHAO_CODES)),
        whole_groups=True,
    ),
    Target(
        "llm-compressor",
        "recipes for llm-compressor's `oneshot` (GPTQ, and round to nearest), and a script that runs them",
        Integers(bits=WIDTHS),
        partial(_write_llm_compressor, Recipe("llm-compressor", llm_compressor, LLM_COMPRESSOR, LLM_COMPRESSOR_USE)),
        whole_groups=True,
    ),
    Target(
        "gptqmodel",
        "a `QuantizeConfig` with `dynamic` rules for GPTQModel, and a script that quantizes with it",
        Integers(bits=WIDTHS),
        partial(write_recipe, Recipe("GPTQModel", gptqmodel, GPTQMODEL, GPTQMODEL_USE)),
        whole_groups=True,
        transposed=True,
    ),
    Target(
        "autoround",
        "`layer_config` and `extra_config` for AutoRound, and a script that quantizes with them",
        Integers(
            bits=WIDTHS, but=((8, False),)
        ),  # its checkpoints with 8 bits and zero-points are read by few, so it refuses them
        partial(write_recipe, Recipe("AutoRound", autoround, AUTOROUND, AUTOROUND_USE)),
        whole_groups=True,
        transposed=True,
    ),
    Target(
        "exllamav3",
        "the recipe of bits a tensor for ExLlamaV3's `convert.py -rcp`; only the bits carry over",
        Integers(bits=WIDTHS),
        _write_exllamav3,
    ),
)
