"""First and second order against finite differences and brute-force KL in float64; both contractions; nothing depends on the batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bitatlas.measure.curvature as curvature
from bitatlas.data.rows import make_rows
from bitatlas.measure.curvature import contract, expand, final_gradients, label_points, labels_at
from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.measure.interactions import pair_rows, swap_interactions
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.model.layerwise import logits_of, picks_words, record
from bitatlas.plan.expansion import quadratic_model
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal
from tiny import TEXT, make_checkpoint

NAMES = ("int2_g32", "int4_g32")


def setup(folder: Path, dtype: torch.dtype = torch.float64, fuse: bool = False) -> tuple[Checkpoint, DamageMeter, Tensor]:
    checkpoint = open_checkpoint(str(folder), fuse=fuse)
    decoder = checkpoint.load_model(dtype=dtype)
    bank = Bank(decoder, [m.name for m in checkpoint.modules], "rtn")
    meter = DamageMeter(decoder, bank, checkpoint.info.weights_sha256, "rtn", Journal(None))
    rows = make_rows([TEXT], checkpoint.load_tokenizer(), "text", (6, 2, 2), 16, 128, 0).fit
    return checkpoint, meter, rows


def damage(meter: DamageMeter, base: dict[str, str], moved: dict[str, str], share: float, rows: Tensor) -> np.ndarray:
    """KL(reference || base + share x (moved - base)), float64, by row."""
    with torch.no_grad():
        reference = torch.log_softmax(meter.decoder.model(rows).logits, -1)
        start = {
            name: meter.bank.weights({name: base[name]})[name] if name in base else meter.bank.reference(name) for name in moved
        }
        end = meter.bank.weights(moved)
        weights = {**meter.bank.weights(base), **{name: start[name] + share * (end[name] - start[name]) for name in moved}}
        with meter.decoder.swapped(weights):
            changed = torch.log_softmax(meter.decoder.model(rows).logits, -1)
    return (reference.exp() * (reference - changed)).sum(-1).mean(-1).numpy()


@pytest.mark.parametrize(("family", "step", "tolerance"), [("gpt2", 1e-4, 1e-5), ("llama", 1e-2, 3e-3)])
def test_first_order_equals_finite_differences_row_by_row(family: str, step: float, tolerance: float, tmp_path: Path):
    """Llama computes norms and rotations in float32 whatever the model's dtype: a small step would measure that rounding."""
    checkpoint, meter, rows = setup(make_checkpoint(tmp_path / family, family))
    base = {m.name: "int2_g32" for m in checkpoint.modules}
    found = expand(meter, checkpoint.modules, NAMES, base, rows, draws=1)
    assert (found.first[:, :, 0] == 0).all()
    for index, module in enumerate(checkpoint.modules):
        ahead, behind = (damage(meter, base, {module.name: "int4_g32"}, sign * step, rows) for sign in (1, -1))
        assert found.first[:, index, 1] == pytest.approx((ahead - behind) / (2 * step), rel=tolerance, abs=tolerance / 50)


def test_first_order_is_zero_at_the_reference(tiny_llama: Path):
    checkpoint, meter, rows = setup(tiny_llama)
    assert (expand(meter, checkpoint.modules, NAMES, {}, rows, draws=1).first == 0).all()


def test_second_order_approaches_the_true_damage_of_swaps_and_pairs(tiny_llama: Path):
    """At the reference KL = z'Qz + O(step^3). Sampling noise of the diagonal: sqrt(2 / (rows x draws)) = 3 %, four of them are allowed."""
    checkpoint, meter, rows = setup(tiny_llama)
    modules, step = checkpoint.modules, 1e-2
    problem = quadratic_model(expand(meter, modules, NAMES, {}, rows, draws=300), shrinkage=1.0)
    spread = np.sqrt(np.diag(problem.matrix))
    for u, v in ((0, 1), (2, 6), (4, 16), (9, 20)):
        i, j = 2 * u, 2 * v  # both at int2_g32
        one, other = ({modules[w].name: "int2_g32"} for w in (u, v))
        single = [damage(meter, {}, plan, step, rows).mean() / step**2 for plan in (one, other)]
        assert single == pytest.approx([problem.matrix[i, i], problem.matrix[j, j]], rel=0.15)
        both = damage(meter, {}, one | other, step, rows).mean() / step**2
        assert abs(both - sum(single) - 2 * problem.matrix[i, j]) < 0.15 * spread[i] * spread[j]


