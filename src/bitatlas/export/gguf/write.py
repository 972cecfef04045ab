"""A checkpoint, or a plan of one, as a GGUF file that llama.cpp runs.

Tensors go from the checkpoint into the file one by one. A planned module's blocks are the bank's own: what was measured is what is
written, byte for byte what llama-quantize makes of the same weight. Everything else keeps its dtype, but for norms and biases, which
llama.cpp wants in float32. The plan stands in the file's metadata (`bitatlas.plan`), so the file can be verified by itself; spaces behind it
make the file as large as the plan promises, to the byte.
Left out: weights that the checkpoint stores under other names than transformers' model has; files in several parts.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bitatlas.errors import UserError
from bitatlas.export.gguf.base import BaseFile, base_of, kinds_of, open_base, write_on_base
from bitatlas.export.gguf.header import (
    PLAN_KEY,
    QUANTIZATION_VERSION,
    WEIGHTS_KEY,
    file_type,
    fill_up,
    header_bytes,
    padded,
    type_number,
    write_header,
)
from bitatlas.export.gguf.names import (
    CONVERT,
    PRE_TOKENIZERS,
    Architecture,
    Vocabulary,
    add_vocabulary,
    architecture_of,
    head_size,
    heads_to_permute,
    permute,
    rope_factors,
    rope_of,
    tensor_name,
    vocabulary_of,
    weight_names,
)
from bitatlas.export.packed import stored_of
from bitatlas.export.target import Job, Target, write_readme
from bitatlas.model.checkpoint import Checkpoint
from bitatlas.model.decoder import Decoder, decoder_of
from bitatlas.model.tensor_files import Reader, read_header
from bitatlas.quantize.ggml import Blocks, check_packages
from bitatlas.records import Plan
from bitatlas.records.formats import FORMATS, LLAMA_CPP, Format, stored_bytes
from bitatlas.records.plan import FileLayout, ModuleFile
from bitatlas.records.sizes import check_rows
from bitatlas.records.text import byte_size

KINDS = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f32"}  # the checkpoint's dtype -> the GGUF's
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """A tensor of the GGUF."""

    name: str
    key: str  # of the checkpoint; "": computed from the config
    file: Path | None
    shape: tuple[int, ...]
    kind: str  # "f32", "f16", "bf16", or the name of a format
    module: str | None = None  # that the plan gives a format
    heads: int = 0  # among whose rows those of this tensor change places

    @property
    def size_bytes(self) -> int:
        if self.module:
            return stored_bytes((self.shape[0], self.shape[1]), FORMATS[self.kind])
        return DTYPES[self.kind].itemsize * int(np.prod(self.shape))


@dataclass(frozen=True)
class Blueprint:
    """What a GGUF will hold. `note`: where llama.cpp's tokens of a text differ from the tokenizer's."""

    architecture: Architecture
    parts: list[Part]
    vocabulary: Vocabulary
    note: str

    @property
    def quantized_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts if part.module)

    @property
    def tensor_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


def blueprint_of(checkpoint: Checkpoint, plan: Plan | None, kind: str | None = None) -> Blueprint:
    """Return all tensors, nothing written yet; UserError where the model cannot be written.

    Without a plan every weight has `kind` ("f16", "f32", "bf16"), or the checkpoint's own dtype.
    """
    planned = dict(plan.modules) if plan else {}
    if plan:
        for module in checkpoint.modules:
            if module.name in planned:
                check_rows([module], [planned[module.name]])
    architecture, parts = _architecture_and_parts(checkpoint, planned, kind)
    vocabulary, note = vocabulary_of(checkpoint.load_tokenizer(), checkpoint.vocabulary)
    return Blueprint(architecture, parts, vocabulary, note)


def _architecture_and_parts(
    checkpoint: Checkpoint, planned: Mapping[str, str], kind: str | None = None
) -> tuple[Architecture, list[Part]]:
    config = checkpoint.config.get_text_config()
    architecture = architecture_of(config)
    parts = [part for file in checkpoint.files for part in _parts(file, checkpoint, planned, kind)]
    names = Counter(part.name for part in parts)
    keys = {part.name: part.key for part in parts}
    if getattr(config, "tie_word_embeddings", False) and _same_head(checkpoint, keys):
        parts = [part for part in parts if part.name != "output.weight"]  # llama.cpp takes the embedding where there is none
    lost = sorted(set(planned) - {part.module for part in parts}) or ["token_embd.weight"] * ("token_embd.weight" not in keys)
    if lost or max(names.values()) > 1:
        what = lost[0] if lost else names.most_common(1)[0][0]
        raise UserError(f"--to llama.cpp: the checkpoint stores {what} in a way that is not followed here; {CONVERT}")
    factors = rope_factors(config)
    if factors is not None:
        parts.append(Part("rope_freqs.weight", "", None, tuple(factors.shape), "f32"))
    return architecture, sorted(parts, key=_order)


def with_gguf(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with what its modules, and all the rest, take in a GGUF; UserError where that is not written here."""
    check_packages("a GGUF")
    architecture, parts = _architecture_and_parts(checkpoint, {module.name: "" for module in checkpoint.modules})
    vocabulary, _ = vocabulary_of(checkpoint.load_tokenizer(), checkpoint.vocabulary, trial=False)
    longest = replace(vocabulary, pre_tokenizer=max(PRE_TOKENIZERS, key=len))
    blueprint = Blueprint(architecture, parts, longest, "")
    header = header_bytes(checkpoint.modules, lambda path, text: _writer(path, checkpoint, blueprint, text))
    kept = {part.module: padded(part.size_bytes) for part in parts if part.module}
    other = header + sum(padded(part.size_bytes) for part in parts if not part.module)
    modules = [replace(module, file=ModuleFile(((0, module.shape[0]),), kept[module.name])) for module in checkpoint.modules]
    layout = FileLayout(LLAMA_CPP, "gguf", other, 0, 0, 0)
    return replace(checkpoint, modules=modules, info=replace(checkpoint.info, file=layout))


