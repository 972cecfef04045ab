"""gptq against the paper's column-by-column loop in float64 and against exhaustive search; never worse than rtn on its fit rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitatlas.data.rows import make_rows
from bitatlas.data.texts import read_documents
from bitatlas.errors import UserError
from bitatlas.measure.damage import DamageMeter
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize import QUANTIZERS, gptq, rtn
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.moments import module_moments
from bitatlas.records.formats import FORMATS, INTEGER_FORMATS, Format
from bitatlas.records.journal import Journal
from tiny import SHARED, TEXT, make_checkpoint

CANDIDATES = [FORMATS[name] for name in ("int2_g32", "int4_g64_sym")]


def correlated(inputs: int, tokens: int, seed: int, spread: float = 1.0) -> Tensor:
    """The mean of x xᵀ, float64 [in, in], of inputs that go together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    sizes = torch.exp(spread * torch.randn(inputs, generator=generator, dtype=torch.float64))
    samples = (torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ (mix + 0.3)) * sizes
    return samples.T @ samples / tokens


def random_weight(out_features: int, in_features: int, seed: int) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.1


def paper_loop(weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format, hessian: Tensor, act_order: bool) -> Tensor:
    """Codes as arXiv 2210.17323 finds them: round one input, correct the rest by H⁻¹, eliminate the input from H⁻¹; float64."""
    inputs = weight.shape[1]
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64))
    diagonal = hessian.diagonal().tolist()
    order = sorted(range(inputs), key=lambda j: -diagonal[j]) if act_order else list(range(inputs))
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    for position, j in enumerate(order):
        s, z = scale[:, j // fmt.group_size].double(), zero[:, j // fmt.group_size].double()
        codes[:, j] = ((left[:, j] / s).round() + z).clamp(0, 2**fmt.bits - 1)
        error = (left[:, j] - (codes[:, j] - z) * s) / inverse[j, j]
        rest = order[position + 1 :]
        left[:, rest] -= error.unsqueeze(1) * inverse[j, rest]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def rounded(weight: Tensor, fmt: Format, factor: gptq.CholeskyFactor, refit: bool = False) -> gptq._Rows:
    """The codes on rtn's grid, with or without refitted scales."""
    scale, zero = (part.T.contiguous() for part in rtn.grid(weight, fmt))
    weight_t = weight.T.contiguous()
    inputs = gptq._Inputs(weight_t, weight_t[factor.order], factor.damped @ weight_t)
    rows, _ = gptq._round(inputs.ordered, scale, zero, fmt, factor)
    return gptq._refit(inputs, rows, fmt, factor) if refit else rows


def error_of(weight: Tensor, rows: gptq._Rows, size: int) -> Tensor:
    """w - ŵ, float64 [out, in]."""
    return (weight - (rows.steps * rows.scale.repeat_interleave(size, 0)[: weight.shape[1]]).T).double()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["int2_g32", "int3_g64", "int4_g32_sym", "int8_g128"])
@pytest.mark.parametrize("inputs", [16, 75, 172])
def test_codes_are_those_of_the_papers_loop(name: str, inputs: int, act_order: bool):
    fmt, hessian, weight = FORMATS[name], correlated(inputs, 4 * inputs, seed=inputs), random_weight(24, inputs, seed=1)
    scale, zero = rtn.grid(weight, fmt)
    found = rounded(weight, fmt, gptq.factorize(hessian, act_order))
    codes = found.steps.T + zero.repeat_interleave(fmt.group_size, 1)[:, :inputs]
    assert torch.equal(codes, paper_loop(weight, scale, zero, fmt, hessian, act_order))
    assert not torch.equal(codes, rtn.quantize(weight, fmt).codes.float())


def test_the_cost_that_is_reported_is_the_damped_output_error():
    fmt, hessian, weight = FORMATS["int3_g32"], correlated(75, 300, seed=3), random_weight(9, 75, seed=2)
    factor = gptq.factorize(hessian)
    rows, refitted = (rounded(weight, fmt, factor, refit) for refit in (False, True))
    for found in (rows, refitted):
        error = error_of(weight, found, 32)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(75, dtype=torch.float64)
        torch.testing.assert_close(found.cost.double(), ((error @ damped) * error).sum(1), rtol=1e-4, atol=1e-9)
    assert bool((refitted.cost <= rows.cost).all())
    assert float(refitted.cost.sum()) < 0.99 * float(rows.cost.sum())
    assert torch.equal(refitted.scale, refitted.scale.half().float())


def test_the_last_groups_scale_is_the_best_float16():
    """The group that is refitted last stands at the minimum over all scales, found by trying its neighbours among the float16."""
    fmt, hessian, weight = FORMATS["int2_g32"], correlated(64, 300, seed=5), random_weight(6, 64, seed=4)
    factor = gptq.factorize(hessian)
    found = rounded(weight, fmt, factor, refit=True)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)

    def cost(scale: Tensor) -> Tensor:
        error = error_of(weight, found._replace(scale=scale), 32)
        return ((error @ damped) * error).sum(1)

    for factor_of in (1 - 2**-9, 1 + 2**-9):  # two steps of float16 or more
        moved = found.scale.clone()
        moved[-1] = (moved[-1] * factor_of).half().float()
        assert bool((moved[-1] != found.scale[-1]).all())
        assert bool((cost(moved) >= cost(found.scale)).all())


