"""Families of every shape are measured as a plain pass measures them: units, plans, prices, streamed or in memory.

The oracle knows nothing of layers: a copy of the model gets its weights set, and one whole forward pass gives the logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from bitatlas.errors import UserError
from bitatlas.measure.damage import DamageMeter, StateBudget, Swap
from bitatlas.measure.interactions import swap_interactions
from bitatlas.measure.prices import price_units
from bitatlas.model.checkpoint import Checkpoint, check_causal, open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.layerwise import check_chain, is_chain
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.tune import Tuner, Tuning
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import Unit, units_of
from gradients import check_moments, check_prices
from tiny import tokenizer

FORMATS = ("int2_g32", "int4_g32")
SIZE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 128}
GATED = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
PER_LAYER = {"head_dim": 16, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 300, "sliding_window": 8}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT_PART = {key: value for key, value in GATED.items() if key != "pad_token_id"}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "inputs of two axes": ("opt", {**SIZE, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "inputs of four axes, shared experts": (
        "deepseek_v2",
        {**GATED, **EXPERTS, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "keys and values of layers in front, inputs by layer": (
        "gemma4_text",
        {**GATED, **PER_LAYER, "global_head_dim": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": TWO_KINDS},
    ),
    "several streams side by side": (
        "gemma3n_text",
        {**GATED, **PER_LAYER, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": TWO_KINDS, "altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    ),
    "several values, state": ("rwkv", {"hidden_size": 64, "num_hidden_layers": 4, "attention_hidden_size": 64, "intermediate_size": 96, "context_length": 128, "vocab_size": 300, "rescale_every": 2}),
    "two classes of blocks": ("olmo_hybrid", {**GATED, **LINEAR, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "routed experts": ("qwen2_moe", {**GATED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}),
    "a weight that is read without its module": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "vocab_size": 300}),
    "values of a router for the next one": ("zaya", {**GATED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32}),
    "a part that sees": ("llava", {"text_config": {"model_type": "llama", **TEXT_PART}, "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}, "image_token_index": 299}),
    "a part that sees, keys and values of its own": ("gemma3", {"text_config": {"model_type": "gemma3_text", **TEXT_PART, "head_dim": 16, "sliding_window": 8}, "vision_config": {"model_type": "siglip_vision_model", **VISION}, "mm_tokens_per_image": 4, "image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}),
}  # fmt: skip
WHOLE = {"values of a router for the next one"}  # that cannot be run layer by layer


def build(folder: Path, family: str, config: dict[str, Any]) -> Path:
    """A checkpoint with random weights in which every linear module matters."""
    content = AutoConfig.for_model(family, **copy.deepcopy(config))
    torch.manual_seed(0)
    made = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = made.from_config(content).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in (2, 3) and "conv" not in name and not name.endswith(("A_log", "_bias", ".D")):
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif not bool(torch.isfinite(parameter).all()):
                parameter.zero_()
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Plain:
    """A copy of the model whose weights are set, run whole."""

    def __init__(self, meter: DamageMeter, rows: Tensor):
        self.model, self.bank, self.rows = copy.deepcopy(meter.decoder.model), meter.bank, rows
        self.reference = self.log_p()

    @torch.no_grad()
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.model(input_ids=self.rows, use_cache=False).logits.double(), -1)

    @torch.no_grad()
    def put(self, assignment: dict[str, str]) -> None:
        for name, weight in self.bank.weights(assignment).items():
            self.model.get_submodule(name).weight.copy_(weight)

    def damage(self) -> np.ndarray:
        return (self.reference.exp() * (self.reference - self.log_p())).sum(-1).mean(-1).numpy()


def setup(folder: Path) -> tuple[Checkpoint, DamageMeter, Tensor]:
    checkpoint = open_checkpoint(str(folder))
    decoder = checkpoint.load_model()
    check_causal(decoder, "model")
    check_chain(decoder, "model")
    rows = torch.randint(3, 290, (3, 12), generator=torch.Generator().manual_seed(3))
    return checkpoint, meter_of(checkpoint, decoder), rows


def meter_of(checkpoint: Checkpoint, decoder: Decoder, budget: StateBudget | None = None) -> DamageMeter:
    bank = Bank(decoder, [module.name for module in checkpoint.modules], "rtn")
    return DamageMeter(decoder, bank, checkpoint.info.weights_sha256, "rtn", Journal(None), budget)


def swaps_of(units: list[Unit]) -> dict[str, Swap]:
    return {unit.name: Swap(unit.layer, {module.name: "int2_g32" for module in unit.modules}) for unit in units}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_what_is_measured_is_what_a_plain_pass_gives(shape: str, tmp_path: Path):
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    assert is_chain(meter.decoder) == (shape not in WHOLE)
    units, base = units_of(checkpoint.modules), {module.name: "int4_g32" for module in checkpoint.modules}
    swaps, plain = swaps_of(units), Plain(meter, rows)
    alone = meter.swaps(base, swaps, rows)
    paired = swap_interactions(meter, base, list(swaps.values()), rows)
    plain.put(base)
    before = plain.damage()
    close = {"rtol": 2e-3, "atol": 2e-4 * before.max()}  # float32 passes against float64 logarithms
    np.testing.assert_allclose(meter.plans({"plan": base}, rows)["plan"], before, **close)
    assert paired.by_row is not None
    for index, (name, swap) in enumerate(swaps.items()):
        plain.put(dict(swap.assignment))
        truly = plain.damage()
        plain.put(dict.fromkeys(swap.assignment, "int4_g32"))
        np.testing.assert_allclose(alone[name], truly, err_msg=name, **close)
        np.testing.assert_allclose(paired.by_row[:, index], truly - before, err_msg=name, rtol=1e-2, atol=1e-3 * before.max())


@pytest.mark.parametrize(
    "shape", sorted(set(SHAPES) - WHOLE - {"inputs of four axes, shared experts", "routed experts", "two classes of blocks"})
)
def test_streamed_is_in_memory(shape: str, tmp_path: Path):
    """Left out: experts that the file stores one by one, which are fused while they are loaded."""
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    streamed = meter_of(checkpoint, checkpoint.stream_model(), StateBudget(2**16, 2**12, whole=False, folder=tmp_path))
    check_chain(streamed.decoder, "model")
    swaps, base = swaps_of(units_of(checkpoint.modules)), {module.name: "int4_g32" for module in checkpoint.modules}
    mine, theirs = (one.swaps(base, swaps, rows) for one in (streamed, meter))
    for name in swaps:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6)
    prices = [price_units(one, checkpoint.modules, FORMATS, rows) for one in (streamed, meter)]
    np.testing.assert_allclose(*prices, rtol=1e-3, atol=1e-4 * prices[1].max())


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - WHOLE))
def test_gradients_of_scales_layer_by_layer_are_those_of_a_whole_pass(shape: str, tmp_path: Path):
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    codes = {module.name: meter.bank.codes(module.name, "int4_g32") for module in checkpoint.modules}
    gradients = []
    for streamed in (False, True):
        tuner = Tuner(meter.decoder, codes, dict.fromkeys(codes, 4), Tuning(rows, rows[:1], 2))
        tuner.teacher.see(rows, range(3))
        tuner._streamed = streamed
        with tuner._tuned() as weights:
            tuner._step(weights, [0, 2], 0.0)
            gradients.append({name: weight.momentum for name, weight in weights.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


def test_what_cannot_be_run_layer_by_layer_is_not_streamed(tmp_path: Path):
    checkpoint = open_checkpoint(str(build(tmp_path / "model", *SHAPES["values of a router for the next one"])))
    with pytest.raises(UserError, match="hands more from layer to layer than can be kept"):
        check_chain(checkpoint.stream_model(), "model")


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_moments_are_those_of_a_plain_pass(shape: str, tmp_path: Path):
    checkpoint, meter, rows = setup(build(tmp_path / "model", *SHAPES[shape]))
    check_moments(meter.decoder, [module.name for module in checkpoint.modules], rows)
    check_prices(meter, checkpoint.modules, rows)


def test_what_is_kept_out_of_the_plan_is_told(tmp_path: Path):
    mixture = open_checkpoint(str(build(tmp_path / "mixture", *SHAPES["routed experts"])))
    assert not [m.name for m in mixture.modules if m.name.endswith(("mlp.gate", "shared_expert_gate"))]
    assert any(m.name.endswith("shared_expert.gate_proj") for m in mixture.modules)
    assert mixture.notes[0].startswith("the plan covers ")
    mamba = open_checkpoint(str(build(tmp_path / "mamba", *SHAPES["a weight that is read without its module"])))
    assert {m.kind for m in mamba.modules} == {"in_proj", "x_proj", "out_proj"}
    assert any(note.startswith("backbone.layers.{0,1}.mixer.dt_proj: not quantized") for note in mamba.notes)


def test_sizes_count_what_sees(tmp_path: Path):
    folder = build(tmp_path / "model", *SHAPES["a part that sees"])
    info = open_checkpoint(str(folder)).info
    model = AutoModelForImageTextToText.from_pretrained(folder)
    every = sum(4 * p.numel() for p in model.parameters())
    assert info.total_bytes == every
    assert info.other_bytes == every - 4 * info.quantizable_weights
    assert all("vision" not in m.name for m in open_checkpoint(str(folder)).modules)


def test_activations_beyond_float16_are_told(tiny_llama: Path):
    checkpoint = open_checkpoint(str(tiny_llama))
    decoder = checkpoint.load_model(dtype=torch.float16)
    with torch.no_grad():
        decoder.model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(6e4)
    with pytest.raises(UserError, match=r"activations overflow float16 .*use --dtype bfloat16 or float32"):
        check_chain(decoder, "model")
