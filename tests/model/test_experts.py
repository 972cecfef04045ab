"""Mixtures: experts that a model holds in one tensor are linear modules of their own, and change nothing by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitatlas.errors import UserError
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.model.layerwise import whole_logits
from bitatlas.quantize import moments
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.moments import expert_tokens, module_moments
from bitatlas.records.sizes import units_of
from tiny_shapes import MIXTURES, build

IDS = torch.randint(3, 290, (2, 24), generator=torch.Generator().manual_seed(5))
ROUNDING = 1e-5  # of the largest logit: sums in another order


def mixture(tmp_path: Path, name: str) -> tuple[Checkpoint, Path]:
    folder = build(tmp_path / "model", *MIXTURES[name])
    return open_checkpoint(str(folder), fuse=False), folder


@torch.no_grad()
def plain_logits(folder: Path, change: dict[str, Tensor] | None = None) -> Tensor:
    """What transformers computes by itself, with parts of its fused tensors changed: "parameter.expert" -> [out, in]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    for name, weight in (change or {}).items():
        fused, _, expert = name.rpartition(".")
        part = parameters[fused][int(expert)]
        part.copy_(weight.T if fused.split(".")[-1] in TRANSPOSED.get(model.config.model_type, ()) else weight)
    return model(input_ids=IDS, use_cache=False).logits


TRANSPOSED = dict.fromkeys(("gpt_oss", "llama4_text"), ("gate_up_proj", "down_proj"))


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_the_model_is_the_same_with_its_experts_one_by_one(name: str, tmp_path: Path):
    checkpoint, folder = mixture(tmp_path, name)
    expected = plain_logits(folder)
    close = {"rtol": 0, "atol": ROUNDING * float(expected.abs().max())}
    decoder, streamed = checkpoint.load_model(), checkpoint.stream_model()
    torch.testing.assert_close(whole_logits(decoder, IDS), expected, **close)
    torch.testing.assert_close(whole_logits(streamed, IDS), expected, **close)
    experts = [module for module in checkpoint.modules if module.expert is not None]
    for module in experts:
        torch.testing.assert_close(streamed.weight(module.name), decoder.weight(module.name), rtol=0, atol=0)
        assert tuple(decoder.weight(module.name).shape) == module.shape == decoder.shape(module.name)
    # every expert in int2: as if their fused tensors were changed by hand
    weights = Bank(decoder, [m.name for m in experts], "rtn").weights({module.name: "int2_g32" for module in experts})
    changed = plain_logits(folder, dict(weights))
    assert (changed - expected).abs().max() > 0.01 * expected.abs().max()
    for model in (decoder, streamed):
        with model.swapped(weights):
            torch.testing.assert_close(whole_logits(model, IDS), changed, **close)
        torch.testing.assert_close(whole_logits(model, IDS), expected, **close)


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_a_plan_covers_nearly_all_weights(name: str, tmp_path: Path):
    checkpoint, folder = mixture(tmp_path, name)
    every = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    covered = sum(module.weights for module in (*checkpoint.modules, *checkpoint.outer))
    # of so small a model: routers, and of GPT-OSS a bias an expert
    assert covered >= (0.98 if name == "gpt_oss" else 0.985) * every
    assert not any("router" in m.name or m.name.endswith(".gate") for m in checkpoint.modules)
    experts = [module for module in checkpoint.modules if module.expert is not None]
    by_unit = [unit for unit in units_of(checkpoint.modules) if unit.modules[0].expert is not None]
    assert {len(unit.modules) for unit in by_unit} == {4} and len(experts) == 4 * len(by_unit)
    each = open_checkpoint(str(folder), fuse=False, each_expert=True).modules
    assert {module.unit for module in each if module.expert is not None} == {module.name for module in experts}


def test_an_expert_that_saw_few_tokens_is_fitted_to_all_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, _ = mixture(tmp_path, "mixtral")
    decoder, names = checkpoint.load_model(), [m.name for m in checkpoint.modules if m.expert is not None]
    counts = expert_tokens(decoder, names, IDS)
    assert sum(counts[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"] for expert in range(4)) == 2 * IDS.numel()
    # all of them saw fewer than that, none fewer than 1
    for few, expected in ((IDS.numel() + 1, dict.fromkeys(names, IDS.numel())), (0, counts)):
        monkeypatch.setattr(moments, "FEW_TOKENS", few)
        fitted = {name: m for m in module_moments(decoder, names, IDS) for name in m.names}
        assert {name: m.tokens for name, m in fitted.items()} == expected
        if few:
            every = fitted
    inputs: list[Tensor] = []
    block = decoder.model.get_submodule("model.layers.1.mlp.experts")
    hook = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    whole_logits(decoder, IDS)
    hook.remove()
    gate, up = (inputs[0] @ decoder.weight("model.layers.1.mlp.experts.gate_up_proj.2").T).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    for kind, x in (("gate_up_proj", inputs[0]), ("down_proj", inner)):
        moment = every[f"model.layers.1.mlp.experts.{kind}.2"]
        torch.testing.assert_close(moment.plain, x.T @ x, rtol=1e-4, atol=1e-4 * float(x.abs().max()) ** 2)
        torch.testing.assert_close(moment.weighted, moment.plain)


def test_experts_that_are_quantized_already_are_told(tmp_path: Path):
    _, folder = mixture(tmp_path, "gpt_oss")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "mxfp4"},', 1))
    with pytest.raises(UserError, match="quantized already, by mxfp4; give the unquantized checkpoint"):
        open_checkpoint(str(folder))