def test_exhaustive_search_over_four_inputs():
    """Never below the true optimum, at it wherever inputs are independent, at it more often than rtn where they are not."""
    fmt = FORMATS["int2_g32"]
    every = torch.tensor(list(itertools.product(range(4), repeat=4))).float()  # [256, 4]
    hits = {"gptq": 0, "rtn": 0}
    for seed in range(60):
        weight = random_weight(1, 4, seed)
        scale, zero = rtn.grid(weight, fmt)
        errors = (weight - (every - zero) * scale).double()
        for hessian in (correlated(4, 40, seed), torch.diag(correlated(4, 40, seed).diagonal())):
            damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(4, dtype=torch.float64)
            best = float(((errors @ damped) * errors).sum(1).min())
            cost = float(rounded(weight, fmt, gptq.factorize(hessian)).cost)
            assert cost >= best * (1 - 1e-5)
            if bool((hessian == hessian.diagonal().diag()).all()):
                assert cost == pytest.approx(best, rel=1e-5)
            else:
                error = (weight - (rtn.quantize(weight, fmt).codes - zero) * scale).double()
                hits["gptq"] += cost <= best * (1 + 1e-5)
                hits["rtn"] += float(((error @ damped) * error).sum()) <= best * (1 + 1e-5)
    assert hits["gptq"] > hits["rtn"] + 10


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 140), st.integers(1, 300), st.sampled_from(sorted(INTEGER_FORMATS)), st.floats(-4, 3), st.integers(0, 10**6)
)  # fmt: skip
def test_no_output_is_worse_than_with_rtn(outs: int, inputs: int, tokens: int, name: str, exponent: float, seed: int):
    fmt, hessian = FORMATS[name], correlated(inputs, tokens, seed, spread=2.0)
    dead = torch.rand(inputs, generator=torch.Generator().manual_seed(seed)) < 0.1
    hessian[dead], hessian[:, dead] = 0, 0
    weight = random_weight(outs, inputs, seed) * 10**exponent
    codes, nearest = gptq.fit(weight, fmt, gptq.factorize(hessian)), rtn.quantize(weight, fmt)
    assert codes.codes.dtype == codes.zero.dtype == torch.uint8 and codes.scale.dtype == torch.float16
    assert codes.codes.shape == nearest.codes.shape and codes.scale.shape == codes.zero.shape == nearest.scale.shape
    assert int(codes.codes.max()) < 2**fmt.bits and int(codes.zero.max()) < 2**fmt.bits
    assert fmt.symmetric <= bool((codes.zero == 2 ** (fmt.bits - 1)).all())
    assert bool(torch.isfinite(codes.weight()).all())
    ours, theirs = (((weight.double() - q.weight().double()) @ hessian * (weight.double() - q.weight().double())).sum(1)
                    for q in (codes, nearest))  # fmt: skip
    assert bool((ours <= theirs).all())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 140), st.sampled_from(["int2_g32", "int3_g64_sym", "int4_g128"]), st.integers(0, 10**6))
def test_plain_torch_costs_the_same(outs: int, inputs: int, name: str, seed: int):
    """Compiled or not, sums are taken in another order: a code at a tie may differ, what a row costs hardly does."""
    fmt, weight, factor = FORMATS[name], random_weight(outs, inputs, seed), gptq.factorize(correlated(inputs, 4 * inputs, seed))
    compiled = rounded(weight, fmt, factor, refit=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "_compiled_leaf", lambda: None)
        patch.setattr(gptq, "_compiled_descent", lambda: None)
        plain = rounded(weight, fmt, factor, refit=True)
    same = (compiled.steps == plain.steps).all(0)
    assert float(same.float().mean()) > 0.8 or outs < 5
    torch.testing.assert_close(compiled.scale[:, same], plain.scale[:, same], rtol=2**-10, atol=2**-24)
    torch.testing.assert_close(compiled.cost[same], plain.cost[same], rtol=1e-3, atol=1e-9)


def test_formats_together_get_the_codes_of_each_alone():
    weight, factor = random_weight(40, 172, 7), gptq.factorize(correlated(172, 600, seed=7))
    formats = [FORMATS[name] for name in ("int2_g64", "int3_g64", "int4_g32_sym")]
    for fmt, together in zip(formats, gptq.fit_all(weight, formats, factor), strict=True):
        alone = gptq.fit(weight, fmt, factor)
        assert all(torch.equal(getattr(together, part), getattr(alone, part)) for part in ("codes", "scale", "zero"))


