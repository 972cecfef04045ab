"""What a file of weights stores them as, by kind of module, read off its headers: formats, bits a weight, bytes with scales and zero-points.

A module's tensors are those that share a name up to what the layouts of this field call its parts (`qweight`, `weight_packed`, `scales`, `absmax`, ...). How
many weights stand in a packed module is taken from the unquantized model's shapes; bits are its codes' bits over these weights.
Left out: what is inside one tensor in a way that its dtype does not tell (torchao's, saved by pickle).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bitatlas.model.from_gguf import open_reader
from bitatlas.model.tensor_files import Reader
from bitatlas.records.comparison import StoredKind

# what stands behind a module's name in the names of its tensors, the longest first; the codes' own come in the first group
CODES = (".weight_packed", ".qweight", ".q_weight", ".trellis", ".weight._data", ".weight")
SIDES = (
    ".weight_scale_inv", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale", ".input_scale",
    ".qzeros", ".scales", ".g_idx", ".biases", ".SCB", ".weight_format", ".svh", ".suh", ".weight._scale", ".weight._shift", ".input_global_scale",
    ".activation_scale", ".output_scale", ".bias",
)  # fmt: skip
BITSANDBYTES = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$")
FLOATS = {"F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16"}
NOT_FLOATS = {"F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2"}
OTHERS = "norms and other vectors"


class _Part(NamedTuple):
    stem: str  # the module
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def kinds_of_gguf(file: Path) -> list[StoredKind]:
    """Return what the tensors of a GGUF are stored as, by kind; UserError where it cannot be read."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in open_reader(file).tensors:
        shape = [int(n) for n in tensor.shape]
        kind = OTHERS if len(shape) < 2 else re.sub(r"^blk\.\d+\.|\.weight$", "", tensor.name)
        _add(counts, kind, tensor.tensor_type.name, math.prod(shape), int(tensor.n_bytes))
    return _records(counts)


def kinds_of_files(files: list[Path], method: str, weights: Mapping[str, int]) -> list[StoredKind]:
    """Return what the tensors of safetensors files are stored as, by kind. method: what quantized them, for the formats' names.

    weights: of the unquantized model, by the name of each weight (`model.layers.0.mlp.up_proj.weight`).
    """
    reader, modules = Reader(files), defaultdict[str, list[_Part]](list)
    for name in reader:
        stem, suffix = _split(name)
        modules[stem].append(_Part(stem, suffix, reader.dtype(name), tuple(reader.shape(name)), reader.size_bytes(name)))
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for stem, parts in modules.items():
        codes = next(
            (part for suffix in CODES for part in parts if part.suffix == suffix), max(parts, key=lambda part: part.bytes)
        )
        count = weights.get(f"{stem}.weight") or weights.get(stem) or math.prod(codes.shape)
        kind = OTHERS if len(codes.shape) < 2 and codes.dtype in FLOATS else stem.rpartition(".")[2] or stem
        _add(counts, kind, _format(codes, parts, count, method), count, sum(part.bytes for part in parts))
    return _records(counts)


def _split(name: str) -> tuple[str, str]:
    if match := BITSANDBYTES.search(name):
        return name[: match.start()], match[0]
    for suffix in (*SIDES, *CODES):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _format(codes: _Part, parts: list[_Part], count: int, method: str) -> str:
    """Return a format's name: the dtype of plain weights, else who made the codes, their bits, and weights a scale."""
    if codes.dtype in FLOATS:
        return FLOATS[codes.dtype]
    bits = 8 * codes.bytes / count if count else 0
    name = NOT_FLOATS.get(codes.dtype, f"{bits:.3g} bits" if bits else codes.dtype.lower())
    scales = next(
        (part for part in parts if part.suffix in (".scales", ".weight_scale", ".weight_scale_inv", ".weight._scale")), None
    )
    many = math.prod(scales.shape) if scales else 0
    groups = f", {count // many} a scale" if many > 1 and count // many > 1 else ""
    return f"{method} {name}{groups}".strip()


def _add(counts: dict[tuple[str, str], list[int]], kind: str, stored: str, weights: int, size: int) -> None:
    entry = counts[kind, stored]
    entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + weights, entry[2] + size


def _records(counts: Mapping[tuple[str, str], list[int]]) -> list[StoredKind]:
    kinds = [StoredKind(kind, stored, *numbers) for (kind, stored), numbers in counts.items()]
    return sorted(kinds, key=lambda kind: (kind.kind == OTHERS, kind.kind, -kind.weights, kind.format))
