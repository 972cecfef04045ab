"""Plans in llama.cpp's formats."""

from __future__ import annotations

from pathlib import Path

from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel
from bitatlas.records.formats import (
    FORMATS,
    LLAMA_CPP,
)
from bitatlas.records.sizes import size_of

QUIET = Reporter(quiet=True)


def make_plan(folder: Path, formats: list[str]) -> Plan:
    """Formats in turn, module by module."""
    checkpoint = open_checkpoint(str(folder), None, False)
    modules = {m.name: formats[k % len(formats)] for k, m in enumerate(checkpoint.modules)}
    info = PlanModel(checkpoint.info.name, None, checkpoint.info.weights_sha256)
    size = size_of(checkpoint.modules, modules, checkpoint.info)
    table = {name: FORMATS[name] for name in formats}
    return Plan(info, table, LLAMA_CPP, modules, Budget("code_bits", 5.0), size, PlanDamage(None, None))