def test_measured_swaps_and_their_interactions(tmp_path: Path):
    """Against float64 KL of each swap, and of pairs of small (4-bit) ones at the reference, where the quadratic model is good."""
    checkpoint, meter, rows = setup(make_checkpoint(tmp_path / "gpt2", "gpt2"))
    modules = checkpoint.modules
    swaps = [Swap(modules[u].layer, {modules[u].name: "int4_g32"}) for u in (0, 1, 3, 5, 7, 8, 10)]
    found = swap_interactions(meter, {}, swaps, rows)
    # 2 labels x 96 tokens give 7 % of noise; the mean of 30 draws leaves the instrument's own error
    together = np.mean([swap_interactions(meter, {}, swaps, rows, seed).together for seed in range(30)], axis=0)
    true, predicted = [], []
    for i, swap in enumerate(swaps):
        assert found.added[i] == pytest.approx(damage(meter, {}, dict(swap.assignment), 1.0, rows).mean(), rel=1e-3)
        for j in range(i):
            both = damage(meter, {}, {**swap.assignment, **swaps[j].assignment}, 1.0, rows).mean()
            true.append(both - found.added[i] - found.added[j])
            predicted.append(2 * together[i, j])
    assert np.corrcoef(true, predicted)[0, 1] > 0.9
    assert np.diag(together) == pytest.approx(found.added, rel=0.35)
    pairs = [(0, 1), (2, 5), (6, 3)]
    by_row = pair_rows(meter, {}, swaps, pairs, rows)
    assert by_row.shape == (len(rows), len(pairs))
    np.testing.assert_allclose(by_row.mean(axis=0), [2 * found.together[pair] for pair in pairs], rtol=1e-9)


def test_units_add_up_their_modules(tiny_llama: Path):
    alone, meter, rows = setup(tiny_llama)
    fused = open_checkpoint(str(tiny_llama), fuse=True).modules
    by_module = expand(meter, alone.modules, NAMES, {}, rows, draws=2)
    by_unit = expand(meter, fused, NAMES, {}, rows, draws=2)
    units = list(dict.fromkeys(m.unit for m in fused))
    for index, unit in enumerate(units):
        members = [i for i, m in enumerate(fused) if m.unit == unit]
        assert by_unit.scores[:, :, index] == pytest.approx(by_module.scores[:, :, members].sum(axis=2), rel=1e-9, abs=1e-12)


def test_both_contractions_are_the_same_number(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    x, delta, changes = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 5, 8), (3, 5, 6), (4, 6, 8)))
    exact = torch.einsum("rto,rti,foi->rf", delta, x, changes)
    for answer in (True, False):
        monkeypatch.setattr(curvature, "by_gradient", lambda *shape, answer=answer: answer)
        assert torch.allclose(contract(x, delta, changes), exact, rtol=1e-12)


def test_nothing_depends_on_the_batch_or_the_journal(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, meter, rows = setup(tiny_llama, torch.float32)
    base = {m.name: "int2_g32" for m in checkpoint.modules}
    whole = expand(meter, checkpoint.modules, NAMES, base, rows)
    again = expand(meter, checkpoint.modules, NAMES, base, rows)
    assert (whole.scores == again.scores).all()
    assert (whole.first == again.first).all()
    monkeypatch.setattr("bitatlas.measure.damage.batch_rows", lambda *_: 1)
    single = expand(meter, checkpoint.modules, NAMES, base, rows)
    assert single.scores == pytest.approx(whole.scores, rel=1e-3, abs=1e-3 * np.abs(whole.scores).max())
    assert single.first == pytest.approx(whole.first, rel=1e-3, abs=1e-5 * np.abs(whole.first).max())
    assert all(not p.requires_grad and p.grad is None for p in meter.decoder.model.parameters())


@pytest.mark.parametrize("picks", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_gradients_at_the_last_hidden_state_are_those_of_each_draw_alone(
    family: str, picks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint, meter, rows = setup(make_checkpoint(tmp_path / family, family))
    decoder = meter.decoder
    assert picks_words(decoder)
    if not picks:
        monkeypatch.setattr(curvature, "picks_words", lambda _: False)
    meter.budget = replace(meter.budget, logit_bytes=4 * 300 * len(rows) * 7)  # spans of 7 tokens
    meter.reference.see([rows])
    with decoder.swapped(meter.bank.weights({m.name: "int2_g32" for m in checkpoint.modules})):
        final = record(decoder, [rows]).final[0]
        first, of_draws = final_gradients(meter, rows, final, 5, 3)
        leaf = final.clone().requires_grad_(True)
        log_q = torch.log_softmax(logits_of(decoder, rows, leaf), -1)
    log_p = torch.cat([meter.reference.log_p(rows, span) for span in meter.spans(rows)], dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum() / rows.shape[1]
    assert first is not None
    assert torch.allclose(first, torch.autograd.grad(kl, leaf, retain_graph=True)[0], rtol=1e-4, atol=1e-8)
    for draw, gradient in enumerate(of_draws):
        labels = labels_at(log_q.detach().exp().float(), label_points(rows, 5, draw))
        chosen = log_q.gather(-1, labels.unsqueeze(-1)).sum()
        (exact,) = torch.autograd.grad(chosen, leaf, retain_graph=True)
        assert torch.allclose(gradient, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
