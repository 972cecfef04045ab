"""Second moments of what linear modules meet on some rows: their inputs, and the gradients at their outputs. And what a change costs by them.

With δ_t the gradient of drawn labels' log-probability at a module's output and x_t its input, a change ΔW of its weight does the damage
½ mean_t (δ_tᵀ ΔW x_t)² to second order at the reference, in nats/token, as if what it does at different tokens did not interact. Taking the
directions of δ as independent of x beside its size |δ|², this is

    ½ tr(G ΔW H ΔWᵀ),    G = mean δδᵀ,    H = Σ |δ|² x xᵀ / Σ |δ|²:

two matrices price every format. H has to carry the weights |δ|²: tokens that a model uses as a sink have inputs a thousand times larger than
all others, and next to no gradient. `plain` is the mean of x xᵀ without them. Quantizers fit codes to the mean of both, each by its own mean
diagonal: less damage than with either. G is taken from every fifth token.

Layer by layer, from the last one to the first, with one layer's matrices in memory. Of a module that a pass calls more than once, or with an
expert's tokens alone, all calls are added up.

Sources: the Kronecker form: K-FAC (arXiv 1503.05671), YAQA (2505.22988); tokens weighted by their gradients: GuidedQuant (2505.07004).
Left out: interactions between tokens, between modules and between outputs beyond G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitatlas.model.decoder import Decoder
from bitatlas.model.gradients import ModuleCall, layer_calls
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.linear import is_linear

BLOCK = 256  # columns of a sum
SEED = 0  # of the labels: codes must not depend on a survey's seed
BATCH_ROWS = 8
OUTPUT_STEP = 5  # every so many tokens count for G, of a batch with more than so many:
FEW_TOKENS = 512
TINY = 1e-30
STATE_BYTES = 2**29  # of what goes into the layers that stays in memory; the rest waits in files


@dataclass
class InputMoments:
    """Sums over the tokens of modules that share their input; zeros where no token came (an expert that was never chosen).

    plain: x xᵀ; weighted: |δ|² x xᵀ by module: float32 [in, in]; outputs: δδᵀ by module, float32 [out, out].
    """

    names: tuple[str, ...]
    plain: Tensor
    weighted: dict[str, Tensor]
    outputs: dict[str, Tensor]
    weight: dict[str, Tensor]  # Σ |δ|² by module

    def add(self, inputs: Tensor, gradients: dict[str, Tensor]) -> None:
        """Add one call of all modules. inputs: [tokens, in]; gradients: module -> [tokens, out]."""
        inputs = inputs.float()
        add_products(self.plain, inputs, inputs)
        step = OUTPUT_STEP if len(inputs) > FEW_TOKENS else 1
        for name, gradient in gradients.items():
            gradient = gradient.float()
            weights = gradient.square().sum(1)  # [tokens]
            add_products(self.weighted[name], inputs * weights.unsqueeze(1), inputs)
            self.weight[name] += weights.sum()
            part = gradient[::step]
            add_products(self.outputs[name], part * (len(gradient) / max(1, len(part))), part)

    def fill(self) -> None:
        """Make the sums whole, once all calls are added."""
        for total in (self.plain, *self.weighted.values(), *self.outputs.values()):
            for start in range(0, len(total), BLOCK):
                block = slice(start, start + BLOCK)
                total[start + BLOCK :, block] = total[block, start + BLOCK :].T

    @property
    def hessian(self) -> Tensor:
        """The matrix that codes are fitted to: the mean of `plain` and of the modules' `weighted`, each by its own mean diagonal. float64 [in, in]"""
        weighted = [_by_diagonal(matrix) for matrix in self.weighted.values()]
        return _by_diagonal(self.plain) + sum(weighted[1:], weighted[0]) / len(weighted)

    def price(self, name: str, change: Tensor, tokens: int) -> Tensor:
        """Return the damage of `change` [out, in] of a module's weight, nats/token, as a scalar. `tokens`: of the rows."""
        gradients = self.outputs[name] @ change  # Σ δδᵀ ΔW [out, in]
        inputs = change @ self.weighted[name] / self.weight[name].clamp(min=TINY)
        return (gradients * inputs).sum() / (2 * tokens)


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right [width, width], which is symmetric, to `total`: from the diagonal's blocks on alone, which is half of the products."""
    for start in range(0, len(total), BLOCK):
        total[start : start + BLOCK, start:].addmm_(left[:, start : start + BLOCK].T, right[:, start:])


