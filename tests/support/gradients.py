"""A plain pass through a whole model, forwards and backwards, beside which moments of inputs and gradients are held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitatlas.model.decoder import Decoder
from bitatlas.model.gradients import label_points, labels_at
from bitatlas.quantize.moments import SEED, InputMoments, module_moments
from bitatlas.quantize.rtn import quantize
from bitatlas.records.formats import FORMATS


def plain_pass(decoder: Decoder, names: list[str], rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs [tokens, in] and gradients of the drawn labels' log-probability [tokens, out] of every module, by autograd alone."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = [
        decoder.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: calls[name].append((args[0].detach().flatten(0, -2), output))
        )
        for name in names
    ]
    for parameter in decoder.model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        logits = decoder.model(input_ids=rows, use_cache=False).logits.float()
        labels = labels_at(torch.softmax(logits.detach(), -1), label_points(rows, SEED, 0))
        likelihood = torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).sum()
        outputs = [output for name in names for _, output in calls[name]]
        gradients = iter(torch.autograd.grad(likelihood, outputs, allow_unused=True))
    for parameter in decoder.model.parameters():
        parameter.requires_grad_(False)
    for handle in handles:
        handle.remove()
    result = {}
    for name in names:
        pairs = [(x, next(gradients), output) for x, output in calls[name]]
        flat = [(x, (torch.zeros_like(output) if g is None else g).flatten(0, -2)) for x, g, output in pairs]
        width = decoder.shape(name)
        xs, gs = zip(*flat, strict=True) if flat else ((torch.zeros(0, width[1]),), (torch.zeros(0, width[0]),))
        result[name] = torch.cat(xs).double(), torch.cat(gs).double()
    return result


def check_moments(decoder: Decoder, names: list[str], rows: Tensor) -> list[InputMoments]:
    expected, found = plain_pass(decoder, names, rows), list(module_moments(decoder, names, rows))
    assert sorted(name for moments in found for name in moments.names if name in names) == sorted(names)
    for moments in found:
        for name in set(moments.names) & set(names):
            x, delta = expected[name]
            weights = delta.square().sum(1)
            scale = float(x.abs().max()) ** 2 if len(x) else 1.0
            torch.testing.assert_close(moments.plain.double(), x.T @ x, rtol=1e-3, atol=1e-5 * scale)
            weighted = (x * weights[:, None]).T @ x
            torch.testing.assert_close(
                moments.weighted[name].double(), weighted, rtol=5e-3, atol=2e-3 * float(weighted.abs().max())
            )
            outputs = delta.T @ delta
            torch.testing.assert_close(moments.outputs[name].double(), outputs, rtol=5e-3, atol=2e-3 * float(outputs.abs().max()))
            change = quantize(decoder.weight(name), FORMATS["int3_g32"]).weight() - decoder.weight(name)
            total = weights.sum()
            price = (
                ((outputs @ change.double()) * (change.double() @ weighted)).sum() / total / (2 * rows.numel()) if total else 0.0
            )
            assert float(moments.price(name, change, rows.numel())) == pytest.approx(float(price), rel=1e-2, abs=1e-12)
    return found
