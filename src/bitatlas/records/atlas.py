"""`atlas.json` and its parts: everything measured on one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitatlas.records.formats import Format
from bitatlas.records.plan import Measured, ModelInfo, Module, Plan, Size

ATLAS_SCHEMA = "bitatlas.atlas/1"


@dataclass(frozen=True)
class Split:
    """Rows of one set. `blocks`: of each row, what it shares with the rows that are not independent of it; intervals resample blocks."""

    rows: int
    tokens: int
    sha256: str
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TokensInfo:
    source: str
    row_length: int
    splits: dict[str, Split]  # "fit", "select", "test"
    documents: int = 1  # different ones, as far as was read
    repeated_documents: int = 0  # dropped, each equal to an earlier one
    repeated_rows: int = 0  # dropped, each with a run of tokens that the text had before
    separate_documents: bool = False  # no two sets share a document; else they share none of its stretches
    by_document: bool = False  # a block is a whole document (or some short ones); else a stretch of one

    def blocks(self, split: str) -> list[int] | None:
        """Return the block of each row of a split; None in an atlas from before rows had blocks."""
        return self.splits[split].blocks or None


@dataclass(frozen=True)
class Uniform:
    """Every module at one format."""

    format: str
    size: Size
    damage: Measured


@dataclass(frozen=True)
class WeightProfile:
    """What the weights of one module look like. `sparsity` = share with |w| < 1 % of the module's standard deviation."""

    module: str
    layer: int
    kind: str
    weights: int
    std: float
    sparsity: float
    sparsity_curve: dict[str, float]  # threshold in standard deviations -> share below it
    kurtosis: float  # excess; 0 for a normal distribution
    outlier_ratio: float  # largest |w| / standard deviation
    outlier_share: float  # share of weights beyond 6 standard deviations
    relative_error: dict[str, float]  # format -> ||W - Q(W)||^2 / ||W||^2


@dataclass(frozen=True)
class SparsityPoint:
    """Share of all quantizable weights below a threshold, beside what a Gaussian of the same width has."""

    threshold: float  # standard deviations of the module
    share: float
    gaussian: float
    ratio95: tuple[float, float]  # interval of share / gaussian, for so many independent weights
    verdict: str  # "more", "as many", "fewer" or "inconclusive": 10 % more or fewer count


@dataclass(frozen=True)
class Sparsity:
    """Weights near 0: the curve over thresholds, and whether the layers differ."""

    curve: list[SparsityPoint]
    layers: list[float]  # share below 1 % of the standard deviation, by layer
    p_value: float  # chi-squared, "all layers are alike"
    spread: float  # standard deviation between layers beyond that of so many weights, as a share of the mean
    differ: bool  # p <= 0.05, and a spread of at least 5 %


@dataclass(frozen=True)
class AttentionHead:
    layer: int
    head: int
    base: str
    entropy: float  # normalized, 0..1, sinks removed
    sink_mass: float
    role: str | None  # "previous", "duplicate", "induction", "retrieval" or None
    scores: dict[str, float]  # role -> kappa
    p_values: dict[str, float]  # role -> permutation p, after Benjamini-Hochberg
    focus_percent: float | None


@dataclass(frozen=True)
class AttentionLayer:
    layer: int
    base: str  # "reference", "uniform:int4_g64", ...
    entropy: Measured  # mean over rows with >= 8 keys of H / ln(keys), 0..1
    entropy_nats: Measured
    sink_mass: Measured
    specialization_percent: Measured  # share of heads with a recognized role
    specialization_at: dict[str, float]  # kappa threshold -> %
    roles: dict[str, int]  # role -> heads
    focus_percent: Measured | None  # 0 is chance; None: no problem had tagged operands
    focus_null: str  # which null the focus is corrected by
    drift_local: Measured | None = None  # Jensen-Shannon distance, 0..1, to the reference's maps
    drift_cumulative: Measured | None = None
    drift_noise: Measured | None = None  # the same between bfloat16 and float32, reference weights


@dataclass(frozen=True)
class HeadMap:
    """Where a head looks in one short sequence: a random block of tokens twice, reference weights, sinks included."""

    layer: int
    head: int
    role: str
    score: float  # kappa of that role
    percent: list[list[int]]  # of the query's attention, by query; row i has the keys 0 .. i


@dataclass(frozen=True)
class Ablation:
    """What removing the heads of one role from the reference does to the repetition of a random block, beside as many random other heads."""

    role: str
    heads: list[list[int]]  # (layer, head) of those that carry the role
    draws: int = 0  # random sets of as many others
    as_harmful: int = 0  # of these, that add at least as much
    first_half: Measured | None = None  # loss with all heads, nats/token
    second_half: Measured | None = None
    added: Measured | None = None  # to the loss of the second half, without the heads
    added_by_chance: Measured | None = None  # the same without random others, mean over sets
    effect: Measured | None = None  # added - added_by_chance, paired by sequence
    not_tested: str = ""  # why all of that is missing


