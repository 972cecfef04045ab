"""Importance matrices, as llama.cpp has them: the mean square of every input of a module, of the fit rows or of a user's file.

llama.cpp's quantizers count an input's squared error by it. One pass over the rows: of an expert the tokens that are routed to it, with how
many there were. An embedding has no such inputs, and a head is not collected, as llama.cpp's own tool leaves it out by default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.model.decoder import Decoder
from bitatlas.quantize import ggml
from bitatlas.quantize.ggml import Blocks
from bitatlas.quantize.moments import watch_inputs
from bitatlas.records.formats import Format


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squares of the inputs of modules. `counts`: tokens that each saw; empty where a file did not say."""

    mean_squares: Mapping[str, Tensor]  # module -> float32 [in]
    counts: Mapping[str, int]

    @property
    def sha256(self) -> str:
        """Hash of what the codes depend on."""
        digest = hashlib.sha256()
        for name, values in sorted(self.mean_squares.items()):
            digest.update(f"{name}\n".encode() + values.float().numpy().tobytes())
        return digest.hexdigest()

    def of(self, module: str) -> Tensor | None:
        """Return a module's own, float32 [in]; None where there is none, or no token came."""
        values = self.mean_squares.get(module)
        return None if values is None or not bool(values.any()) else values


def collect(decoder: Decoder, modules: Sequence[str], rows: Tensor) -> ImportanceMatrix:
    """Return the importance of those of `modules` that lie in decoder layers, on `rows` int64 [rows, tokens]."""
    inside = [name for name in modules if 0 <= decoder.stages_of(name)[-1] < decoder.behind]
    sums = {name: torch.zeros(decoder.shape(name)[1], dtype=torch.float64) for name in inside}
    counts = dict.fromkeys(inside, 0)

    def add(name: str, inputs: Tensor) -> None:
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        counts[name] += len(inputs)
        sums[name] += inputs.square().sum(0).cpu().double()

    watch_inputs(decoder, inside, rows, add)
    return ImportanceMatrix({name: (sums[name] / max(1, counts[name])).float() for name in inside}, counts)


def quantize(decoder: Decoder, formats: Mapping[str, Sequence[Format]], rows: Any) -> Iterator[tuple[str, list[Blocks]]]:
    """Yield every module's blocks in llama.cpp's formats, as llama-quantize makes them with an importance matrix. formats: module -> formats

    rows: int64 [rows, tokens], to collect it on, or an ImportanceMatrix.
    """
    if rows is None or (not isinstance(rows, ImportanceMatrix) and not len(rows)):
        raise UserError(
            "--quantizer imatrix takes its importance matrix from rows of text: give a text with --tokens, or --imatrix FILE"
        )
    matrix = rows if isinstance(rows, ImportanceMatrix) else collect(decoder, list(formats), rows)
    for name, of_module in formats.items():
        weight = decoder.weight(name)
        yield name, [ggml.quantize(weight, fmt, matrix.of(name)) for fmt in of_module]