def _same_head(checkpoint: Checkpoint, keys: Mapping[str, str]) -> bool:
    """Tell whether the head that is stored beside the embedding is the same, as the config says. keys: names in a GGUF -> in the files."""
    if not {"output.weight", "token_embd.weight"} <= set(keys):
        return False
    reader = Reader(checkpoint.files)
    return torch.equal(reader.read(keys["output.weight"]), reader.read(keys["token_embd.weight"]))


def _parts(file: Path, checkpoint: Checkpoint, planned: Mapping[str, str], kind: str | None) -> Iterable[Part]:
    config = checkpoint.config.get_text_config()
    for key, entry in read_header(file).items():
        if key not in checkpoint.loaded:
            continue
        name, shape = tensor_name(key), tuple(entry["shape"])
        if name is None or entry["dtype"] not in KINDS:
            raise UserError(f"--to llama.cpp: {key} ({entry['dtype']}) has no place in a GGUF of this model; {CONVERT}")
        stem = key.removesuffix(".weight")
        module = next((name for name in (stem, f"model.{stem}") if name in planned), None)
        dtype = "f32" if len(shape) == 1 else kind or KINDS[entry["dtype"]]
        yield Part(name, key, file, shape, (planned[module] if module else "") or dtype, module, heads_to_permute(key, config))


def _order(part: Part) -> tuple[int, str]:
    """Return a sort key: embedding and head first, then layer by layer."""
    words = part.name.split(".")
    return (int(words[1]) if words[0] == "blk" else -1, part.name)


