"""Device memory: the cache to the byte, the activations never below the true peak, and a budget that is never exceeded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.decoder import find_layers, memory_shape
from bitatlas.model.linear import split_experts
from bitatlas.model.modules import linear_modules
from bitatlas.plan.budget import (
    activation_bytes,
    cache_bytes,
    check_budget,
    costs_of,
    resolve_budget,
    runtime_bytes,
    size_range,
    workload_of,
)
from bitatlas.plan.knapsack import solve_knapsack
from bitatlas.records import Budget, ModelInfo, Module
from bitatlas.records.plan import CacheLayers, MemoryShape, Workload
from bitatlas.records.sizes import assignment_of, size_of, units_of
from live_bytes import LiveBytes
from tiny import COMMON, FAMILIES, GATED

LONG = {"max_position_embeddings": 512}
PLAIN = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 300}
MORE: dict[str, dict] = {
    **{family: {**config, **LONG} for family, config in FAMILIES.items() if family != "gpt2"},
    "gpt2": PLAIN,
    "gemma3_text": {**GATED, **LONG, "head_dim": 32, "sliding_window": 16, "num_hidden_layers": 7},
    "gemma2": {**GATED, **LONG, "head_dim": 32, "sliding_window": 16},
    "phi3": {**GATED, **LONG, "pad_token_id": 0},
    "falcon": {**COMMON, **LONG, "multi_query": True, "new_decoder_architecture": False},
    "gpt_bigcode": {**PLAIN, "multi_query": True},
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300},
    "opt": {**COMMON, **LONG, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {**GATED, **LONG, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**GATED, **LONG, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
}  # fmt: skip
CLOSE = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma3_text", "mixtral")
AT_MOST = 3.0  # times the true peak, for these at tiny sizes, where masks weigh most; docs/memory.md has full sizes
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_8B_SHAPE = MemoryShape(4096, 14336, 32, 128256, True, [CacheLayers(32, 8, 128, None)])


def skeleton(family: str, **config: object) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**MORE.get(family, {}), **config}))


def shape_of(family: str, **config: object) -> MemoryShape | str:
    model = skeleton(family, **config)
    path = find_layers(model, family)
    split_experts(model)
    return memory_shape(model, linear_modules(model, path, False), len(model.get_submodule(path)))


def load_of(context: int, chunk: int = 512, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Workload:
    name = str(dtype).removeprefix("torch.")
    return Workload(context, batch, chunk, name, name)


@torch.no_grad()
def last_pass(family: str, context: int, chunk: int, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of the cache, true peak of what else is alive) of a real pass that fills the context."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MORE[family])).to(dtype).eval()
    cache = StaticCache(config=model.config, max_cache_len=context)
    tokens = torch.randint(0, 300, (batch, context))
    model(tokens[:, :1], past_key_values=cache, logits_to_keep=1)  # allocates the cache
    cache.reset()
    chunk = min(chunk, context)
    for part in tokens[:, : context - chunk].split(64, dim=1) if context > chunk else ():
        model(part, past_key_values=cache, logits_to_keep=1)
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    last = tokens[:, context - chunk :].clone()
    with LiveBytes([*model.parameters(), *model.buffers(), last, *kept]) as live:
        model(last, past_key_values=cache, logits_to_keep=1)
    return sum(tensor.nbytes for tensor in kept), live.peak


def test_the_example_of_the_documentation():
    load = load_of(8192)
    assert cache_bytes(LLAMA_8B_SHAPE, load) == 2**30
    carried = 6 * 512 * 4096 * 2 + 4 * 512 * 128 * 2 + 32 * (512 + 8192) + 512 * 8192
    attention = 512 * (2 * (8192 + 4096) + 49152) + 512 * 8192 * 2 + 2 * 8192 * 2 * 4096
    assert activation_bytes(LLAMA_8B_SHAPE, load) == carried + attention == 210_518_016
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    for told in ("1,073,741,824", "30,162,944", "180,355,072", "210,518,016", "7,305,674,752"):
        assert told in text
    assert 8 * 2**30 - 2**30 - 210_518_016 == 7_305_674_752


@pytest.mark.parametrize(
    ("family", "config", "layers", "fused"),
    [
        ("llama", {}, [CacheLayers(3, 2, 16, None)], True),
        ("llama", LLAMA_8B, [CacheLayers(32, 8, 128, None)], True),
        ("llama", {"num_key_value_heads": 1}, [CacheLayers(3, 1, 16, None)], True),
        ("qwen3", {"head_dim": 48}, [CacheLayers(3, 2, 48, None)], True),
        ("mistral", {}, [CacheLayers(3, 2, 16, 16)], True),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
         [CacheLayers(1, 2, 16, None), CacheLayers(2, 2, 16, 16)], True),
        ("gemma3_text", {}, [CacheLayers(6, 2, 32, 16), CacheLayers(1, 2, 32, None)], True),
        ("gemma2", {}, [CacheLayers(2, 2, 32, 16), CacheLayers(1, 2, 32, None)], False),
        ("gpt2", {}, [CacheLayers(3, 4, 16, None)], True),
        ("gpt_bigcode", {}, [CacheLayers(3, 1, 16, None)], True),
        ("falcon", {}, [CacheLayers(3, 1, 16, None)], False),
        ("bloom", {}, [CacheLayers(3, 4, 16, None)], False),
    ],
)  # fmt: skip
def test_shapes_read_off_the_config(family: str, config: dict, layers: list[CacheLayers], fused: bool):
    shape = shape_of(family, **config)
    assert isinstance(shape, MemoryShape)
    assert (shape.layers, shape.fused) == (layers, fused)


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("deepseek_v3", {**GATED, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8},
         "latent attention"),
        ("lfm2", {**GATED, "layer_types": ["conv", "full_attention", "conv"]}, "more than keys and values"),
        ("falcon_h1", {**GATED, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, "more than keys and values"),
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 4}, "more than keys and values"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said_in_a_few_words(family: str, config: dict, said: str):
    reason = shape_of(family, **config)
    assert isinstance(reason, str)
    assert said in reason
    info = info_of([Module("layers.0.q", 0, "q", (64, 64), "layers.0.q")], reason)
    with pytest.raises(UserError, match=r"cannot be told: .*; use --size$"):
        resolve_budget(Budget("vram", 1e6, workload_of(64, None, None, None)), info)


@pytest.mark.parametrize("family", sorted(MORE))
@pytest.mark.parametrize(
    ("context", "chunk", "batch", "dtype"),
    [
        (256, 64, 1, torch.bfloat16),
        (512, 16, 1, torch.bfloat16),
        (128, 512, 2, torch.bfloat16),
        (12, 16, 1, torch.bfloat16),
        (96, 32, 3, torch.float32),
    ],
)
def test_against_a_real_pass(family: str, context: int, chunk: int, batch: int, dtype: torch.dtype):
    """The cache is exact, the bound is one, and for the common families not far off."""
    shape, load = shape_of(family), load_of(context, chunk, batch, dtype)
    assert isinstance(shape, MemoryShape)
    cache, peak = last_pass(family, context, chunk, batch, dtype)
    assert cache_bytes(shape, load) == cache
    bound = activation_bytes(shape, load)
    assert bound >= peak
    assert family not in CLOSE or bound <= AT_MOST * peak


def test_a_single_token_stays_below_the_pass_over_a_prompt():
    """The pass of `chunk` tokens is the largest: no generated token needs more."""
    for family in CLOSE:
        _, peak = last_pass(family, 256, 1, 1, torch.bfloat16)
        assert peak <= activation_bytes(shape_of(family), load_of(256, 64))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_against_a_cache_that_grows(family: str):
    """`DynamicCache` keeps one token fewer in layers whose window is full, as those are all that the next token can see."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MORE[family])).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros((2, 40), dtype=torch.int64), past_key_values=cache)
    shape = shape_of(family)
    assert isinstance(shape, MemoryShape)
    fewer = sum(2 * 2 * kind.layers * kind.kv_heads * kind.head_dim * 4 for kind in shape.layers if kind.window)
    used = sum(tensor.numel() * 4 for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(shape, load_of(40, batch=2, dtype=torch.float32)) - fewer == used


@pytest.mark.parametrize(("name", "bytes_of_block"), [("q8_0", 34), ("q4_0", 18)])
def test_llama_cpps_caches(name: str, bytes_of_block: int):
    """A token's keys of all heads are whole blocks of 32 numbers: 48 of them take two."""
    load = replace(load_of(100, batch=3), cache_dtype=name)
    shape = replace(LLAMA_8B_SHAPE, layers=[CacheLayers(5, 3, 16, None), CacheLayers(2, 8, 128, 40)])
    assert cache_bytes(shape, load) == 2 * 3 * bytes_of_block * (5 * 100 * 2 + 2 * 40 * 32)
    assert workload_of(100, name, None, None).cache_dtype == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config", "context"),
    [("llama", LLAMA_8B, 8192), ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257}, 1024)],
)  # fmt: skip
def test_full_sizes(family: str, config: dict, context: int):
    """Fake tensors have shapes and no numbers, so a pass of a model of 8 billion weights is counted in seconds."""
    shape, load = shape_of(family, **config), load_of(context)
    assert isinstance(shape, MemoryShape)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=torch.bfloat16).eval()
        cache = StaticCache(config=model.config, max_cache_len=context)
        model(torch.zeros((1, 1), dtype=torch.int64), past_key_values=cache, logits_to_keep=1)
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        last = torch.zeros((1, 512), dtype=torch.int64)
        with LiveBytes([*model.parameters(), *model.buffers(), last, *kept]) as live:
            model(last, past_key_values=cache, logits_to_keep=1)
        assert cache_bytes(shape, load) == sum(tensor.nbytes for tensor in kept)
    assert live.peak <= activation_bytes(shape, load) <= 1.4 * live.peak


