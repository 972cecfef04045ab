"""What is measured does not depend on how rows are batched or on how many threads compute, beyond rounding in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from bitatlas.measure import interactions, prices
from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import uniform

FORMATS = ["int2_g32", "int4_g32"]
# Sums of 24 tokens x 300 words in float32, in another order: about 1e-6 of the damage; labels may flip where a
# cumulative probability is within rounding of the drawn point, which none of these rows does.
CLOSE = {"rtol": 2e-4, "atol": 1e-7}


def measured(folder: Path, quantizer: str = "rtn") -> dict[str, np.ndarray]:
    """Everything that a search asks the model for, without a journal to remember it."""
    checkpoint = open_checkpoint(str(folder), None, False)
    decoder = checkpoint.load_model("cpu")
    modules = checkpoint.modules
    rows = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(3))
    bank = Bank(decoder, [m.name for m in modules], quantizer, rows=rows)
    meter = DamageMeter(decoder, bank, "", bank.identity, Journal(None))
    low, high = (uniform(modules, name) for name in FORMATS)
    swaps = [Swap(layer, {m.name: "int2_g32" for m in modules if m.layer == layer}) for layer in range(3)]
    together = interactions.swap_interactions(meter, high, swaps, rows)
    return {
        "plans": meter.plans({"low": low}, rows)["low"],
        "swaps": np.stack(list(meter.swaps(high, {str(s.layer): s for s in swaps}, rows).values())),
        "prices": prices.price_units(meter, modules, FORMATS, rows),
        "added": together.added,
        "together": together.together,
    }


def same(found: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in found.items():
        size = float(np.abs(values).max())  # a number near 0 is a difference of large ones
        np.testing.assert_allclose(other[name], values, rtol=CLOSE["rtol"], atol=max(CLOSE["atol"], 2e-4 * size), err_msg=name)


@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_the_batch_does_not_matter(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int):
    whole = measured(tiny_llama)
    monkeypatch.setattr("bitatlas.model.layerwise.batch_rows", lambda *_: rows_at_once)
    same(whole, measured(tiny_llama))


def test_the_threads_do_not_matter(tmp_path: Path):
    folder = tiny.make_checkpoint(tmp_path / "wide", hidden_size=128, intermediate_size=192)
    threads = torch.get_num_threads()
    one = measured(folder)
    try:
        torch.set_num_threads(2)
        two = measured(folder)
    finally:
        torch.set_num_threads(threads)
    same(one, two)
