"""Comparing two checkpoints: equal ones differ by nothing, a rounded one by what an independent computation says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from bitatlas.compare import Comparison, compare_models
from bitatlas.errors import UserError
from bitatlas.progress import Reporter
from bitatlas.tokens import make_rows
from tiny import SHARED


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(tiny.TEXT, encoding="utf-8")
    return file


def compared(first: Path, second: Path, text: Path | None, tasks: str | None = None) -> Comparison:
    data = str(SHARED / "data") if tasks else None
    return compare_models(
        str(first), str(second), str(text) if text else None, (2, 2, 8), 24, tasks, data, 8, "cpu", 0, Reporter(quiet=True)
    )  # fmt: skip


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