# --- budgets -------------------------------------------------------------------------------------------------------------


def info_of(modules: list[Module], memory: MemoryShape | str | None, dtype: str = "bfloat16") -> ModelInfo:
    weights = sum(module.weights for module in modules)
    return ModelInfo("tiny", None, "0" * 64, "Tiny", 3, 4, 512, dtype, weights, 12345, 12345 + 2 * weights, memory)


@settings(max_examples=150, deadline=None)
@given(
    place=st.floats(0, 1),
    layers=st.integers(1, 4),
    width=st.integers(1, 200),
    kind=st.builds(CacheLayers, st.integers(1, 4), st.integers(1, 8), st.integers(1, 64), st.none() | st.integers(1, 600)),
    context=st.none() | st.integers(1, 512),
    cache_dtype=st.sampled_from([None, "float32", "float8_e4m3fn"]),
    batch=st.integers(1, 5),
    chunk=st.integers(1, 600),
)
def test_a_budget_of_memory_is_never_exceeded(place, layers, width, kind, context, cache_dtype, batch, chunk):
    """Whatever is planned: weights, cache and activations, added up here, are within the bytes that were given."""
    modules = [Module(f"layers.{i}.q", i, "q", (width, 37), f"layers.{i}.q") for i in range(layers)]
    info, units, formats = (
        info_of(modules, MemoryShape(64, 96, 8, 300, True, [kind])),
        units_of(modules),
        ["int2_g64", "int4_g64"],
    )
    asked = resolve_budget(Budget("vram", 1.0, workload_of(context, cache_dtype, batch, chunk)), info)
    least, most = size_range("vram", modules, formats, info, runtime_bytes(asked))
    budget = replace(asked, value=float(int(least + place * (most - least))))
    check_budget(budget, modules, formats, info)
    costs = costs_of(budget, units, formats, info)
    assert costs.limit is not None
    choice = solve_knapsack(-costs.cost.astype(float), costs.cost, costs.limit).choice
    size = size_of(modules, assignment_of(units, formats, choice), info)
    load = budget.workload
    assert load is not None
    cache = 2 * kind.layers * kind.kv_heads * kind.head_dim * batch * min(context or 512, kind.window or 512)
    assert load.cache_bytes == cache * {None: 2, "float32": 4, "float8_e4m3fn": 1}[cache_dtype]
    assert size.total_bytes + load.cache_bytes + load.activation_bytes <= budget.value
    assert runtime_bytes(budget) == load.cache_bytes + load.activation_bytes
    # the room is used: one byte less than all that the widest format needs is the only reason not to take it
    if budget.value >= most:
        assert (choice == np.array(1)).all()