def to_float64(values: Tensor) -> Tensor:
    """Return `values` as float64, on the same device where that has float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _by_diagonal(matrix: Tensor) -> Tensor:
    """Return `matrix` with a mean diagonal of 1, in float64; zeros as they are."""
    matrix = to_float64(matrix)
    return matrix / matrix.diagonal().mean().clamp(min=TINY)


def module_moments(decoder: Decoder, modules: Sequence[str], rows: Tensor, seed: int = SEED) -> Iterator[InputMoments]:
    """Yield the moments of `modules`, input by input, on `rows` int64 [rows, tokens]; the model must hold the reference weights all the while.

    With each come the other modules of its input, whether they are asked for or not: which ones are changes no number.
    Raises ValueError for a module outside the decoder layers.
    """
    layers, wanted = _by_layer(decoder, modules), set(modules)
    batches = [batch.to(decoder.device) for batch in rows.split(BATCH_ROWS)]
    sums: dict[tuple[str, ...], InputMoments] = {}
    with StateCache(STATE_BYTES) as states:
        for number, (layer, calls) in enumerate(layer_calls(decoder, layers, batches, states, seed), start=1):
            _add(sums, calls)
            if number % len(batches) == 0:
                yield from (moments for moments in _by_input(decoder, layers[layer], sums) if wanted & set(moments.names))
                sums.clear()


def _by_layer(decoder: Decoder, modules: Sequence[str]) -> dict[int, list[str]]:
    """Return layer -> all its linear modules, of the layers that have one of `modules`."""
    layers: dict[int, list[str]] = {}
    names = {id(module): name for name, module in decoder.model.named_modules() if is_linear(module)}
    for index, layer in enumerate(decoder.layers):
        layers[index] = [names[id(module)] for module in layer.modules() if id(module) in names]
    wanted = set(modules)
    if wanted - {name for inside in layers.values() for name in inside}:
        raise ValueError("a module outside the decoder layers has no recorded input")
    return {index: inside for index, inside in layers.items() if wanted & set(inside)}


def _add(sums: dict[tuple[str, ...], InputMoments], calls: Sequence[ModuleCall]) -> None:
    """Add the calls of one pass; those with the same input together."""
    sharing: dict[tuple[int, tuple[int, ...]], list[ModuleCall]] = {}
    for call in calls:
        sharing.setdefault((call.inputs.data_ptr(), tuple(call.inputs.shape)), []).append(
            call
        )  # all are alive: an address is a tensor
    for group in sharing.values():
        names = tuple(dict.fromkeys(call.name for call in group))
        inputs = group[0].inputs.reshape(-1, group[0].inputs.shape[-1])
        if names not in sums:
            sums[names] = _empty(names, inputs.shape[1], {call.name: call.gradient.shape[-1] for call in group}, inputs.device)
        sums[names].add(inputs, {call.name: call.gradient.reshape(len(inputs), -1) for call in group})


def _empty(names: tuple[str, ...], inputs: int, outputs: dict[str, int], device: torch.device) -> InputMoments:
    def square(width: int) -> Tensor:
        return torch.zeros(width, width, device=device)

    weight = {name: torch.zeros((), device=device) for name in names}
    return InputMoments(
        names, square(inputs), {name: square(inputs) for name in names}, {name: square(outputs[name]) for name in names}, weight
    )


def _by_input(decoder: Decoder, names: Sequence[str], sums: dict[tuple[str, ...], InputMoments]) -> Iterator[InputMoments]:
    """Yield every module of a layer once, with those that shared its input throughout."""
    left = dict.fromkeys(names)
    for key, moments in sums.items():
        if not any(set(key) & set(other) for other in sums if other != key):
            for name in key:
                del left[name]
            moments.fill()
            yield moments
    for name in left:
        outputs, inputs = decoder.shape(name)
        alone = _empty((name,), inputs, {name: outputs}, decoder.device)
        for moments in (moments for key, moments in sums.items() if name in key):
            alone.plain += moments.plain
            alone.weighted[name] += moments.weighted[name]
            alone.outputs[name] += moments.outputs[name]
            alone.weight[name] += moments.weight[name]
        alone.fill()
        yield alone
