"""ExLlamaV3: the recipe of bits a tensor that its `convert.py -rcp` reads.

EXL3 is a codebook format (trellis-coded, without groups, scales or zero-points): of a plan only the bits of every tensor carry over.
Neither codes nor bytes nor measured damage do, and the files say so. A tensor that the plan leaves as it is gets 16, which the converter
stores unquantized, and so does the head, which plans leave as it is.
The converter wants every linear module of the layers named, and no other, so the model's modules must be known.
Source: exllamav3 1.6.5, `doc/optimize.md`, `conversion/convert_model.py` and `conversion/allocation.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitatlas.errors import UserError
from bitatlas.export.target import Integers, Job, Target
from bitatlas.export.words import write_readme, yaml_text

FILE = "recipe.yaml"
AS_IT_WAS = 16
SAID = """EXL3 is a codebook format: **only the bits of every tensor carry over.** Codes, scales, bytes and the damage above do not; EXL3's own
damage at the same bits is another one. What the plan leaves as it is, the head too, is stored unquantized (16).

```
python convert.py -i MODEL -o OUT -w WORK_FOLDER -rcp recipe.yaml        # in a clone of exllamav3; needs a CUDA GPU
```"""


def recipe(job: Job) -> dict[str, Any]:
    """The content of `recipe.yaml`. Bits a weight are those of the quantized tensors alone, as the converter counts them."""
    tensors = {module.name: job.formats[module.name].bits if module.name in job.formats else AS_IT_WAS for module in job.modules}
    weights = {module.name: module.weights for module in job.modules if module.name in job.formats}
    mean = round(sum(weights[name] * tensors[name] for name in weights) / sum(weights.values()), 4)
    return {"target_bpw": mean, "achieved_bpw": mean, "head_bits": AS_IT_WAS, "tensors": tensors}


def write(job: Job, folder: Path) -> list[str]:
    if not job.modules:
        raise UserError("--to exllamav3: its recipe names every linear module of the model, so it needs --model")
    comment = "# Only bits a tensor: EXL3 is a codebook format, so no codes, scales or bytes of the plan carry over.\n"
    (folder / FILE).write_text(comment + yaml_text(recipe(job)), encoding="utf-8")
    write_readme(folder, job, "For ExLlamaV3", SAID)
    return ["only bits a tensor carry over: EXL3 is a codebook format, whose bytes and damage are its own"]


TARGET = Target(
    "exllamav3",
    "the recipe of bits a tensor for ExLlamaV3's `convert.py -rcp`; only the bits carry over",
    Integers(bits=(2, 3, 4, 8)),
    write,
)
