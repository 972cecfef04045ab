"""Codes as compressed-tensors `pack-quantized` tensors, and the `quantization_config` that says how to read them.

Layout (compressed-tensors 0.20): a row's codes one after the other, little-endian, in whole 32-bit words; a float16 scale a group;
the row length as two int64. A symmetric format whose group size divides the row is `group`; everything else is `block` with blocks
of one row by one group, because
- transformers 5.24 with compressed-tensors 0.18 to 0.20 refuses the packed zero-points of `group` (it expects them unpacked), while
  those of `block` are plain int8 and load;
- `group` refuses rows that the group size does not divide, while `block` cuts off what hangs over: our short last group.
Zero-points that are no whole numbers (hqq) are stored as float32, which the same reader subtracts as they are: float16, once moved by
half the codes' range, would not hold them exactly.

Pure: torch alone, nothing is read or written. Left out: packed zero-points for runtimes that want those.
Source: compressed_tensors/compressors/pack_quantized and quantization/lifecycle of version 0.20.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitatlas.quantize.codes import Codes, pack
from bitatlas.records.formats import Format, group_count, stored_bytes

PACKAGE = "compressed_tensors"  # what the extra `export` installs
WORD = 32  # bits
PACKED_TOGETHER = 2**22  # codes at a time: packing takes eight bytes and more for each

Part = tuple[torch.dtype, tuple[int, ...]]


def layout(shape: tuple[int, int], fmt: Format, whole_zeros: bool) -> dict[str, Part]:
    """Return suffix of the tensor's name -> dtype and shape, for a weight [out, in]."""
    out, width = shape
    groups = (out, math.ceil(width / fmt.group_size))
    parts: dict[str, Part] = {
        "weight_packed": (torch.int32, (out, math.ceil(width * fmt.bits / WORD))),
        "weight_scale": (torch.float16, groups),
        "weight_shape": (torch.int64, (2,)),
    }
    if not fmt.symmetric:
        parts["weight_zero_point"] = (torch.int8 if whole_zeros else torch.float32, groups)
    return parts


def tensors(codes: Codes, fmt: Format) -> dict[str, Tensor]:
    """Return the tensors that `layout` announces. ValueError for a code or a zero-point outside the format's range."""
    result = {
        "weight_packed": pack_rows(codes.codes, fmt.bits),
        "weight_scale": codes.scale.half().contiguous(),
        "weight_shape": torch.tensor(codes.codes.shape, dtype=torch.int64),
    }
    half = 2 ** (fmt.bits - 1)  # the reader's codes are signed
    if fmt.symmetric:
        if bool((codes.zero != half).any()):
            raise ValueError(f"a symmetric format has the zero-point {half} everywhere")
    elif codes.zero.is_floating_point():
        result["weight_zero_point"] = codes.zero.float() - half
    else:
        if int(codes.zero.max()) >> fmt.bits:
            raise ValueError(f"zero-points up to {int(codes.zero.max())} do not fit {fmt.bits} bits")
        result["weight_zero_point"] = (codes.zero.short() - half).to(torch.int8)
    return result


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 [out, in] -> int32 [out, ceil(in * bits / 32)], every row starting a new word."""
    out, width = codes.shape
    words = math.ceil(width * bits / WORD)
    rows = max(1, PACKED_TOGETHER // max(1, width))
    parts = []
    for block in codes.split(rows):
        padded = torch.nn.functional.pad(block, (0, -width % WORD)).contiguous()  # 32 codes are whole words at every width
        stream = pack(padded, bits).view(len(block), -1)[:, : words * WORD // 8]
        parts.append(stream.contiguous().view(torch.int32))
    return torch.cat(parts) if parts else torch.empty(out, words, dtype=torch.int32)


def quantization_config(
    formats: Mapping[str, Format],
    shapes: Mapping[str, tuple[int, int]],
    ignored: Sequence[str],
    whole_zeros: bool,
    version: str,
    layout_name: str,
) -> dict[str, Any]:
    """Return the entry of `config.json`.

    formats, shapes: of each packed module. ignored: linear modules that stay as they are. layout_name: what the config calls the layout.
    """
    groups: dict[str, Any] = {}
    for module, fmt in formats.items():
        weights = _weights(fmt, shapes[module][1], whole_zeros)
        name = fmt.name if weights["strategy"] == "group" else f"{fmt.name}_block"
        groups.setdefault(name, {"targets": [], "weights": weights, "format": layout_name})["targets"].append(module)
    return {
        "quant_method": "compressed-tensors",
        "format": layout_name,
        "quantization_status": "compressed",
        "version": version,
        "config_groups": groups,
        "ignore": list(ignored),
    }


def _weights(fmt: Format, width: int, whole_zeros: bool) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric, "dynamic": False}
    if fmt.symmetric and width % fmt.group_size == 0:
        return {**weights, "strategy": "group", "group_size": fmt.group_size}
    zero = {} if fmt.symmetric or whole_zeros else {"zp_dtype": "torch.float32"}
    return {**weights, "strategy": "block", "block_structure": [1, fmt.group_size], **zero}


def part_bytes(part: Part) -> int:
    """Return the bytes of a tensor with this dtype and shape."""
    dtype, shape = part
    return dtype.itemsize * math.prod(shape)


def overheads(shape: tuple[int, int], fmt: Format, whole_zeros: bool) -> dict[str, int]:
    """Return bytes on disk minus the bytes that the format counts, by cause; their sum is the whole difference for this weight."""
    sizes = {name: part_bytes(part) for name, part in layout(shape, fmt, whole_zeros).items()}
    groups = group_count(shape, fmt.group_size)
    causes = {
        "rows padded to whole 32-bit words": sizes["weight_packed"] - math.ceil(shape[0] * shape[1] * fmt.bits / 8),
        "zero-points (1 byte, not 2)" if whole_zeros else "zero-points (4 bytes, not 2)": sizes.get("weight_zero_point", 0)
        - math.ceil(groups * fmt.zero_bits / 8),
        "row lengths (16 bytes a module)": sizes["weight_shape"],
    }
    assert sum(causes.values()) == sum(sizes.values()) - stored_bytes(shape, fmt)
    return causes
