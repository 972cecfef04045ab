"""Moments of inputs and gradients: those of a plain pass through the whole model; prices are their trace. More shapes: `test_families`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitatlas.data.rows import make_rows
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize.moments import InputMoments, module_moments
from gradients import check_moments
from tiny import FAMILIES, TEXT, make_checkpoint


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_moments_are_those_of_a_plain_pass(family: str, tmp_path: Path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / family, family)))
    decoder, names = checkpoint.load_model(), [module.name for module in checkpoint.modules]
    rows = make_rows([TEXT], checkpoint.load_tokenizer(), "text", (10, 2, 2), 16, 128, 0).fit
    check_moments(decoder, names, rows)
    some = [names[1], names[-1]]
    alone = {name: moments for moments in module_moments(decoder, some, rows) for name in moments.names if name in some}
    every = {name: moments for moments in module_moments(decoder, names, rows) for name in moments.names}
    for name in some:  # which ones are asked for changes no number
        assert torch.equal(alone[name].hessian, every[name].hessian) and alone[name].names == every[name].names


def test_a_module_without_tokens_has_zeros():
    empty = InputMoments(("a",), torch.zeros(4, 4), torch.zeros(4, 4))
    empty.add(torch.ones(3, 4), [torch.zeros(3, 2)])
    empty.fill()
    expected = torch.ones(4, 4).double() * 3 / (8 + 3) / 2
    expected.fill_diagonal_(1 / 2)
    torch.testing.assert_close(empty.hessian, expected, rtol=1e-6, atol=0)
    assert not empty.weighted.any()
