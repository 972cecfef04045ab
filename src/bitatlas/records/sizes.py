"""Units, and the exact bytes of a plan: what a module costs in a format, what a plan costs in all, and sizes as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bitatlas.errors import UserError
from bitatlas.records import ModelInfo, Module, Plan, Size
from bitatlas.records.formats import FORMATS, Format, get_format, stored_bytes, takes

SIZE_UNITS = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power for power, letter in enumerate("kmgt", start=1) for infix, base in (("", 1000), ("i", 1024))
}
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
EMBEDDING_AND_HEAD = "embedding and head"  # part of a module: one weight for both
RANGE_DIGITS = 4  # significant digits of a possible range
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True)
class Unit:
    """Modules that share one format."""

    name: str
    modules: tuple[Module, ...]
    layer: int
    weights: int

    @property
    def part(self) -> str:
        """Return what part of the model it is, outside the decoder layers; "" within them."""
        return self.modules[0].part if self.modules else ""

    def formats(self, usual: Sequence[str]) -> Sequence[str]:
        """Return the formats that the unit may have, narrowest first: its own, or the survey's."""
        return self.modules[0].formats(usual) if self.modules else usual


def units_of(modules: Sequence[Module]) -> list[Unit]:
    """Return the units in the order in which their first module comes. ValueError where a unit spans layers."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.unit, []).append(module)
    units = []
    for name, group in groups.items():
        if len({module.layer for module in group}) > 1:
            raise ValueError(f"unit {name!r} spans more than one layer")
        units.append(Unit(name, tuple(group), group[0].layer, sum(module.weights for module in group)))
    return units


def unlike_partners(plan: Plan) -> tuple[str, str, str, str] | None:
    """Return (module, its format, other module, its format) of the first two whose formats differ and that runtimes like vLLM fuse."""
    first: dict[str, tuple[str, str]] = {}
    for name, format_name in plan.modules.items():
        parent, _, last = name.rpartition(".")
        if last in FUSED:
            other, other_format = first.setdefault(f"{parent}.{FUSED[last]}", (name, format_name))
            if other_format != format_name:
                return name, format_name, other, other_format
    return None


def unlike_experts(plan: Plan, modules: Iterable[Module]) -> tuple[str, str] | None:
    """Return two experts of a layer that have different formats."""
    first: dict[int, str] = {}
    for module in modules:
        if module.expert is not None and module.name in plan.modules:
            other = first.setdefault(module.layer, module.name)
            if plan.modules[other] != plan.modules[module.name]:
                return other, module.name
    return None


def assignment_of(units: Sequence[Unit], formats: Sequence[str], choice: NDArray[np.integer]) -> dict[str, str]:
    """Return module name -> format name. choice: [units], each unit's index into its formats: `formats`, or its modules' own candidates."""
    return {
        module.name: module.formats(formats)[int(k)] for unit, k in zip(units, choice, strict=True) for module in unit.modules
    }


def uniform(modules: Iterable[Module], name: str) -> dict[str, str]:
    """Return the assignment of one format to all decoder layers, or of the nearest that a module can hold; outside them of the widest candidate."""
    return {module.name: module.at(name) for module in modules}


def inner(modules: Iterable[Module]) -> list[Module]:
    """Return the modules that are in decoder layers."""
    return [module for module in modules if not module.part]


def candidates_of(modules: Iterable[Module], formats: Sequence[str]) -> list[tuple[str, str]]:
    """Return every (module, format) that a plan may choose."""
    return [(module.name, name) for module in modules for name in dict.fromkeys(module.formats(formats))]


def outside_bytes(modules: Iterable[Module], info: ModelInfo) -> int:
    """Return what the modules outside the decoder layers take in the checkpoint, which `other_bytes` holds too."""
    return sum(kept_bytes(module, info.dtype) for module in modules if module.part)


# --- what a weight takes in a safetensors file ---------------------------------------------------------------------------
#
# pack-quantized (compressed-tensors): a row's codes in whole 32-bit words; a scale and a zero-point a group; the row length as two int64.
# mlx: the codes alike; a scale and a bias a group. Each tensor has an entry of the header: its name, dtype, shape and place, in JSON. The place has as
# many digits as the file's size at most, and every entry is counted in whole 8 bytes; what is too much then, the header is padded with.

WORD_BITS, ROW_LENGTH_BYTES, ALIGNMENT, GGUF_ALIGNMENT = 32, 16, 8, 32
FILES = {
    "transformers": "pack-quantized",
    "bitatlas": "pack-quantized",
    "vllm": "pack-quantized",
    "mlx": "mlx",
}  # runtime -> layout


def entry_bytes(name_bytes: int, dtype: str, shape: Sequence[int], digits: int) -> int:
    """Return the bytes that the header gives to a tensor at most, in whole 8."""
    text = (
        len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
        + name_bytes
        + len(dtype)
        + len(",".join(map(str, shape)))
        + 2 * digits
    )
    return -(-text // ALIGNMENT) * ALIGNMENT


def weight_bytes(module: Module, fmt: Format, info: ModelInfo) -> int:
    """Return the bytes of a weight as its format counts them, of one that stays as it is those that it has in the checkpoint."""
    return kept_bytes(module, info.dtype) if fmt.dtype else stored_bytes(module.shape, fmt)


def file_bytes(module: Module, fmt: Format, info: ModelInfo) -> int:
    """Return what a weight in a format takes in the file, its entries of the header among it; where no file is known, as the format counts."""
    layout, file = info.file, module.file
    if layout is None or file is None:
        return weight_bytes(module, fmt, info)
    if not file.pieces or fmt.dtype:
        return file.kept
    if layout.name == "gguf":  # a tensor's entry has one length, whatever its type
        width = module.shape[1]
        return sum(-(-stored_bytes((rows, width), fmt) // GGUF_ALIGNMENT) * GGUF_ALIGNMENT for _, rows in file.pieces)
    width, groups = module.shape[1], math.ceil(module.shape[1] / fmt.group_size)
    words = math.ceil(width * fmt.bits / WORD_BITS)
    total = 0
    parts: list[tuple[str, str, tuple[int, ...], int]]  # of a name: its end, dtype, shape, bytes of a number
    for name, rows in file.pieces:
        if layout.name == "mlx":
            parts = [
                ("weight", "U32", (rows, words), 4),
                *((part, "F16", (rows, groups), layout.scale_bytes) for part in ("scales", "biases")),
            ]
        else:
            parts = [
                ("weight_packed", "I32", (rows, words), 4),
                ("weight_scale", "F16", (rows, groups), layout.scale_bytes),
                ("weight_shape", "I64", (2,), ROW_LENGTH_BYTES // 2),
                *([] if fmt.symmetric else [("weight_zero_point", "F32", (rows, groups), layout.zero_bytes)]),
            ]
        total += sum(
            math.prod(shape) * size + entry_bytes(name + len(suffix), dtype, shape, layout.digits)
            for suffix, dtype, shape, size in parts
        )
    return total


def size_of(modules: Sequence[Module], assignment: dict[str, str], info: ModelInfo) -> Size:
    """Return the exact size of a plan. Modules not in `assignment` stay as the checkpoint stores them and count in `total_bytes` alone.

    With nothing assigned in the decoder layers both averages are the stored width of their weights, in the mean.
    Raises UserError where the assignment names a module that the checkpoint lacks, or an unknown format.
    """
    unknown = sorted(set(assignment) - {module.name for module in modules})
    if unknown:
        raise UserError(f"the plan names {len(unknown)} modules that the checkpoint lacks, for example {unknown[0]!r}")
    weights = code_bits = in_layers = unquantized_bytes = outside = 0
    other = info.other_bytes
    for module in modules:
        if module.name not in assignment:
            unquantized_bytes += 0 if module.part else kept_bytes(module, info.dtype)
            continue
        fmt = get_format(assignment[module.name])
        if module.part:
            other -= kept_bytes(module, info.dtype)
            outside += weight_bytes(module, fmt, info)
            continue
        weights += module.weights
        code_bits += module.weights * fmt.bits
        in_layers += weight_bytes(module, fmt, info)
    total = other + in_layers + outside + unquantized_bytes
    if info.file:
        total = info.file.other + sum(
            file_bytes(module, get_format(assignment[module.name]), info)
            if module.name in assignment
            else _kept_in_file(module, info)
            for module in modules
        )
    if not weights:
        whole = sum(module.weights for module in inner(modules))
        width = 8 * unquantized_bytes / whole if whole else 8.0 * dtype_bytes(info.dtype)
        return Size(width, width, outside, total)
    return Size(code_bits / weights, 8 * in_layers / weights, in_layers + outside, total)


def _kept_in_file(module: Module, info: ModelInfo) -> int:
    return kept_bytes(module, info.dtype) if module.file is None else module.file.kept


def parse_size(text: str, flag: str = "--size") -> int:
    """Return the bytes that "4GiB", "600MB", "1.5 GiB" or "123456" names; UserError naming `flag` otherwise. A part of a byte is dropped."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in SIZE_UNITS:
        letter = unit.removesuffix("i").upper()
        near = f" ({letter}B counts in 1000s, {letter}iB in 1024s)" if letter in {"K", "M", "G", "T"} else ""
        raise UserError(f"{flag} {text!r} is not a size: write a number and a unit, like 600MB or 1.5GiB{near}")
    size = math.floor(Fraction(match.group(1)) * SIZE_UNITS[unit])
    if size < 1:
        raise UserError(f"{flag} {text!r} is less than one byte")
    return size


