"""`plan.json` and its parts, and `Measured`, the atom of everything that is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bitatlas.records.formats import Format

PLAN_SCHEMA = "bitatlas.plan/1"


@dataclass(frozen=True)
class Measured:
    """A number with what it rests on. `n` counts rows, problems or heads' sequences; where rows of one text belong together, `blocks` were
    resampled instead of them.
    """

    mean: float
    ci95: tuple[float, float] | None
    unit: str  # "nats/token", "points", "%", "share", "ratio", ...
    base: str  # "reference", "uniform:int4_g64", "plan", ...
    rows: str  # "fit", "select", "test", or "items:arc_easy"
    n: int
    blocks: int | None = None  # documents, or stretches of a long one, that the rows come in; None: every row stands by itself


@dataclass(frozen=True)
class Module:
    """One weight that can be quantized. `shape` is (out, in), whatever way round the checkpoint stores it; of an embedding (tokens, width).

    Outside the decoder layers `layer` is -1 in front of them, and their number behind.
    """

    name: str  # "model.layers.3.mlp.up_proj"
    layer: int
    kind: str  # "up_proj"
    shape: tuple[int, int]
    unit: str  # modules with the same unit share one format
    size_bytes: int | None = None  # of the weight as the checkpoint stores it; None: in the checkpoint's dtype
    part: str = ""  # outside the decoder layers: "embedding", "head", or "embedding and head" where these are tied
    candidates: tuple[str, ...] = ()  # outside the layers: as many formats as the survey has, narrowest first
    expert: int | None = None  # its number, of one of a layer's experts
    file: ModuleFile | None = None  # None: the file's own bytes are not known
    instead: dict[str, str] = field(default_factory=dict)  # the survey's format -> the nearest, where the module cannot hold it

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def parameter(self) -> str:
        """Return the model's name of the tensor that the weight is, or, of an expert, is a part of."""
        fused, _, number = self.name.rpartition(".")
        return fused if self.expert is not None and number == str(self.expert) else f"{self.name}.weight"

    def formats(self, usual: Sequence[str]) -> Sequence[str]:
        """Return the formats that the module may have, narrowest first: its own, or for each of the survey's what it can hold."""
        return self.candidates or ([self.at(name) for name in usual] if self.instead else usual)

    def at(self, name: str) -> str:
        """Return what the module has where all have the format `name`: the nearest that it can hold, outside the layers its widest."""
        return self.candidates[-1] if self.part else self.instead.get(name, name)


@dataclass(frozen=True)
class ModelInfo:
    name: str
    revision: str | None
    weights_sha256: str
    architecture: str
    layers: int
    heads: int
    context: int  # longest input, tokens
    dtype: str  # of the checkpoint's linear weights, or of most of them
    quantizable_weights: int
    other_bytes: (
        int  # all but the linear weights of the decoder layers, in the dtypes of the files: embeddings, norms, head, biases
    )
    total_bytes: int  # the checkpoint as it is, all tensors
    memory: MemoryShape | str | None = None  # text: why it cannot be told; None: an atlas from before it was recorded
    other_numbers: int | None = None  # that `other_bytes` are; None: of one dtype
    file: FileLayout | None = None  # of the file that the sizes of plans are about; None: a format's own bytes are counted


@dataclass(frozen=True)
class ModuleFile:
    """A module in the file. pieces: (bytes of the beginning that its tensors' names have in common, rows) each; none: it stays whole.

    kept: bytes as it is in the checkpoint, the header's among them.
    """

    pieces: tuple[tuple[int, int], ...]
    kept: int


@dataclass(frozen=True)
class FileLayout:
    """How a runtime's files hold quantized weights (`sizes.file_bytes`). other: bytes of all that is in no module, headers included."""

    runtime: str
    name: str  # "pack-quantized", "mlx" or "gguf"
    other: int
    digits: int  # at most, of a tensor's place in a file
    zero_bytes: int  # of a zero-point
    scale_bytes: int  # of a scale


