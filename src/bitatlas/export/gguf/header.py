"""What our own GGUFs have in common: the plan in the metadata, and spaces behind it that make a file as large as was promised.

Left out: what the file is of (`write` makes it of a checkpoint, `base` of another GGUF).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bitatlas.records import Module, Plan
from bitatlas.records.files import to_json
from bitatlas.records.formats import LLAMA_CPP

PLAN_KEY = "bitatlas.plan"
WEIGHTS_KEY = "bitatlas.weights_sha256"
TENSORS_KEY = "bitatlas.tensors"  # tensor -> modules, where these are not known by the tensors' names
QUANTIZATION_VERSION = 2  # of llama.cpp's blocks
ALIGNMENT = 32  # of a tensor in the file
PLAN_BYTES = 2**13  # of the plan's text, at most, beside
NAME_BYTES = 24  # for each module, more than its name has
FILE_TYPES = ("MOSTLY_{}", "MOSTLY_{}_M", "MOSTLY_{}_MOE")  # llama.cpp's names for files of mostly one type


def padded(count: int) -> int:
    """Return the bytes that a tensor of `count` bytes takes in the file."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def plan_text(plan: Plan) -> str:
    """Return a plan without its baselines, on one line."""
    return json.dumps(json.loads(to_json(replace(plan, baselines=[]))), ensure_ascii=False, separators=(",", ":"))


def fill_up(plan: Plan | None, beside: Path, data_bytes: int, start: Callable[[Path, str], Any]) -> Any:
    """Return a writer whose header is written so that the file, with `data_bytes` of tensors, has the bytes that the plan promises.

    start: writes the header with the plan's text and returns the writer.
    """
    text = plan_text(plan) if plan else ""
    writer = start(beside, text)
    if plan and plan.runtime == LLAMA_CPP:
        missing = plan.size.total_bytes - data_bytes - beside.stat().st_size
        if missing > 0:
            writer.close()
            writer = start(beside, text + " " * missing)
    return writer


def write_header(writer: Any) -> None:
    """Write all but the tensors' data."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stream in writer.fout or ():
        stream.flush()


def type_number(kind: str) -> Any:
    """Return the package `gguf`'s number of a type."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.upper()]


def file_type(kind: str) -> Any:
    """Return llama.cpp's number for files that are mostly of one type."""
    from gguf import LlamaFileType

    types = [name for form in FILE_TYPES if (name := form.format(kind.upper())) in LlamaFileType.__members__]
    return LlamaFileType[types[0]] if types else LlamaFileType.ALL_F32


def header_bytes(modules: Iterable[Module], start: Callable[[Path, str], Any]) -> int:
    """Return the bytes of a file's header that has room for the text of a plan of these modules. start: as in `fill_up`."""
    room = " " * (PLAN_BYTES + sum(len(module.name) + NAME_BYTES for module in modules))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "header.gguf"
        start(file, room).close()
        return padded(file.stat().st_size)
