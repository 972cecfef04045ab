"""llama.cpp: the types of all tensors for llama-quantize with the commands, and, with --model and the extra, the GGUF itself.

The GGUF is written from the bank, so it holds what was measured; llama-quantize makes the same blocks of the same weights. A model
whose weights are not written here, or a vocabulary, still gets the list of types and the commands, and a line that says why.
Source: llama.cpp's tools/quantize (the list holds regular expressions) and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from bitatlas.errors import UserError
from bitatlas.export.gguf.names import tensor_name, weight_names
from bitatlas.export.recipes import write_readme
from bitatlas.export.target import Job, Target
from bitatlas.records.formats import FORMATS, LLAMA_CPP, Format, check_rows, stored_bytes
from bitatlas.records.text import byte_size

TYPES, COMMANDS = "tensor-types.txt", "commands.txt"
USE = """The GGUF holds the plan's own blocks: what was measured. `tensor-types.txt` and `commands.txt` make the same file with llama.cpp's own
programs; where there is no GGUF here, they are the way."""
KEPT_TYPES = {"bfloat16": "bf16", "float16": "f16"}  # of what stays unquantized; float32 otherwise


@dataclass(frozen=True)
class OwnFormats:
    """The formats that llama.cpp defines."""

    def fits(self, fmt: Format) -> bool:
        return fmt.runtime == LLAMA_CPP

    def nearest(self, fmt: Format) -> str:
        """By the bytes of a long row."""
        shape = (1, 2**16)
        held = [other for other in FORMATS.values() if self.fits(other)]
        return min(held, key=lambda other: abs(stored_bytes(shape, other) - stored_bytes(shape, fmt))).name


def write(job: Job, folder: Path) -> list[str]:
    """The list, the commands, a README, and the GGUF where it can be written."""
    names = _names(job)
    for module in job.modules:
        if module.name in job.formats:
            check_rows([module], [job.formats[module.name].name], "--to llama.cpp")
    kept = KEPT_TYPES.get(job.checkpoint.info.dtype if job.checkpoint else "", "f32")
    types = {module: fmt.own_name for module, fmt in job.formats.items()} | dict.fromkeys(job.kept, kept)
    lines = [f"^{re.escape(names[module])}$={kind}" for module, kind in types.items()]
    (folder / TYPES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    file = folder / f"{Path(job.plan.model.name).name or 'model'}.gguf"
    (folder / COMMANDS).write_text(_commands(job, file.name, kept), encoding="utf-8")
    write_readme(folder, job, "For llama.cpp", USE)
    try:
        return _write_gguf(job, file)
    except UserError as error:
        return [f"no GGUF was written: {error}"]


def _names(job: Job) -> dict[str, str]:
    """Module -> the GGUF's name of its weight."""
    modules = [*job.formats, *job.kept]
    if job.checkpoint:
        return weight_names(modules, job.checkpoint.config.model_type, job.checkpoint.info.layers)
    named = {module: tensor_name(f"{module}.weight") for module in modules}
    lost = [module for module, name in named.items() if name is None]
    if lost:
        raise UserError(f"--to llama.cpp: what llama.cpp calls {lost[0]} depends on the model; give --model")
    return {module: str(name) for module, name in named.items()}


def _commands(job: Job, name: str, kept: str) -> str:
    model = job.model or job.plan.model.name
    source, made = f"{Path(name).stem}-{kept}.gguf", shlex.quote(name)
    return (
        "# In llama.cpp's folder, with this one's files at hand: the same weights by llama.cpp's own programs.\n"
        "# Q8_0 is the type of nothing: the list names every matrix of the layers, the options the embedding and the head.\n"
        "# The converter refuses tokenizers that it does not know.\n"
        f"python convert_hf_to_gguf.py {shlex.quote(model)} --outtype {kept} --outfile {shlex.quote(source)}\n"
        f"llama-quantize --tensor-type-file {TYPES} --token-embedding-type {kept} --output-tensor-type {kept} "
        f"{shlex.quote(source)} {made} Q8_0\n"
        "# beside plan.json:\n"
        f"bitatlas verify {shlex.quote(model)} {made} --tokens TEXT_FILE\n"
    )


def _write_gguf(job: Job, file: Path) -> list[str]:
    """Lines about it. UserError where it cannot be written."""
    from bitatlas.export.gguf.write import draw, write_gguf
    from bitatlas.quantize.ggml import check_packages

    if job.checkpoint is None:
        raise UserError("--model, the checkpoint that the plan was made for, was not given")
    check_packages("to write it")
    blueprint = draw(job.checkpoint, job.plan)
    with job.reporter.stage("writing the GGUF") as progress:
        write_gguf(file, job.checkpoint, job.plan, job.plan_file, blueprint, progress)
    disk, promised = file.stat().st_size, job.plan.size
    others = promised.total_bytes - promised.quantized_bytes
    return [
        f"{file.name}: {byte_size(disk)}; quantized tensors {blueprint.quantized_bytes:,} bytes, promised {promised.quantized_bytes:,}; "
        f"other tensors {blueprint.tensor_bytes - blueprint.quantized_bytes:,}, in the plan {others:,} (norms are float32 here); "
        f"names, vocabulary and padding {disk - blueprint.tensor_bytes:,}",
        *([blueprint.note] if blueprint.note else []),
    ]


TARGET = Target(
    LLAMA_CPP,
    "a list of tensor types and the commands for llama-quantize; with --model and the extra `gguf`, the GGUF itself",
    OwnFormats(),
    write,
)