@dataclass(frozen=True)
class Size:
    """`code_bits`: bits of the codes alone, per quantized weight of the decoder layers. `stored_bits`: all bytes of these weights x 8 / their number.

    `quantized_bytes`: of all quantized modules, embedding and head among them, as formats count them; `total_bytes`: of the whole model: of its
    files, to the byte, where their layout is known (`ModelInfo.file`).
    """

    code_bits: float
    stored_bits: float
    quantized_bytes: int
    total_bytes: int  # with everything that stays unquantized


@dataclass(frozen=True)
class Budget:
    """`value` in bits, nats/token, or bytes: of the whole model, or with `workload` of the device; of "protect" the least margin, points."""

    kind: str  # "code_bits", "stored_bits", "size" (the whole model), "vram" (with cache and activations), "max_damage" or "protect"
    value: float
    workload: Workload | None = None  # of "vram" alone
    protect: dict[str, float] | None = None  # of "protect" alone: task -> points that may be lost


# --- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanDamage:
    predicted: float | None
    measured: Measured | None


@dataclass(frozen=True)
class Baseline:
    """A plan anybody could have made, at most as large as ours. `difference` is plan minus baseline, paired by row.

    Both are on `damage.n` test rows: as few as decided which is better, or all (see `plan.looks`); the interval of the difference holds for
    every number of rows at which it might have been decided.
    """

    name: str  # "uniform int2_g32", "first layers high", "last layers high", "random plans (mean of 20)", ...
    code_bits: float
    quantized_bytes: int
    damage: Measured
    difference: Measured | None = None

    @property
    def is_random(self) -> bool:
        """Return whether it was drawn, and is no rule that somebody would follow."""
        return self.name.startswith("random")


@dataclass(frozen=True)
class PlanModel:
    name: str
    revision: str | None
    weights_sha256: str


@dataclass(frozen=True)
class Plan:
    """`plan.json`. Modules not listed keep the dtype that the checkpoint stores them in."""

    model: PlanModel
    formats: dict[str, Format]
    quantizer: str
    modules: dict[str, str]  # module name -> format name
    budget: Budget
    size: Size
    damage: PlanDamage
    baselines: list[Baseline] = field(default_factory=list)
    recommended: bool | None = None  # better than its baselines on test rows, or the smallest of equals; None: not judged
    verdict: str = ""
    solver: dict[str, Any] = field(default_factory=dict)
    codes: str = ""  # whose quantized weights were measured: quantizer, its version, and the hash of the rows it was fitted on
    runtime: str = ""  # whose file `size.total_bytes` counts; "": as formats count
    standing: str = ""  # "better", "no worse shown" or "worse" than the baselines; "": not judged, or before these words
    schema: str = PLAN_SCHEMA


def without_kept(plan: Plan) -> Plan:
    """Return the plan of the modules that are quantized, without those whose format is to stay as they are."""
    return replace(plan, modules={module: name for module, name in plan.modules.items() if not plan.formats[name].dtype})


# --- device memory: what it depends on (of the model), and what was asked for (of the user) ----------------------------


@dataclass(frozen=True)
class CacheLayers:
    """Decoder layers whose keys and values take equally much room. `window`: tokens kept by sliding attention; None: all."""

    layers: int  # how many
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class MemoryShape:
    """What the memory of a running model depends on besides its weights (`plan/budget.py` has the formula, `model/memory_shape.py` reads it)."""

    hidden: int
    inner: int  # widest input of a linear module: the inner width of the MLP
    heads: int
    vocabulary: int
    fused: bool  # attention without the whole matrix of scores in memory
    layers: list[CacheLayers]


@dataclass(frozen=True)
class Workload:
    """What a budget of device memory has to hold besides the weights. None, "" and 0 stand until the model is known."""

    context: int | None  # tokens of a sequence, all of them in the cache
    batch: int  # sequences at once
    chunk: int  # tokens of each sequence that one pass reads
    cache_dtype: str | None
    activation_dtype: str = ""
    cache_bytes: int = 0
    activation_bytes: int = 0
