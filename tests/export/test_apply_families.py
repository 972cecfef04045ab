"""Packed checkpoints of models that transformers does not load as they are stored: what it merges, exchanges or reads too early."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from bitatlas.errors import UserError
from bitatlas.export import blueprint, conversion
from bitatlas.export import trial as packed
from bitatlas.export.targets import export_plan
from bitatlas.model import tensor_files
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.tensor_files import rules_of
from bitatlas.records.files import to_json
from bitatlas.run.options import VerifyOptions
from bitatlas.run.verify import verify_plan
from packing import LOGITS, QUIET, applied, check_bytes, largest_difference, make_plan
from tiny import make_checkpoint
from tiny_shapes import MIXTURES, build

stage = importlib.import_module("bitatlas.export.packed")
PLAN = ("int2_g32", "int4_g32_sym")
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16,
    "vocab_size": 300, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict] = {
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, **EXPERTS, "num_experts": 12},
    "lfm2_moe": {**SMALL, **EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "granitemoe": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 300},
    "nanochat": SMALL,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300, "alibi": False},
}


def checkpoint_of(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """As `save_pretrained` stores the family: experts one by one, where it does that."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    config.architectures = [type(model).__name__]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name and "A_log" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    tiny.tokenizer().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "apart", "held"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight", "model.layers.0.mlp.experts.gate_up_proj"),
        ("qwen3_moe", "model.layers.1.mlp.experts.11.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
        ("lfm2_moe", "model.layers.1.feed_forward.experts.0.w2.weight", "model.layers.1.feed_forward.experts.down_proj"),
        (
            "llama4_text",
            "model.layers.1.feed_forward.experts.gate_up_proj",
            "model.layers.1.feed_forward.experts.3.up_proj.weight",
        ),
    ],
)
def test_experts_come_in_the_form_that_transformers_loads(family: str, apart: str, held: str, tmp_path: Path):
    model = checkpoint_of(tmp_path / "model", family)
    assert apart in stored(model) and held not in stored(model)
    plan = make_plan(model, PLAN, skip=1, experts=None)
    found = applied(model, plan, tmp_path, shard_bytes=30_000)
    tensors = stored(found.out)
    assert held in tensors and apart not in tensors and held in found.converted
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)


def test_what_is_not_planned_is_equal_to_the_bit(tmp_path: Path):
    """In bfloat16, twelve experts: the order of stacking is 2 before 10."""
    model = checkpoint_of(tmp_path / "model", "qwen3_moe", torch.bfloat16)
    plan = make_plan(model, PLAN, experts=None)
    out = applied(model, plan, tmp_path).out
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in (model, out))
    same = [name for name in ours if name in theirs and name.removesuffix(".weight") not in plan.modules]
    assert sum("experts" in name for name in same) == 4
    assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == torch.bfloat16 for name in same)


def test_names_that_transformers_only_changes_stay(tmp_path: Path):
    model = checkpoint_of(tmp_path / "model", "granitemoe")
    assert any("input_linear" in key for key in stored(model))
    plan = make_plan(model, PLAN, experts=None)
    found = applied(model, plan, tmp_path)
    assert not found.converted and {k for k in stored(model) if "input_linear" in k} <= set(stored(found.out))
    assert largest_difference(model, plan, found.out) <= LOGITS


@pytest.mark.parametrize(("family", "early"), [("mamba", ("dt_proj", "out_proj")), ("nanochat", ("self_attn.o_proj",))])
def test_weights_that_are_read_too_early_are_written_whole(family: str, early: tuple[str, ...], tmp_path: Path):
    """With the plan's own values, by name, and the bytes say so."""
    model = checkpoint_of(tmp_path / "model", family)
    plan = make_plan(model, PLAN)
    found = applied(model, plan, tmp_path)
    assert sorted(found.whole) == sorted(name for name in plan.modules if name.endswith(early))
    assert found.causes["modules written whole, not packed"] > 0 and found.whole[0] in found.notes[0]
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)


BEYOND = {
    "falcon": r"reads transformer\.h\.0\..*, and every other module of the plan, before it unpacks any",
    "gpt2": r"transformer\.h\.0\.attn\.c_attn is a Conv1D",
    "llama": r"model\.embed_tokens is an embedding",
}


