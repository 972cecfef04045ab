"""Everything that is measured stays on the model's device: run on one that refuses to meet the CPU's tensors, with the CPU's results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.measure import damage, interactions, prices
from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.quantize import moments
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal
from elsewhere import ELSEWHERE, Elsewhere

FORMATS = ["int2_g32", "int4_g32"]


def meter_on(checkpoint: Checkpoint, device: torch.device) -> DamageMeter:
    decoder = checkpoint.load_model()
    for module in decoder.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.data.to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    return DamageMeter(decoder, Bank(decoder, [m.name for m in checkpoint.modules], "rtn"), "", "rtn", Journal(None))


def measured(checkpoint: Checkpoint, device: torch.device) -> dict[str, np.ndarray]:
    rows = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(3))
    base = {m.name: "int4_g32" for m in checkpoint.modules}
    swaps = [Swap(m.layer, {m.name: "int2_g32"}) for m in checkpoint.modules[:3]]
    meter = meter_on(checkpoint, device)
    together = interactions.swap_interactions(meter, base, swaps, rows)
    return {
        "plans": meter.plans({"base": base}, rows)["base"],
        "swaps": meter.swaps(base, {"first": swaps[0]}, rows)["first"],
        "prices": prices.price_units(meter, checkpoint.modules, FORMATS, rows),
        "together": together.together,
        **{" ".join(part.names): part.hessian.cpu().numpy() for part in moments.module_moments(meter.decoder, list(base), rows)},
    }


def test_another_device_measures_the_same(tiny_llama: Path):
    checkpoint = open_checkpoint(str(tiny_llama))
    here = measured(checkpoint, torch.device("cpu"))
    with Elsewhere():
        there = measured(checkpoint, ELSEWHERE)
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=1e-3, atol=1e-4 * np.abs(values).max(), err_msg=name)


MISTAKES = {
    "changes on the CPU": (
        prices,
        "changes_of",
        lambda bank, name, formats: torch.zeros(len(formats), *bank.reference(name).shape),
    ),
    "sums on the CPU": (moments, "_empty", lambda names, width, _: moments.InputMoments(names, *torch.zeros(2, width, width))),
    "labels on the CPU": (interactions, "labels_at", lambda q, points: torch.zeros(points.shape, dtype=torch.int64)),
    "damage on the CPU": (damage, "kl_per_token", lambda log_p, p, logits: torch.zeros(logits.shape[:2])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_forgotten_device_is_caught(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, mistake: str):
    monkeypatch.setattr(*MISTAKES[mistake])
    with Elsewhere(), pytest.raises(RuntimeError, match="on the CPU"):
        measured(open_checkpoint(str(tiny_llama)), ELSEWHERE)
