"""What a survey needs is known before it: in memory where that fits, layer by layer where that does, one line where neither; same results."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitatlas.errors import UserError
from bitatlas.measure.machine import MemoryNeed, available_bytes, choose_load_mode, estimate_memory, peak_bytes
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.records import Module
from tiny import TEXT

WORDS = [
    "--tasks", "none", "--rows", "4,4,6", "--row-length", "16", "--formats", "int2_g32,int4_g32", "--quantizer", "rtn", "--no-refine", "--no-curve", "-q",
]  # fmt: skip
STREAMED = """
import sys
from pathlib import Path
from bitatlas.run import prepare
from bitatlas.cli.main import main
from bitatlas.measure.machine import LoadMode
from bitatlas.measure.damage import StateBudget
if sys.argv.pop(1) == "streamed":
    prepare.choose_load_mode = lambda needed, memory, device, out: LoadMode(True, StateBudget(2**16, 2**12, 2**16, whole=False, folder=out), 2**16, needed.streamed)
main()
"""


def test_the_way_is_chosen_by_what_is_needed(tmp_path: Path):
    needed = MemoryNeed(whole=10 * 2**30, streamed=2**30)
    assert not choose_load_mode(needed, 11 * 2**30, "cpu", tmp_path).streamed
    way = choose_load_mode(needed, 2 * 2**30, "cpu", tmp_path)
    assert way.streamed and not way.state_budget.whole and way.predicted_bytes <= 2 * 2**30
    assert way.state_budget.state_bytes > choose_load_mode(needed, needed.streamed, "cpu", tmp_path).state_budget.state_bytes > 0
    with pytest.raises(UserError, match=r"--memory 500 MB: too little; layer by layer this survey needs 1.07 GB"):
        choose_load_mode(needed, 500_000_000, "cpu", tmp_path)


def test_in_memory_states_take_what_is_spare_up_to_what_pays(tmp_path: Path):
    needed = MemoryNeed(10 * 2**30, 2**30, states=2**28, max_states=2**30)
    ways = [choose_load_mode(needed, needed.whole + spare, "cuda", tmp_path) for spare in (0, 2**30, 2**40)]
    assert [way.state_budget.state_bytes for way in ways] == [2**28, 2**29, 2**30]
    assert [way.predicted_bytes - needed.whole for way in ways] == [0, 2**28, 2**30 - 2**28]
    assert all(way.predicted_bytes <= limit for way, limit in zip(ways, (10 * 2**30, 11 * 2**30, 2**40), strict=True))


def test_what_is_needed_grows_with_what_makes_it_grow(tiny_llama: Path):
    checkpoint = open_checkpoint(str(tiny_llama))

    def of(
        modules: list[Module] = checkpoint.modules, row_length: int = 64, formats: int = 2, dtype: torch.dtype = torch.float32
    ) -> MemoryNeed:
        return estimate_memory(checkpoint.info, modules, 300, 8, row_length, formats, dtype, "cuda")

    wide = [Module(m.name, m.layer, m.kind, (64 * m.shape[0], m.shape[1]), m.unit) for m in checkpoint.modules]
    for more in (of(wide), of(row_length=4096), of(wide, formats=4)):
        assert more.whole > of().whole and more.streamed > of().streamed
    assert of(dtype=torch.bfloat16).whole < of().whole
    large = replace(checkpoint.info, quantizable_weights=10**9)
    large_need = estimate_memory(large, checkpoint.modules, 300, 8, 64, 2, torch.float32, "cuda")
    assert large_need.streamed == of().streamed < large_need.whole


def test_memory_at_hand_holds_this_process():
    assert available_bytes("cpu") > peak_bytes("cpu") / 2 > 2**26


def survey(how: str, model: Path, text: Path, out: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, how, "survey", str(model), "--tokens", str(text), *WORDS, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_streamed_survey_finds_what_one_in_memory_finds(tiny_llama: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for how in ("whole", "streamed"):
        survey(how, tiny_llama, text, tmp_path / how)
    plans = [json.loads((tmp_path / how / "plan.json").read_text()) for how in ("whole", "streamed")]
    assert plans[0]["modules"] == plans[1]["modules"]
    means = [plan["damage"]["measured"]["mean"] for plan in plans]
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    atlases = [json.loads((tmp_path / how / "atlas.json").read_text()) for how in ("whole", "streamed")]
    assert atlases[0]["settings"] == atlases[1]["settings"]
    for one, other in zip(*(atlas["attention"] for atlas in atlases), strict=True):
        assert one["entropy"]["mean"] == pytest.approx(other["entropy"]["mean"], rel=1e-4)
    assert not list((tmp_path / "streamed").glob(".states-*"))
