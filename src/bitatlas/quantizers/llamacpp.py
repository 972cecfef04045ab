"""llama.cpp's own formats, quantized by llama.cpp's own library (`pip install 'bitatlas[gguf]'`). No data is needed.

The blocks are those that `llama-quantize` writes for the same weight in float32 and the same type, and what is measured is what
llama.cpp computes with. Left out: importance matrices, and the types that need one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from bitatlas.formats import Format
from bitatlas.quantizers.codes import Blocks
from bitatlas.swap import weight_of


def quantize_modules(
    model: nn.Module, modules: Sequence[str], formats: Sequence[Format], rows: Tensor | None
) -> Iterator[tuple[str, list[Blocks]]]:
    """Every module in every format; `rows` are not looked at."""
    for name in modules:
        weight = weight_of(model, name)
        yield name, [quantize_weight(weight, fmt) for fmt in formats]


def quantize_weight(weight: Tensor, fmt: Format) -> Blocks:
    """Blocks of `weight` [out, in]; ValueError where a block does not divide the rows."""
    from bitatlas.llamacpp.library import quantize

    return Blocks(quantize(weight.detach().float(), fmt.own_name), fmt.own_name)