@dataclass(frozen=True)
class Layer:
    """The evidence on one decoder layer. `lowered`: this layer low, the others high; `raised`: the reverse (damage of that whole model)."""

    layer: int
    weights: int
    lowered: Measured
    raised: Measured
    share: Measured  # of the damage between uniform high and uniform low
    criticality: Measured  # share of the damage / share of the weights
    q_value: float  # two-sided, criticality = 1, Benjamini-Hochberg over layers
    verdict: str  # "critical", "safe", "light" or "uncertain"
    rows_needed: int | None = None  # uncertain or light: about so many rows would tell (10 000: or more); None: no number would
    q_is_bound: bool = False  # resampling gives no smaller one: printed with "<"


@dataclass(frozen=True)
class UnitDamage:
    """The evidence on one unit; fields as in `Layer`, on the rows that plans are found on."""

    unit: str
    layer: int
    kinds: list[str]
    weights: int
    lowered: Measured
    raised: Measured
    share: Measured
    criticality: Measured
    q_value: float  # Benjamini-Hochberg over units
    q_is_bound: bool = False


@dataclass(frozen=True)
class KindDamage:
    """The evidence on all modules of one kind together, in every layer; fields as in `Layer`."""

    kind: str
    modules: int
    weights: int
    lowered: Measured
    raised: Measured
    share: Measured
    criticality: Measured
    q_value: float  # Benjamini-Hochberg over kinds
    q_is_bound: bool = False


@dataclass(frozen=True)
class UnitPair:
    """Two units, and what they do together beyond both alone."""

    first: str
    second: str
    extra: Measured


@dataclass(frozen=True)
class UnitInteractions:
    """What any two units lowered together do beyond both alone (second order), on the rows that plans are found on; nats/token."""

    base: str
    format: str  # that they are lowered to
    units: list[str]
    extra: list[list[float]]  # below the diagonal, three digits: row i has i numbers, with the units before it
    pairs: list[UnitPair]  # those that hurt most together, the worst first


@dataclass(frozen=True)
class ShapleyCheck:
    """The layers' shares of the damage from sampled orders of the layers, beside those of the quadratic model, on the same rows."""

    orders: int  # in pairs: an order and its reverse
    models: int  # different ones that were measured
    sampled: list[Measured]  # share by layer
    standard_errors: list[float]  # of these shares, over pairs of orders, on these rows
    quadratic: list[float]  # share by layer
    largest: Measured  # difference of a share
    rank: Measured  # rank correlation of sampled with quadratic shares


@dataclass(frozen=True)
class JointDamage:
    """Layers lowered together from uniform high, nats/token added, on rows that did not call them safe."""

    layers: list[int]  # all safe ones
    added: Measured  # by all of them together
    together: list[int]  # the largest group, from the least harmful up, that stays within the tolerance together
    added_together: Measured | None  # by that group; None: it is empty


@dataclass(frozen=True)
class Zone:
    first: int
    last: int
    name: str  # "early", "middle", "late", ...
    criticality: Measured
    verdict: str
    low_share: float | None = None  # share of the zone's weights that the plan puts at the lowest format
    border95: tuple[int, int] | None = None  # interval of `first`, with as many zones; None: the first zone, or too few rows


@dataclass(frozen=True)
class TaskScore:
    task: str
    precision: str  # "reference", "uniform:int4_g64", "uniform:int2_g64" or "plan"
    correct: int
    n: int
    chance: float  # 0..1
    wilson95: tuple[float, float]
    above_chance: bool  # one-sided exact binomial p < 0.05, Holm over precisions
    correct_norm: int | None = None  # of choices: right by log-likelihood per character (acc_norm)
    below_chance: bool = False  # the same on the other side, p < 0.01: not guessing


@dataclass(frozen=True)
class NoLoss:
    """The test of "no loss within `margin_points`" on a pair; p-values are one-sided (see `stats.margin`)."""

    margin_points: float
    ci90: tuple[float, float]  # of the difference, points: its lower end is what the score test compares with the margin
    p: float
    holm_p: float
    equivalence_p: float  # two one-sided tests: neither lost nor gained
    items_needed: int  # about so many would show it, were there no loss
    held: bool  # shown, and the first of the pair is above chance by more than the margin