@pytest.mark.parametrize(
    ("memory", "asked", "said"),
    [
        (None, (64, None, None, None), "--vram: this survey does not hold what the memory depends on; make it again"),
        (LLAMA_8B_SHAPE, (513, None, None, None), "--context 513: the model's own is 512 tokens; give at most that"),
        (LLAMA_8B_SHAPE, (0, None, None, None), "--context 0: must be 1 or more"),
        (
            LLAMA_8B_SHAPE,
            (64, "int3", None, None),
            "--cache-dtype int3: unknown; one of float32, bfloat16, float16, float8_e4m3fn",
        ),
        (LLAMA_8B_SHAPE, (64, None, 0, None), "--batch 0: must be 1 or more"),
        (LLAMA_8B_SHAPE, (64, None, None, -3), "--chunk -3: must be 1 or more"),
    ],
)
def test_what_cannot_be_asked_for(memory, asked, said):
    with pytest.raises(UserError) as caught:
        resolve_budget(Budget("vram", 1e6, workload_of(*asked)), info_of([], memory))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("dtype", "cache"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float16")])
def test_defaults_are_the_models(dtype: str, cache: str):
    load = resolve_budget(Budget("vram", 1e9, workload_of(None, None, None, None)), info_of([], LLAMA_8B_SHAPE, dtype)).workload
    assert load is not None
    assert (load.context, load.cache_dtype, load.activation_dtype, load.batch, load.chunk) == (512, cache, dtype, 1, 512)
    assert load.activation_bytes == activation_bytes(LLAMA_8B_SHAPE, load) > 0


def test_other_budgets_need_no_shape():
    budget = Budget("size", 1e6)
    assert resolve_budget(budget, info_of([], None)) is budget
    with pytest.raises(ValueError, match="not settled"):
        runtime_bytes(Budget("vram", 1e6, workload_of(None, None, None, None)))


def test_a_checkpoint_has_its_shape(tiny_llama: Path):
    info = open_checkpoint(str(tiny_llama)).info
    assert info.memory == MemoryShape(64, 96, 4, 300, True, [CacheLayers(3, 2, 16, None)])
