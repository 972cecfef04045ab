"""One list says which files a checkpoint is: loading, streaming, hash and sizes agree with transformers; bytes are exact tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitatlas.errors import UserError
from bitatlas.export.packed import apply_plan
from bitatlas.model.checkpoint import Checkpoint, check_finite, open_checkpoint, open_model
from bitatlas.model.folder import find_folder, weight_files
from bitatlas.progress import Reporter
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel
from bitatlas.records.files import to_json
from bitatlas.records.formats import get_format, stored_bytes
from bitatlas.records.sizes import size_of
from tiny import make_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IDS = torch.arange(1, 20)[None]
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "a copy of wörds"))


def save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def change(folder: Path, **tensors: Tensor) -> None:
    """Put tensors (a name's dots are double underscores here) into the weights' file."""
    save({**load_file(folder / WEIGHTS), **{name.replace("__", "."): value for name, value in tensors.items()}}, folder / WEIGHTS)


def shard(folder: Path) -> dict[str, str]:
    """Two files and an index in the place of one."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save({name: tensors[name] for name in places if places[name] == file}, folder / file)
    write_index(folder, places)
    return places


def write_index(folder: Path, places: dict[str, str], **others: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places, **others}))


def old_index(folder: Path) -> None:
    save(
        {name: 0.3 * tensor for name, tensor in load_file(folder / WEIGHTS).items()}, folder / "model-00001-of-00001.safetensors"
    )
    write_index(folder, dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors"))


def other_copies(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name in ("consolidated", "a-old", "old", "model.fp16"):
        save({key: 0.3 * tensor for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


def half_a_map(folder: Path) -> None:
    """The index places some tensors elsewhere and leaves others out; both files are named."""
    files = sorted(set((places := shard(folder)).values()))
    write_index(folder, {name: files[number % 2] for number, name in enumerate(list(places)[::3])})


def twice(folder: Path) -> None:
    """A tensor in both shards, with other values in the later one."""
    places = shard(folder)
    first, last = sorted(set(places.values()))
    name = next(name for name in places if places[name] == first and "proj" in name)
    save({**load_file(folder / last), name: 2 * load_file(folder / first)[name]}, folder / last)


def links(folder: Path) -> None:
    """The layout of the hub's cache."""
    shard(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in sorted(folder.iterdir()):
        blob = file.rename(blobs / hashlib.sha256(file.name.encode()).hexdigest())
        file.symlink_to(Path("..") / "blobs" / blob.name)


def other_head(folder: Path) -> None:
    """The config ties the head, the file stores another one."""
    change(folder, lm_head__weight=torch.randn(300, 64, generator=torch.Generator().manual_seed(1)))


def same_head(folder: Path) -> None:
    change(folder, lm_head__weight=load_file(folder / WEIGHTS)["model.embed_tokens.weight"])


def head_alone(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save(tensors, folder / WEIGHTS)


def passed_over(folder: Path) -> None:
    """Tensors that transformers has no use for: of any dtype, empty, infinite."""
    dtypes = (torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
    extra = {f"extra.{number}": torch.ones(3).to(dtype) for number, dtype in enumerate(dtypes)}
    change(folder, note=torch.zeros(0, 3), model__layers__0__self_attn__mask=torch.full((2, 2), -torch.inf), **extra)


LAYOUTS = [old_index, other_copies, shard, half_a_map, twice, links, other_head, same_head, head_alone, passed_over]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@torch.no_grad()
def test_what_is_measured_is_what_transformers_loads(copy: Path, layout: Callable[[Path], object]):
    """To the bit; the hash and the sizes are of the same files."""
    layout(copy)
    checkpoint = open_checkpoint(f"{copy}/")
    check_finite(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)(IDS).logits
    assert torch.equal(checkpoint.load_model().model(IDS).logits, theirs)
    assert torch.equal(checkpoint.stream_model().model(IDS, use_cache=False).logits, theirs)
    files = sorted(copy.glob("model-0*.safetensors")) if layout in (shard, half_a_map, twice, links) else [copy / WEIGHTS]
    assert checkpoint.files == weight_files(copy) == files
    assert checkpoint.info.weights_sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert checkpoint.info.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.info.other_bytes == checkpoint.info.total_bytes - 4 * checkpoint.info.quantizable_weights


def refusal(folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        check_finite(open_checkpoint(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rename(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def alone(name: str) -> Callable[[Path], object]:
    """Nothing but one file of this name."""

    def only(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_text("{}")

    return only


def config(**changes: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return write


def cast(dtype: torch.dtype) -> Callable[[Path], object]:
    return lambda folder: change(folder, **{LAYER: load_file(folder / WEIGHTS)[LAYER].to(dtype)})


def index_of(places: object, **others: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": places, **others}))

    return write


def packed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save(
        {k.replace("proj.weight", "proj.qweight"): v if "proj" not in k else v.int() for k, v in tensors.items()},
        folder / WEIGHTS,
    )


def both_names(folder: Path) -> None:
    change(folder, **{LAYER.removeprefix("model."): 2 * load_file(folder / WEIGHTS)[LAYER]})


def dangling(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rename("weights.safetensors"), "weights.safetensors is not what transformers loads: it takes model.safetensors"),
        (rename("model.fp16.safetensors"), "model.fp16.safetensors is not what transformers loads"),
        (rename("shard-00000-model-00001-of-00001.safetensors"), "part of a distributed checkpoint"),
        (rename("model-Q4_K.gguf"), "model-Q4_K.gguf is a GGUF file"),
        (dangling, "model.safetensors is a link to a file that is not there"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "has shape .* but the config says"),
        (alone("model-Q4_K.gguf"), "no config.json.*model-Q4_K.gguf is a GGUF file.*that it was made from"),
        (alone("adapter_config.json"), r"adapter.*merge_and_unload\(\)\.save_pretrained"),
        (adapter, r"adapter.*merge_and_unload\(\)\.save_pretrained"),
        (index_of({"a": "model-1.safetensors"}), '"metadata"'),
        (index_of({}, metadata={}), "names none"),
        (index_of({"a": "/tmp/model-1.safetensors"}, metadata={}), "outside the folder"),
        (index_of({"a": "model-1.bin"}, metadata={}), "not a safetensors file"),
        (config(transformers_weights="w.safetensors"), "transformers_weights"),
        (config(quantization={"bits": 4, "group_size": 64}), "quantized already, in MLX's layout"),
        (config(quantization_config={"quant_method": "awq", "bits": 4}), "quantized already, by awq"),
        (cast(torch.float8_e4m3fn), "up_proj.weight is stored as F8_E4M3"),
        (cast(torch.int8), "up_proj.weight is stored as I8"),
        (packed, r"_proj.qweight is packed, so the checkpoint is quantized already"),
        (both_names, "are both the model's model.layers.1.mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_what_is_no_plain_checkpoint_is_told(copy: Path, damage: Callable[[Path], object], said: str):
    damage(copy)
    with pytest.raises(UserError, match=said) as caught:
        check_finite(open_checkpoint(str(copy)))
    assert "\n" not in str(caught.value)


def test_a_head_that_is_neither_stored_nor_tied_is_missed(copy: Path):
    """transformers would draw one by chance."""
    config(tie_word_embeddings=False)(copy)
    checkpoint = open_checkpoint(str(copy))
    with pytest.raises(UserError, match=r"the weights lack 1 tensors of the model, the first is lm_head.weight"):
        checkpoint.load_model()
    with pytest.raises(UserError, match=r"lm_head.weight is not in the weights files"):
        checkpoint.stream_model()


def test_adapters_are_refused_where_two_checkpoints_are_compared(copy: Path):
    adapter(copy)
    with pytest.raises(UserError, match="merge_and_unload"):
        open_model(str(copy))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.Q4_K_M.gguf", "not a whole GGUF"),
        ("model.safetensors", "one file of weights; give the folder"),
        ("pytorch_model.bin", "is pickle, which can run code as it is read"),
        ("config.json", "give the folder that it lies in"),
        ("model.zip", "an archive; unpack it"),
        ("model", "give a checkpoint folder"),
    ],
)
def test_a_file_in_the_place_of_a_folder(tmp_path: Path, name: str, said: str):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=said):
        find_folder(str(tmp_path / name), None)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_no_file_system_takes(name: str):
    assert "no such checkpoint folder" in refusal(name)


# --- sizes -------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mixed") / "model", hidden_size=32, num_hidden_layers=2, intermediate_size=40)


def promised_bytes(checkpoint: Checkpoint, assignment: dict[str, str], tensors: dict[str, Tensor]) -> int:
    """Counted by hand: what is in the plan by its format, everything else as it lies in the file."""
    shapes = {f"{module.name}.weight": module.shape for module in checkpoint.modules if module.name in assignment}
    planned = sum(stored_bytes(shape, get_format(assignment[key.removesuffix(".weight")])) for key, shape in shapes.items())
    return planned + sum(tensor.nbytes for key, tensor in tensors.items() if key not in shapes)


@settings(max_examples=8)
@given(data=st.data())
def test_sizes_of_mixed_dtypes_are_exact(small: Path, data: st.DataObject):
    tensors = {name: t.to(data.draw(st.sampled_from(DTYPES), label=name)) for name, t in load_file(small / WEIGHTS).items()}
    folder = small.parent / "drawn"
    shutil.copytree(small, folder, dirs_exist_ok=True)
    save(tensors, folder / WEIGHTS)
    checkpoint = open_checkpoint(str(folder), fuse=False)
    info = checkpoint.info
    assert info.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    linear = {f"{module.name}.weight" for module in checkpoint.modules}
    assert info.other_bytes == sum(tensor.nbytes for name, tensor in tensors.items() if name not in linear)
    assert info.other_numbers == sum(tensor.numel() for name, tensor in tensors.items() if name not in linear)
    assert [module.size_bytes for module in checkpoint.modules] == [
        tensors[f"{m.name}.weight"].nbytes for m in checkpoint.modules
    ]
    names = st.sampled_from(["int2_g32", "int4_g32_sym", None])
    drawn = {module.name: data.draw(names, label=module.name) for module in checkpoint.modules}
    assignment = {name: fmt for name, fmt in drawn.items() if fmt}
    assert size_of(checkpoint.modules, assignment, info).total_bytes == promised_bytes(checkpoint, assignment, tensors)
    assert size_of(checkpoint.modules, {}, info).total_bytes == info.total_bytes
    bits = 8 * sum(tensors[name].nbytes for name in linear)
    assert size_of(checkpoint.modules, {}, info).stored_bits == bits / info.quantizable_weights


@pytest.mark.parametrize("seed", [0, 1])
def test_a_packed_checkpoint_of_mixed_dtypes_has_the_bytes_that_were_promised(small: Path, tmp_path: Path, seed: int):
    """To the byte; what a packed tensor takes beside the plan's count is told by name, and no other cause is left."""
    pytest.importorskip("compressed_tensors")
    generator = torch.Generator().manual_seed(seed)
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    draw = torch.randint(1, len(DTYPES), (100,), generator=generator).tolist()
    tensors = {name: t.to(DTYPES[draw.pop()]) for name, t in load_file(folder / WEIGHTS).items()}
    save({**tensors, "counter": torch.ones(3, dtype=torch.uint32)}, folder / WEIGHTS)
    checkpoint = open_checkpoint(str(folder), fuse=False)
    modules = {module.name: "int4_g32" for module in checkpoint.modules if draw.pop() % 2}
    size = size_of(checkpoint.modules, modules, checkpoint.info)
    info = PlanModel(checkpoint.info.name, None, checkpoint.info.weights_sha256)
    table = {"int4_g32": get_format("int4_g32")}
    plan = Plan(info, table, "rtn", modules, Budget("size", float(size.total_bytes)), size, PlanDamage(None, None))
    (tmp_path / "plan.json").write_text(to_json(plan), encoding="utf-8")
    result = apply_plan(str(folder), tmp_path / "plan.json", tmp_path / "packed", Reporter(quiet=True))
    written = sum(tensor.nbytes for file in weight_files(result.out) for tensor in load_file(file).values())
    headers = result.causes.pop("headers of the files")
    assert result.promised_bytes + sum(result.causes.values()) == written == result.disk_bytes - headers
    assert "tensors of more than one dtype" not in result.causes
