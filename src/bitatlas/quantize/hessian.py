"""What goes into the modules: the mean of x xᵀ over all tokens of some rows, for every distinct input of a decoder.

A quantizer that looks at the data needs no more than this matrix: the squared error of an output row with weight error e is
e H eᵀ. The decoder runs layer by layer, with one layer's matrices in memory; every layer's hidden state is computed once, from
the reference weights, since which formats the other modules will get is not known yet. Modules that are called with the same
tensor (q, k and v; gate and up) share one matrix.

Source of the streaming sum: the `add_batch` of the GPTQ authors' code (IST-DASLab/gptq). Left out: inputs of modules outside the
decoder layers, which bitatlas never quantizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import batch_rows, is_chain, layer_inputs, run_layer, whole_logits

Run = Callable[[int, Callable[[], None]], None]  # (layer, called before each batch)


def input_moments(decoder: Decoder, modules: Sequence[str], rows: Tensor) -> Iterator[tuple[list[str], Tensor]]:
    """For every distinct input: the modules that it goes into, and the mean of x xᵀ over the tokens of `rows` [rows, tokens].

    The matrix is float64 [in, in], on the model's device where that has float64. An input that no token reached (an expert that
    was never chosen) has a matrix of zeros. Lazy, layer by layer; the model must hold the reference weights all the while.
    Raises ValueError for a module outside the decoder layers.
    """
    layers = [_inside(decoder.model, layer, modules) for layer in decoder.layers]
    if sum(map(len, layers)) < len(set(modules)):
        raise ValueError("a module outside the decoder layers has no recorded input")
    batches = rows.split(batch_rows(rows.shape[1], decoder.vocabulary))
    run = _pieces(decoder, batches) if is_chain(decoder) else _whole(decoder, batches)
    for number, named in enumerate(layers):
        if not any(layers[number:]):
            return
        sums = _Sums()
        with decoder.held(number):
            with sums.watching(named), torch.no_grad():
                run(number, sums.next_batch)
            for name in named:
                if name not in sums.owner:
                    sums.add(name, torch.zeros(1, decoder.shape(name)[1], device=decoder.device))
            yield from sums.means()


def _pieces(decoder: Decoder, batches: Sequence[Tensor]) -> Run:
    """Every batch through one layer after the other."""
    starts = [layer_inputs(decoder, batch.to(decoder.device)) for batch in batches]
    hidden, shared = [start.hidden for start in starts], [start.fresh() for start in starts]

    def run(layer: int, next_batch: Callable[[], None]) -> None:
        for batch, start in enumerate(starts):
            if layer < len(start.calls):
                next_batch()
                call = start.call(layer, shared[batch])
                hidden[batch] = run_layer(decoder.layers[layer], hidden[batch], call)

    return run


def _whole(decoder: Decoder, batches: Sequence[Tensor]) -> Run:
    """The whole model on every batch, again for each layer: no more than one layer's matrices are in memory."""

    def run(layer: int, next_batch: Callable[[], None]) -> None:
        for batch in batches:
            next_batch()
            whole_logits(decoder, batch.to(decoder.device))

    return run


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear module was called with."""
    return next(iter((*args, *kwargs.values())))  # type: ignore[no-any-return]


def precise(values: Tensor) -> Tensor:
    """`values` as float64, on the same device where that has float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _inside(model: nn.Module, layer: nn.Module, modules: Sequence[str]) -> dict[str, nn.Module]:
    """Those of `modules` that are in `layer`."""
    inner = {id(module) for module in layer.modules()}
    found = {name: model.get_submodule(name) for name in modules}
    return {name: module for name, module in found.items() if id(module) in inner}


class _Sums:
    """The running sums of one layer's inputs. The first module that a tensor goes into *owns* the sum; the others share it."""

    def __init__(self) -> None:
        self.owner: dict[str, str] = {}
        self._total: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._shared: dict[str, tuple[Tensor, int]] = {}  # the owner's sum and tokens when a module last had the same input
        self._latest: dict[str, Tensor] = {}  # by owner, of this batch: kept alive, so that `is` means the same tensor

    def next_batch(self) -> None:
        self._latest = {}

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within the block, what goes into `modules` is added up."""

        def hook_of(name: str) -> Any:
            return lambda module, args, kwargs: self.add(name, input_of(args, kwargs))

        hooks = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, name: str, inputs: Tensor) -> None:
        """`inputs` [..., in] goes into module `name`."""
        tokens = inputs.numel() // inputs.shape[-1]
        if self.owner.get(name, "") != name:
            owner = next((owner for owner, tensor in self._latest.items() if tensor is inputs), name)
            before = self._shared[name][1] if name in self._shared else 0
            if owner == self.owner.get(name, owner) and owner != name and self._tokens[owner] == before + tokens:
                self.owner[name] = owner  # both had the same so far
                self._shared[name] = self._total[owner], self._tokens[owner]
                return
            self._part(name)
        self._latest[name] = inputs
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        product = precise(flat.T @ flat)
        self._total[name] = self._total[name] + product if name in self._total else product
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def _part(self, name: str) -> None:
        """From here on `name` goes its own way, from what it had together with another."""
        self.owner[name] = name
        if name in self._shared:
            self._total[name], self._tokens[name] = self._shared.pop(name)

    def means(self) -> Iterator[tuple[list[str], Tensor]]:
        """The modules that share an input, and its matrix; each is forgotten once handed out."""
        for name, (_, tokens) in list(self._shared.items()):
            if tokens != self._tokens[self.owner[name]]:
                self._part(name)
        for owner in list(self._total):
            sharing = [name for name, own in self.owner.items() if own == owner]
            yield sharing, self._total.pop(owner) / max(1, self._tokens[owner])
