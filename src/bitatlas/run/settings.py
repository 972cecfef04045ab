"""Settle what a survey is asked to do, validated when constructed; messages name the flag."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import bitatlas.data as demo
from bitatlas.data.tasks import check_task_names
from bitatlas.errors import UserError
from bitatlas.plan.budget import workload_of
from bitatlas.records import Budget, Module
from bitatlas.records.formats import FORMATS, GGUF_LADDER, LLAMA_CPP, Format, by_width, get_format, takes
from bitatlas.records.runtimes import MADE_FOR, nearest_held
from bitatlas.records.sizes import parse_size
from bitatlas.records.text import given, listed
from bitatlas.run.options import EXPERTS, BudgetOptions, SurveyOptions, check_seed, parse_rows
from bitatlas.stats.margin import parse_points

DEFAULT_FORMATS = ("int2_g64", "int3_g64", "int4_g64")
DEMO_FORMATS = ("int2_g128", "int3_g128", "int4_g128")  # at which both of the demo's tasks have something to lose
DEFAULT_TASKS = ("arc_easy", "svamp")
DEMO_TASKS = ("demo_problems", "demo_questions")
MOST_THREADS = 1024
DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST_BYTES = 2**80  # more than any disk; a larger --size or --vram asks for the same
TWO_FORMATS = "give at least two, a narrow and a wide one, like int2_g64,int4_g64"
TOO_FEW_FORMATS = f"--formats: {TWO_FORMATS}"


@dataclass(frozen=True)
class Settings:
    """`formats` from narrowest to widest; `rows` = (fit, select, test)."""

    model: str
    formats: tuple[str, ...]
    quantizer: str
    budget: Budget
    tokens: str | None
    rows: tuple[int, int, int]
    row_length: int
    tasks: tuple[str, ...]
    task_data: str | None
    limit: int | None
    tolerance_nats: float
    fuse: bool
    refine: bool
    device: str
    dtype: str  # that the model computes in
    threads: int | None  # on a CPU; None: the fastest
    memory_bytes: int | None  # at the peak; None: what is free
    revision: str | None
    seed: int
    margin_points: float  # of "no loss within x points"
    curve: bool  # a few verified plans at other sizes
    few_shot: int  # examples with their answers before each question
    runtime: str  # that the file is for, a key of `runtimes.MADE_FOR`
    embedding_formats: (
        tuple[str, ...] | None
    )  # candidates of embedding and head; (): they stay as they are; None: those that follow from `formats`
    experts: str = "unit"  # a key of `options.EXPERTS`
    time_seconds: float | None = None  # that the survey may take; None: as long as the nominal effort takes
    imatrix: str | None = None  # a file of llama.cpp's
    base_gguf: str | None = None  # a GGUF of the same model, whose metadata is taken
    effort: str | None = None  # how much is measured, a key of `effort.EFFORTS`; None: not settled yet

    @classmethod
    def of(cls, options: SurveyOptions) -> Settings:
        """Return the settings that options mean. Without a model: the bundled one, its text and its tasks, and no refinement."""
        is_demo, budget, memory = options.model is None, parse_budget(options), options.memory
        usual_formats, usual_tasks = (DEMO_FORMATS, DEMO_TASKS) if is_demo else (DEFAULT_FORMATS, DEFAULT_TASKS)
        tokens = options.tokens or (demo.TEXT_FILE if is_demo else None)
        resolved: dict[str, Any] = {
            "memory_bytes": parse_size(memory, "--memory") if memory else None,
            "time_seconds": parse_time(options.time) if options.time else None,
            "effort": None,
            "margin_points": parse_points(options.margin, "--margin"),
            "formats": (formats := parse_formats(usual_formats if options.formats is None else options.formats)),
            "runtime": parse_runtime(options.runtime, formats),
            "embedding_formats": parse_embedding_formats(options.embedding_formats, formats),
            "base_gguf": None if options.base_gguf is None else str(options.base_gguf),
            "imatrix": (imatrix := None if options.imatrix is None else str(options.imatrix)),
            "quantizer": default_quantizer(formats, imatrix) if options.quantizer is None else options.quantizer,
            "tasks": tuple(check_task_names(usual_tasks if options.tasks is None else options.tasks)),
            "budget": budget or default_budget(formats),
            "rows": parse_rows(",".join(map(str, options.rows))),
            "model": str(demo.MODEL_DIR if options.model is None else options.model),
            "tokens": None if tokens is None else str(tokens),
            "task_data": None if options.task_data is None else str(options.task_data),
            "tolerance_nats": options.tolerance,
            "refine": not is_demo if options.refine is None else options.refine,
        }
        same = {field.name: getattr(options, field.name) for field in fields(cls) if field.name not in resolved}
        return cls(**same, **resolved)

    def __post_init__(self) -> None:
        if len(self.formats) < 2:
            raise UserError(TOO_FEW_FORMATS)
        if min(self.rows) < 2:
            raise UserError(f"--rows {','.join(map(str, self.rows))}: each of fit,select,test needs at least 2 rows")
        if self.imatrix is not None and self.quantizer != "imatrix":
            raise UserError(f"--imatrix: belongs to --quantizer imatrix, not to {self.quantizer}")
        if self.base_gguf is not None and self.runtime != LLAMA_CPP:
            raise UserError(f"--base-gguf: belongs to --for llama.cpp, not to {self.runtime}")
        if self.experts not in EXPERTS:
            raise UserError(f"--experts {self.experts}: unknown; one of {', '.join(EXPERTS)}")
        if self.row_length < 16:
            raise UserError(f"--row-length {self.row_length}: at least 16 tokens")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: at least 1 item a task")
        if self.few_shot < 0:
            raise UserError(f"--few-shot {self.few_shot}: 0 or more examples")
        if not 0 < self.tolerance_nats < math.inf:  # not true for NaN either
            raise UserError(f"--tolerance {self.tolerance_nats}: must be a number above 0 nats/token")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"--threads {self.threads}: 1 to {MOST_THREADS:,} threads")
        check_seed(self.seed)
        if self.tokens is not None and not self.tokens.strip():
            raise UserError("--tokens: is empty; give a text file, a JSONL file, or hub:owner/name")
        if self.task_data is not None and not Path(self.task_data).is_dir():
            raise UserError(f"--task-data {self.task_data}: no such folder")

    @property
    def low(self) -> str:
        return self.formats[0]

    @property
    def high(self) -> str:
        return self.formats[-1]

    def format_table(self) -> dict[str, Format]:
        return {name: FORMATS[name] for name in self.formats}

    def torch_dtype(self, device: str) -> Any:
        """Return what the model computes in on a device; UserError for a word that is no such dtype."""
        import torch

        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: unknown; one of {', '.join(DTYPES)}")
        return getattr(torch, ("float32" if device == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype)

    def recorded(self) -> dict[str, Any]:
        """Return what goes into the atlas: everything that a result depends on."""
        content = asdict(self)
        del content["memory_bytes"], content["threads"], content["time_seconds"]  # change no result beside the effort
        return content | {"formats": list(self.formats), "rows": list(self.rows), "tasks": list(self.tasks)}


def parse_time(text: str, flag: str = "--time") -> float:
    """Parse `20min`, `2h`, `90s` -> seconds; UserError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6}(?:[.][0-9]{1,3})?) ?(s|min|h)", text.strip())
    if not match or float(match[1]) <= 0:
        raise UserError(f"{flag} {text}: give a number of s, min or h, like 20min")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def parse_formats(names: Sequence[str]) -> tuple[str, ...]:
    """Return the formats' names, narrowest first, each once; UserError for an unknown one."""
    every = [kind for name in names for kind in (GGUF_LADDER if name.strip() == "gguf" else (name,))]
    known = [get_format(name.strip()).name for name in dict.fromkeys(every) if name.strip()]
    if not [name for name in known if not FORMATS[name].dtype]:
        raise UserError(TOO_FEW_FORMATS)
    return tuple(by_width(known))