@dataclass(frozen=True)
class TaskPair:
    """Two precisions on the same items. `difference` is second minus first, in percentage points."""

    task: str
    first: str
    second: str
    difference: Measured
    lost: int  # right at first, wrong at second
    gained: int
    mcnemar_p: float
    holm_p: float
    detectable_points: float  # smallest difference that this n could have shown
    items_needed: int | None  # about so many would settle what was seen
    verdict: str  # "falls", "rises", "inconclusive", "at chance", "below chance", or "no loss within 2 points"
    text: str
    no_loss: NoLoss | None = None  # of a survey from before this was tested


@dataclass(frozen=True)
class TaskDamage:
    """Damage on a task's own text, rows "text:<task>". Lists are by layer."""

    task: str
    uniform: dict[str, Measured]  # format -> every module at it
    criticality: list[Measured]
    q_values: list[float]  # two-sided, criticality as on general text of that length, Benjamini-Hochberg over tasks and layers
    agreement: Correlation | None  # of criticality here and on that general text, over layers
    general: list[Measured] = field(default_factory=list)  # criticality on test rows cut to the task's length


@dataclass(frozen=True)
class CurvePoint:
    name: str
    kind: str  # "uniform", "plan", "baseline" or "random"
    code_bits: float
    stored_bits: float
    total_bytes: int
    damage: Measured


@dataclass(frozen=True)
class Finding:
    """A statement with its evidence. `verdict` is "holds", "does not hold", "inconclusive", or the word the statement is about."""

    topic: str  # "layers", "zones", "folk", "tasks", "attention", "plan"
    claim: str  # "early layers are safe"
    verdict: str
    text: str  # the sentence that is printed
    evidence: Measured | None = None
    p_value: float | None = None
    p_is_bound: bool = False  # resampling gives no smaller one: printed with "<"


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a cheap measure with measured damage, over layers or units (of a prediction: over plans)."""

    measure: str
    rho: float
    ci95: tuple[float, float] | None  # of layers and units: over rows, for these layers
    n: int
    p_value: float | None = None  # of layers: against measures as smooth over depth that have nothing to do with damage
    q_value: float | None = None  # Benjamini-Hochberg over all measures
    not_tested: str = ""  # why there is no p
    q_is_bound: bool = False  # resampling gives no smaller one: printed with "<"


@dataclass(frozen=True)
class CalibrationPoint:
    """One random plan around the base."""

    changed: int  # units
    predicted: float  # nats/token, without these rows
    measured: Measured


@dataclass(frozen=True)
class Calibration:
    """Damage of random plans around the plan: predicted from fit rows, measured on select rows; intervals over plans."""

    prediction: Correlation
    others: list[Correlation]  # of cheaper predictions, on the same plans
    on_fit: Correlation  # of the same plans, measured on the fit rows: no prediction from those can be expected to rank better
    slope: Measured  # of measured on predicted
    intercept: Measured
    relative_error: Measured  # mean of |predicted - measured| / measured
    kept: float  # share of the curvature between changes that the prediction keeps, 0..1
    training: int  # other plans that `kept` was fitted on
    centre: CalibrationPoint  # the base itself
    points: list[CalibrationPoint]


@dataclass(frozen=True)
class Atlas:
    """`atlas.json`: everything measured on one checkpoint. The report and any new plan are made from it without the model."""

    model: ModelInfo
    settings: dict[str, Any]
    versions: dict[str, str]
    formats: dict[str, Format]
    quantizer: str
    high: str
    low: str
    tokens: TokensInfo
    modules: list[Module]
    module_bytes: dict[str, dict[str, int]]  # module -> format -> bytes
    unit_damage: dict[str, dict[str, dict[str, float]]]  # base -> unit -> format -> damage on fit rows, nats/token
    base_damage: dict[str, float]  # base -> damage on fit rows, nats/token
    uniform: list[Uniform]
    layers: list[Layer]
    zones: list[Zone]
    weights: list[WeightProfile]
    attention: list[AttentionLayer]
    heads: list[AttentionHead]
    tasks: list[TaskScore]
    task_pairs: list[TaskPair]
    plan: Plan | None
    curve: list[CurvePoint]
    correlations: list[Correlation]
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)  # what was not done, and why
    calibration: Calibration | None = None
    task_damage: list[TaskDamage] = field(default_factory=list)
    units: list[UnitDamage] = field(default_factory=list)
    kinds: list[KindDamage] = field(default_factory=list)
    unit_correlations: list[Correlation] = field(default_factory=list)  # of cheap measures with the damage of units
    shapley: ShapleyCheck | None = None
    ablations: list[Ablation] = field(default_factory=list)
    interactions: UnitInteractions | None = None
    head_maps: list[HeadMap] = field(default_factory=list)
    joint: JointDamage | None = None  # None: no layer is safe, or a survey from before it was measured
    sparsity: Sparsity | None = None
    plans: list[Plan] = field(default_factory=list)  # verified at other sizes, from small to large; files in curve/
    schema: str = ATLAS_SCHEMA
