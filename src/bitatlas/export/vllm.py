"""vLLM: the packed checkpoint of `apply`, refused where vLLM cannot be expected to run it.

vLLM reads compressed-tensors `pack-quantized` with one format for q/k/v and one for gate/up, which it runs as one matrix each. Its
weight-only scheme has 2 to 8 bits symmetric; `apply` writes zero-points in a way that transformers reads and vLLM does not.
Not run here: vLLM needs a GPU. Source: vLLM, `compressed_tensors/schemes/compressed_tensors_wNa16.py`.
"""

from __future__ import annotations

from pathlib import Path

from bitatlas.export.packed import apply_plan
from bitatlas.export.target import Job, Target
from bitatlas.records.runtimes import Integers


def write(job: Job, folder: Path) -> list[str]:
    notes = apply_plan(job.model, job.plan_file, folder, job.reporter).notes
    return ["the packed checkpoint of bitatlas apply; in vLLM it was not run here", *notes]


TARGET = Target(
    "vllm",
    "the packed checkpoint of `apply`, where vLLM's rules allow it",
    Integers(bits=(2, 3, 4, 8), symmetric=(True,)),
    write,
    needs_model=True,
    whole_groups=True,
    fused=True,
)
