"""A model whose layers are read when they run is the model in memory: same logits, same measurements, one layer's weights at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.data.rows import make_rows
from bitatlas.errors import UserError
from bitatlas.measure.damage import DamageMeter, StateBudget, Swap
from bitatlas.measure.interactions import swap_interactions
from bitatlas.measure.prices import price_units
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.model.hidden_states import StateCache, remove_leftovers
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal
from tiny import FAMILIES, TEXT, make_checkpoint

FORMATS = ("int2_g32", "int4_g32")


def opened(folder: Path, tmp_path: Path, quantizer: str = "rtn") -> tuple[Checkpoint, DamageMeter, DamageMeter, torch.Tensor]:
    """Meters of one checkpoint: in memory, and streamed in a room for a few states."""
    checkpoint = open_checkpoint(str(folder), fuse=False)
    rows = make_rows([TEXT], checkpoint.load_tokenizer(), "text", (20, 2, 2), 16, 128, 0).fit
    names = [module.name for module in checkpoint.modules]
    meters = []
    for decoder, budget in (
        (checkpoint.load_model(), StateBudget()),
        (checkpoint.stream_model(), StateBudget(2**16, 2**12, whole=False, folder=tmp_path)),
    ):
        bank = Bank(decoder, names, quantizer, rows=rows[:8])
        meters.append(DamageMeter(decoder, bank, checkpoint.info.weights_sha256, bank.identity, Journal(None), budget))
    return checkpoint, *meters, rows


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_those_of_the_model_in_memory(family: str, tmp_path: Path):
    checkpoint, memory, streamed, rows = opened(make_checkpoint(tmp_path / family, family), tmp_path)
    assert torch.equal(streamed.decoder.model(rows[:3]).logits, memory.decoder.model(rows[:3]).logits)
    plan = {module.name: FORMATS[module.layer % 2] for module in checkpoint.modules}
    with memory.decoder.swapped(memory.bank.weights(plan)):
        expected = memory.decoder.model(rows[:3]).logits
    with streamed.decoder.swapped(streamed.bank.weights(plan)):
        assert torch.equal(streamed.decoder.model(rows[:3]).logits, expected)
    for module in checkpoint.modules:
        assert torch.equal(streamed.decoder.weight(module.name), memory.decoder.weight(module.name))


def test_one_layers_weights_are_there_while_it_runs(tiny_llama: Path, tmp_path: Path):
    _, _, streamed, rows = opened(tiny_llama, tmp_path)
    layers, there = streamed.decoder.layers, []

    def count(*_: object) -> None:
        there.append(sum(not p.isnan().any() for layer in layers for p in layer.parameters()))

    hooks = [layer.mlp.register_forward_hook(count) for layer in layers]
    streamed.decoder.model(rows[:2])
    for hook in hooks:
        hook.remove()
    assert there == [len(list(layers[0].parameters()))] * 3
    assert all(p.isnan().all() and p.untyped_storage().nbytes() == 4 for layer in layers for p in layer.parameters())


def test_swaps_nest_and_restore_around_and_inside_a_held_layer(tiny_llama: Path, tmp_path: Path):
    _, memory, streamed, _ = opened(tiny_llama, tmp_path)
    name = "model.layers.1.mlp.up_proj"
    reference = memory.decoder.weight(name)
    one, two = torch.ones_like(reference), torch.full_like(reference, 2)
    with streamed.decoder.held(1):
        with streamed.decoder.swapped({name: one}):
            with streamed.decoder.swapped({name: two}):
                assert torch.equal(streamed.decoder.weight(name), two)
            assert torch.equal(streamed.decoder.weight(name), one)
        assert torch.equal(streamed.decoder.weight(name), reference)
    with streamed.decoder.swapped({name: one}), streamed.decoder.held(1), streamed.decoder.swapped({name: two}):
        assert torch.equal(streamed.decoder.weight(name), two)
    assert torch.equal(streamed.decoder.weight(name), reference)


def test_measurements_equal_those_in_memory_and_layers_are_read_once_a_pass(tiny_llama: Path, tmp_path: Path):
    checkpoint, memory, streamed, rows = opened(tiny_llama, tmp_path)
    base = {module.name: "int4_g32" for module in checkpoint.modules}
    swaps = {module.name: Swap(module.layer, {module.name: "int2_g32"}) for module in checkpoint.modules}
    plans = {"low": dict.fromkeys(base, "int2_g32"), "high": base}
    pairs = [(meter.plans(plans, rows), meter.swaps(base, swaps, rows)) for meter in (memory, streamed)]
    for mine, theirs in zip(*pairs, strict=True):
        assert all(mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6) for name in mine)
    several = [swap_interactions(meter, base, list(swaps.values()), rows) for meter in (memory, streamed)]
    assert several[0].added == pytest.approx(several[1].added, rel=1e-4, abs=1e-6)
    assert several[0].together == pytest.approx(several[1].together, rel=1e-3, abs=1e-3 * np.abs(several[0].together).max())
    prices = [price_units(meter, checkpoint.modules, FORMATS, rows) for meter in (memory, streamed)]
    assert prices[0] == pytest.approx(prices[1], rel=1e-3, abs=1e-4 * prices[0].max())
    assert not list(tmp_path.glob(".states-*")) or streamed.reference.states.spilled


def test_a_pass_reads_each_layer_once_however_many_batches(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, _, streamed, rows = opened(tiny_llama, tmp_path)
    monkeypatch.setattr("bitatlas.model.layerwise.batch_rows", lambda *_: 2)
    object.__setattr__(streamed.budget, "state_bytes", 2**24)
    streamed.reference.see(streamed.chunks(rows)[0])
    before = streamed.decoder.stream.reads
    assert len(streamed.chunks(rows)) == 1 and len(streamed.chunks(rows)[0]) == 10
    streamed.plans({name: {module.name: name for module in checkpoint.modules} for name in FORMATS}, rows)
    assert streamed.decoder.stream.reads - before == 3


def test_gptq_fits_the_same_codes(tiny_llama: Path, tmp_path: Path):
    checkpoint, memory, streamed, _ = opened(tiny_llama, tmp_path, "gptq")
    for module in checkpoint.modules:
        mine, theirs = (meter.bank.codes(module.name, "int2_g32") for meter in (memory, streamed))
        assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scale, theirs.scale)


def test_weights_that_change_under_the_run_are_told(tmp_path: Path):
    _, _, streamed, rows = opened(make_checkpoint(tmp_path / "model"), tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="changed while it was in use"):
        streamed.decoder.model(rows[:1])


def test_names_that_are_not_the_models_own_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.query.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--memory: model.layers.0.self_attn.q_proj.weight is not in the weights files"):
        open_checkpoint(str(folder)).stream_model()


def test_states_in_files_come_back_bit_for_bit_and_the_files_go(tmp_path: Path):
    with StateCache(100, tmp_path) as shelf:
        tensors = {number: torch.randn(5, 4, generator=torch.Generator().manual_seed(number)) for number in range(4)}
        for number, tensor in tensors.items():
            shelf.put(number, tensor[:, 1:])
        assert shelf.spilled == 3  # 60 of 100 bytes hold one
        shelf.put(3, tensors[0])
        assert torch.equal(shelf.get(3), tensors[0])
        assert all(torch.equal(shelf.get(number), tensors[number][:, 1:]) for number in range(3))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    (tmp_path / ".states-killed").mkdir()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
