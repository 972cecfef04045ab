"""Tuning: its gradients against autograd, its damage against a plain pass, the model as before, the same bytes after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitatlas.measure.damage import DamageMeter
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.decoder import Decoder
from bitatlas.model.linear import weight_of
from bitatlas.quantize import rtn, tune
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.codes import Codes
from bitatlas.quantize.tune import STEP_ROWS, Pace, TunedWeight, Tuner, Tuning
from bitatlas.records.formats import FORMATS
from bitatlas.records.journal import Journal
from tiny import make_checkpoint

FORMAT = "int2_g32"


def rows(count: int, seed: int) -> Tensor:
    return torch.randint(0, 300, (count, 24), generator=torch.Generator().manual_seed(seed))


def opened(folder: Path) -> tuple[Decoder, dict[str, Codes]]:
    checkpoint = open_checkpoint(str(folder), None, False)
    decoder = checkpoint.load_model("cpu")
    return decoder, {m.name: rtn.quantize(decoder.weight(m.name), FORMATS[FORMAT]) for m in checkpoint.modules}


def tuner(decoder: Decoder, codes: dict[str, Codes], steps: int, file: Path | None = None) -> Tuner:
    return Tuner(decoder, codes, dict.fromkeys(codes, 2), Tuning(rows(24, 1), rows(8, 2), steps), file)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> tuple[Decoder, dict[str, Codes]]:
    return opened(tiny_llama)


@pytest.mark.parametrize("width", [64, 75])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_moments_are_autograds_gradients(width: int, kind: type):
    generator = torch.Generator().manual_seed(width)
    reference = torch.randn(8, width, generator=generator)
    module = nn.Linear(width, 8, bias=False) if kind is nn.Linear else Conv1D(8, width)
    codes = rtn.quantize(reference, FORMATS["int3_g32"])
    weight = TunedWeight(module, lambda: codes, 3)
    weight.write()
    torch.testing.assert_close(weight_of(module), codes.weight())  # it begins as the quantizer left it
    weight.change = 0.2 * torch.rand(weight.change.shape, generator=generator) - 0.1
    weight.write()
    inputs, target = torch.randn(5, width, generator=generator), torch.randn(5, 8, generator=generator)
    change = weight.change.clone().requires_grad_(True)
    groups = torch.arange(width) // 32
    explicit = (codes.codes - codes.zero[:, groups].float()) * (codes.scale.float() * (1 + change))[:, groups]
    (inputs @ explicit.T - target).square().sum().backward()
    module.weight.requires_grad_(True)
    (module(inputs) - target).square().sum().backward()
    weight.take(module.weight.grad)
    # a share of a first gradient goes into a momentum; scales are rounded to float16
    torch.testing.assert_close(weight.momentum, (1 - tune.MOMENTUM) * change.grad, rtol=5e-3, atol=5e-3)


def test_tuning_does_less_damage_and_its_figure_is_a_plain_passes(llama: tuple[Decoder, dict[str, Codes]]):
    decoder, codes = llama
    before = {name: parameter.clone() for name, parameter in decoder.model.named_parameters()}
    run = tuner(decoder, codes, steps=60)
    result = run.run()
    assert all(torch.equal(parameter, before[name]) for name, parameter in decoder.model.named_parameters())
    assert not any(parameter.requires_grad or parameter._post_accumulate_grad_hooks for parameter in decoder.model.parameters())
    assert list(result.select) == [0, *run.tuning.marks()]
    assert result.select[result.steps] == min(result.select.values()) < 0.95 * result.select[0]
    for step, of_step in ((0, codes), (result.steps, result.codes)):
        assert result.select[step] == pytest.approx(damage_of(decoder, of_step, run.tuning.select), rel=1e-4)
    for name, of_module in result.codes.items():
        assert of_module.scale.dtype == torch.float16
        assert torch.equal(of_module.codes, codes[name].codes) and torch.equal(of_module.zero, codes[name].zero)


def damage_of(decoder: Decoder, codes: dict[str, Codes], select: Tensor) -> float:
    bank = Bank(decoder, list(codes), "rtn")
    bank.put(codes, dict.fromkeys(codes, FORMAT))
    meter = DamageMeter(decoder, bank, "", "these codes", Journal(None))
    return float(meter.plans({"plan": dict.fromkeys(codes, FORMAT)}, select)["plan"].mean())


class StoppedError(Exception):
    pass


def stop_after(steps: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == steps:
            raise StoppedError

    return progress


@pytest.mark.parametrize("after", [3, 7])
def test_an_interrupted_run_ends_in_the_same_bytes(llama: tuple[Decoder, dict[str, Codes]], tmp_path: Path, after: int):
    decoder, codes = llama
    whole = tuner(decoder, codes, 12).run()

    file = tmp_path / "state.safetensors"
    with pytest.raises(StoppedError):
        tuner(decoder, codes, 12, file).run(stop_after(after))
    done: list[int] = []
    resumed = tuner(decoder, codes, 12, file).run(lambda step, total: done.append(step))
    assert done[0] == after // 3 * 3 + 1  # from the last mark on
    assert resumed.select == whole.select and resumed.steps == whole.steps
    for name, of_module in whole.codes.items():
        for part in ("codes", "scale", "zero"):
            assert torch.equal(getattr(of_module, part), getattr(resumed.codes[name], part))


def test_layer_by_layer_is_in_memory(tiny_llama: Path, llama: tuple[Decoder, dict[str, Codes]], tmp_path: Path):
    """But for the order of sums; and the same run gives the same bytes, also after an interruption."""
    decoder, codes = llama
    whole = tuner(decoder, codes, 12).run()
    streamed = open_checkpoint(str(tiny_llama), None, False).stream_model()
    first = tuner(streamed, codes, 12).run()
    assert first.select == pytest.approx(whole.select, rel=1e-3) and first.steps == whole.steps
    assert all(parameter.isnan().all() for parameter in streamed.layers.parameters())  # nothing of the layers stays in memory
    file = tmp_path / "state.safetensors"
    with pytest.raises(StoppedError):
        tuner(streamed, codes, 12, file).run(stop_after(5))
    again = tuner(streamed, codes, 12, file).run()
    assert again.select == first.select
    assert all(torch.equal(of_module.scale, again.codes[name].scale) for name, of_module in first.codes.items())


def test_another_runs_state_is_not_taken(llama: tuple[Decoder, dict[str, Codes]], tmp_path: Path):
    decoder, codes = llama
    file = tmp_path / "state.safetensors"
    tuner(decoder, codes, 4, file).run()
    other = tuner(decoder, codes, 4, file)
    other.name = "of another plan"
    done: list[int] = []
    other.run(lambda step, total: done.append(step))
    assert done == [1, 2, 3, 4]


def test_what_does_not_help_is_not_taken(llama: tuple[Decoder, dict[str, Codes]], monkeypatch: pytest.MonkeyPatch):
    """With a rate that throws everything about, the codes stay those that were given."""
    decoder, codes = llama
    monkeypatch.setattr(tune, "RATE", 2.0)
    result = tuner(decoder, codes, 20).run()
    assert result.steps == 0 and result.codes is codes


def test_the_most_steps_that_fit_into_a_time(llama: tuple[Decoder, dict[str, Codes]]):
    run = tuner(*llama, steps=0)  # 24 rows to tune on, 8 select rows
    pace = run.pace()
    assert 0 < pace.row < pace.step
    for seconds in (0.1, 1.0, 30.0):
        steps = run.steps_within(seconds, Pace(0.5, 0.01))
        assert run.seconds(steps + 1, Pace(0.5, 0.01)) > seconds >= run.seconds(steps, Pace(0.5, 0.01)) or steps == 1
    assert run.seconds(100, Pace(0.5, 0.01)) == pytest.approx(50 + 0.01 * (24 + 6 * 8))


def test_every_row_comes_once_before_any_comes_again():
    tuning = Tuning(rows(7, 3), rows(2, 4), steps=9)
    drawn = [tuning.batch(step).tolist() for step in range(9)]
    assert all(len(batch) == STEP_ROWS for batch in drawn)
    assert len({row for batch in drawn[:3] for row in batch}) == 6
    assert drawn == [tuning.batch(step).tolist() for step in range(9)]
    one = Tuning(rows(1, 3), rows(2, 4), steps=2)
    assert [one.batch(step).tolist() for step in range(2)] == [[0], [0]]


def not_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitatlas.quantize.tune", "bitatlas.model.layerwise"):
        monkeypatch.setattr(f"{module}.is_chain", lambda decoder: False)


@pytest.mark.parametrize("change", [lambda monkeypatch: None, not_a_chain])
def test_a_model_that_is_run_whole_and_transposed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable):
    decoder, codes = opened(make_checkpoint(tmp_path / "gpt2", "gpt2"))
    change(monkeypatch)
    result = tuner(decoder, codes, 40).run()
    assert result.select[result.steps] < 0.95 * result.select[0]