def parse_runtime(name: str | None, formats: Sequence[str]) -> str:
    """Return the runtime of --for, the usual one of the formats without a name; UserError for an unknown one."""
    if name is None:
        return FORMATS[formats[0]].runtime or "transformers"
    if name not in MADE_FOR:
        raise UserError(f"--for {name}: unknown; one of {', '.join(MADE_FOR)}")
    return name


def parse_embedding_formats(names: Sequence[str] | None, formats: Sequence[str]) -> tuple[str, ...] | None:
    """Return the candidates of embedding and head, narrowest first; UserError for more of them than formats."""
    if names is None or list(names) == ["none"]:
        return None if names is None else ()
    known = by_width([get_format(name).name for name in dict.fromkeys(names)])
    if len(known) > len(formats):
        raise UserError(f"--embedding-formats: {len(known)} formats; give at most as many as --formats has ({len(formats)})")
    return tuple(known)


def held_formats(formats: Sequence[str], modules: Iterable[Module], runtime: str) -> tuple[str, ...]:
    """Return the formats under the names that rows have: one that no module can hold is called what stands in its place, each once.

    A format that some modules hold keeps its name. UserError where fewer than two are left.
    """
    widths = {module.shape[1] for module in modules}
    seen: dict[tuple[str, ...], str] = {}  # what the modules have -> its name
    for name in formats:
        held = tuple(nearest_held(name, width, runtime) for width in sorted(widths))
        seen.setdefault(held, held[0] if len(set(held)) == 1 else name)
    if len(seen) < 2:
        raise UserError(
            f"--formats: rows of {listed(map(str, sorted(widths)))} take only {next(iter(seen.values()))} of these; {TWO_FORMATS}"
        )
    return tuple(by_width(list(seen.values())))


