"""AutoRound's codes are those of its own weights, for every family. Needs the extra: pip install 'bitatlas[autoround]'."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.data.rows import make_rows
from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.layerwise import layer_inputs, run_layer
from bitatlas.model.linear import weight_of
from bitatlas.quantize import QUANTIZERS, rtn
from bitatlas.quantize.autoround import recover, tune
from bitatlas.records.formats import FORMATS
from tiny import TEXT, make_checkpoint

pytest.importorskip("auto_round")
FEW = 5  # steps
pytestmark = pytest.mark.slow


def opened(folder: Path):
    checkpoint = open_checkpoint(str(folder), fuse=False)
    rows = make_rows([TEXT], checkpoint.load_tokenizer(), "text", (20, 2, 2), 16, 128, 0).fit
    return [module.name for module in checkpoint.modules], checkpoint.load_model(), rows


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "int2_g32"), ("llama", "int8_g64"), ("gpt2", "int3_g64"), ("gpt_neox", "int4_g32_sym"), ("qwen3", "int4_g128")],
)
def test_codes_stand_for_the_packages_own_weights(family: str, name: str, tmp_path: Path):
    changes = {} if family == "gpt2" else {"intermediate_size": 76}  # neither 32 nor a group size divides it
    names, decoder, rows = opened(make_checkpoint(tmp_path / family, family, **changes))
    fmt = FORMATS[name]
    tuned = tune(decoder, fmt, rows, steps=FEW)
    for module in names:
        codes = recover(tuned, module, fmt)
        assert torch.equal(codes.weight(), weight_of(tuned.get_submodule(module)))
        assert int(codes.codes.max()) < 2**fmt.bits
        assert codes.scale.dtype == torch.float16 and bool((codes.scale > 0).all())
        assert not fmt.symmetric or bool((codes.zero == 2 ** (fmt.bits - 1)).all())
        nearest = rtn.quantize(decoder.weight(module), fmt)
        assert codes.scale.shape == nearest.scale.shape and codes.zero.shape == nearest.zero.shape


def test_the_process_and_the_model_are_left_as_they_were(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    import auto_round  # noqa: F401  (what importing it writes is not ours)

    for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names, decoder, rows = opened(tiny_llama)
    before = {name: p.clone().detach().requires_grad_(p.requires_grad) for name, p in decoder.model.named_parameters()}
    logits = decoder.model(rows).logits.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    environment = dict(os.environ)
    capfd.readouterr()
    tuned = tune(decoder, FORMATS["int3_g32"], rows, steps=FEW)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.rglob("*"))
    assert dict(os.environ) == environment
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate() and states[2] == np.random.get_state()[1].tolist()
    assert all(
        torch.equal(before[name], p) and p.requires_grad == before[name].requires_grad
        for name, p in decoder.model.named_parameters()
    )
    assert torch.equal(decoder.model(rows).logits, logits)
    torch.manual_seed(7)
    with torch.no_grad():
        again = tune(decoder, FORMATS["int3_g32"], rows, steps=FEW)
    assert all(torch.equal(weight_of(tuned.get_submodule(name)), weight_of(again.get_submodule(name))) for name in names)


def test_a_layers_output_changes_less_than_with_rtn(tiny_llama: Path):
    names, decoder, rows = opened(tiny_llama)
    first, fmt = names[:7], FORMATS["int2_g32"]
    layer, start = decoder.layers[0], layer_inputs(decoder, rows)
    with torch.no_grad():
        reference = run_layer(layer, start.hidden, start.calls[0])
    errors = {}
    for quantizer in ("autoround", "rtn"):
        found = dict(QUANTIZERS[quantizer].quantize(decoder, {name: [fmt] for name in first}, rows))
        assert list(found) == first
        with decoder.swapped({name: codes.weight() for name, (codes,) in found.items()}), torch.no_grad():
            output = run_layer(layer, start.hidden, start.calls[0])
        errors[quantizer] = float((output - reference).square().sum())
    assert errors["autoround"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("rows", [None, torch.zeros(0, 8, dtype=torch.int64)])
def test_without_rows_it_is_refused_at_once(tiny_llama: Path, rows: torch.Tensor | None):
    names, decoder, _ = opened(tiny_llama)
    with pytest.raises(UserError, match=r"--quantizer autoround.*--tokens"):
        QUANTIZERS["autoround"].quantize(decoder, {name: [FORMATS["int4_g32"]] for name in names}, rows)
