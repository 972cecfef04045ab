"""A plain pass through a whole model, forwards and backwards, beside which moments of inputs and gradients are held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.prices import price_units
from bitatlas.model.decoder import Decoder
from bitatlas.model.gradients import label_points, labels_at
from bitatlas.model.layerwise import split_rows
from bitatlas.quantize.moments import SEED, InputMoments, module_moments
from bitatlas.records import Module
from bitatlas.records.sizes import units_of


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
            x, _ = expected[name]
            scale = float(x.abs().max()) ** 2 if len(x) else 1.0
            torch.testing.assert_close(moments.plain.double(), x.T @ x, rtol=1e-3, atol=1e-5 * scale)
        deltas = [expected[name][1].square().sum(1) for name in moments.names if name in names]
        # weights are shared by all that have this input at some call, told apart or not, and relative to a batch
        others = any(
            len(expected[name][0]) == len(x) and torch.equal(expected[name][0], x) for name in {*names} - {*moments.names}
        )
        noise = any(float(delta.mean()) < 1e-20 for delta in deltas)
        if (
            len(split_rows(decoder, rows)) == 1
            and len(deltas) == len(moments.names)
            and len(x) == rows.numel()
            and not (others or noise)
        ):
            weights = sum(delta / delta.mean().clamp(min=1e-30) for delta in deltas) / len(deltas)
            weighted = (x * weights[:, None]).T @ x
            torch.testing.assert_close(moments.weighted.double(), weighted, rtol=1e-2, atol=5e-3 * float(weighted.abs().max()))
    return found


def check_prices(meter: DamageMeter, modules: Sequence[Module], rows: Tensor) -> None:
    """Compare the prices of all units with the plain pass's own."""
    formats = ("int2_g32", "int4_g32")
    expected = plain_pass(meter.decoder, [module.name for module in modules], rows)
    prices = price_units(meter, modules, formats, rows, SEED)
    for unit, price in zip(units_of(modules), prices, strict=True):
        for name, value in zip(formats, price, strict=True):
            scores: dict[int, Any] = {}
            for module in unit.modules:
                x, delta = expected[module.name]
                change = (meter.bank.weights({module.name: name})[module.name] - meter.bank.reference(module.name)).double()
                scores[len(x)] = scores.get(len(x), 0.0) + ((x @ change.T) * delta).sum(1)
            true = sum(float(score.square().sum()) for score in scores.values()) / (2 * rows.numel())
            assert value == pytest.approx(true, rel=2e-2, abs=1e-12)