def outside_modules(settings: Settings, outer: Iterable[Module], asked: Sequence[str]) -> list[Module]:
    """Return the modules outside the decoder layers that are planned, with their candidates: as many as there are formats, the widest repeated.

    asked: the formats before `held_formats`.
    """
    usual = (*asked[1:], widest_of(asked))
    planned = []
    for module in outer if settings.embedding_formats != () else ():
        width = module.shape[1]
        held = (nearest_held(name, width, settings.runtime) for name in settings.embedding_formats or usual)
        names = by_width([name for name in dict.fromkeys(held) if takes(FORMATS[name], width)])[-len(settings.formats) :]
        if module.part in MADE_FOR[settings.runtime].outside and names:
            padding = (names[-1],) * (len(settings.formats) - len(names))
            planned.append(replace(module, candidates=(*names, *padding)))
    return planned


def held_modules(settings: Settings, modules: Iterable[Module]) -> list[Module]:
    """Return the modules of decoder layers, each with what it holds in the place of a format that its rows or the runtime do not take."""
    held, runtime = [], MADE_FOR[settings.runtime]
    for module in modules:
        names = {name: nearest_held(name, module.shape[1], settings.runtime) for name in settings.formats}
        if module.expert is not None:
            names = {name: _of_width(other, runtime.experts) for name, other in names.items()}
            if runtime.alike:
                module = replace(module, unit=_experts_unit(module))
        held.append(replace(module, instead={name: other for name, other in names.items() if other != name}))
    return held


def _of_width(name: str, widths: Sequence[int]) -> str:
    """Return the format that is like `name`, of the nearest of some widths, the wider of two."""
    fmt = FORMATS[name]
    return (
        name
        if fmt.bits in widths or fmt.dtype
        else replace(fmt, bits=min(widths, key=lambda width: (abs(width - fmt.bits), -width))).name
    )


def _experts_unit(module: Module) -> str:
    """Return what holds all experts of a layer."""
    before, _, rest = module.name.partition("experts.")
    return f"{before}experts" if rest else module.name


