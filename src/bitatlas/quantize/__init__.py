"""Quantizers by name: how the stored numbers are chosen, for every module of a model in every format that is asked for."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.model.decoder import Decoder
from bitatlas.quantize import autoround, ggml, gptq, hqq, importance, rtn
from bitatlas.quantize.codes import Codes
from bitatlas.quantize.ggml import Blocks
from bitatlas.records.formats import FORMATS, LLAMA_CPP, Format

WORKER_PIECES = 4  # of a bank, for a worker: modules differ in size

# The last argument: rows of text, int64 [rows, tokens], or what a quantizer takes in their place; None: nothing.
Quantize = Callable[[Decoder, Mapping[str, Sequence[Format]], Any], Iterator[tuple[str, Sequence[Codes | Blocks]]]]


@dataclass(frozen=True)
class Quantizer:
    """How the stored numbers are chosen.

    `quantize(decoder, formats, rows)` gives every module's codes, one for each of its formats, module by module in any order, each as soon
    as it is known; formats: module -> formats. The model holds the reference weights until the last one has come. `rows` are the fit rows, int64 [rows, tokens].
    """

    name: str
    quantize: Quantize
    uses_rows: bool  # the codes depend on the rows
    version: int  # raised whenever the codes change: codes that were stored by another version are not used again
    package: str | None = None  # that it needs
    extra: str | None = None  # of ours, that installs the package; None: the one of the quantizer's own name
    symmetric: bool = True  # it can do formats without a zero-point
    needs_all: bool = False  # of the model's weights in memory at once
    whole_zeros: bool = True  # its zero-points are codes, not numbers in between
    runtimes: tuple[str, ...] = ("",)  # whose formats it makes; "": integer formats
    by_format: bool = False  # one run over the whole model makes a format, whichever modules are asked for

    def pieces(self, modules: Sequence[str], formats: Sequence[str], slots: int) -> list[tuple[list[str], list[str]]]:
        """Cut modules and formats into what `slots` workers make at a time, each making as little twice as the method allows."""
        if self.by_format:
            return [(list(modules), [name]) for name in formats]
        # fitted ones pass through all layers before a module's own, so each worker gets one run of neighbours
        count = slots if self.uses_rows else WORKER_PIECES * slots
        size = max(1, -(-len(modules) // count))
        return [(list(modules[start : start + size]), list(formats)) for start in range(0, len(modules), size)]

    def check(self, formats: Sequence[Format]) -> None:
        """Raise UserError where its package is missing, or where it cannot do one of `formats`."""
        formats = [fmt for fmt in formats if not fmt.dtype]
        if len({fmt.runtime for fmt in formats}) > 1:
            names = (next(fmt.name for fmt in formats if bool(fmt.runtime) == own) for own in (True, False))
            raise UserError("--formats: {} is llama.cpp's own and {} is not; give formats of one kind".format(*names))
        foreign = [fmt for fmt in formats if fmt.runtime not in self.runtimes]
        if foreign:
            able = [quantizer.name for quantizer in QUANTIZERS.values() if foreign[0].runtime in quantizer.runtimes]
            formats_made = "integer formats"
            if self.runtimes[0]:
                names = (name for name, fmt in FORMATS.items() if fmt.runtime in self.runtimes)
                formats_made = f"formats of {self.runtimes[0]} ({', '.join(names)})"
            raise UserError(
                f"--quantizer {self.name}: makes {formats_made} alone; for {foreign[0].name} give --quantizer {' or '.join(able)}"
            )
        if any(fmt.runtime == LLAMA_CPP for fmt in formats):
            ggml.check_packages(f"--quantizer {self.name}", (ggml.PACKAGE,))
        if self.package and importlib.util.find_spec(self.package) is None:
            extra = self.extra or self.name
            raise UserError(f"--quantizer {self.name}: needs a package that is not here: pip install 'bitatlas[{extra}]'")
        refused = [fmt.name for fmt in formats if fmt.symmetric and not self.symmetric]
        if refused:
            raise UserError(
                f"--quantizer {self.name}: no symmetric formats ({refused[0]}); give {refused[0].removesuffix('_sym')}"
            )


def one_by_one(quantize: Callable[[Tensor, Format], Codes | Blocks]) -> Quantize:
    """Return what a `Quantizer` calls, made of a function of one weight and one format. The rows are not looked at."""

    def quantize_modules(
        decoder: Decoder, formats: Mapping[str, Sequence[Format]], rows: Tensor | None
    ) -> Iterator[tuple[str, Sequence[Codes | Blocks]]]:
        for name, of_module in formats.items():
            weight = decoder.weight(name)
            yield name, [quantize(weight, fmt) for fmt in of_module]

    return quantize_modules


QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer
    for quantizer in (
        Quantizer("rtn", one_by_one(rtn.quantize), uses_rows=False, version=2),
        Quantizer("gptq", gptq.quantize, uses_rows=True, version=3, runtimes=("", LLAMA_CPP)),
        Quantizer("hqq", one_by_one(hqq.quantize), uses_rows=False, version=1, package="hqq", symmetric=False, whole_zeros=False),
        Quantizer(
            "autoround", autoround.quantize, uses_rows=True, version=1, package="auto_round", needs_all=True, by_format=True
        ),
        Quantizer(
            LLAMA_CPP,
            one_by_one(ggml.quantize),
            uses_rows=False,
            version=1,
            package=ggml.PACKAGE,
            extra="gguf",
            runtimes=(LLAMA_CPP,),
        ),
        Quantizer(
            "imatrix",
            importance.quantize,
            uses_rows=True,
            version=1,
            package=ggml.PACKAGE,
            extra="gguf",
            runtimes=(LLAMA_CPP,),
        ),
    )
}


def get_quantizer(name: str) -> Quantizer:
    """Return the quantizer called `name`; UserError with the valid names otherwise."""
    if name not in QUANTIZERS:
        near = difflib.get_close_matches(name, QUANTIZERS, n=1, cutoff=0.0)[0]
        raise UserError(f"--quantizer: unknown quantizer {name!r}; nearest is {near!r} (valid: {', '.join(QUANTIZERS)})")
    return QUANTIZERS[name]
