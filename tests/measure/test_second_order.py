"""Prices and measured interactions of swaps, against brute-force KL in float64; nothing depends on the journal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitatlas.data.rows import make_rows
from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.measure.interactions import pair_rows, swap_interactions
from bitatlas.measure.prices import price_units
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.model.gradients import label_points, labels_at
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal
from tiny import TEXT, make_checkpoint

NAMES = ("int2_g32", "int4_g32")


def setup(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Checkpoint, DamageMeter, Tensor]:
    checkpoint = open_checkpoint(str(folder), fuse=False)
    decoder = checkpoint.load_model(dtype=dtype)
    bank = Bank(decoder, [m.name for m in checkpoint.modules], "rtn")
    meter = DamageMeter(decoder, bank, checkpoint.info.weights_sha256, "rtn", Journal(None))
    rows = make_rows([TEXT], checkpoint.load_tokenizer(), "text", (6, 2, 2), 16, 128, 0).fit
    return checkpoint, meter, rows


def damage(meter: DamageMeter, changed: dict[str, str], rows: Tensor, share: float = 1.0) -> float:
    """KL(reference || reference + share x changes), float64, nats/token."""
    with torch.no_grad():
        reference = torch.log_softmax(meter.decoder.model(rows).logits, -1)
        whole = {name: (meter.bank.reference(name), weight) for name, weight in meter.bank.weights(changed).items()}
        with meter.decoder.swapped({name: start + share * (end - start) for name, (start, end) in whole.items()}):
            moved = torch.log_softmax(meter.decoder.model(rows).logits, -1)
    return float((reference.exp() * (reference - moved)).sum(-1).mean())


def test_prices_of_the_last_layer_are_the_true_damage_of_small_changes(tiny_llama: Path):
    """Behind its attention no token sees another, so nothing is left out. Sampling noise: sqrt(2 / (96 tokens x 60 draws)) = 2 %, five are allowed."""
    checkpoint, meter, rows = setup(tiny_llama)
    last, step = max(m.layer for m in checkpoint.modules), 1e-2
    modules = [m for m in checkpoint.modules if m.layer == last and m.kind in ("o_proj", "gate_proj", "up_proj", "down_proj")]
    assert len(modules) == 4
    prices = np.mean([price_units(meter, modules, NAMES, rows, seed) for seed in range(60)], axis=0)
    for module, price in zip(modules, prices, strict=True):
        exact = [damage(meter, {module.name: name}, rows, step) / step**2 for name in NAMES]
        assert price == pytest.approx(exact, rel=0.1)


def test_prices_come_from_the_journal_and_leave_the_model_as_it_was(tiny_llama: Path):
    checkpoint, meter, rows = setup(tiny_llama, torch.float32)
    first = price_units(meter, checkpoint.modules, NAMES, rows)
    assert (first == price_units(meter, checkpoint.modules, NAMES, rows)).all()
    assert (first > 0).all() and (first[:, 0] > first[:, 1]).all()  # two bits do more than four
    assert (first != price_units(meter, checkpoint.modules, NAMES, rows, seed=1)).all()
    assert all(not p.requires_grad and p.grad is None for p in meter.decoder.model.parameters())


def test_measured_swaps_and_their_interactions(tmp_path: Path):
    """Against float64 KL of each swap, and of pairs of small (4-bit) ones at the reference, where the quadratic model is good."""
    checkpoint, meter, rows = setup(make_checkpoint(tmp_path / "gpt2", "gpt2"))
    modules = checkpoint.modules
    swaps = [Swap(modules[u].layer, {modules[u].name: "int4_g32"}) for u in (0, 1, 3, 5, 7, 8, 10)]
    measured = swap_interactions(meter, {}, swaps, rows)
    # 2 labels x 96 tokens give 7 % of noise; the mean of 30 draws leaves the instrument's own error
    together = np.mean([swap_interactions(meter, {}, swaps, rows, seed).together for seed in range(30)], axis=0)
    true, predicted = [], []
    for i, swap in enumerate(swaps):
        assert measured.added[i] == pytest.approx(damage(meter, dict(swap.assignment), rows), rel=1e-3)
        for j in range(i):
            both = damage(meter, {**swap.assignment, **swaps[j].assignment}, rows)
            true.append(both - measured.added[i] - measured.added[j])
            predicted.append(2 * together[i, j])
    assert np.corrcoef(true, predicted)[0, 1] > 0.9
    assert np.diag(together) == pytest.approx(measured.added, rel=0.35)
    pairs = [(0, 1), (2, 5), (6, 3)]
    by_row = pair_rows(meter, {}, swaps, pairs, rows)
    assert by_row.shape == (len(rows), len(pairs))
    np.testing.assert_allclose(by_row.mean(axis=0), [2 * measured.together[pair] for pair in pairs], rtol=1e-9)


def test_labels_are_drawn_from_the_distribution_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch):
    """Each label is the word in whose stretch of the cumulative distribution its point lies."""
    q = torch.softmax(torch.randn(3, 40, 17, generator=torch.Generator().manual_seed(0)).double(), -1)
    rows = torch.arange(120).reshape(3, 40)
    points = torch.stack([label_points(rows, 5, draw) for draw in range(2)], dim=-1)
    labels = labels_at(q, points)
    assert labels.shape == points.shape and (labels[..., 0] == labels_at(q, points[..., 0])).all()
    ends = q.cumsum(-1)
    upper, lower = ends.gather(-1, labels), (ends - q).gather(-1, labels)
    assert ((points <= upper + 1e-12) & (points >= lower - 1e-12)).all()
    monkeypatch.setattr("bitatlas.model.layerwise.CACHED_BYTES", 4 * 17 * 7)  # blocks of 7 tokens
    assert (labels_at(q, points) == labels).all()