@pytest.mark.parametrize("family", BEYOND)
def test_what_transformers_does_not_load_packed_is_opened_by_load_packed(family: str, tmp_path: Path):
    """A model whose weights are all read early, transposed layers, an embedding. transformers refuses the folder, and does not misread it."""
    model = checkpoint_of(tmp_path / "model", family) if family == "falcon" else make_checkpoint(tmp_path / "model", family)
    plan = make_plan(model, PLAN, outer=family == "llama")
    found = applied(model, plan, tmp_path)
    assert re.search(BEYOND[family], found.beyond) and not found.whole and "opened by load_packed" in found.tried
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)
    with pytest.raises(ValueError, match=r"input_value='bitatlas\.load_packed'"):
        AutoModelForCausalLM.from_pretrained(found.out)


@pytest.mark.parametrize("name", sorted(MIXTURES))
@pytest.mark.parametrize("experts", [("int2_g32", "int3_g64", "int4_g32_sym"), ("int4_g32_sym",)], ids=["mixed", "uniform"])
def test_mixtures_are_packed_expert_by_expert(name: str, experts: tuple[str, ...], tmp_path: Path):
    """transformers loads experts that share a symmetric format and are stored one by one, or that it exchanges; `load_packed` all of them."""
    model = build(tmp_path / "model", *MIXTURES[name])
    plan = make_plan(model, PLAN, experts=experts)
    found = applied(model, plan, tmp_path)
    natively = name == "llama4" or (len(experts) == 1 and name not in ("gpt_oss", "gemma4", "granitemoe"))
    assert bool(found.beyond) != natively and not found.whole
    assert largest_difference(model, plan, found.out) <= LOGITS
    check_bytes(found)
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT, encoding="utf-8")
    assert verify_plan(VerifyOptions(model, found.out, tokens=text, rows=(1, 1, 2), row_length=16, quiet=True)).size_kept


