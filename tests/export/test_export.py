"""Exports to other runtimes: what is refused and that nothing is written then, what each file says, and the numbers in those with weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bitatlas.cli.main import main
from bitatlas.errors import UserError
from bitatlas.export import targets
from bitatlas.export.target import Target
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.records.files import to_json
from bitatlas.records.runtimes import Integers
from exports import SMALL, exported, make_plan, refusal
from tiny import make_checkpoint

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> str:
    """A runtime that holds little, and fuses."""
    holds = Integers(bits=(3, 4), group_sizes=(32, 64), symmetric=(True,))
    target = Target("narrow", "", holds, lambda job, folder: [], needs_model=False, whole_groups=True, fused=True)
    monkeypatch.setitem(targets.TARGETS, "narrow", target)
    return "narrow"


def test_an_unknown_runtime_is_named_with_the_nearest(tmp_path: Path):
    assert "unknown runtime 'autoroud'; nearest is 'autoround'" in refusal(SMALL, tmp_path, "autoroud")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("int2_g32", "int3_g32_sym"),
        ("int8_g128_sym", "int4_g64_sym"),
        ("int4_g64", "int4_g64_sym"),
        ("int3_g128", "int3_g64_sym"),
    ],
)
def test_a_format_that_the_runtime_cannot_hold(tmp_path: Path, narrow: str, name: str, nearest: str):
    said = refusal(make_plan({"model.layers.0.mlp.up_proj": name}), tmp_path, narrow)
    told = f"model.layers.0.mlp.up_proj has the format {name}, which narrow cannot hold; the nearest that it can is {nearest}"
    assert said == f"--to narrow: {told}"


def test_rows_that_groups_do_not_divide(tmp_path: Path, narrow: str):
    """Known from the model alone: without it the export says that it did not look."""
    model = make_checkpoint(tmp_path / "model", intermediate_size=96)  # 96 = 3 x 32
    sha256 = open_checkpoint(str(model)).info.weights_sha256
    plan = make_plan({"model.layers.0.mlp.down_proj": "int3_g64_sym"}, sha256)
    said = refusal(plan, tmp_path / "here", narrow, model)
    assert "rows of 96 weights, which groups of 64 do not divide" in said
    assert said.endswith("the nearest that it can is int3_g32_sym")
    assert "row lengths were not checked" in exported(plan, tmp_path / "there", narrow).notes[0]


def test_modules_that_are_one_matrix_have_one_format(tmp_path: Path, narrow: str):
    modules = {f"model.layers.0.{part}": "int4_g32_sym" for part in PARTS}
    exported(make_plan({**modules, "model.layers.0.mlp.down_proj": "int3_g32_sym"}), tmp_path / "whole", narrow)
    said = refusal(make_plan({**modules, "model.layers.0.self_attn.v_proj": "int3_g32_sym"}), tmp_path / "split", narrow)
    assert "model.layers.0.self_attn.v_proj has the format int3_g32_sym and model.layers.0.self_attn.q_proj int4_g32_sym" in said


def test_another_model_and_an_empty_plan_are_refused(tmp_path: Path, tiny_llama: Path):
    assert "not the weights that the plan was made for" in refusal(SMALL, tmp_path / "other", "autoround", tiny_llama)
    assert "quantizes no module" in refusal(replace(SMALL, modules={}, formats={}), tmp_path / "empty", "autoround")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--to", "mxl"], "--to: unknown runtime 'mxl'; nearest is 'mlx' (valid: vllm, mlx, "),
        (["--to", ""], "--to"),
        (["--to", "mlx"], "--to mlx: writes weights, so it needs --model"),
        (["--to", "mlx", "--model", "nowhere"], "nowhere: no such checkpoint folder"),
        ([], "Missing option '--to'"),
    ],
)
def test_the_command_says_it_in_one_line(tmp_path: Path, monkeypatch, capsys, flags: list[str], said: str):
    (tmp_path / "plan.json").write_text(to_json(SMALL), encoding="utf-8")
    command = ["bitatlas", "export", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out"), *flags]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said in error[-1] and len([line for line in error if line.startswith("bitatlas: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "plan.json").write_text(to_json(SMALL), encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["bitatlas", "export", str(tmp_path / "plan.json"), "--to", "torchao", "--out", str(tmp_path / "out"), "-q"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code
    assert lines[0] == "torchao: README.md, plan.json, quantize.py, torchao.json"
    assert lines[-1] == str(tmp_path / "out")


def test_transposed_layers(tmp_path: Path):
    """GPT-2's weights lie the other way round: a runtime that would cut the wrong axis into groups gets nothing."""
    model = make_checkpoint(tmp_path / "model", "gpt2")
    plan = make_plan({"transformer.h.0.mlp.c_fc": "int4_g32"}, open_checkpoint(str(model)).info.weights_sha256)
    for target in ("torchao", "llm-compressor", "mlx", "exllamav3"):
        said = refusal(plan, tmp_path / target, target, model)
        assert f"transformer.h.0.mlp.c_fc is a Conv1D (GPT-2's transposed linear layer), which {target} cannot" in said
    exported(plan, tmp_path / "gptqmodel", "gptqmodel", model)


def test_codes_that_were_fitted_must_be_at_hand(tmp_path: Path, tiny_llama: Path):
    modules = {"model.layers.0.mlp.up_proj": "int4_g32"}
    plan = replace(make_plan(modules, open_checkpoint(str(tiny_llama)).info.weights_sha256), quantizer="gptq")
    assert "folder 'bank' must lie beside the plan" in refusal(plan, tmp_path / "weights", "mlx", tiny_llama)
    exported(plan, tmp_path / "settings", "torchao", tiny_llama)  # whose codes are its own


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path):
    exported(SMALL, tmp_path, "autoround")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="exists and is not empty"):
        exported(SMALL, tmp_path, "autoround")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(job: object, folder: Path) -> list[str]:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(targets.TARGETS, "failing", Target("failing", "", Integers(bits=(2, 4)), failing))
    with pytest.raises(OSError, match="No space"):
        exported(SMALL, tmp_path, "failing")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
