"""hqq's codes stand for the weights that the package itself would use. Needs the extra: pip install 'bitatlas[hqq]'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize import QUANTIZERS, rtn
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.hqq import quantize
from bitatlas.records.formats import FORMATS

package = pytest.importorskip("hqq.core.quantize")
ASYMMETRIC = sorted(name for name, fmt in FORMATS.items() if not fmt.symmetric)


def random_weight(outs: int, inputs: int, seed: int) -> torch.Tensor:
    """Weights with heavy tails, which is what the p-norm is for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, inputs, generator=generator) * 0.05
    return weight * torch.where(torch.rand(outs, inputs, generator=generator) < 0.02, 6.0, 1.0)


@pytest.mark.parametrize("name", ASYMMETRIC)
@pytest.mark.parametrize("inputs", [128, 172, 20])
def test_weights_are_the_packages_own_within_float16(name: str, inputs: int):
    fmt, weight = FORMATS[name], random_weight(16, inputs, 1)
    whole = inputs // fmt.group_size * fmt.group_size
    parts = []
    for piece in (weight[:, :whole], weight[:, whole:]):
        if piece.numel():
            size = min(fmt.group_size, piece.shape[1])
            packed, meta = package.Quantizer.quantize(piece, fmt.bits, group_size=size, axis=1, device="cpu")
            parts.append(package.Quantizer.dequantize(packed, {**meta, "compute_dtype": torch.float32}))
    codes = quantize(weight, fmt)
    assert codes.zero.dtype == codes.scale.dtype == torch.float16 and codes.codes.dtype == torch.uint8
    assert int(codes.codes.max()) == 2**fmt.bits - 1
    # Half an ulp of float16, 2**-11, of the zero-point and of the scale each.
    step = codes.scale.float().repeat_interleave(fmt.group_size, 1)[:, :inputs]
    zero = codes.zero.float().abs().repeat_interleave(fmt.group_size, 1)[:, :inputs]
    bound = (step * zero + codes.weight().abs()) * 2.0**-11 * 1.05
    assert bool(((codes.weight() - torch.cat(parts, dim=1)).abs() <= bound + 1e-9).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_p_norm_of_the_errors_is_below_that_of_its_starting_point(bits: int):
    fmt, weight = FORMATS[f"int{bits}_g64"], random_weight(64, 256, 2)
    start, meta = package.Quantizer.quantize(weight, bits, group_size=64, axis=1, device="cpu", optimize=False)
    plain = package.Quantizer.dequantize(start, {**meta, "compute_dtype": torch.float32})
    ours = quantize(weight, fmt).weight()
    assert float((ours - weight).abs().pow(0.7).sum()) < float((plain - weight).abs().pow(0.7).sum())
    nearest = rtn.quantize(weight, fmt).weight()  # which has the least squares: hqq must not be far off
    assert float((ours - weight).square().sum()) < 2.5 * float((nearest - weight).square().sum())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5), st.integers(1, 140), st.sampled_from(ASYMMETRIC), st.floats(-6, 4), st.floats(-5, 5), st.integers(0, 10**6)
)
def test_codes_fit_their_bits_and_weights_are_finite(
    outs: int, inputs: int, name: str, exponent: float, offset: float, seed: int
):
    fmt = FORMATS[name]
    codes = quantize((random_weight(outs, inputs, seed) + offset) * 10**exponent, fmt)
    assert int(codes.codes.max()) < 2**fmt.bits
    assert bool(torch.isfinite(codes.weight()).all())


def test_a_bank_of_it(tiny_llama: Path):
    checkpoint = open_checkpoint(str(tiny_llama), fuse=False)
    decoder = checkpoint.load_model()
    name = checkpoint.modules[0].name
    bank = Bank(decoder, [name], "hqq")
    QUANTIZERS["hqq"].check([FORMATS["int4_g32"]])
    assert torch.equal(bank.weights({name: "int4_g32"})[name], quantize(bank.reference(name), FORMATS["int4_g32"]).weight())
    assert not bank.codes(name, "int4_g32").codes.is_inference()
