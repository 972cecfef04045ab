"""Opening checkpoints: every family's modules, and one clear line for each kind of wrong input."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from bitatlas.errors import UserError
from bitatlas.model.checkpoint import check_causal, check_finite, open_checkpoint, open_model
from bitatlas.model.decoder import decoder_of
from tiny import FAMILIES, make_checkpoint

KINDS = {
    "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gpt_neox": 4, "gpt2": 4,
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_modules_and_sizes_of_every_family(family: str, tmp_path: Path):
    folder = make_checkpoint(tmp_path / family, family)
    checkpoint = open_checkpoint(str(folder), fuse=False)
    assert checkpoint.info.layers == 3
    assert checkpoint.info.heads == 4
    assert len(checkpoint.modules) == 3 * KINDS[family]
    assert len({m.kind for m in checkpoint.modules}) == KINDS[family]
    decoder = checkpoint.load_model()
    assert len(decoder.layers) == 3
    for module in checkpoint.modules:
        assert tuple(decoder.weight(module.name).shape) == module.shape
        assert f".{module.layer}." in module.name
    tensors = load_file(folder / "model.safetensors")
    assert checkpoint.info.total_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert checkpoint.info.other_bytes == checkpoint.info.total_bytes - 4 * checkpoint.info.quantizable_weights
    check_finite(checkpoint)


def test_units_fuse_what_runtimes_fuse(tiny_llama: Path):
    fused = open_checkpoint(str(tiny_llama), fuse=True).modules
    units = [m.unit for m in fused if m.layer == 1]
    assert units[:3] == ["model.layers.1.self_attn.qkv"] * 3
    assert len(set(units)) == 4
    loose = open_checkpoint(str(tiny_llama), fuse=False).modules
    assert [m.unit for m in loose] == [m.name for m in loose]


def refusal(folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        check_finite(open_checkpoint(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "copy")


def test_no_such_path():
    assert "no such checkpoint folder" in refusal("./nowhere/at-all")


def test_unknown_hub_name_offline():
    assert "hub did not give it" in refusal("nobody/nothing")


def test_folder_without_weights(copy: Path):
    (copy / "model.safetensors").unlink()
    assert "no safetensors weights" in refusal(copy)


def test_folder_without_config(tmp_path: Path):
    assert "config.json" in refusal(tmp_path)


def test_pickle_weights_are_not_read(copy: Path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickle" in refusal(copy)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_truncated_weights(copy: Path, keep: float):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "model.safetensors" in refusal(copy)


def test_garbage_header(copy: Path):
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"[1]x")
    assert "not a whole safetensors file" in refusal(copy)


def test_missing_shard(copy: Path):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in refusal(copy)


def test_index_may_not_leave_the_folder(copy: Path):
    (copy / "model.safetensors").unlink()  # which would go before an index
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder" in refusal(copy)


def test_nan_weights_are_named(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert name in refusal(copy)


def test_encoder_is_refused(tmp_path: Path):
    config = BertConfig(architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path)
    assert "BertForMaskedLM is not a decoder-only" in refusal(tmp_path)


def test_quantized_checkpoint_is_refused(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    assert "quantized already" in refusal(copy)


def test_tensors_that_are_missing_are_named(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 1 tensors"):
        open_checkpoint(str(copy)).load_model()


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": "x"},
        {"num_attention_heads": 0},
        {"max_position_embeddings": "long"},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [3]},
    ],
    ids=str,
)
def test_config_that_makes_no_sense(copy: Path, changes: dict):
    change_config(copy, **changes)
    assert "transformers cannot build" in (said := refusal(copy)) or "config.json cannot be used" in said


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", "[" * 100_000], ids=lambda content: content[:5])
def test_config_that_is_no_config(copy: Path, content: str):
    (copy / "config.json").write_text(content)
    assert "config.json cannot be used" in refusal(copy)


def test_empty_name():
    assert "name is empty" in refusal("")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null, "b": "c"}}'])
def test_damaged_index(copy: Path, content: str):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(content)
    assert "not a readable index" in refusal(copy)


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b'{"a": {"dtype": "F32", "data_offsets": ["x", 0]}}', b'{"a": {"dtype": 3, "data_offsets": [0, 0]}}'],
    ids=["nested", "offsets", "dtype"],
)
def test_damaged_header(copy: Path, header: bytes):
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not a whole safetensors file" in refusal(copy)


@pytest.mark.parametrize("content", [None, "{}", "[" * 100_000, '{"model": {"type": "new"}}'], ids=["none", "{}", "[[", "new"])
def test_tokenizer_that_cannot_be_used(copy: Path, content: str | None):
    if content is None:
        (copy / "tokenizer.json").unlink()
    else:
        (copy / "tokenizer.json").write_text(content)
    for load in (open_checkpoint(str(copy)).load_tokenizer, lambda: open_model(str(copy))):
        with pytest.raises(UserError, match="no usable tokenizer") as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 64}, r"layers\.0\.mlp\.\w+_proj\.weight has shape \(.*but the config says"),
        ({"num_hidden_layers": 2}, r"hold model\.layers\.2\..*but the config says 2 layers"),
    ],
)
def test_weights_that_the_config_does_not_describe(copy: Path, capfd: pytest.CaptureFixture, changes: dict, said: str):
    change_config(copy, **changes)
    capfd.readouterr()
    with pytest.raises(UserError, match=said) as caught:
        open_checkpoint(str(copy)).load_model()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("model.layers.1.mlp.up_proj.bias", True),
        ("layers.1.mlp.up_proj.bias", True),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.1.self_attn.bias", False),
        ("vision.layers.30.mlp.up_proj.weight", False),
    ],
)
def test_unexpected_tensors(copy: Path, name: str, refused: bool):
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, name: torch.ones(8)}, copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(copy))
    if not refused:
        checkpoint.load_model()
        return
    with pytest.raises(UserError, match=r"hold .*layers\.1\.mlp\.up_proj\.bias, which the config has no place for"):
        checkpoint.load_model()


def test_comparing_needs_whole_weights_too(copy: Path):
    change_config(copy, num_hidden_layers=4)
    with pytest.raises(UserError, match=r"lack \d+ tensors"):
        open_model(str(copy))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_causal_models_read_no_further(family: str, tmp_path: Path):
    check_causal(open_checkpoint(str(make_checkpoint(tmp_path, family))).load_model(), family)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_encoder_with_a_causal_head_reads_ahead(is_decoder: bool):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    decoder = decoder_of(BertLMHeadModel(BertConfig(**size, is_decoder=is_decoder)).eval())
    if is_decoder:
        check_causal(decoder, "bert")
        return
    with pytest.raises(UserError, match="bert: BertLMHeadModel reads ahead"):
        check_causal(decoder, "bert")


def test_weights_hash_tells_weights_apart(tmp_path: Path):
    first, same, other = (open_checkpoint(str(make_checkpoint(tmp_path / str(i), seed=s))) for i, s in enumerate((0, 0, 1)))
    assert first.info.weights_sha256 == same.info.weights_sha256 != other.info.weights_sha256
    assert torch.get_default_device().type == "cpu"  # the skeleton's meta device does not leak


def test_weights_that_change_under_the_run_are_told(copy: Path):
    checkpoint = open_checkpoint(str(copy))
    checkpoint.load_model()
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors: the file changed while it was in use"):
        checkpoint.load_model()
    file.unlink()
    with pytest.raises(UserError, match="changed while it was in use"):
        checkpoint.check_unchanged()