def show_bytes(value: int | Fraction, digits: int = RANGE_DIGITS) -> str:
    """Return a size as text that `parse_size` reads again, rounded up to `digits` significant digits: 1234567 -> "1.235MB"."""
    power = min(4, max(0, (len(str(math.floor(value))) - 1) // 3))
    text = rounded_up(Fraction(value) / 1000**power, digits).removesuffix(".0")
    return f"{text}{('', 'k', 'M', 'G', 'T')[power]}B"


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one number of a dtype ("bfloat16", "torch.float32"); UserError for a dtype that is not known."""
    name = dtype.removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UserError(f"the checkpoint's dtype {dtype!r} is not supported (known: {', '.join(DTYPE_BYTES)})")
    return DTYPE_BYTES[name]


def kept_bytes(module: Module, dtype: str) -> int:
    """Return the bytes of a module that stays unquantized, in a checkpoint whose other modules are of `dtype`."""
    return module.size_bytes if module.size_bytes is not None else module.weights * dtype_bytes(dtype)


def rounded_up(value: Fraction, digits: int) -> str:
    """Return decimal text with at least one decimal, rounded up: a budget typed from what is shown is never too small."""
    decimals = max(1, digits - len(str(math.floor(value))))
    head, tail = divmod(math.ceil(value * 10**decimals), 10**decimals)
    return f"{head}.{f'{tail:0{decimals}d}'.rstrip('0') or '0'}"


# --- rows that a format takes ------------------------------------------------------------------------------------------


def check_rows(modules: Iterable[Module], formats: Iterable[str], flag: str = "--formats") -> None:
    """Refuse formats that rows do not fit: UserError with `flag`, the first such module and the nearest format that takes its rows."""
    names = list(formats)
    for module in modules:
        width = module.shape[1]
        for fmt in map(get_format, module.formats(names)):
            if takes(fmt, width):
                continue
            able = [other for other in FORMATS.values() if other.runtime == fmt.runtime and takes(other, width)]
            near = min(able, key=lambda other: abs(_row_bits(other) - _row_bits(fmt)), default=None)
            advice = f"the nearest that takes them is {near.name}" if near else f"no format of {fmt.runtime} takes them"
            raise UserError(
                f"{flag}: {module.name} has rows of {width}, which {fmt.name} cannot take (whole blocks of {fmt.group_size}); {advice}"
            )


def _row_bits(fmt: Format) -> float:
    """Return the stored bits per weight, in a row of whole groups."""
    return fmt.bits + (fmt.scale_bits + fmt.zero_bits) / fmt.group_size
