"""What the checks of the torch libraries share. A check is run by `runtimes.py` in the library's own environment:

    python CHECK.py QUANTIZED MODEL JOB.json

and prints one JSON line. Nothing of bitatlas is imported. A library's word on its bits is not enough: the weight that a module really
multiplies by is found by giving it the unit matrix, and its levels are counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

SAME = 1e-3  # of a group's range: values nearer than this are one level (kernels in 16 bit round by 5e-4 of the largest)
ROUNDED = 2.0**-8  # of a weight itself: GPTQModel stores what it does not quantize as bfloat16
PASSES = 5  # timed


def levels(weight: torch.Tensor, group_size: int) -> int:
    """The most distinct values in any group of `weight` [out, in]."""
    groups = weight.float().reshape(-1, group_size).sort(dim=1).values
    span = (groups[:, -1:] - groups[:, :1]).clamp(min=1e-12)
    return int(((groups.diff(dim=1) > SAME * span).sum(1) + 1).max())


@torch.no_grad()
def effective_weight(module: torch.nn.Module, width: int) -> torch.Tensor:
    """What `module` multiplies by, float32 [out, in]."""
    bias = getattr(module, "bias", None)
    dtype = bias.dtype if isinstance(bias, torch.Tensor) and bias.is_floating_point() else torch.float32
    try:
        out = module(torch.eye(width, dtype=dtype))
    except RuntimeError:  # a kernel that wants 16 bit
        out = module(torch.eye(width, dtype=torch.float16))
    if isinstance(bias, torch.Tensor):
        out = out - bias.to(out.dtype)
    return out.float().T.contiguous()


@torch.no_grad()
def tokens_per_second(forward: Callable[[], Any], tokens: int) -> float:
    """Median of a few passes, the first left out."""
    times = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return tokens / statistics.median(times[1:])


@torch.no_grad()
def check(package: str, load: Callable[[str], Any], declared: Callable[[torch.nn.Module], dict | None]) -> None:
    """Load, ask, count, compare; print what was found."""
    folder, reference_folder, job_file = sys.argv[1:4]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    model = load(folder)
    ids = torch.tensor(job["ids"])
    logits = model(input_ids=ids).logits
    dtype, logits = logits.dtype, logits.float()
    reference = AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.float32).eval()
    speed_before = tokens_per_second(lambda: reference(input_ids=ids), ids.numel())
    clean = torch.log_softmax(reference(input_ids=ids).logits, -1)
    found: dict[str, Any] = {}
    for name, told in {**job["modules"], **dict.fromkeys(job["kept"])}.items():
        place = reference.get_submodule(name)
        weight = effective_weight(model.get_submodule(name), place.weight.shape[1])
        if told is None:
            close = ROUNDED * place.weight.abs() + 1e-6 * place.weight.abs().max()
            found[name] = {"unchanged": bool(((weight - place.weight).abs() <= close).all())}
        else:
            found[name] = {**(declared(model.get_submodule(name)) or {}), "levels": levels(weight, told["group_size"])}
        place.weight.data = weight
    again = reference.to(dtype)(input_ids=ids).logits.float()
    damage = (clean.exp() * (clean - torch.log_softmax(logits, -1))).sum(-1).mean()
    print(
        json.dumps(
            {
                "package": f"{package} {version(package)}",
                "torch": torch.__version__,
                "modules": found,
                "largest_difference": float((again - logits).abs().max()),
                "against": "the weights that its modules multiply by, in plain linear layers",
                "damage_nats": float(damage),
                "tokens_per_second": tokens_per_second(lambda: model(input_ids=ids), ids.numel()),
                "tokens_per_second_unquantized": speed_before,
            }
        )
    )
