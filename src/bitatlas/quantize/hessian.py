"""Hessians of the modules: the mean of x xᵀ over all tokens of some rows, for every distinct input x of a decoder.

A quantizer that looks at the data needs no more than this matrix: the squared error of an output row with weight error e is
e H eᵀ. The decoder runs layer by layer, with one layer's matrices in memory; every layer's hidden state is computed once, from
the reference weights, since which formats the other modules will get is not known yet. Modules that are called with the same
tensor (q, k and v; gate and up) share one matrix.

Source of the streaming sum: the `add_batch` of the GPTQ authors' code (IST-DASLab/gptq). Left out: inputs of modules outside the
decoder layers, which bitatlas never quantizes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.model.decoder import Decoder
from bitatlas.model.gradients import module_input
from bitatlas.model.layerwise import batch_rows, is_chain, layer_inputs, run_layer, whole_logits

BATCH_TOKENS = 4096  # of a batch whose logits nobody needs
BLOCK = 256  # columns of a sum: what lies above the diagonal's blocks is computed once
Run = Callable[[int, Callable[[], None]], None]  # (layer, called before each batch)


def input_hessians(decoder: Decoder, modules: Sequence[str], rows: Tensor) -> Iterator[tuple[list[str], Tensor]]:
    """Yield for every distinct input the modules that it goes into, and the mean of x xᵀ over the tokens of `rows` [rows, tokens].

    The matrix is float64 [in, in], on the model's device where that has float64. An input that no token reached (an expert that
    was never chosen) has a matrix of zeros. Lazy, layer by layer; the model must hold the reference weights all the while.
    Raises ValueError for a module outside the decoder layers.
    """
    layers = [_modules_in(decoder.model, layer, modules) for layer in decoder.layers]
    if sum(map(len, layers)) < len(set(modules)):
        raise ValueError("a module outside the decoder layers has no recorded input")
    if is_chain(decoder):
        run = _layer_runner(decoder, rows.split(max(1, BATCH_TOKENS // rows.shape[1])))
    else:
        run = _model_runner(decoder, rows.split(batch_rows(rows.shape[1], decoder.vocabulary)))
    for index, layer_modules in enumerate(layers):
        if not any(layers[index:]):
            return
        sums = InputSums()
        with decoder.held(index):
            with sums.watching(layer_modules), torch.no_grad():
                run(index, sums.next_batch)
            for name in layer_modules:
                if name not in sums.modules:
                    sums.add(name, torch.zeros(1, decoder.shape(name)[1], device=decoder.device))
            yield from sums.means()


def _layer_runner(decoder: Decoder, batches: Sequence[Tensor]) -> Run:
    """Return what sends every batch through one layer after the other."""
    starts = [layer_inputs(decoder, batch.to(decoder.device)) for batch in batches]
    hidden, shared = [start.hidden for start in starts], [start.fresh() for start in starts]

    def run(layer: int, next_batch: Callable[[], None]) -> None:
        for index, start in enumerate(starts):
            if layer < len(start.calls):
                next_batch()
                hidden[index] = run_layer(decoder.layers[layer], hidden[index], start.call(layer, shared[index]))

    return run


def _model_runner(decoder: Decoder, batches: Sequence[Tensor]) -> Run:
    """Return what runs the whole model on every batch, again for each layer, so that no more than one layer's matrices are in memory."""

    def run(layer: int, next_batch: Callable[[], None]) -> None:
        for batch in batches:
            next_batch()
            whole_logits(decoder, batch.to(decoder.device))

    return run


def to_float64(values: Tensor) -> Tensor:
    """Return `values` as float64, on the same device where that has float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _modules_in(model: nn.Module, layer: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return those of the modules called `names` that are in `layer`."""
    inner = {id(module) for module in layer.modules()}
    modules = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in modules.items() if id(module) in inner}


def _gram(flat: Tensor) -> Tensor:
    """Return flatᵀ flat, float32 [in, in], of `flat` [tokens, in]: half of the products, since it is symmetric."""
    width = flat.shape[1]
    if width <= BLOCK:
        return flat.T @ flat
    product = flat.new_empty(width, width)
    for start in range(0, width, BLOCK):
        block = slice(start, start + BLOCK)
        torch.mm(flat[:, block].T, flat[:, start:], out=product[block, start:])
        product[start:, block] = product[block, start:].T
    return product


class InputSums:
    """Sums of x xᵀ over one layer's inputs, one for every set of modules that were called with the same tensors."""

    def __init__(self) -> None:
        self.modules: dict[str, None] = {}  # in the order in which they were first called
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}  # modules called with the same tensor -> sum, tokens
        self._calls: list[tuple[Tensor, list[str]]] = []  # of this batch: kept alive, so that `is` means the same tensor

    def next_batch(self) -> None:
        """Add up what came since the last call."""
        for inputs, modules in self._calls:
            flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
            product = to_float64(_gram(flat))
            key = tuple(modules)
            total, tokens = self._sums.get(key, (None, 0))
            self._sums[key] = product if total is None else total + product, tokens + len(flat)
        self._calls = []

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Add up what goes into `modules` within the block."""

        def hook_of(name: str) -> Any:
            return lambda module, args, kwargs: self.add(name, module_input(args, kwargs))

        hooks = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, name: str, inputs: Tensor) -> None:
        """Take note that `inputs` [..., in] go into module `name`; the tensor must stay as it is until the next batch."""
        self.modules[name] = None
        for tensor, modules in self._calls:
            if tensor is inputs and name not in modules:
                modules.append(name)
                return
        self._calls.append((inputs, [name]))

    def means(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yield the modules that had the same inputs throughout, and their mean; sums are dropped after their last use."""
        self.next_batch()
        sharing: dict[tuple[tuple[str, ...], ...], list[str]] = defaultdict(list)
        for name in self.modules:
            sharing[tuple(key for key in self._sums if name in key)].append(name)
        uses = Counter(key for keys in sharing for key in keys)
        for keys, names in sharing.items():
            totals, tokens = zip(*(self._sums[key] for key in keys), strict=True)
            uses.subtract(keys)
            for key in keys:
                if not uses[key]:
                    del self._sums[key]
            yield names, sum(totals[1:], totals[0]) / max(1, sum(tokens))