def test_a_plan_of_some_experts_is_refused(tmp_path: Path):
    model = build(tmp_path / "model", *MIXTURES["mixtral"])
    plan = make_plan(model, PLAN)
    del plan.modules["model.layers.1.mlp.experts.down_proj.2"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.down_proj: the plan names 3 of its 4 experts"):
        applied(model, plan, tmp_path)
    assert not (tmp_path / "packed").exists()


def test_the_skeleton_is_as_it_was_after_it_was_asked(tmp_path: Path):
    checkpoint = open_checkpoint(str(checkpoint_of(tmp_path / "model", "mamba")), None, False)
    model = checkpoint.skeleton()
    before = {name: (type(module), list(module._parameters)) for name, module in model.named_modules()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(conversion.unpackable(model, linear)) == 4  # dt_proj and out_proj of two layers
    assert before == {name: (type(module), list(module._parameters)) for name, module in model.named_modules()}


def test_modules_that_the_checkpoint_stores_in_one_tensor_are_packed_apart(tmp_path: Path):
    """Our own rule in the place of a family's: q and k in one matrix, which transformers splits as it loads."""
    from transformers.core_model_loading import Chunk, WeightConverter

    skeleton = open_checkpoint(str(make_checkpoint(tmp_path / "model", num_key_value_heads=4)), None, False).skeleton()
    rules = rules_of(skeleton)
    split = WeightConverter(["self_attn.qk.weight"], ["self_attn.q_proj.weight", "self_attn.k_proj.weight"], [Chunk(dim=0)])
    names = [f"model.layers.0.self_attn.{part}.weight" for part in ("q_proj", "k_proj")]
    both = torch.randn(128, 64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tensor_files, "rules_of", lambda model: replace(rules, converters=[split]))
        found = tensor_files.Conversion(skeleton, {"model.layers.0.self_attn.qk.weight": both.to("meta")})
    assert set(found.converted) == set(names) == set(found.origins) and all(found.key(name) is None for name in names)
    read = [found.read(name, {"model.layers.0.self_attn.qk.weight": both}.__getitem__) for name in names]
    assert torch.equal(torch.cat(read), both)


# --- the trial of the finished folder --------------------------------------------------------------------------------------


def refusal(model: Path, place: Path) -> str:
    """The line; nothing of what was written is left."""
    with pytest.raises(UserError) as refused:
        applied(model, make_plan(model, PLAN, experts=None), place)
    assert [file.name for file in place.iterdir()] == ["plan.json"]
    return str(refused.value)


@pytest.mark.parametrize("short", [False, True])
def test_a_folder_that_does_not_load_gets_no_name(tiny_llama: Path, tmp_path: Path, monkeypatch, short: bool):
    """Of a model that is too large to be run here the tensors' places are still checked."""
    if short:
        monkeypatch.setattr(packed, "available_bytes", lambda device: 0)
    real = stage.blueprint_of

    def without(part: str):
        def drawn(*arguments):
            found = real(*arguments)
            found.copied.remove(part)
            entries = [tensor_files.Entry(k, "F32", (v // 4,), v) for shard in found.shards for k, v in shard.sizes.items()]
            headers = {k: e for shard in found.shards for k, e in json.loads(shard.header[8:]).items() if k != "__metadata__"}
            kept = [
                tensor_files.Entry(e.name, headers[e.name]["dtype"], tuple(headers[e.name]["shape"]), e.size_bytes)
                for e in entries
                if e.name != part
            ]
            found.shards[:] = tensor_files.split_shards(kept)
            return found

        return drawn

    monkeypatch.setattr(stage, "blueprint_of", without("model.norm.weight"))
    assert "has no value for model.norm.weight" in refusal(tiny_llama, tmp_path / "missing")
    monkeypatch.setattr(stage, "blueprint_of", real)
    monkeypatch.setattr(blueprint, "unpackable", lambda model, names: [])
    monkeypatch.setattr(blueprint, "exchanged", lambda model: {})
    if not short:
        assert "transformers does not load it ('Linear' object" in refusal(
            checkpoint_of(tmp_path / "mamba", "mamba"), tmp_path / "early"
        )
    told = refusal(checkpoint_of(tmp_path / "llama4", "llama4_text"), tmp_path / "random")
    assert "has no value for model.layers.1.feed_forward.experts.0.down_proj.weight and 11 more" in told


def test_a_folder_that_computes_something_else_gets_no_name(tiny_llama: Path, tmp_path: Path, monkeypatch):
    real = stage._packed

    def doubled(plan, name, codes):
        tensors = real(plan, name, codes)
        if name == "model.layers.2.mlp.down_proj":
            tensors["weight_scale"][5, 1] *= 2  # one group of one row
        return tensors

    monkeypatch.setattr(stage, "_packed", doubled)
    assert "it computes something else: logits differ by" in refusal(tiny_llama, tmp_path / "other")


def test_where_memory_is_short_the_output_says_so(tiny_llama: Path, tmp_path: Path, monkeypatch):
    plan = make_plan(tiny_llama, PLAN)
    assert "loaded in transformers and run" in applied(tiny_llama, plan, tmp_path / "run").tried
    monkeypatch.setattr(packed, "available_bytes", lambda device: 0)
    found = applied(tiny_llama, plan, tmp_path / "short")
    assert "not run before it was named" in found.tried and found.notes[-1].endswith(found.tried)
    for file in found.out.iterdir():  # and the bytes are those of the other run
        assert file.read_bytes() == (tmp_path / "run" / "packed" / file.name).read_bytes(), file.name


def test_the_export_to_vllm_is_tried_too(tmp_path: Path, monkeypatch):
    model = checkpoint_of(tmp_path / "model", "qwen3_moe")
    plan = make_plan(model, ["int4_g32_sym"])
    (tmp_path / "plan.json").write_text(to_json(plan), encoding="utf-8")
    found = export_plan(tmp_path / "plan.json", "vllm", tmp_path / "out", str(model), QUIET)
    assert any("loaded in transformers and run" in note for note in found.notes)
    assert largest_difference(model, plan, found.out) <= LOGITS


# --- tensors of odd kinds -----------------------------------------------------------------------------------------------


def test_what_the_model_passes_over_and_a_head_of_its_own_come_along(tmp_path: Path):
    """A head beside a tied embedding is the file's, as transformers has it; counters, empty and float8 tensors are copied."""
    model = make_checkpoint(tmp_path / "model", intermediate_size=100, num_hidden_layers=1)
    odd = {
        "counter": torch.tensor([1, 2], dtype=torch.uint32), "model.note": torch.zeros(0, 3), "model.table": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "lm_head.weight": torch.randn(300, 64), "old.flags": torch.tensor([True, False, True]),
    }  # fmt: skip
    save_file({**stored(model), **odd}, model / "model.safetensors", metadata={"format": "pt"})
    plan = make_plan(model, PLAN)
    out = applied(model, plan, tmp_path).out
    tensors = stored(out)
    assert all(torch.equal(tensors[key].view(torch.uint8), value.view(torch.uint8)) for key, value in odd.items())
    ids = torch.arange(24).view(1, -1)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (model, out))
    assert torch.equal(ours.lm_head.weight, odd["lm_head.weight"]) and torch.equal(theirs.lm_head.weight, odd["lm_head.weight"])
    assert theirs(input_ids=ids).logits.isfinite().all()


def test_a_huge_weight_gives_the_same_bytes_every_time(tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    tensors = stored(model)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 7] = 5e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    plan = make_plan(model, ["int2_g32"])
    first, second = (applied(model, plan, tmp_path / name).out for name in ("one", "two"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert stored(first)["model.layers.0.mlp.up_proj.weight_scale"][3, 0] == 65504
    assert largest_difference(model, plan, first) <= LOGITS * 1e3  # logits of such a model are large


def test_a_plan_that_counts_wrongly_is_told(tmp_path: Path):
    """A large embedding in float32 beside bfloat16 modules: either the plan counts tensor by tensor, or both commands say that it does not."""
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    tensors = {k: t.bfloat16() if t.dim() > 1 and "embed" not in k else t for k, t in stored(model).items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    plan = make_plan(model, PLAN)
    for right in (True, False):
        told = plan if right else replace(plan, size=replace(plan.size, total_bytes=plan.size.total_bytes - 1000))
        found = applied(model, told, tmp_path / str(right))
        assert found.disk_bytes == sum(file.stat().st_size for file in found.out.glob("*.safetensors"))
        assert found.disk_bytes == told.size.total_bytes + sum(found.causes.values())
        text = tmp_path / "text.txt"
        text.write_text(tiny.TEXT, encoding="utf-8")
        checked = verify_plan(VerifyOptions(model, found.out, tokens=text, rows=(1, 1, 2), row_length=16, quiet=True))
        assert checked.disk and checked.disk[1] == found.disk_bytes
        assert checked.size_kept == ("counted otherwise by the plan" not in found.causes)
    assert not checked.size_kept


# --- models that also see --------------------------------------------------------------------------------------------------

SIGHT = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
LINEAR = {
    f"linear_{part}": size
    for part, size in {"num_value_heads": 2, "num_key_heads": 2, "key_head_dim": 16, "value_head_dim": 16}.items()
}
SEEING: dict[str, tuple[str, dict, dict]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"sliding_window": 16, "query_pre_attn_scalar": 16},
        {"model_type": "siglip_vision_model", **SIGHT, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {**LINEAR, "layer_types": ["linear_attention", "full_attention"]},
        {**SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
    ),
}


@pytest.mark.parametrize("family", SEEING)
def test_models_that_also_see(family: str, tmp_path: Path):
    """The text part is packed, the rest is there to the bit, and the folder loads as what its config names and as the text part alone."""
    name, text, vision = SEEING[family]
    tokens = {"image_token_index": 299} if family == "gemma3" else {"image_token_id": 299, "video_token_id": 298}
    config = AutoConfig.for_model(family, text_config={**SMALL, **text}, vision_config=vision, **tokens)
    config.architectures = [name]
    torch.manual_seed(0)
    model = tmp_path / "model"
    getattr(transformers, name)(config).float().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    try:
        plan = make_plan(model, ["int4_g32", "int2_g32_sym"])
    except UserError as error:
        pytest.skip(f"such checkpoints are not opened here: {error}")
    found = applied(model, plan, tmp_path)
    before, after = stored(model), stored(found.out)
    sight = [key for key in before if "visual" in key or "vision" in key]
    assert sight and all(torch.equal(before[key], after[key]) for key in sight)
    check_bytes(found)
    whole, report = getattr(transformers, name).from_pretrained(found.out, dtype=torch.float32, output_loading_info=True)
    text_part, report_text = AutoModelForCausalLM.from_pretrained(found.out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()) and not any(report_text.values())
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        assert float((whole.eval()(ids).logits - text_part.eval()(ids).logits).abs().max()) <= LOGITS
