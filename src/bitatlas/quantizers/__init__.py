"""Quantizers by name: how the stored numbers are chosen.

A quantizer gets the model with its reference weights, the modules, the formats and the fit rows, and yields each module with one
`Codes` a format, so that whoever stores them loses one module at most.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.formats import Format
from bitatlas.quantizers import rtn
from bitatlas.quantizers.codes import Codes
from bitatlas.swap import weight_of

Quantize = Callable[[nn.Module, Sequence[str], Sequence[Format], Tensor | None], Iterator[tuple[str, list[Codes]]]]


@dataclass(frozen=True)
class Quantizer:
    name: str
    quantize: Quantize
    uses_rows: bool
    version: int


def _each(
    model: nn.Module, modules: Sequence[str], formats: Sequence[Format], rows: Tensor | None
) -> Iterator[tuple[str, list[Codes]]]:
    for name in modules:
        yield name, [rtn.quantize(weight_of(model, name), fmt) for fmt in formats]


QUANTIZERS: dict[str, Quantizer] = {"rtn": Quantizer("rtn", _each, False, 1)}


def get_quantizer(name: str) -> Quantizer:
    """The quantizer called `name`; UserError with the valid names otherwise."""
    if name not in QUANTIZERS:
        near = difflib.get_close_matches(name, QUANTIZERS, n=1, cutoff=0.0)[0]
        raise UserError(f"--quantizer: unknown quantizer {name!r}; nearest is {near!r} (valid: {', '.join(QUANTIZERS)})")
    return QUANTIZERS[name]
