"""Quantizers by name: how the stored numbers are chosen. Each is a pure tensor function `(weight [out, in], Format) -> Codes`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.formats import Format
from bitatlas.quantizers import rtn
from bitatlas.quantizers.codes import Codes

Quantizer = Callable[[Tensor, Format], Codes]
QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn.quantize}


def get_quantizer(name: str) -> Quantizer:
    """The quantizer called `name`; UserError with the valid names otherwise."""
    if name not in QUANTIZERS:
        near = difflib.get_close_matches(name, QUANTIZERS, n=1, cutoff=0.0)[0]
        raise UserError(f"--quantizer: unknown quantizer {name!r}; nearest is {near!r} (valid: {', '.join(QUANTIZERS)})")
    return QUANTIZERS[name]
