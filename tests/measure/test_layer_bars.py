"""What is called critical is critical: a layer that was made fragile on purpose, and layers of a trained model on fresh rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

import bitatlas.data as demo
from bitatlas.data.rows import make_rows
from bitatlas.findings.shares import LayerRows, layer_records
from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.screens import pairs_for, screen_kinds, screen_layers, screen_orders, screen_uniform, screen_units
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import uniform
from tiny import make_checkpoint

QUIET = Reporter(quiet=True)
TOLERANCE = 0.05  # nats/token
LAYERS, FRAGILE = 6, 2


def opened(folder: Path, rows: int, row_length: int) -> tuple[list, DamageMeter, torch.Tensor]:
    checkpoint = open_checkpoint(str(folder), fuse=False)
    decoder = checkpoint.load_model()
    bank = Bank(decoder, [m.name for m in checkpoint.modules], "rtn")
    meter = DamageMeter(decoder, bank, checkpoint.info.weights_sha256, "rtn", Journal(None))
    text = demo.TEXT_FILE.read_text(encoding="utf-8")
    cut = make_rows([text], checkpoint.load_tokenizer(), "text", (2, 2, rows), row_length, checkpoint.info.context, 0)
    return checkpoint.modules, meter, cut.test


def layers_of(folder: Path, low: str, high: str, rows: int, row_length: int) -> LayerRows:
    modules, meter, test = opened(folder, rows, row_length)
    widths = screen_uniform(meter, modules, (low, high), test, QUIET)
    layers = screen_layers(meter, modules, low, high, test, QUIET)
    weights = np.bincount([m.layer for m in modules], [m.weights for m in modules])
    return LayerRows(widths[high], widths[low], layers.lowered, layers.raised, weights, low_name=low, high_name=high)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers do about equal damage: next to its loud embeddings each adds little, so errors do not grow on the way."""
    folder = make_checkpoint(tmp_path_factory.mktemp("even") / "even", num_hidden_layers=LAYERS, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 100
    model.save_pretrained(folder)
    return folder


def make_fragile(folder: Path, layer: int, factor: float = 12.0) -> float:
    """Outliers in a layer's weights that leave its function as it is; returns the largest change of a logit.

    up_proj's row c and v_proj's row r are divided, what reads them (columns of down_proj and o_proj) multiplied: then every group of 32
    of these columns has outliers, and the other weights of the group get a coarser grid.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp, attention = model.model.layers[layer].mlp, model.model.layers[layer].self_attn
    ids = torch.arange(3, 99)[None]
    with torch.no_grad():
        before = model(ids).logits
        channels = [5, 21, 40, 60, 70, 90]  # two in each group of 32
        mlp.up_proj.weight[channels] /= factor
        mlp.down_proj.weight[:, channels] *= factor
        for row in (3, 19):  # of 2 key-value heads of 16, each read by two of the 4 heads
            attention.v_proj.weight[row] /= factor
            head, at = divmod(row, 16)
            for reader in (2 * head, 2 * head + 1):
                attention.o_proj.weight[:, 16 * reader + at] *= factor
        change = float((model(ids).logits - before).abs().max())
    model.save_pretrained(folder)
    return change


def test_a_planted_fragile_layer_is_the_one_that_is_called_critical(even: Path, tmp_path: Path):
    before = layer_records(layers_of(even, "int2_g32", "int4_g32", 48, 32), TOLERANCE)
    assert before[FRAGILE].verdict != "critical"
    shutil.copytree(even, tmp_path / "fragile")
    assert make_fragile(tmp_path / "fragile", FRAGILE) < 1e-5
    after = layer_records(layers_of(tmp_path / "fragile", "int2_g32", "int4_g32", 48, 32), TOLERANCE)
    assert [record.layer for record in after if record.verdict == "critical"] == [FRAGILE]


@pytest.mark.slow
def test_layers_called_critical_hold_on_fresh_rows():
    """Twenty random halves call layers critical, the other halves check them: criticality above 1 is a mean above 0, so a t test does."""
    rows = layers_of(demo.MODEL_DIR, "int2_g128", "int4_g128", 64, 96)
    excess = rows.values - rows.values.sum(axis=1, keepdims=True) * rows.weights / rows.weights.sum()  # [rows, layers]
    held, confirmed = [], []
    for seed in range(20):
        called_on, fresh = np.split(np.random.default_rng(seed).permutation(rows.rows), 2)
        own = LayerRows(
            rows.high[called_on], rows.low[called_on], rows.lowered[:, called_on], rows.raised[:, called_on], rows.weights
        )
        called = [record.layer for record in layer_records(own, TOLERANCE, seed=seed) if record.verdict == "critical"]
        assert called
        held.append(bool((excess[fresh][:, called].mean(axis=0) > 0).all()))
        confirmed += list(stats.ttest_1samp(excess[fresh][:, called], 0, alternative="greater").pvalue < 0.025)
    print(f"{sum(held)} of 20 resamplings hold; {np.mean(confirmed):.1%} of {len(confirmed)} calls with their interval above 1")
    assert np.mean(held) >= 0.95


# --- the screens themselves --------------------------------------------------------------------------------------------


def test_sampled_orders_are_orders_of_measured_models(tiny_llama: Path):
    """Oracle: all eight models of three layers, and from them what each of the three pairs of reversed orders must give."""
    modules, meter, test = opened(tiny_llama, 8, 24)
    low, high = "int2_g32", "int4_g32"
    found = screen_orders(meter, modules, low, high, test, 0, QUIET)
    assert found is not None
    assert found.added.shape == (pairs_for(3), 8, 3)
    damage = {}
    for bits in range(8):
        plan = {m.name: low if bits >> m.layer & 1 else high for m in modules}
        damage[bits] = meter.plans({"one": plan}, test)["one"]
    possible = []
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2)):  # the other three are their reverses
        added = np.zeros((8, 3))
        for one in (order, order[::-1]):
            bits = 0
            for layer in one:
                added[:, layer] += (damage[bits | 1 << layer] - damage[bits]) / 2
                bits |= 1 << layer
        possible.append(added)
    for pair in found.added:
        assert min(np.abs(pair - added).max() for added in possible) < 1e-12
    assert (pairs_for(1), pairs_for(16), pairs_for(16, short=True), pairs_for(80)) == (0, 6, 3, 3)


def test_kinds_and_units_by_row_are_the_models_they_stand_for(tiny_llama: Path):
    modules, meter, test = opened(tiny_llama, 6, 24)
    low, high = "int2_g32", "int4_g32"
    kinds = screen_kinds(meter, modules, low, high, test, QUIET)
    units = screen_units(meter, modules, (low, high), test, QUIET)
    meter.journal = Journal(None)
    place = kinds.kinds.index("down_proj")
    plan = {m.name: low if m.kind == "down_proj" else high for m in modules}
    assert (meter.plans({"one": plan}, test)["one"] == kinds.lowered[place]).all()
    name = modules[0].unit
    plan = {**uniform(modules, low), **{m.name: high for m in modules if m.unit == name}}
    # a swap's damage is a sum of two terms in float32, a plan's is one
    np.testing.assert_allclose(units.by_row[f"uniform:{low}"][name][high], meter.plans({"one": plan}, test)["one"], atol=2e-6)
    assert units.damage[f"uniform:{low}"][name][high] == pytest.approx(units.by_row[f"uniform:{low}"][name][high].mean())
