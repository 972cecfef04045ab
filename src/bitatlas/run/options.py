"""Declare what the commands and the Python functions take: name, type, default, help text and completion of every option, once.

One record a command. The command line is made of it by `cli.options`, the parameters of a Python function by `api.taking`,
and what a survey does by `Settings.of`. Imports nothing slow: `--help` waits for this file.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from bitatlas.errors import UserError

# These repeat what the registries have: asking those imports torch, two seconds a key press.
QUANTIZER_NAMES = ("rtn", "gptq", "hqq", "autoround", "llama.cpp", "imatrix")
RUNTIME_NAMES = ("vllm", "mlx", "torchao", "llm-compressor", "gptqmodel", "autoround", "exllamav3", "llama.cpp")

EXPERTS = ("unit", "each")

StrPath = str | PathLike[str]
RowCounts = tuple[int, int, int]
DEFAULT_ROWS = (24, 24, 64)


@dataclass(frozen=True)
class Option:
    """What the command line needs to know of a field beside its name, type and default.

    `parse`: makes the field's value of a word, where the command line takes a word for it. `values`: what a shell completes.
    """

    help: str
    flags: tuple[str, ...] = ()  # where they are not --its-name alone
    parse: Callable[[Any], Any] | None = None
    values: Callable[[], Sequence[str]] | None = None
    may_be_empty: bool = False  # an empty word is refused elsewhere, or means something
    before: str = ""  # the option that it stands before, where it is the command line's own


@dataclass(frozen=True)
class Argument(Option):
    """A field that the command line takes by its position."""

    may_be_empty: bool = True
    metavar: str | None = None


def format_names() -> tuple[str, ...]:
    """Return what `formats` may name."""
    from bitatlas.records.formats import FORMATS

    return *FORMATS, "gguf"


def task_names() -> tuple[str, ...]:
    """Return what `tasks` may name."""
    from bitatlas.data.tasks import TASKS

    return *TASKS, "none"


def split_names(text: str) -> tuple[str, ...]:
    """Split `a, b` -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_rows(text: str) -> RowCounts:
    """Parse `24,24,64` -> (fit, select, test)."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9}){2}", text.replace(" ", "")):
        default = ",".join(map(str, DEFAULT_ROWS))
        raise UserError(f"--rows {text}: give three numbers, fit,select,test, like {default}")
    fit, select, test = (int(part) for part in text.replace(" ", "").split(","))
    return fit, select, test


def check_seed(seed: int) -> None:
    """Refuse a seed that the random generators do not take."""
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")


# --- options of several commands -------------------------------------------------------------------------------------------

Quiet = Annotated[bool, Option("No progress on stderr.", ("--quiet", "-q"))]
Seed = Annotated[int, Option("Seed of everything drawn at random.")]
Rows = Annotated[
    RowCounts, Option("Rows to find, choose and judge a plan on: fit,select,test.", parse=parse_rows, may_be_empty=True)
]
Device = Annotated[str, Option("cpu, cuda, mps or auto: a GPU where there is one.")]
Folder = Annotated[StrPath, Argument("Folder of a finished survey.", parse=Path)]
PlannedModel = Annotated[StrPath, Argument("The checkpoint that the plan was made for.")]
PlanFile = Annotated[StrPath, Argument("A plan.json.", parse=Path, metavar="PLAN")]
Experts = Annotated[
    str,
    Option("A layer's experts of one kind share a format (unit), or every expert has its own (each).", values=lambda: EXPERTS),
]
Dtype = Annotated[str, Option("What the model computes in: float32, bfloat16, float16; auto: float32 on a CPU, else bfloat16.")]
Threads = Annotated[
    int | None, Option("Threads on a CPU. Default: OMP_NUM_THREADS, else the fastest, timed on the model's first layer.")
]
Memory = Annotated[
    str | None,
    Option(
        "What this may take at its peak, like 6GiB (of the GPU with --device cuda); "
        "layer by layer where all weights do not fit. Default: what is free."
    ),
]
Revision = Annotated[str | None, Option("Hub revision.")]


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Options of a budget: at most one of them, but that context, cache dtype, batch and chunk belong to `vram`."""

    code_bits: Annotated[float | None, Option("Budget: bits of the codes alone, per weight (the usual '3-bit').")] = None
    stored_bits: Annotated[float | None, Option("Budget: all stored bits of the quantized modules, per weight.")] = None
    size: Annotated[str | None, Option("Budget: bytes of the files that will be written, headers included, like 4GiB.")] = None
    vram: Annotated[str | None, Option("Budget: device memory for weights, cache and activations, like 8GiB.")] = None
    context: Annotated[int | None, Option("With --vram: tokens in the cache. Default: the model's own.")] = None
    cache_dtype: Annotated[
        str | None,
        Option(
            "With --vram: float16, bfloat16, float32, float8_e4m3fn, float8_e5m2, or llama.cpp's q8_0, q4_0. "
            "Default: the checkpoint's if 16 bit, else float16."
        ),
    ] = None
    batch: Annotated[int | None, Option("With --vram: sequences at once, each with the whole context. Default: 1.")] = None
    chunk: Annotated[int | None, Option("With --vram: tokens of a prompt read in one pass. Default: 512.")] = None
    max_damage: Annotated[float | None, Option("Budget: the greatest damage tolerated, nats/token; finds the smallest plan.")] = (
        None
    )
    protect: Annotated[
        Sequence[str],
        Option(
            "Budget: a task and the points it may lose, like svamp=1pp; finds the smallest model that holds it. Repeatable.",
            parse=tuple,
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Options of the text that is measured on."""

    tokens: Annotated[
        StrPath | None,
        Option("Text to measure on: a text file, JSON lines or a JSON list (field text), or hub:owner/name[:config[:split]]."),
    ] = None
    rows: Rows = DEFAULT_ROWS
    row_length: Annotated[int, Option("Tokens in a row.")] = 192


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of the tasks that are scored, and when one is held."""

    tasks: Annotated[
        Sequence[str] | None,
        Option(
            "Tasks, like arc_easy,svamp; or none. Default: the demo's two, else arc_easy,svamp.",
            parse=split_names,
            values=task_names,
        ),
    ] = None
    task_data: Annotated[
        StrPath | None, Option("Folder with the tasks' files (SVAMP.json, ARC-Easy-test.jsonl, ...), instead of the hub.")
    ] = None
    limit: Annotated[int | None, Option("At most so many items a task.")] = 300
    few_shot: Annotated[
        int, Option("Examples with their answers before each question, from items that are not scored (published GSM8K: 5).")
    ] = 0
    margin: Annotated[str, Option("A task is held where a loss of so many percentage points can be ruled out.")] = "2pp"


# --- the commands ----------------------------------------------------------------------------------------------------------


BaseGguf = Annotated[
    StrPath | None,
    Option("A GGUF of the same model in f16, bf16 or f32, as llama.cpp's converter makes it: its metadata and names are taken."),
]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Options of the codes that there are to choose from."""

    formats: Annotated[
        Sequence[str] | None,
        Option(
            "Candidate formats, int{2,3,4,5,6,8}_g{32,64,128}[_sym], or llama.cpp's, like q4_0,q8_0 (gguf: eight of them, iq2_xxs to q8_0); "
            "bf16, f16, f32: as it is. "
            "Default: int{2,3,4}_g64 (the demo: _g128).",
            parse=split_names,
            values=format_names,
        ),
    ] = None
    runtime: Annotated[
        str | None,
        Option(
            "What the file is for: transformers, vllm, mlx, llama.cpp, ... (as in export --to), or bitatlas (transformers by bitatlas.load_packed). "
            "It decides whether embedding, head and experts are planned, too. "
            "Default: transformers; llama.cpp for its formats.",
            ("--for",),
            values=lambda: ("transformers", "bitatlas", *RUNTIME_NAMES),
        ),
    ] = None
    embedding_formats: Annotated[
        Sequence[str] | None,
        Option(
            "Candidate formats of embedding and head, at most as many as --formats; none: they stay as they are. "
            "Default: those of --formats but the narrowest, and 8 bits.",
            parse=split_names,
            values=lambda: (*format_names(), "none"),
        ),
    ] = None
    quantizer: Annotated[
        str | None,
        Option(
            "How codes are chosen: gptq (fitted on the fit rows), rtn (no data); hqq, autoround (extras); for llama.cpp's formats also "
            "imatrix, llama.cpp (its own codes, with and without an importance matrix). Default: gptq.",
            values=lambda: QUANTIZER_NAMES,
            may_be_empty=True,
        ),
    ] = None
    imatrix: Annotated[
        StrPath | None,
        Option(
            "An importance matrix of llama.cpp's (GGUF or .dat), for --quantizer imatrix. Default: collected on the fit rows."
        ),
    ] = None
    base_gguf: BaseGguf = None


@dataclass(frozen=True)
class SurveyOptions(TaskOptions, RowOptions, BudgetOptions, Candidates):  # a record's last base comes first
    """Options of `survey`."""

    model: Annotated[StrPath | None, Argument("Checkpoint folder or hub name. Default: the bundled demo model.")] = None
    out: Annotated[StrPath, Option("Folder for the run's files.", parse=Path)] = "bitatlas-out"
    _: KW_ONLY
    tolerance: Annotated[float, Option("A layer is safe only if lowering it adds at most this, nats/token.")] = 0.05
    fuse: Annotated[
        bool, Option("q/k/v share a format, and gate/up (vLLM needs it; GGUF and MLX do not).", ("--fuse/--no-fuse",))
    ] = True
    experts: Experts = "unit"
    refine: Annotated[
        bool | None,
        Option("Search on from the first plans with measurements. Default: on (the demo: off).", ("--refine/--no-refine",)),
    ] = None
    curve: Annotated[
        bool, Option("Also a few verified plans at other sizes, for the report's slider.", ("--curve/--no-curve",))
    ] = True
    device: Device = "auto"
    dtype: Dtype = "auto"
    threads: Threads = None
    time: Annotated[
        str | None,
        Option(
            "What this may take, like 20min or 2h: rows and stages are fitted into it. Default: what a nominal machine does in 40 min."
        ),
    ] = None
    memory: Memory = None
    ray: Annotated[
        str | None,
        Option("Measure on a Ray cluster: auto (a running one, else this machine's processors), host:port or ray://host:port."),
    ] = None
    revision: Revision = None
    seed: Seed = 0
    resume: Annotated[bool, Option("Go on with the run in --out.")] = False
    quiet: Quiet = False


@dataclass(frozen=True)
class QuantizeOptions(RowOptions, BudgetOptions, Candidates):
    """Options of `quantize`."""

    model: Annotated[StrPath, Argument("Checkpoint folder, hub name, or a GGUF in f16, bf16, f32 or q8_0.")]
    _: KW_ONLY
    runtime: Annotated[
        str | None,
        Option(
            "What the file is for: llama.cpp, transformers, bitatlas, vllm, mlx. Default: llama.cpp.",
            ("--for",),
            values=lambda: ("transformers", "bitatlas", *RUNTIME_NAMES),
        ),
    ] = None
    out: Annotated[StrPath, Option("Folder for the plan and the files; a survey's folder goes on from there.", parse=Path)] = (
        "bitatlas-out"
    )
    experts: Experts = "unit"
    device: Device = "auto"
    dtype: Dtype = "auto"
    threads: Threads = None
    memory: Memory = None
    revision: Revision = None
    seed: Seed = 0
    quiet: Quiet = False


@dataclass(frozen=True)
class PlanOptions(BudgetOptions):
    """Options of `plan`."""

    folder: Folder
    _: KW_ONLY
    out: Annotated[StrPath | None, Option("File for the plan. Default: FOLDER/plan-<budget>.json.", parse=Path)] = None
    curve: Annotated[bool, Option("Verified plans at sizes from the smallest to the largest; needs the model.")] = False
    points: Annotated[int | None, Option("Plans on the curve. Default: 7.")] = None
    model: Annotated[str | None, Option("Where the model is now, for --curve and --protect.")] = None
    device: Annotated[str | None, Option("For --curve and --protect; cpu, cuda, ...")] = None
    quiet: Quiet = False


@dataclass(frozen=True)
class VerifyOptions(RowOptions):
    """Options of `verify`."""

    model: PlannedModel
    plan_or_checkpoint: Annotated[
        StrPath, Argument("A plan.json, a folder that apply wrote, or a GGUF.", parse=Path, metavar="PLAN_OR_CHECKPOINT")
    ]
    _: KW_ONLY
    tasks: Annotated[
        Sequence[str] | None, Option("Of a folder: score these of the survey's tasks again. Default: none.", parse=split_names)
    ] = None
    base_gguf: BaseGguf = None
    card: Annotated[bool, Option("Of a folder: put what was found into its README.md.")] = False
    device: Device = "auto"
    seed: Seed = 0
    quiet: Quiet = False


@dataclass(frozen=True)
class CompareOptions(TaskOptions):
    """Options of `compare`."""

    reference: Annotated[
        StrPath | Sequence[StrPath],
        Argument(
            "The model that all are compared with: a checkpoint, or a folder that compare --out wrote.", metavar="REFERENCE"
        ),
    ]
    files: Annotated[
        Sequence[StrPath],
        Argument(
            "Files of the same model: folders (16 bit, GPTQ, AWQ, compressed-tensors, bitsandbytes, MLX, ...), GGUFs, plans, surveys' folders.",
            parse=tuple,
            metavar="FILE...",
        ),
    ] = ()
    _: KW_ONLY
    out: Annotated[
        StrPath, Option("Folder for compare.html, comparison.json, and what more files can be compared with.", parse=Path)
    ] = "bitatlas-compare"
    tokens: Annotated[
        Sequence[StrPath] | StrPath | None,
        Option(
            "Text to compare on, like chat=talk.jsonl: a text file, JSON (field text, or messages: a chat), or hub:owner/name; a label before =. "
            "Repeatable. Default: four small bundled texts, prose, code, math and chat; none: tasks alone.",
            parse=tuple,
        ),
    ] = None
    rows: Annotated[int, Option("Rows of all texts together, shared evenly.")] = 64
    row_length: Annotated[int | None, Option("Tokens in a row, at most. Default: 256, or the model's context.")] = None
    score: Annotated[
        str, Option("Of a chat: all tokens, or the assistant's alone (assistant).", values=lambda: ("all", "assistant"))
    ] = "all"
    tasks: Annotated[
        Sequence[str] | None,
        Option("Also compare tasks, like arc_easy,svamp. Default: none.", parse=split_names, values=task_names),
    ] = None
    require: Annotated[
        Sequence[str],
        Option(
            'Exit code 1 unless a file\'s damage is at most so many nats/token, like "model.gguf<=0.02". Repeatable.', parse=tuple
        ),
    ] = ()
    device: Device = "auto"
    threads: Threads = None
    seed: Seed = 0
    quiet: Quiet = False


@dataclass(frozen=True)
class ApplyOptions:
    """Options of `apply`."""

    model: PlannedModel
    plan: PlanFile
    out: Annotated[StrPath, Option("A new folder for the packed checkpoint.", parse=Path)]
    _: KW_ONLY
    tune: Annotated[
        str | None, Option("Train the codes first for so long, like 10min (see `bitatlas tune`); kept where that helps.")
    ] = None
    quiet: Quiet = False


@dataclass(frozen=True)
class TuneOptions(RowOptions):
    """Options of `tune`."""

    model: PlannedModel
    plan: PlanFile
    _: KW_ONLY
    time: Annotated[str, Option("What the steps may take, like 10min or 1h.")] = "10min"
    steps: Annotated[int | None, Option("So many steps, in the place of a time: the same steps give the same codes.")] = None
    memory: Annotated[
        str | None,
        Option("What this may take at its peak, like 6GiB; layer by layer where all weights do not fit. Default: what is free."),
    ] = None
    device: Device = "auto"
    seed: Seed = 0
    quiet: Quiet = False


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export`."""

    plan: PlanFile
    _: KW_ONLY
    to: Annotated[
        str,
        Option("The runtime: mlx, vllm, torchao, gptqmodel, ...; docs/runtimes.md has them all.", values=lambda: RUNTIME_NAMES),
    ]
    out: Annotated[StrPath, Option("A new folder for what the runtime reads.", parse=Path)]
    model: Annotated[str | None, Option("The checkpoint that the plan was made for; needed where weights are written.")] = None
    base_gguf: BaseGguf = None
    quiet: Quiet = False


@dataclass(frozen=True)
class ReportOptions:
    """Options of `report`."""

    folder: Folder
    _: KW_ONLY
    figures: Annotated[bool, Option("Also every figure as SVG and PNG, into FOLDER/figures (extra: figures).")] = False