def widest_of(formats: Sequence[str]) -> str:
    """Return the format of 8 bits that is like the widest of `formats`."""
    widest = FORMATS[[name for name in formats if not FORMATS[name].dtype][-1]]
    return "q8_0" if widest.runtime else replace(widest, bits=8).name


def default_quantizer(formats: Sequence[str], imatrix: str | None = None) -> str:
    """Return the quantizer that makes the best codes without a package of its own; llama.cpp's own with a user's importance matrix."""
    if imatrix is not None and FORMATS[formats[0]].runtime != LLAMA_CPP:
        raise UserError("--imatrix: belongs to llama.cpp's formats, like --formats gguf")
    return "gptq" if imatrix is None else "imatrix"


def default_budget(formats: Sequence[str]) -> Budget:
    """Return code bits half-way between the narrowest and the widest format."""
    widths = [FORMATS[name].bits for name in formats if not FORMATS[name].dtype]
    return Budget("code_bits", (min(widths) + max(widths)) / 2)


def parse_budget(options: BudgetOptions) -> Budget | None:
    """Return the one budget that was given, or None; UserError for two."""
    size, vram = options.size, options.vram
    values = {
        "code_bits": options.code_bits,
        "stored_bits": options.stored_bits,
        "size": min(parse_size(size), LARGEST_BYTES) if size is not None else None,
        "vram": min(parse_size(vram, "--vram"), LARGEST_BYTES) if vram is not None else None,
        "max_damage": options.max_damage,
    }
    workload = {name: getattr(options, name) for name in ("context", "cache_dtype", "batch", "chunk")}
    for name, value in workload.items():
        if value is not None and vram is None:
            raise UserError(f"--{name.replace('_', '-')} {value}: belongs to --vram, like --vram 8GiB --context 8192")
    budgets = [Budget(kind, _positive(kind, value)) for kind, value in values.items() if value is not None]
    if options.protect:
        tasks = parse_protect(options.protect)
        budgets.append(Budget("protect", min(tasks.values()), protect=tasks))
    if len(budgets) > 1:
        raise UserError("--code-bits, --stored-bits, --size, --vram, --max-damage, --protect: give one of them, not several")
    if vram is not None:
        return replace(budgets[0], workload=workload_of(**workload))
    return budgets[0] if budgets else None


def parse_protect(words: Sequence[str]) -> dict[str, float]:
    """Parse `svamp=1pp` -> {"svamp": 1.0}, for each word; UserError for an unknown task, or one that comes twice."""
    margins: dict[str, float] = {}
    for word in words:
        name, equals, points = word.partition("=")
        if not equals:
            raise UserError(f"--protect {word}: give a task and the points that it may lose, like svamp=1pp")
        (task,) = check_task_names([name], "--protect") or [""]
        if not task or task in margins:
            raise UserError(f"--protect {word}: {'give a task, like svamp=1pp' if not task else f'{task} comes twice'}")
        margins[task] = parse_points(points, f"--protect {task}")
    return margins


def _positive(kind: str, value: float) -> float:
    if not 0 < value <= sys.float_info.max:  # not true for NaN either
        raise UserError(f"--{kind.replace('_', '-')} {given(value)}: must be a positive number")
    return float(value)


def check_device(device: str) -> str:
    """Return the device, for `auto` the best one at hand; UserError where the named one is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    name, colon, number = device.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in available or (colon and not re.fullmatch("[0-9]{1,4}", number)):
        raise UserError(f"--device {device}: unknown; one of cpu, cuda, cuda:0, mps, auto")
    if not available[name]:
        here = ", ".join(kind for kind, is_here in available.items() if is_here)
        raise UserError(f"--device {device}: not available on this machine; here: {here}")
    count = torch.cuda.device_count() if name == "cuda" else 1
    if colon and int(number) >= count:
        raise UserError(f"--device {device}: this machine has {count} of them, counted from 0")
    return device
