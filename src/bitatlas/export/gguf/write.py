"""A checkpoint, or a plan of one, as a GGUF file that llama.cpp runs.

Tensors go from the checkpoint into the file one by one. A planned module's blocks are the bank's own: what was measured is what is
written, byte for byte what llama-quantize makes of the same weight. Everything else keeps its dtype, but for norms and biases, which
llama.cpp wants in float32. The plan stands in the file's metadata (`bitatlas.plan`), so the file can be verified by itself.
Left out: weights that the checkpoint stores under other names than transformers' model has; files in several parts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from bitatlas.errors import UserError
from bitatlas.export.gguf.names import (
    CONVERT,
    Architecture,
    architecture_of,
    head_size,
    heads_to_permute,
    permute,
    rope_factors,
    rope_of,
    tensor_name,
)
from bitatlas.export.gguf.vocabulary import Vocabulary, add_vocabulary, vocabulary_of
from bitatlas.export.packed import stored_of
from bitatlas.model.checkpoint import Checkpoint
from bitatlas.model.tensor_files import Reader, read_header
from bitatlas.quantize.codes import Blocks
from bitatlas.records import Plan
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS, check_rows, stored_bytes

PLAN_KEY = "bitatlas.plan"
WEIGHTS_KEY = "bitatlas.weights_sha256"
QUANTIZATION_VERSION = 2  # of llama.cpp's blocks
KINDS = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f32"}  # the checkpoint's dtype -> the GGUF's
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
FILE_TYPES = ("MOSTLY_{}", "MOSTLY_{}_M", "MOSTLY_{}_MOE")  # llama.cpp's names for files of mostly one type
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


def draw(checkpoint: Checkpoint, plan: Plan | None, kind: str | None = None) -> Blueprint:
    """All tensors, nothing written yet; UserError where the model cannot be written.

    Without a plan every weight has `kind` ("f16", "f32", "bf16"), or the checkpoint's own dtype.
    """
    config = checkpoint.config.get_text_config()
    architecture = architecture_of(config)
    planned = dict(plan.modules) if plan else {}
    if plan:
        for module in checkpoint.modules:
            if module.name in planned:
                check_rows([module], [planned[module.name]])
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
    vocabulary, note = vocabulary_of(checkpoint.load_tokenizer(), int(config.vocab_size))
    return Blueprint(architecture, sorted(parts, key=_place), vocabulary, note)


def _same_head(checkpoint: Checkpoint, keys: Mapping[str, str]) -> bool:
    """Is the head that is stored beside the embedding the same, as the config says? Names in a GGUF -> in the files."""
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
        module = next((one for one in (stem, f"model.{stem}") if one in planned), None)
        own = "f32" if len(shape) == 1 else kind or KINDS[entry["dtype"]]
        yield Part(name, key, file, shape, planned[module] if module else own, module, heads_to_permute(key, config))


def _place(part: Part) -> tuple[int, str]:
    """Embedding and head first, then layer by layer."""
    words = part.name.split(".")
    return (int(words[1]) if words[0] == "blk" else -1, part.name)


def write_gguf(
    file: Path, checkpoint: Checkpoint, plan: Plan | None, plan_file: Path | None, blueprint: Blueprint, progress: Progress
) -> None:
    """Write beside, then rename. With a plan, `plan_file` is where it lies, and its bank perhaps beside it."""
    from gguf import GGUFWriter

    beside = file.with_name(f".{file.name}.partial")
    writer = GGUFWriter(beside, blueprint.architecture.name)
    _add_metadata(writer, checkpoint, plan, blueprint)
    add_vocabulary(writer, blueprint.vocabulary)
    for part in blueprint.parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.size_bytes, raw_dtype=_number(part.kind))
    skeleton = checkpoint.skeleton()
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, part in enumerate(blueprint.parts, start=1):
            writer.write_tensor_data(_data(part, plan, plan_file, skeleton, checkpoint.config.get_text_config()))
            progress(done, len(blueprint.parts))
        writer.close()
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _number(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.upper()]


def _data(part: Part, plan: Plan | None, plan_file: Path | None, skeleton: nn.Module, config: Any) -> np.ndarray:
    """uint8 [bytes], as they stand in the file."""
    if part.file is None:
        factors = rope_factors(config)
        assert factors is not None
        return factors.numpy().view(np.uint8)
    with safe_open(part.file, framework="pt") as reader:
        weight = reader.get_tensor(part.key)
    if part.module:
        assert plan and plan_file
        found = stored_of(plan, plan_file, skeleton, part.module, weight)
        assert isinstance(found, Blocks)
        rows = found.blocks
    else:
        rows = weight.to(DTYPES[part.kind])
    if part.heads:
        rows = permute(rows, part.heads)
    return rows.contiguous().view(torch.uint8).numpy().reshape(-1)


def _add_metadata(writer: Any, checkpoint: Checkpoint, plan: Plan | None, blueprint: Blueprint) -> None:
    from gguf import LlamaFileType, RopeScalingType

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
    writer.add_vocab_size(int(config.vocab_size))
    (most, _), *_ = Counter(part.kind for part in blueprint.parts if len(part.shape) > 1).most_common(1)
    found = [kind for form in FILE_TYPES if (kind := form.format(most.upper())) in LlamaFileType.__members__]
    writer.add_file_type(LlamaFileType[found[0]] if found else LlamaFileType.ALL_F32)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_string(WEIGHTS_KEY, checkpoint.info.weights_sha256)
    if plan:
        writer.add_string(PLAN_KEY, to_json(plan))
