"""Exports of small plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitatlas.errors import UserError
from bitatlas.export.targets import Exported, export_plan
from bitatlas.progress import Reporter
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel, Size
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS

QUIET = Reporter(quiet=True)


def make_plan(modules: dict[str, str], sha256: str = "0" * 64) -> Plan:
    table = {name: FORMATS[name] for name in dict.fromkeys(modules.values())}
    model = PlanModel("owner/model", None, sha256)
    return Plan(model, table, "rtn", modules, Budget("code_bits", 3.0), Size(3.0, 4.0, 100, 200), PlanDamage(None, None))


SMALL = make_plan(
    {
        "model.layers.1.self_attn.q_proj": "int4_g64",
        "model.layers.1.mlp.up_proj": "int2_g32",
        "model.layers.10.mlp.up_proj": "int4_g64",
    }
)


def exported(plan: Plan, place: Path, target: str, model: Path | None = None) -> Exported:
    place.mkdir(exist_ok=True)
    (place / "plan.json").write_text(to_json(plan), encoding="utf-8")
    return export_plan(place / "plan.json", target, place / "out", str(model) if model else None, QUIET)


def refusal(plan: Plan, place: Path, target: str, model: Path | None = None) -> str:
    """The line; nothing may be left of what it refused."""
    with pytest.raises(UserError) as refused:
        exported(plan, place, target, model)
    assert [file.name for file in place.iterdir()] == ["plan.json"]
    return str(refused.value)