def write_gguf(
    file: Path, checkpoint: Checkpoint, plan: Plan | None, plan_file: Path | None, blueprint: Blueprint, progress: Progress
) -> None:
    """Write the file beside, then rename it. With a plan, `plan_file` is where it lies, and its bank perhaps beside it."""
    beside = file.with_name(f".{file.name}.partial")
    decoder = decoder_of(checkpoint.skeleton(), checkpoint.layers_path)
    data = sum(padded(part.size_bytes) for part in blueprint.parts)
    try:
        writer = fill_up(plan, beside, data, lambda path, text: _writer(path, checkpoint, blueprint, text))
        for done, part in enumerate(blueprint.parts, start=1):
            writer.write_tensor_data(_data(part, plan, plan_file, decoder, checkpoint.config.get_text_config()))
            progress(done, len(blueprint.parts))
        writer.close()
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _writer(file: Path, checkpoint: Checkpoint, blueprint: Blueprint, text: str) -> Any:
    """Return a `gguf.GGUFWriter` that has written everything but the tensors' data."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, blueprint.architecture.name)
    _add_metadata(writer, checkpoint, blueprint)
    if text:
        writer.add_string(PLAN_KEY, text)
    add_vocabulary(writer, blueprint.vocabulary)
    for part in blueprint.parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.size_bytes, raw_dtype=type_number(part.kind))
    write_header(writer)
    return writer


def _data(part: Part, plan: Plan | None, plan_file: Path | None, decoder: Decoder, config: Any) -> np.ndarray:
    """Return uint8 [bytes], as they stand in the file."""
    if part.file is None:
        factors = rope_factors(config)
        assert factors is not None
        return factors.numpy().view(np.uint8)
    with safe_open(part.file, framework="pt") as reader:
        weight = reader.get_tensor(part.key)
    if part.module:
        assert plan and plan_file
        blocks = stored_of(plan, plan_file, decoder, part.module, weight)
        assert isinstance(blocks, Blocks)
        rows = blocks.blocks
    else:
        rows = weight.to(DTYPES[part.kind])
    if part.heads:
        rows = permute(rows, part.heads)
    return rows.contiguous().view(torch.uint8).numpy().reshape(-1)


def _add_metadata(writer: Any, checkpoint: Checkpoint, blueprint: Blueprint) -> None:
    from gguf import RopeScalingType

    config, rope = checkpoint.config.get_text_config(), rope_of(checkpoint.config.get_text_config())
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    writer.add_name(Path(checkpoint.info.name).name)
    writer.add_context_length(min(context, int(window)) if window else context)  # llama.cpp's own has no window
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(checkpoint.vocabulary)
    (most, _), *_ = Counter(part.kind for part in blueprint.parts if len(part.shape) > 1).most_common(1)
    writer.add_file_type(file_type(most))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_string(WEIGHTS_KEY, checkpoint.info.weights_sha256)


# --- the runtime llama.cpp ----------------------------------------------------------------------------------------------
#
# The types of all tensors for llama-quantize with the commands, and, with --model and the extra, the GGUF itself.
#
# The GGUF is written from the bank, so it holds what was measured; llama-quantize makes the same blocks of the same weights. A model
# whose weights are not written here, or a vocabulary, still gets the list of types and the commands, and a line that says why.
# Source: llama.cpp's tools/quantize (the list holds regular expressions) and convert_hf_to_gguf.py.

TYPES, COMMANDS = "tensor-types.txt", "commands.txt"
USE = {
    "gptq": """The GGUF holds the plan's own blocks: what was measured. `tensor-types.txt` and `commands.txt` make a file of the same types and size with
llama.cpp's own programs, whose codes do more damage: they are llama.cpp's own, and the plan's make up for each other's errors.""",
    "": """The GGUF holds the plan's own blocks: what was measured. `tensor-types.txt` and `commands.txt` make the same file with llama.cpp's own
programs; where there is no GGUF here, they are the way.""",
}
UNQUANTIZED_TYPES = {"bfloat16": "bf16", "float16": "f16"}  # of what stays unquantized; float32 otherwise


@dataclass(frozen=True)
class OwnFormats:
    """The formats that llama.cpp defines."""

    def fits(self, fmt: Format) -> bool:
        return fmt.runtime == LLAMA_CPP

    def nearest(self, fmt: Format) -> str:
        """Return the format that is nearest by the bytes of a long row."""
        shape = (1, 2**16)
        held = [other for other in FORMATS.values() if self.fits(other)]
        return min(held, key=lambda other: abs(stored_bytes(shape, other) - stored_bytes(shape, fmt))).name


def write(job: Job, folder: Path) -> list[str]:
    """Write the list, the commands, a README, and the GGUF where it can be written. Return what the command prints."""
    for module in job.modules:
        if module.name in job.formats:
            check_rows([module], [job.formats[module.name].name], "--to llama.cpp")
    base_file = base_of(job.model, job.base_gguf)
    base = open_base(base_file, job.checkpoint) if base_file and job.checkpoint else None
    unquantized = UNQUANTIZED_TYPES.get(job.checkpoint.info.dtype if job.checkpoint else "", "f32")
    types = _types_of_tensors(job, base, unquantized)
    (folder / TYPES).write_text("".join(f"^{re.escape(name)}$={kind}\n" for name, kind in types.items()), encoding="utf-8")
    file = folder / f"{Path(job.plan.model.name).name or 'model'}.gguf"
    (folder / COMMANDS).write_text(_commands(job, file.name, types, unquantized), encoding="utf-8")
    write_readme(folder, job, "For llama.cpp", USE.get(job.plan.quantizer, USE[""]))
    if base:
        return _write_on_base(job, base, file)
    try:
        return _write_gguf(job, file)
    except UserError as error:
        return [f"no GGUF was written: {error}"]


def _types_of_tensors(job: Job, base: BaseFile | None, unquantized: str) -> dict[str, str]:
    """Return tensor -> type, of all that llama-quantize would give one."""
    types = {module: fmt.own_name for module, fmt in job.formats.items()} | dict.fromkeys(job.unquantized, unquantized)
    if base:
        kinds = kinds_of(base, job.plan)
        return {
            tensor.name: kinds.get(tensor.name, tensor.tensor_type.name.lower())
            for tensor in base.reader.tensors
            if len(tensor.shape) > 1
        }
    names = _names(job)
    return {names[module]: kind for module, kind in types.items()}


def _names(job: Job) -> dict[str, str]:
    """Return module -> the GGUF's name of its weight."""
    modules = [*job.formats, *job.unquantized]
    if job.checkpoint:
        return weight_names(modules, job.checkpoint.config.model_type, job.checkpoint.info.layers)
    named = {module: tensor_name(f"{module}.weight") for module in modules}
    lost = [module for module, name in named.items() if name is None]
    if lost:
        raise UserError(f"--to llama.cpp: what llama.cpp calls {lost[0]} depends on the model; give --model")
    return {module: str(name) for module, name in named.items()}


