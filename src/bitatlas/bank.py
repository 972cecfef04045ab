"""Every module in every candidate format, so that any plan is assembled without quantizing again.

Codes are kept (one byte a weight and format, in memory) and turned into weights on demand; a module is quantized the first time it
is asked for. Left out for now: the bank on disk, which a plan for a model larger than memory needs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bitatlas.formats import FORMATS, Format
from bitatlas.quantizers import get_quantizer
from bitatlas.quantizers.codes import Codes
from bitatlas.swap import weight_of


class Bank:
    """Quantized weights of `model`'s modules. Reads the reference weights, so fill it outside any `swapped` block."""

    def __init__(self, model: nn.Module, modules: list[str], quantizer: str, formats: Mapping[str, Format] = FORMATS):
        self.formats = dict(formats)
        self._quantize = get_quantizer(quantizer)
        # The tensors themselves, not the parameters: a swap exchanges the parameter's storage and leaves these as they are.
        self._reference = {name: weight_of(model, name) for name in modules}
        self._codes: dict[tuple[str, str], Codes] = {}

    def codes(self, module: str, format_name: str) -> Codes:
        key = (module, format_name)
        if key not in self._codes:
            self._codes[key] = self._quantize(self._reference[module], self.formats[format_name])
        return self._codes[key]

    def reference(self, module: str) -> Tensor:
        """The unquantized weight [out, in]."""
        return self._reference[module]

    def weights(self, assignment: Mapping[str, str]) -> dict[str, Tensor]:
        """Module name -> weight [out, in] in its assigned format, in the reference's dtype."""
        return {module: self.codes(module, name).weight(self._reference[module].dtype) for module, name in assignment.items()}
