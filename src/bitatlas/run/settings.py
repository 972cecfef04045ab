"""What a survey is asked to do, validated when constructed; messages name the flag."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitatlas.data.tasks import check_task_names
from bitatlas.errors import UserError
from bitatlas.plan.budget import workload_of
from bitatlas.records import Budget
from bitatlas.records.formats import FORMATS, Format, by_width, get_format
from bitatlas.records.sizes import parse_size
from bitatlas.records.text import given
from bitatlas.stats.margin import MARGIN_POINTS, parse_points

DEFAULT_FORMATS = "int2_g64,int3_g64,int4_g64"
DEFAULT_ROWS = "24,24,64"
DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST_BYTES = 2**80  # more than any disk; a larger --size or --vram asks for the same
TOO_FEW_FORMATS = "--formats: give at least two, a narrow and a wide one, like int2_g64,int4_g64"


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
    fuse: bool = True
    refine: bool = True
    device: str = "cpu"
    dtype: str = "auto"  # that the model computes in
    memory_bytes: int | None = None  # at the peak; None: what is free
    revision: str | None = None
    seed: int = 0
    margin_points: float = MARGIN_POINTS  # of "no loss within x points"
    curve: bool = True  # a few verified plans at other sizes
    few_shot: int = 0  # examples with their answers before each question

    def __post_init__(self) -> None:
        if len(self.formats) < 2:
            raise UserError(TOO_FEW_FORMATS)
        if min(self.rows) < 2:
            raise UserError(f"--rows {','.join(map(str, self.rows))}: each of fit,select,test needs at least 2 rows")
        if self.row_length < 16:
            raise UserError(f"--row-length {self.row_length}: at least 16 tokens")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: at least 1 item a task")
        if self.few_shot < 0:
            raise UserError(f"--few-shot {self.few_shot}: 0 or more examples")
        if not 0 < self.tolerance_nats < math.inf:  # not true for NaN either
            raise UserError(f"--tolerance {self.tolerance_nats}: must be a number above 0 nats/token")
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
        """What the model computes in on a device; UserError for a word that is no such dtype."""
        import torch

        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: unknown; one of {', '.join(DTYPES)}")
        return getattr(torch, ("float32" if device == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype)

    def recorded(self) -> dict[str, Any]:
        """What goes into the atlas: everything that a result depends on."""
        content = asdict(self)
        del content["memory_bytes"]  # changes no result
        content["formats"] = list(self.formats)
        content["rows"] = list(self.rows)
        content["tasks"] = list(self.tasks)
        return content


def parse_formats(text: str) -> tuple[str, ...]:
    """`int2_g64,int4_g64` -> names, narrowest first, each once; UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(TOO_FEW_FORMATS)
    return tuple(by_width([get_format(name).name for name in dict.fromkeys(names)]))


def parse_rows(text: str) -> tuple[int, int, int]:
    """`24,24,64` -> (fit, select, test)."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9}){2}", text.replace(" ", "")):
        raise UserError(f"--rows {text}: give three numbers, fit,select,test, like {DEFAULT_ROWS}")
    fit, select, test = (int(part) for part in text.replace(" ", "").split(","))
    return fit, select, test


def parse_budget(
    code_bits: float | None,
    stored_bits: float | None,
    size: str | None,
    max_damage: float | None,
    vram: str | None = None,
    context: int | None = None,
    cache_dtype: str | None = None,
    batch: int | None = None,
    chunk: int | None = None,
    protect: Sequence[str] = (),
) -> Budget | None:
    """The one budget that was given, or None; UserError for two. Context, cache dtype, batch and chunk belong to `vram`."""
    values = {
        "code_bits": code_bits,
        "stored_bits": stored_bits,
        "size": min(parse_size(size), LARGEST_BYTES) if size is not None else None,
        "vram": min(parse_size(vram, "--vram"), LARGEST_BYTES) if vram is not None else None,
        "max_damage": max_damage,
    }
    for flag, value in (("--context", context), ("--cache-dtype", cache_dtype), ("--batch", batch), ("--chunk", chunk)):
        if value is not None and vram is None:
            raise UserError(f"{flag} {value}: belongs to --vram, like --vram 8GiB --context 8192")
    given = [Budget(kind, _positive(kind, value)) for kind, value in values.items() if value is not None]
    if protect:
        tasks = parse_protect(protect)
        given.append(Budget("protect", min(tasks.values()), protect=tasks))
    if len(given) > 1:
        raise UserError("--code-bits, --stored-bits, --size, --vram, --max-damage, --protect: give one of them, not several")
    if vram is not None:
        return replace(given[0], workload=workload_of(context, cache_dtype, batch, chunk))
    return given[0] if given else None


def parse_protect(words: Sequence[str]) -> dict[str, float]:
    """`svamp=1pp` -> {"svamp": 1.0}, for each word; UserError for an unknown task, or one that comes twice."""
    found: dict[str, float] = {}
    for word in words:
        name, equals, points = word.partition("=")
        if not equals:
            raise UserError(f"--protect {word}: give a task and the points that it may lose, like svamp=1pp")
        (task,) = check_task_names([name], "--protect") or [""]
        if not task or task in found:
            raise UserError(f"--protect {word}: {'give a task, like svamp=1pp' if not task else f'{task} comes twice'}")
        found[task] = parse_points(points, f"--protect {task}")
    return found


def _positive(kind: str, value: float) -> float:
    if not 0 < value <= sys.float_info.max:  # not true for NaN either
        raise UserError(f"--{kind.replace('_', '-')} {given(value)}: must be a positive number")
    return float(value)


def check_seed(seed: int) -> None:
    """UserError for a seed that the random generators do not take."""
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")


def check_device(device: str) -> str:
    """`auto` -> the best device at hand; UserError where the named one is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    name, colon, number = device.partition(":")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in there or (colon and not re.fullmatch("[0-9]{1,4}", number)):
        raise UserError(f"--device {device}: unknown; one of cpu, cuda, cuda:0, mps, auto")
    if not there[name]:
        raise UserError(
            f"--device {device}: not available on this machine; here: {', '.join(d for d, ok in there.items() if ok)}"
        )
    count = torch.cuda.device_count() if name == "cuda" else 1
    if colon and int(number) >= count:
        raise UserError(f"--device {device}: this machine has {count} of them, counted from 0")
    return device
