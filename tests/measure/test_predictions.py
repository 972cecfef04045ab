"""Kept predictions: their divergence from another model's is the exact one where all is kept, and close to it, with its error told, where not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitatlas.measure.predictions import COLUMNS, TOP, Kept, deviate, keep, rounded_layers
from tiny import make_checkpoint

KL, VARIANCE, LOSS, SAME, SHARED = (COLUMNS.index(name) for name in ("kl", "variance", "loss", "same_top", "top5"))


def kept(logits: Tensor, targets: Tensor, seed: int = 0, **sizes: int) -> Kept:
    return keep(logits, targets, torch.Generator().manual_seed(seed), **sizes)


def exact_kl(first: Tensor, second: Tensor) -> Tensor:
    """In float64, over the whole vocabulary."""
    p, q = torch.log_softmax(first.double(), -1), torch.log_softmax(second.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


def drawn(count: int, vocabulary: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits like a language model's, those of a damaged one, and tokens that came."""
    generator = torch.Generator().manual_seed(seed)
    first = 3 * torch.randn(count, vocabulary, generator=generator)
    second = first + spread * torch.randn(count, vocabulary, generator=generator)
    return first, second, torch.randint(vocabulary, (count,), generator=generator)


@given(st.integers(6, 1024), st.floats(0, 3), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_small_vocabulary_is_exact(vocabulary: int, spread: float, seed: int):
    first, second, targets = drawn(5, vocabulary, spread, seed)
    told = deviate(kept(first, targets), second, targets)
    torch.testing.assert_close(told[:, KL].double(), exact_kl(first, second), atol=2e-5, rtol=1e-4)  # float32 sums
    assert (told[:, VARIANCE] == 0).all()
    loss = torch.nn.functional.cross_entropy(second, targets, reduction="none")
    torch.testing.assert_close(told[:, LOSS], loss, atol=1e-4, rtol=1e-5)
    for row, (p, q) in enumerate(zip(first, second, strict=True)):  # by brute force
        best = [sorted(range(vocabulary), key=lambda token, v=values: -float(v[token]))[:TOP] for values in (p, q)]
        assert told[row, SAME] == (best[0][0] == best[1][0])
        assert told[row, SHARED] == len(set(best[0]) & set(best[1]))


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_the_estimate_is_unbiased_and_its_error_told(spread: float):
    first, second, targets = drawn(40, 8000, spread)
    exact = exact_kl(first, second).mean()
    errors, variances = [], []
    for seed in range(60):
        told = deviate(kept(first, targets, seed), second, targets).double()
        errors.append(told[:, KL].mean() - exact)
        variances.append(told[:, VARIANCE].sum() / len(told) ** 2)
    mean, told_error = torch.stack(errors).mean(), torch.stack(variances).mean().sqrt()
    seen_error = torch.stack(errors).std()
    assert abs(mean) < 4 * told_error / 60**0.5 + 1e-6  # 1e-6: float32 of what is kept
    assert 0.5 * told_error - 1e-6 < seen_error < 1.5 * told_error + 1e-6  # systematic draws vary a little less than free ones
    assert told_error < 0.02 * exact  # of 8000 tokens 1024 are kept


def test_the_most_probable_alone_would_not_do():
    """What the estimate is for: with 512 of 8000 tokens the divergence within the rest is lost."""
    first, second, targets = drawn(40, 8000, 0.5)
    held = kept(first, targets)
    p, q = held.log_p[:, :512].double(), torch.log_softmax(second.double(), -1).gather(-1, held.ids[:, :512].long())
    rest, other = 1 - p.exp().sum(-1), 1 - q.exp().sum(-1)
    lower = ((p.exp() * (p - q)).sum(-1) + rest * (rest / other).log()).mean()
    exact = exact_kl(first, second).mean()
    assert lower < 0.95 * exact
    assert deviate(held, second, targets)[:, KL].mean() == pytest.approx(float(exact), rel=0.02)


def test_a_token_that_only_the_other_finds_likely():
    """No draw meets it; the known mass outside of what was kept shows it."""
    first, _, targets = drawn(20, 8000, 0.0)
    unlikely = first.argmin(-1)
    second = first.clone()
    second[torch.arange(20), unlikely] = first.logsumexp(-1)  # half of the other's mass
    exact = exact_kl(first, second)
    told = deviate(kept(first, targets), second, targets)[:, KL].double()
    torch.testing.assert_close(told, exact, rtol=0.02, atol=1e-3)


def test_draws_repeat_with_their_seed():
    first, _, targets = drawn(3, 3000, 0.0)
    assert torch.equal(kept(first, targets, 5).ids, kept(first, targets, 5).ids)
    assert not torch.equal(kept(first, targets, 5).ids, kept(first, targets, 6).ids)


def test_rounded_layers_round_and_leave_no_trace(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "model")).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with rounded_layers(model):
            rounded = model(tokens).logits
        assert torch.equal(model(tokens).logits, before)
    assert 0 < float((rounded - before).abs().max()) < 0.1 * float(before.abs().max())
