"""The commands that go on from a plan, as text to copy: verify, apply, and every runtime whose files `bitatlas export` can write of it.

What a runtime can hold is told again here in one line each, because the export itself needs torch and a report does not; a test
compares the two for every format.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from bitatlas.formats import LLAMA_CPP, Format
from bitatlas.planning.budget import unlike_partners
from bitatlas.records import Atlas, Module, Plan


@dataclass(frozen=True)
class Runtime:
    """`holds`: whether it has a format; `model`: the command must be given the checkpoint; `whole`: groups must divide rows; `fused`: q/k/v alike."""

    holds: Callable[[Format], bool]
    model: bool = False
    whole: bool = True
    fused: bool = False


def _integer(fmt: Format) -> bool:
    return not fmt.runtime


RUNTIMES = {
    "vllm": Runtime(lambda fmt: _integer(fmt) and fmt.symmetric, model=True, fused=True),
    "mlx": Runtime(_integer, model=True),
    "torchao": Runtime(_integer),
    "llm-compressor": Runtime(_integer),
    "gptqmodel": Runtime(_integer),
    "autoround": Runtime(lambda fmt: _integer(fmt) and (fmt.bits < 8 or fmt.symmetric)),
    "exllamav3": Runtime(_integer, whole=False),
    LLAMA_CPP: Runtime(lambda fmt: fmt.runtime == LLAMA_CPP, model=True, whole=False),
}


def commands(atlas: Atlas, plan: Plan, place: str) -> list[str]:
    """Shell commands for the folder of the report. `place`: the plan's file, from there."""
    model, file = shlex.quote(str(atlas.settings.get("model", atlas.model.name))), shlex.quote(place)
    used = {name: plan.formats[name] for name in plan.modules.values()}
    found = [f"bitatlas verify {model} {file}"]
    stem = place.rpartition("/")[2].removesuffix(".json")
    if not any(fmt.runtime for fmt in used.values()):
        found.append(f"bitatlas apply {model} {file} --out {shlex.quote(f'{stem}-packed')}")
    for name, runtime in RUNTIMES.items():
        if fits(runtime, plan, atlas.modules):
            given = f" --model {model}" if runtime.model else ""
            found.append(f"bitatlas export {file} --to {name}{given} --out {shlex.quote(f'{stem}-{name}')}")
    return found


def fits(runtime: Runtime, plan: Plan, modules: list[Module]) -> bool:
    """Whether a runtime has all formats of a plan, for rows of these widths."""
    used = [(module, plan.formats[plan.modules[module.name]]) for module in modules if module.name in plan.modules]
    if not used or not all(runtime.holds(fmt) for _, fmt in used):
        return False
    if runtime.whole and any(module.shape[1] % fmt.group_size for module, fmt in used):
        return False
    return not runtime.fused or unlike_partners(plan) is None
