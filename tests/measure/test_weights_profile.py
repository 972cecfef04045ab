"""Weight profiles against numpy and scipy in float64, and against cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bitatlas.errors import UserError
from bitatlas.findings.correlations import sparsity_findings, sparsity_of, untested_sparsity
from bitatlas.measure import weights
from bitatlas.measure.weights import weight_profile
from bitatlas.records import Module, WeightProfile


def module_of(weight: torch.Tensor, name: str = "model.layers.3.mlp.up_proj") -> Module:
    return Module(name, 3, "up_proj", (weight.shape[0], weight.shape[1]), name)


def profile_of(weight: torch.Tensor, **quantized: torch.Tensor) -> weights.WeightProfile:
    return weight_profile(module_of(weight), weight, quantized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(37, 53), (1, 200), (200, 1)])
def test_agrees_with_scipy_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) ** 3 / 7 + 0.01).to(dtype)  # heavy tails, mean not zero
    quantized = (weight.float() * 4).round() / 4
    found = profile_of(weight, int2_g64=quantized)
    exact = weight.double().numpy().ravel()
    assert found.weights == exact.size
    assert found.std == pytest.approx(exact.std(), rel=1e-12)
    assert found.kurtosis == pytest.approx(stats.kurtosis(exact), rel=1e-9)
    assert found.outlier_ratio == pytest.approx(np.abs(exact).max() / exact.std(), rel=1e-12)
    assert found.outlier_share == np.mean(np.abs(exact) > 6 * exact.std())
    for threshold, share in found.sparsity_curve.items():
        assert share == np.mean(np.abs(exact) < float(threshold) * exact.std())
    error = ((exact - quantized.double().numpy().ravel()) ** 2).sum() / (exact**2).sum()
    assert found.relative_error["int2_g64"] == pytest.approx(error, rel=1e-12)


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    other = weight + 0.1
    whole = profile_of(weight, int4_g64=other)
    monkeypatch.setattr(weights, "BLOCK_WEIGHTS", 130)  # three rows, and a short block at the end
    parts = profile_of(weight, int4_g64=other)
    assert parts.sparsity_curve == whole.sparsity_curve
    assert parts.outlier_share == whole.outlier_share
    assert parts.std == pytest.approx(whole.std, rel=1e-13)
    assert parts.kurtosis == pytest.approx(whole.kurtosis, rel=1e-10)
    assert parts.relative_error["int4_g64"] == pytest.approx(whole.relative_error["int4_g64"], rel=1e-13)


def test_sparsity_counted_by_hand() -> None:
    """996 weights of +-1, four small ones: std is about 0.998, so 0.009 is below 1 % of it and 0.02 is below 3 % only."""
    weight = torch.ones(10, 100)
    weight[::2] = -1
    weight[0, :4] = torch.tensor([0.0, 0.009, 0.02, 0.05])
    found = profile_of(weight)
    assert found.sparsity == 0.002
    assert found.sparsity_curve == {"0.001": 0.001, "0.003": 0.001, "0.01": 0.002, "0.03": 0.003, "0.1": 0.004}
    assert found.kurtosis == pytest.approx(-2, abs=0.02)  # two equal peaks


def test_one_outlier_is_found() -> None:
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(2))
    weight[5, 5] = 50.0
    found = profile_of(weight)
    assert found.outlier_share == 1e-4
    assert found.outlier_ratio == pytest.approx(50 / weight.double().std(correction=0).item())


@pytest.mark.parametrize(("value", "sparsity"), [(0.0, 1.0), (0.1, 0.0)])
def test_constant_weight_has_no_scale(value: float, sparsity: float) -> None:
    weight = torch.full((7, 9), value)
    found = profile_of(weight, int2_g64=weight)
    assert (found.std, found.kurtosis, found.outlier_ratio, found.outlier_share) == (0, 0, 0, 0)
    assert found.sparsity == sparsity
    assert found.relative_error == {"int2_g64": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    weight = torch.randn(4, 5)
    broken = weight.clone()
    broken[1, 1] = bad
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.up_proj holds 1 NaN or infinite"):
        profile_of(broken)
    with pytest.raises(UserError, match="as int2_g64 holds 1 NaN"):
        profile_of(weight, int2_g64=broken)


def test_wrong_shape_is_refused() -> None:
    weight = torch.randn(4, 5)
    with pytest.raises(ValueError, match="int2_g64"):
        profile_of(weight, int2_g64=weight.T)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6), st.integers(1, 9), st.integers(2, 30))
def test_shares_do_not_depend_on_the_unit(seed: int, scale: float, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = profile_of(weight, x=weight / 2), profile_of(weight * scale, x=weight * scale / 2)
    shares = list(first.sparsity_curve.values())
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert first.sparsity == first.sparsity_curve["0.01"]
    assert second.kurtosis == pytest.approx(first.kurtosis, rel=1e-6, abs=1e-9)
    assert second.outlier_ratio == pytest.approx(first.outlier_ratio, rel=1e-9)
    assert first.relative_error["x"] == pytest.approx(0.25)
    assert second.std == pytest.approx(first.std * scale, rel=1e-9)


# --- beside a Gaussian -------------------------------------------------------------------------------------------------


def layers_of(shares: list[float], count: int = 1_000_000) -> list[WeightProfile]:
    """A module a layer, with so much of its weights below 1 % of its standard deviation."""
    return [
        WeightProfile(f"m{layer}", layer, "m", count, 1.0, share, {"0.01": share}, 0.0, 5.0, 0.0, {})
        for layer, share in enumerate(shares)
    ]


def test_drawn_gaussians_are_called_what_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    profiles = [
        weight_profile(
            Module(f"m{layer}", layer, "m", (1000, 400), "m"), torch.randn((1000, 400), generator=generator) * 0.02, {}
        )
        for layer in range(3)
    ]
    found = sparsity_of(profiles, 3)
    assert found is not None
    assert [point.threshold for point in found.curve] == [0.001, 0.003, 0.01, 0.03, 0.1]
    for point in found.curve:
        assert point.gaussian == pytest.approx(2 * stats.norm.cdf(point.threshold) - 1, rel=1e-12)
        assert point.ratio95[0] < 1.05
        assert point.ratio95[1] > 0.95
    assert found.curve[2].verdict == "as many"
    assert not found.differ
    (said,) = sparsity_findings(found)
    assert said.verdict == "does not hold"
    assert "as a Gaussian's 0.80%" in said.text
    assert "Layers do not differ" in said.text
    assert set(untested_sparsity(found)) == {"sparsity"}


@pytest.mark.parametrize(
    ("shares", "verdict", "differ"),
    [
        ([0.014] * 4, "holds", False),  # a Laplace distribution's
        ([0.004] * 4, "does not hold", False),
        ([0.0088] * 4, "inconclusive", False),  # 10 % more, and no word for it
        ([0.006, 0.010, 0.007, 0.009], "does not hold", True),
        ([0.0080, 0.0081, 0.0079, 0.0080], "does not hold", False),  # a million weights a layer: significant, and nothing
    ],
)
def test_words_want_a_size_as_well_as_a_test(shares: list[float], verdict: str, differ: bool) -> None:
    found = sparsity_of(layers_of(shares, 10_000_000), len(shares))
    assert found is not None
    # oracle: scipy's test of the table of counts
    table = [[round(share * 10_000_000), 10_000_000 - round(share * 10_000_000)] for share in shares]
    assert found.p_value == pytest.approx(stats.chi2_contingency(table).pvalue, rel=1e-9, abs=1e-300)
    assert found.differ is differ
    assert sparsity_findings(found)[0].verdict == verdict
    assert bool(untested_sparsity(found)) is not differ


def test_the_spread_between_layers_is_the_one_they_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    true = 0.008 * (1 + 0.2 * rng.standard_normal(400))
    found = sparsity_of(layers_of((rng.binomial(100_000, true) / 100_000).tolist(), 100_000), 400)
    assert found is not None
    assert found.spread == pytest.approx(0.2, rel=0.12)  # 400 layers know a standard deviation to 4 %
    assert sparsity_of(layers_of([0.01]), 2) is None
    assert sparsity_of([], 2) is None