def _commands(job: Job, name: str, types: Mapping[str, str], dtype: str) -> str:
    model = job.model or job.plan.model.name
    source, target = f"{Path(name).stem}-{dtype}.gguf", shlex.quote(name)
    embedding = types.get("token_embd.weight", dtype)
    head = types.get("output.weight", embedding)
    same, imatrix = "the same weights by llama.cpp's own programs", ""
    if job.plan.quantizer in ("gptq", "imatrix"):
        imatrix = "--imatrix ../imatrix.gguf "
    if job.plan.quantizer == "gptq":
        same = "the same types, with llama.cpp's own codes, by its own programs (the plan's own codes do less damage)"
    return (
        f"# In llama.cpp's folder, with this one's files at hand: {same}.\n"
        "# Q8_0 is the type of nothing: the list names every matrix of the layers, the options the embedding and the head.\n"
        "# The converter refuses tokenizers that it does not know.\n"
        f"python convert_hf_to_gguf.py {shlex.quote(model)} --outtype {dtype} --outfile {shlex.quote(source)}\n"
        f"llama-quantize {imatrix}--tensor-type-file {TYPES} --token-embedding-type {embedding} --output-tensor-type {head} "
        f"{shlex.quote(source)} {target} Q8_0\n"
        "# beside plan.json:\n"
        f"bitatlas verify {shlex.quote(model)} {target} --tokens TEXT_FILE\n"
    )


def _write_on_base(job: Job, base: BaseFile, file: Path) -> list[str]:
    """Write the GGUF with the metadata of another; return lines about it."""
    assert job.checkpoint
    with job.reporter.stage("writing the GGUF") as progress:
        kinds = write_on_base(file, base, job.checkpoint, job.plan, job.plan_file, progress)
    return [f"{_bytes_text(file, job.plan)}; {len(kinds)} tensors of {base.file.name} in other types, all else as it is there"]


def _bytes_text(file: Path, plan: Plan) -> str:
    promised = f", promised {plan.size.total_bytes:,}" if plan.runtime == LLAMA_CPP else ""
    return f"{file.name}: {file.stat().st_size:,} bytes{promised}"


def _write_gguf(job: Job, file: Path) -> list[str]:
    """Write the GGUF; return lines about it. UserError where it cannot be written."""
    if job.checkpoint is None:
        raise UserError("--model, the checkpoint that the plan was made for, was not given")
    check_packages("to write it")
    blueprint = blueprint_of(job.checkpoint, job.plan)
    with job.reporter.stage("writing the GGUF") as progress:
        write_gguf(file, job.checkpoint, job.plan, job.plan_file, blueprint, progress)
    notes = [blueprint.note] if blueprint.note else []
    quantized = f"quantized tensors {blueprint.quantized_bytes:,} bytes, promised {job.plan.size.quantized_bytes:,}"
    if job.plan.runtime == LLAMA_CPP:
        return [f"{_bytes_text(file, job.plan)}; {quantized}", *notes]
    disk, promised = file.stat().st_size, job.plan.size
    others = promised.total_bytes - promised.quantized_bytes
    return [
        f"{file.name}: {byte_size(disk)}; {quantized}; "
        f"other tensors {blueprint.tensor_bytes - blueprint.quantized_bytes:,}, in the plan {others:,} (norms are float32 here); "
        f"names, vocabulary and padding {disk - blueprint.tensor_bytes:,}",
        *notes,
    ]


TARGET = Target(
    LLAMA_CPP,
    "with --model and the extra `gguf`, the GGUF itself; a list of tensor types and the commands for llama-quantize",
    OwnFormats(),
    write,
)
