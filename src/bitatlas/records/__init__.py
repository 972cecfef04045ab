"""What crosses the borders between stages: frozen dataclasses, written as JSON with a schema version (see `files`).

`Measured` is the atom: a number never travels without its 95 % interval, its unit, the base it was measured around, and the
rows or items it came from. `Plan` is `plan.json`, `Atlas` is `atlas.json`; the long tables beside the atlas are Parquet.
"""

# ruff: noqa: F401
# isort: off
from bitatlas.records.atlas import (
    ATLAS_SCHEMA, Ablation, Atlas, AttentionHead, AttentionLayer, Calibration, CalibrationPoint, Correlation, CurvePoint, Finding, HeadMap,
    JointDamage, KindDamage, Layer, NoLoss, ShapleyCheck, Sparsity, SparsityPoint, Split, TaskDamage, TaskPair, TaskScore, TokensInfo,
    Uniform, UnitDamage, UnitInteractions, UnitPair, WeightProfile, Zone,
)  # fmt: skip
from bitatlas.records.plan import PLAN_SCHEMA, Baseline, Budget, Measured, ModelInfo, Module, Plan, PlanDamage, PlanModel, Size
