"""What a decoder says of its model, and that nothing is left on the model by asking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.decoder import Decoder, decoder_of, once
from bitatlas.model.layerwise import is_chain
from tiny import FAMILIES, make_checkpoint


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_decoder_knows_its_model_and_leaves_nothing_on_it(family: str, tmp_path: Path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path, family)))
    decoder = checkpoint.load_model()
    assert (decoder.vocabulary, decoder.width, decoder.context, len(decoder.layers)) == (300, 64, 128, 3)
    assert decoder.vocabulary == checkpoint.vocabulary
    before = [set(vars(module)) for module in decoder.model.modules()]
    assert is_chain(decoder)
    assert [set(vars(module)) for module in decoder.model.modules()] == before
    again = decoder_of(decoder.model)
    assert (again.layers_path, again.layers) == (checkpoint.layers_path, decoder.layers)
    for module in checkpoint.modules:
        weight = decoder.weight(module.name)
        assert tuple(weight.shape) == decoder.shape(module.name) == module.shape
        x = torch.randn(2, 3, module.shape[1], generator=torch.Generator().manual_seed(0))
        linear = decoder.model.get_submodule(module.name)
        expected = x @ weight.T + (0.0 if linear.bias is None else linear.bias)
        torch.testing.assert_close(linear(x), expected)


def test_what_is_tried_out_is_tried_once_for_each_decoder(tiny_llama: Path):
    asked: list[Decoder] = []

    @once
    def ask(decoder: Decoder) -> int:
        asked.append(decoder)
        return len(asked)

    first, second = (open_checkpoint(str(tiny_llama)).load_model() for _ in range(2))
    assert [ask(first), ask(second), ask(first), ask(second)] == [1, 2, 1, 2]
    assert asked == [first, second]
