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
from bitatlas.swap import swapped, weight_of


class Bank:
    """Quantized weights of `model`'s modules; `rows` int64 [rows, tokens] are what a quantizer that needs data is fitted on."""

    def __init__(
        self,
        model: nn.Module,
        modules: list[str],
        quantizer: str,
        formats: Mapping[str, Format] = FORMATS,
        rows: Tensor | None = None,
    ):
        self.formats = dict(formats)
        self._quantizer = get_quantizer(quantizer)
        self._model, self._rows = model, rows
        # The tensors themselves, not the parameters: a swap exchanges the parameter's storage and leaves these as they are.
        self._reference = {name: weight_of(model, name) for name in modules}
        self._codes: dict[tuple[str, str], Codes] = {}

    def codes(self, module: str, format_name: str) -> Codes:
        key = (module, format_name)
        if key not in self._codes:
            modules = list(self._reference) if self._quantizer.uses_rows else [module]
            with swapped(self._model, self._reference):
                for name, (codes,) in self._quantizer.quantize(self._model, modules, [self.formats[format_name]], self._rows):
                    self._codes[name, format_name] = codes
        return self._codes[key]

    def reference(self, module: str) -> Tensor:
        """The unquantized weight [out, in]."""
        return self._reference[module]

    def weights(self, assignment: Mapping[str, str]) -> dict[str, Tensor]:
        """Module name -> weight [out, in] in its assigned format, in the reference's dtype."""
        return {module: self.codes(module, name).weight(self._reference[module].dtype) for module, name in assignment.items()}
