"""llama.cpp's own formats, quantized by llama.cpp's own library (`pip install 'bitatlas[gguf]'`). No data is needed.

The blocks are those that `llama-quantize` writes for the same weight in float32 and the same type, and what is measured is what
llama.cpp computes with. Left out: importance matrices, and the types that need one.
"""

from __future__ import annotations

from torch import Tensor

from bitatlas.quantize.codes import Blocks
from bitatlas.records.formats import Format


def quantize_weight(weight: Tensor, fmt: Format) -> Blocks:
    """Blocks of `weight` [out, in]; ValueError where a block does not divide the rows."""
    from bitatlas.quantize.ggml import quantize

    return Blocks(quantize(weight.detach().float(), fmt.own_name), fmt.own_name)