def test_an_input_that_nothing_reaches_is_rounded_by_its_weights_alone():
    weight, fmt = random_weight(4, 70, 0), FORMATS["int3_g32"]
    codes = gptq.fit(weight, fmt, gptq.factorize(torch.zeros(70, 70, dtype=torch.float64)))
    ours, theirs = ((weight - q.weight()).square().sum(1) for q in (codes, rtn.quantize(weight, fmt)))
    assert bool((ours <= theirs * (1 + 1e-6)).all())


def opened(folder: Path):
    checkpoint = open_checkpoint(str(folder), fuse=False)
    rows = make_rows([TEXT], checkpoint.load_tokenizer(), "text", (20, 2, 2), 16, 128, 0).fit
    return [module.name for module in checkpoint.modules], checkpoint.load_model(), rows


def test_one_cholesky_an_input_for_all_its_modules_and_formats(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    names, decoder, rows = opened(tiny_llama)
    before = {name: p.clone() for name, p in decoder.model.named_parameters()}
    calls: list[int] = []
    real = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: (calls.append(len(matrix)), real(matrix))[1])
    found = dict(gptq.quantize(decoder, dict.fromkeys(names, CANDIDATES), rows))
    assert sorted(calls) == sorted(3 * [64, 64, 64, 96])  # a layer's q/k/v, o, gate/up and down
    assert set(found) == set(names) and all(len(codes) == 2 for codes in found.values())
    assert all(torch.equal(before[name], p) for name, p in decoder.model.named_parameters())
    again = dict(gptq.quantize(decoder, dict.fromkeys(names[3:9], CANDIDATES[:1]), rows))
    for name, (codes,) in again.items():
        assert torch.equal(codes.codes, found[name][0].codes) and torch.equal(codes.scale, found[name][0].scale)


def test_rows_in_parts_are_rows_in_one_go(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    names, decoder, rows = opened(tiny_llama)
    whole = dict(gptq.quantize(decoder, dict.fromkeys(names[-2:], CANDIDATES), rows))
    monkeypatch.setattr(gptq, "MOST_ROWS", 32)  # parts of 8
    for name, of_formats in gptq.quantize(decoder, dict.fromkeys(names[-2:], CANDIDATES), rows):
        for codes, before in zip(of_formats, whole[name], strict=True):
            assert codes.codes.shape == before.codes.shape and codes.group_size == before.group_size
            assert (codes.weight() != before.weight()).float().mean() < 0.01  # ties, by the order of sums


def test_modules_come_one_by_one(tiny_llama: Path):
    names, decoder, rows = opened(tiny_llama)
    stream = gptq.quantize(decoder, dict.fromkeys(names, CANDIDATES), rows)
    assert {next(stream)[0], next(stream)[0]} <= set(names[-7:])  # the last layer comes first


def test_transposed_weights_are_fitted_the_right_way_round(tmp_path: Path):
    names, decoder, rows = opened(make_checkpoint(tmp_path / "gpt2", "gpt2"))
    hessians = {name: moments.hessian for moments in module_moments(decoder, names, rows) for name in moments.names}
    for name, (codes, _) in gptq.quantize(decoder, dict.fromkeys(names, CANDIDATES), rows):
        weight = decoder.weight(name)
        assert codes.codes.shape == weight.shape
        errors = ((weight - q.weight()).double() for q in (codes, rtn.quantize(weight, CANDIDATES[0])))
        ours, theirs = (float(((error @ hessians[name]) * error).sum()) for error in errors)
        assert ours < 0.9 * theirs


@pytest.mark.parametrize("rows", [None, torch.zeros(0, 8, dtype=torch.int64)])
def test_without_rows_it_is_refused_at_once(tiny_llama: Path, rows: Tensor | None):
    names, decoder, _ = opened(tiny_llama)
    with pytest.raises(UserError, match=r"--quantizer gptq.*--tokens"):
        QUANTIZERS["gptq"].quantize(decoder, dict.fromkeys(names, CANDIDATES), rows)


def test_damage_of_a_trained_model_on_rows_not_seen(babyllama: Path):
    checkpoint = open_checkpoint(str(babyllama), fuse=False)
    decoder, tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()
    names = [module.name for module in checkpoint.modules]
    fit, test = (
        make_rows(read_documents(str(SHARED / "data" / f"tinystories_{part}.txt")), tokenizer, part, (24, 1, 1), 192, 256, 0).fit
        for part in ("fit", "test")
    )
    damage = {}
    for quantizer in ("rtn", "gptq"):
        meter = DamageMeter(decoder, Bank(decoder, names, quantizer, rows=fit), "", quantizer, Journal(None))
        plans = {fmt: dict.fromkeys(names, fmt) for fmt in ("int2_g32", "int4_g32")}
        damage[quantizer] = {fmt: float(rows.mean()) for fmt, rows in meter.plans(plans, test).items()}
    print(damage)
    assert damage["gptq"]["int2_g32"] < 0.3 * damage["rtn"]["int2_g32"]
    assert damage["gptq"]["int4_g32"] < 0.45 * damage["rtn"]["int4_g32"]
