"""The bank on disk: what is written comes back, its size is what was said, an interrupted or damaged one is completed."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize import QUANTIZERS
from bitatlas.quantize import bank as bank_file
from bitatlas.quantize.bank import Bank, disk_bytes, load_checked, save_checked
from bitatlas.quantize.codes import pack, packed_bytes, unpack
from bitatlas.records.formats import FORMATS, stored_bytes
from tiny import make_checkpoint

NAMES = ["int2_g32", "int3_g64", "int4_g32_sym", "int8_g128"]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(1, 5), st.integers(0, 2**32))
def test_packed_codes_come_back(bits: int, columns: int, rows: int, seed: int):
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stream = pack(codes, bits)
    assert len(stream) == math.ceil(rows * columns * bits / 8)
    assert torch.equal(unpack(stream, bits, (rows, columns)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_stream_is_little_endian(bits: int):
    """Against Python's own whole numbers."""
    codes = (torch.arange(21) * 7 % 2**bits).to(torch.uint8)
    number = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(packed_bytes(21, bits), "little")


def test_wrong_packing_is_refused():
    with pytest.raises(ValueError, match="do not fit 2 bits"):
        pack(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="3 bytes are not 8 codes of 2 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), 2, (8,))


@pytest.fixture
def opened(tmp_path: Path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "model")), None, True)
    return checkpoint, checkpoint.load_model("cpu")


def test_what_is_on_disk_is_what_was_quantized_and_no_larger_than_said(opened, tmp_path: Path):
    checkpoint, decoder = opened
    modules = [module.name for module in checkpoint.modules]
    in_memory = Bank(decoder, modules, "rtn")
    Bank(decoder, modules, "rtn", folder=tmp_path / "bank").fill(NAMES)
    again = Bank(decoder, modules, "rtn", folder=tmp_path / "bank")
    for module in checkpoint.modules:
        for name in NAMES:
            assert torch.equal(again.codes(module.name, name).weight(), in_memory.codes(module.name, name).weight())
            fmt = FORMATS[name]
            stored = load_file(again._file((module.name, name)))
            held = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
            assert held <= stored_bytes(module.shape, fmt)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "bank").rglob("*.safetensors"))
    assert 0 < on_disk <= disk_bytes(checkpoint.modules, NAMES)


def test_nothing_is_quantized_twice_and_a_damaged_file_is_made_again(opened, tmp_path: Path, monkeypatch):
    checkpoint, decoder = opened
    modules = [module.name for module in checkpoint.modules]
    asked: list[tuple[str, str]] = []
    real = QUANTIZERS["rtn"]

    def counted(decoder, formats, rows):
        for name, codes in real.quantize(decoder, formats, rows):
            asked.extend((name, fmt.name) for fmt in formats[name])
            yield name, codes

    monkeypatch.setitem(QUANTIZERS, "rtn", dataclasses.replace(real, quantize=counted))
    monkeypatch.setattr(bank_file, "CACHE_BYTES", 1)  # nothing stays in memory
    filled = Bank(decoder, modules, "rtn", folder=tmp_path / "bank")
    filled.fill(["int2_g32"])
    assert asked == [(name, "int2_g32") for name in modules]
    asked.clear()
    again = Bank(decoder, modules, "rtn", folder=tmp_path / "bank")
    file = again._file((modules[3], "int2_g32"))
    file.write_bytes(file.read_bytes()[:100])
    again._file((modules[5], "int2_g32")).unlink()
    again.fill(["int2_g32"])
    again.weights(dict.fromkeys(modules, "int2_g32"))
    assert asked == [(modules[3], "int2_g32"), (modules[5], "int2_g32")]


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_a_changed_bit_is_never_computed_with(place: int, bit: int):
    """Wherever it is in a bank's file: the same tensors are read, or none. Without the hash most of these would be other weights."""
    tensors = {"codes": torch.arange(200, dtype=torch.uint8), "scale": torch.ones(3, 2, dtype=torch.float16)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.safetensors"
        save_checked(tensors, file, "m int2_g32")
        content = bytearray(file.read_bytes())
        content[place % len(content)] ^= 1 << bit
        file.write_bytes(content)
        try:
            found = load_checked(file, "m int2_g32")
        except (SafetensorError, ValueError):
            return
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_file_of_another_module_is_not_taken_for_it(tmp_path: Path):
    save_checked({"codes": torch.zeros(3)}, tmp_path / "m", "first int2_g32")
    with pytest.raises(ValueError, match="something else than was written"):
        load_checked(tmp_path / "m", "second int2_g32")


def test_a_changed_byte_in_the_bank_is_made_again(opened, tmp_path: Path):
    checkpoint, decoder = opened
    modules = [module.name for module in checkpoint.modules]
    bank = Bank(decoder, modules, "rtn", folder=tmp_path / "bank")
    bank.fill(["int2_g32"])
    file = bank._file((modules[2], "int2_g32"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-7] + bytes([whole[-7] ^ 16]) + whole[-6:])
    again = Bank(decoder, modules, "rtn", folder=tmp_path / "bank")
    assert torch.equal(again.codes(modules[2], "int2_g32").weight(), bank.codes(modules[2], "int2_g32").weight())
    assert file.read_bytes() == whole


def test_banks_of_other_weights_or_rows_are_not_taken_for_this_one(opened, tmp_path: Path):
    _, decoder = opened
    places = {
        Bank(decoder, [], "rtn", folder=tmp_path, weights_sha256=sha, identity=identity).folder
        for sha in ("a", "b")
        for identity in (None, "gptq-1-1234", "gptq-1-5678")
    }
    assert len(places) == 6


def test_quantizing_inside_a_swap_reads_the_reference(opened):
    checkpoint, decoder = opened
    name = checkpoint.modules[0].name
    bank = Bank(decoder, [name], "rtn")
    with decoder.swapped({name: torch.zeros(checkpoint.modules[0].shape)}):
        inside = bank.codes(name, "int2_g32")
    assert torch.equal(inside.weight(), Bank(decoder, [name], "rtn").codes(name, "int2_g32").weight())
    assert float(inside.weight().abs().max()) > 0
