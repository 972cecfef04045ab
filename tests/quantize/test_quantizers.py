"""rtn against a brute-force float64 search, and the properties any quantizer must have."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize import QUANTIZERS, Quantizer, get_quantizer, gptq, hqq, rtn
from bitatlas.quantize.codes import Codes
from bitatlas.quantize.rtn import STEPS, grid, quantize
from bitatlas.records.formats import FORMATS, INTEGER_FORMATS, Format


def brute_force_group(group: np.ndarray, fmt: Format) -> float:
    """Least squared error over the same clipping steps, one group, in float64 with scales rounded to float16."""
    top = 2**fmt.bits - 1
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    if fmt.symmetric:
        high = max(high, -low)
        low = -high
    errors = []
    for step in range(STEPS):
        keep = 1 - 0.5 * step / STEPS
        scale = float(np.float16(max(np.float32(high - low) * np.float32(keep) / np.float32(top), 2.0**-24)))
        zero = 2.0 ** (fmt.bits - 1) if fmt.symmetric else min(max(np.round(-low * keep / scale), 0), top)
        codes = np.clip(np.round(group / scale) + zero, 0, top)
        errors.append((((codes - zero) * scale - group) ** 2).sum())
    return min(errors)


@pytest.mark.parametrize("name", ["int2_g32", "int3_g64", "int4_g32_sym", "int8_g128"])
def test_rtn_finds_the_best_clipping_step(name: str):
    fmt = FORMATS[name]
    weight = torch.randn(4, 172, generator=torch.Generator().manual_seed(1)) * 0.1
    found = (quantize(weight, fmt).weight().double() - weight.double()).square().numpy()
    for row in range(4):
        for start in range(0, 172, fmt.group_size):
            group = weight[row, start : start + fmt.group_size].double().numpy()
            # float32 against float64 arithmetic: a tie between two steps may fall the other way, the error may not.
            assert found[row, start : start + fmt.group_size].sum() == pytest.approx(
                brute_force_group(group, fmt), rel=1e-3, abs=1e-12
            )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 140), st.sampled_from(sorted(INTEGER_FORMATS)), st.floats(-5, 5), st.integers(0, 10**6))
def test_codes_fit_their_bits_and_weights_stay_near(out_features: int, in_features: int, name: str, exponent: float, seed: int):
    fmt = FORMATS[name]
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    codes = quantize(weight, fmt)
    assert int(codes.codes.max()) <= 2**fmt.bits - 1
    assert int(codes.zero.max()) <= 2**fmt.bits - 1
    assert bool(torch.isfinite(codes.weight()).all())
    if 10**exponent > 1e-3:  # below, float16 scales are subnormal
        error = (codes.weight() - weight).square().sum() / weight.square().sum()
        assert float(error) < (1.0 if fmt.bits == 2 else 0.2)


def test_zero_and_representable_weights_come_back_exactly():
    assert torch.equal(quantize(torch.zeros(2, 64), FORMATS["int2_g32"]).weight(), torch.zeros(2, 64))
    grid = (torch.arange(64) % 16 - 8).float().repeat(3, 1) * 0.25  # int4 with scale 0.25
    assert torch.equal(quantize(grid, FORMATS["int4_g32"]).weight(), grid)


def test_more_bits_never_hurt():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    errors = [float((quantize(weight, FORMATS[f"int{bits}_g64"]).weight() - weight).square().sum()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_unknown_quantizer_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"--quantizer.*'rnt'.*'rtn'"):
        get_quantizer("rnt")


def test_what_a_quantizer_cannot_do_is_refused_beforehand():
    for quantizer in QUANTIZERS.values():
        assert get_quantizer(quantizer.name) is quantizer
    QUANTIZERS["rtn"].check(list(INTEGER_FORMATS.values()))
    QUANTIZERS["gptq"].check(list(INTEGER_FORMATS.values()))
    missing = Quantizer("odd", QUANTIZERS["rtn"].quantize, uses_rows=False, version=1, package="no_such_package_at_all")
    with pytest.raises(UserError, match=r"--quantizer odd.*pip install 'bitatlas\[odd\]'"):
        missing.check([FORMATS["int4_g32"]])
    picky = Quantizer("odd", QUANTIZERS["rtn"].quantize, uses_rows=False, version=1, symmetric=False)
    picky.check([FORMATS["int4_g32"]])
    with pytest.raises(UserError, match=r"--quantizer odd.*int4_g32_sym.*give int4_g32$"):
        picky.check([FORMATS["int2_g32"], FORMATS["int4_g32_sym"]])


def test_rtn_gives_every_module_in_every_format_without_rows(tiny_llama: Path):
    checkpoint = open_checkpoint(str(tiny_llama), fuse=False)
    decoder, names = checkpoint.load_model(), [module.name for module in checkpoint.modules]
    formats = [FORMATS["int2_g32"], FORMATS["int8_g128_sym"]]
    found = dict(QUANTIZERS["rtn"].quantize(decoder, dict.fromkeys(names, formats), None))
    assert list(found) == names
    for name, codes in found.items():
        assert all(
            torch.equal(c.weight(), quantize(decoder.weight(name), f).weight()) for c, f in zip(codes, formats, strict=True)
        )


@pytest.mark.parametrize("name", ["int2_g32", "int3_g64_sym", "int4_g128", "int8_g32"])
@given(rows=st.integers(1, 4), columns=st.integers(1, 200), exponent=st.integers(-30, 38), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_the_compiled_search_gives_the_same_bits(name: str, rows: int, columns: int, exponent: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10.0**exponent
    counts = torch.rand(2, columns, generator=generator)
    scales, zeros = rtn._candidates(weight.nan_to_num(), fmt := FORMATS[name])
    arguments = (weight.nan_to_num(), counts, scales, zeros, fmt.group_size, 2**fmt.bits - 1)
    assert torch.equal(rtn._compiled()(*arguments), rtn._search(*arguments))
    (weight, _, *rest), first = arguments, counts[:1]
    assert torch.equal(rtn._compiled()(weight, first, *rest), rtn._search(*arguments)[:1])


def test_importance_picks_the_clipping_step_by_weighted_squares():
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(5))
    counts = torch.rand(70, generator=torch.Generator().manual_seed(6)) ** 4
    for name in ("int2_g32", "int3_g32_sym"):
        fmt = FORMATS[name]
        errors = []
        for importance in (None, torch.ones(70), counts):
            scale, zero = (part.repeat_interleave(32, 1)[:, :70] for part in grid(weight, fmt, importance))
            codes = ((weight / scale).round() + zero).clamp(0, 2**fmt.bits - 1)
            errors.append((((codes - zero) * scale - weight).square() * counts).split(32, dim=1))
        for plain, same, weighted in zip(*errors, strict=True):
            assert torch.equal(plain, same)
            assert bool((weighted.sum(1) <= plain.sum(1) * (1 + 1e-6)).all())
        assert sum(float(part.sum()) for part in errors[2]) < 0.99 * sum(float(part.sum()) for part in errors[0])


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Within the block what nobody wrote shows: `torch.empty` and its like are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def codes_of(quantizer: str, weight: torch.Tensor, fmt: Format) -> Codes:
    if quantizer == "hqq":
        pytest.importorskip("hqq")
        return hqq.quantize(weight, fmt)
    if quantizer == "rtn":
        return quantize(weight, fmt)
    inputs = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1)).double()
    return gptq.fit(weight, fmt, gptq.factorize(inputs.T @ inputs / 64))


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["rtn", "gptq", "hqq"]),
    st.sampled_from(["int2_g32", "int2_g64_sym", "int3_g32", "int4_g128_sym", "int8_g32"]),
    st.sampled_from([3e4, 2e5, 5e5, 3e6, 1e12, 1e25, 3e38]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_ranges_that_float16_scales_cannot_span(quantizer: str, name: str, huge: float, everywhere: bool, seed: int):
    """The largest scale then: what is stored is finite, in its range, and the same every time."""
    fmt = FORMATS[name]
    if fmt.symmetric and not QUANTIZERS[quantizer].symmetric:
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 72, generator=generator)
    weight = (weight * (huge / weight.abs().max()) if everywhere else weight).clamp(-huge, huge)
    weight[1, 7] = huge if seed % 2 else -huge
    found = codes_of(quantizer, weight, fmt)
    with uninitialized_memory_is_nan():
        again = codes_of(quantizer, weight, fmt)
    for part in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found, part), getattr(again, part)), part
    assert bool(torch.isfinite(found.weight()).all()) and bool((found.scale > 0).all())
    assert int(found.codes.max()) <= 2**fmt.bits - 1
    assert not fmt.symmetric or bool((found.zero == 2 ** (fmt.bits - 1)).all())


@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "hqq"])
def test_a_huge_weight_gets_the_nearest_that_can_be_stored(quantizer: str):
    """5e5 at 2 bits needs a scale of 166,667; 3 times float16's largest is what 3 steps of it reach, and rows beside it do not change.

    hqq stops when the whole weight's error does, so there they do, a little.
    """
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    plain = codes_of(quantizer, weight, FORMATS["int2_g32"]).weight()
    weight[2, 40] = 5e5
    found = codes_of(quantizer, weight, FORMATS["int2_g32"]).weight()
    assert float(found[2, 40]) == pytest.approx(3 * 65504.0, rel=1e-3)
    assert torch.allclose(found[[0, 1, 3]], plain[[0, 1, 3]], rtol=0, atol=0.05 if quantizer == "hqq" else 0)
