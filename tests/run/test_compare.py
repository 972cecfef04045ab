"""Comparing two checkpoints: equal ones differ by nothing, a rounded one by what an independent computation says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from bitatlas.data.rows import make_rows
from bitatlas.errors import UserError
from bitatlas.measure.damage import DamageMeter
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import Bank
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import size_of
from bitatlas.run.compare import Comparison, compare_models
from bitatlas.run.options import CompareOptions, split_names
from tiny import SHARED


def compared(first: Path, second: Path, text: Path | None, tasks: str | None = None) -> Comparison:
    names, data = split_names(tasks or "none"), SHARED / "data" if tasks else None
    options = CompareOptions(
        first, second, tokens=text, rows=(2, 2, 8), row_length=24, tasks=names, task_data=data, limit=8, quiet=True
    )
    return compare_models(options)


def test_a_rounded_copy_differs_by_what_it_should(tiny_llama: Path, text: Path, tmp_path: Path):
    other = Path(shutil.copytree(tiny_llama, tmp_path / "rounded"))
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = compared(tiny_llama, other, text)
    assert result.damage is not None
    assert result.losses is not None
    from transformers import AutoModelForCausalLM

    rows = make_rows([tiny.TEXT], tiny.tokenizer(), "text", (2, 2, 8), 24, 128, 0).test
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (tiny_llama, other)]
    with torch.no_grad():
        logs = [torch.log_softmax(model(rows).logits, -1) for model in models]
    exact = torch.nn.functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True) / rows.shape[1]
    assert result.damage.mean == pytest.approx(float(exact), rel=1e-2, abs=1e-7)
    losses = [float(torch.nn.functional.nll_loss(log[:, :-1].flatten(0, 1), rows[:, 1:].flatten())) for log in logs]
    assert [loss.mean for loss in result.losses] == pytest.approx(losses, rel=1e-5)
    assert result.loss_difference is not None
    assert result.loss_difference.mean == pytest.approx(losses[1] - losses[0], abs=1e-5)


def test_a_model_and_itself(tiny_llama: Path, text: Path):
    result = compared(tiny_llama, tiny_llama, text)
    assert result.first != result.second
    assert result.damage is not None
    assert abs(result.damage.mean) < 1e-6


def test_tasks_are_paired(babyllama: Path):
    result = compared(babyllama, SHARED / "models" / "stories260K", None, "arc_easy")
    assert [score.n for score in result.scores] == [8, 8]
    assert len(result.pairs) == 1
    assert result.damage is None


def test_what_cannot_be_compared_is_refused(tiny_llama: Path, text: Path, babyllama: Path):
    with pytest.raises(UserError, match="nothing to compare"):
        compared(tiny_llama, tiny_llama, None)
    with pytest.raises(UserError, match="tokenizers differ"):
        compared(tiny_llama, babyllama, text)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        compared(tiny_llama, Path("/nowhere"), text)


# --- plans and quantized checkpoints -----------------------------------------------------------------------------------


def write_plan(model: Path, folder: Path, names: tuple[str, ...], quantizer: str = "rtn") -> Path:
    """Formats in turn, module by module."""
    folder.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(str(model), None, False)
    modules = {module.name: names[index % len(names)] for index, module in enumerate(checkpoint.modules)}
    info = PlanModel(checkpoint.info.name, None, checkpoint.info.weights_sha256)
    table = {name: FORMATS[name] for name in names}
    size = size_of(checkpoint.modules, modules, checkpoint.info)
    plan = Plan(info, table, quantizer, modules, Budget("code_bits", 3.0), size, PlanDamage(None, None))
    (folder / "plan.json").write_text(to_json(plan), encoding="utf-8")
    return folder / "plan.json"


@pytest.fixture
def plan_file(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_plan(tiny_llama, tmp_path / "survey", ("int2_g32", "int4_g32"))


def test_a_plan_differs_from_its_checkpoint_by_its_damage(tiny_llama: Path, plan_file: Path, text: Path):
    plan = json.loads(plan_file.read_text(encoding="utf-8"))["modules"]
    checkpoint = open_checkpoint(str(tiny_llama), None, False)
    decoder = checkpoint.load_model()
    rows = make_rows([tiny.TEXT], tiny.tokenizer(), "text", (2, 2, 8), 24, 128, 0).test
    meter = DamageMeter(decoder, Bank(decoder, list(plan), "rtn"), "", "rtn", Journal(None))
    expected = meter.plans({"plan": plan}, rows)["plan"].mean()
    for argument in (plan_file, plan_file.parent):  # the file, and the folder that it lies in
        result = compared(tiny_llama, argument, text)
        assert result.damage is not None
        assert result.damage.mean == pytest.approx(expected, rel=1e-5)
        assert compared(argument, tiny_llama, text).second == tiny_llama.name


def test_two_plans_and_a_plan_beside_its_survey(tiny_llama: Path, plan_file: Path, text: Path, tmp_path: Path):
    other = write_plan(tiny_llama, tmp_path / "other", ("int8_g32",))
    with pytest.raises(UserError, match=r"neither is that the other model nor does an atlas.json beside it say where"):
        compared(plan_file, other, text)
    with pytest.raises(UserError, match=r"text.txt: "):
        compared(tiny_llama, text, text)


@pytest.mark.parametrize("format_names", [("int2_g32", "int4_g32")])
def test_a_packed_checkpoint_is_its_plan(tiny_llama: Path, text: Path, tmp_path: Path, format_names: tuple[str, ...]):
    pytest.importorskip("compressed_tensors")
    from bitatlas.export.packed import apply_plan

    plan_file = write_plan(tiny_llama, tmp_path / "survey", format_names)
    apply_plan(str(tiny_llama), plan_file, tmp_path / "packed", Reporter(quiet=True))
    packed, whole = compared(tiny_llama, tmp_path / "packed", text), compared(tiny_llama, plan_file, text)
    assert packed.damage is not None
    assert whole.damage is not None
    assert packed.damage.mean == pytest.approx(whole.damage.mean, rel=1e-4)


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("aqlm", "aqlm"), ("vptq", "vptq")])
def test_a_missing_package_is_named(method: str, package: str, tiny_llama: Path, text: Path, tmp_path: Path):
    import importlib.util

    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is here")
    other = Path(shutil.copytree(tiny_llama, tmp_path / "quantized"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "version": "gemm"}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=package) as raised:
        compared(tiny_llama, other, text)
    assert "\n" not in str(raised.value)


def test_weights_that_a_quantized_checkpoint_lacks_are_not_made_up(tiny_llama: Path, text: Path, tmp_path: Path):
    """transformers fills them with random numbers, and warns of it at most."""
    other = Path(shutil.copytree(tiny_llama, tmp_path / "quantized"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "of the future"}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(other / "model.safetensors")
    first = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[first.replace("weight", "packed")] = tensors.pop(first)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights lack 1 tensors of the model"):
        compared(tiny_llama, other, text)
