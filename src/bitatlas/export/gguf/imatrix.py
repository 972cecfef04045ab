"""Importance matrices as files: llama.cpp's GGUF form is written, that and its older binary form are read.

Source: llama.cpp's tools/imatrix (a sum of squares and a count of tokens for each tensor); libgguf reads both forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from bitatlas.errors import UserError
from bitatlas.quantize.ggml import PACKAGE, check_packages
from bitatlas.quantize.importance import ImportanceMatrix

NAME = "imatrix.gguf"  # beside a plan


def write_imatrix(
    file: Path, matrix: ImportanceMatrix, names: Mapping[str, str], experts: Mapping[str, int], text: str, rows: tuple[int, int]
) -> None:
    """Write what `llama-quantize --imatrix` reads.

    names: module -> the GGUF's tensor that it is in; experts: module -> number of the expert; rows: how many, of how many tokens.
    """
    check_packages(str(file))
    from gguf import GGUFWriter

    beside = file.with_name(f".{file.name}.partial")
    writer = GGUFWriter(beside, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", rows[0])
    writer.add_uint32("imatrix.chunk_size", rows[1])
    by_tensor: dict[str, dict[int, str]] = {}  # tensor -> expert -> module; modules that are joined have one input
    for module in matrix.mean_squares:
        if module in names:
            by_tensor.setdefault(names[module], {}).setdefault(experts.get(module, 0), module)
    for name, modules in by_tensor.items():
        ordered = [modules[expert] for expert in sorted(modules)]
        sums = [matrix.mean_squares[module].double().mul(matrix.counts[module]).float().numpy() for module in ordered]
        writer.add_tensor(f"{name}.in_sum2", np.stack(sums))
        writer.add_tensor(f"{name}.counts", np.array([[matrix.counts[module]] for module in ordered], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    beside.replace(file)


def read_imatrix(
    file: Path, names: Mapping[str, str], experts: Mapping[str, int], widths: Mapping[str, int]
) -> tuple[ImportanceMatrix, int]:
    """Return (matrix, how many modules the file does not have); UserError for a file that is none, or of another model.

    names: module -> the GGUF's tensor that it is in; experts: module -> number of the expert; widths: module -> its inputs.
    """
    check_packages(f"--imatrix {file}", (PACKAGE,))
    from libgguf import load_imatrix

    if not file.is_file():
        raise UserError(f"--imatrix {file}: no such file")
    try:
        entries = load_imatrix(file)
    except Exception as error:  # struct and numpy raise many kinds on a damaged file
        raise UserError(
            f"--imatrix {file}: not an importance matrix of llama.cpp ({' '.join(str(error).split())[:120]})"
        ) from None
    mean_squares = {}
    for module, name in names.items():
        if name not in entries:
            continue
        values = torch.from_numpy(np.array(entries[name], np.float32)).flatten()
        if module in experts and values.numel() > widths[module]:
            values = values[experts[module] * widths[module] :][: widths[module]]
        if values.numel() != widths[module]:
            raise UserError(
                f"--imatrix {file}: {name} has {values.numel()} inputs, {module} {widths[module]}: it is of another model"
            )
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise UserError(f"--imatrix {file}: {name} has numbers that are no mean squares")
        mean_squares[module] = values
    if not mean_squares:
        example = next(iter(names.values()))
        raise UserError(f"--imatrix {file}: has no entry of this model's tensors, like {example}: it is of another model")
    return ImportanceMatrix(mean_squares, {}), len(names) - len(mean_squares)
