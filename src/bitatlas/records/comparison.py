"""`comparison.json`: what `compare` measured of one model's files, as the page, the table for a model card and a notebook show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitatlas.records.atlas import TaskPair, TaskScore
from bitatlas.records.plan import Measured

COMPARISON_SCHEMA = "bitatlas.comparison/2"

TOLD_APART, NOISE, UNTOLD = "told apart", "below the noise floor", "not told apart"


@dataclass(frozen=True)
class StoredKind:
    """What the weights of one kind are stored as: `attn_q`, `down_proj`, `embed_tokens`; `bytes` with scales and zero-points."""

    kind: str
    format: str  # "bf16", "Q4_K", "GPTQ 4 bits, 128 a scale", ...
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class ModelFile:
    """A model as it lies on the disk, and how it was run."""

    name: str  # what it is called everywhere, unlike any other's
    path: str
    family: str  # "transformers", "compressed-tensors", "GPTQ", "GGUF", "MLX", "plan", ...
    run: str  # "in llama.cpp", "dequantized by bitatlas", ...
    bytes: int  # of its weights' files; of a plan what it promises
    bits: float  # of these bytes, a weight of the whole model
    kinds: list[StoredKind] = field(default_factory=list)


@dataclass(frozen=True)
class Domain:
    """One text that was measured on. `tokens`: predictions that were scored; `documents`: that intervals resample."""

    name: str
    source: str
    rows: int
    tokens: int
    documents: int
    chat: bool  # conversations in the model's own template
    scored: str  # "all", or "assistant": the assistant's tokens alone
    sha256: str


@dataclass(frozen=True)
class Bucket:
    """Tokens at which the reference's top probability lay in [low, high): their share, and the damage there (None where there are none)."""

    low: float
    high: float
    share: float
    damage: Measured | None


@dataclass(frozen=True)
class Deviation:
    """How far a file's predictions are from the reference's on the same tokens. Intervals are over documents.

    damage: KL(reference || file), nats/token, its mean; quantiles: of it over tokens, by percent ("50", "90", "99", "99.9"); same_top: share of
    tokens with the same most probable token; top5: share of the five most probable in common; agreement: tokens of greedy continuations until
    the first difference, at most `agreement_limit`; loss: cross-entropy; loss_difference: minus the reference's, paired;
    estimate_error: standard error of `damage` that comes from the kept part of the reference's predictions alone, nats/token.
    """

    damage: Measured
    quantiles: dict[str, Measured]
    same_top: Measured
    top5: Measured
    loss: Measured
    loss_difference: Measured
    domains: dict[str, Measured]  # damage by the domain's name
    buckets: list[Bucket]
    estimate_error: float
    agreement: Measured | None = None
    agreement_limit: int = 0
    never_differ: float = 0.0  # share of the continuations that agree to the limit


@dataclass(frozen=True)
class Candidate:
    """A file and what was found. `rank`: 1 + the number of files that the data tell to do less damage; files that cannot be told apart share one.

    on_front: no file of at most its size is told to do less damage. within_noise: its damage is not told to be above the noise floor.
    refused: why it was not compared on the text; then only tasks were.
    """

    file: ModelFile
    deviation: Deviation | None
    rank: int | None = None
    on_front: bool = False
    within_noise: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Pair:
    """Two files on the same tokens. difference: damage of the second minus the first's; p: sign flips of documents, Holm over all pairs.

    verdict: TOLD_APART, UNTOLD, or NOISE, where the difference is told but smaller than what rounding alone does.
    tokens_needed: about how many of such tokens would tell a difference like this (80 % power); None where none is seen.
    """

    first: str
    second: str
    difference: Measured
    p: float
    holm_p: float
    verdict: str
    tokens_needed: int | None
    domains: dict[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True)
class Requirement:
    """What `--require` asked for. kept: the mean damage is at most `limit`."""

    name: str
    limit: float
    damage: float | None
    kept: bool


@dataclass(frozen=True)
class Comparison:
    """`comparison.json`. `candidates` in the order of their ranks, then of damage; `noise`: the reference beside itself, rounded."""

    reference: ModelFile
    reference_loss: Measured | None
    domains: list[Domain]
    candidates: list[Candidate]
    pairs: list[Pair]
    noise: Deviation | None
    noise_what: str  # what was rounded
    tasks: list[TaskScore]
    task_pairs: list[TaskPair]
    requirements: list[Requirement]
    notes: list[str]
    settings: dict[str, Any]
    schema: str = COMPARISON_SCHEMA

    @property
    def kept(self) -> bool:
        """Whether every requirement is kept."""
        return all(requirement.kept for requirement in self.requirements)
