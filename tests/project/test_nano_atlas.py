"""One file explains the method and takes nothing from the package: an oracle that the package's numbers are held against."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats

from bitatlas.measure.damage import DamageMeter, Swap
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.plan.knapsack import solve_knapsack
from bitatlas.plan.search import damage_tables
from bitatlas.quantize import rtn
from bitatlas.quantize.bank import Bank
from bitatlas.records.formats import FORMATS, stored_bytes
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import units_of
from tiny import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "nano_atlas.py"
GROUP_SIZE = 32


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nano_atlas", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nano = load()
NAMES = [f"int{bits}_g{GROUP_SIZE}" for bits in nano.WIDTHS]


def test_it_is_short_and_takes_nothing_from_the_package():
    source = FILE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name for node in imports for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_the_page_on_the_method_names_functions_that_exist():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    paragraph = next(part for part in page.split("\n\n") if "nano_atlas.py" in part)
    named = re.findall(r"`(\w+)\(\)`", paragraph)
    assert len(named) >= 9 and all(callable(getattr(nano, name, None)) for name in named)


def test_the_demo_is_where_it_looks():
    options = nano.parse([])
    assert Path(options.model, "config.json").is_file() and Path(options.tokens).is_file()


# --- weights and bytes


def hard_weight(width: int) -> torch.Tensor:
    """[24, width] with outliers, a row of zeros, one of one sign, one too small for a float16 scale."""
    weight = torch.distributions.StudentT(3.0).sample((24, width)) * 0.05
    weight[0], weight[1], weight[2] = 0.0, weight[1].abs(), weight[2] * 1e-7
    return weight


@pytest.mark.parametrize("width", [64, 96, 172, 20])  # 172: five groups of 32 and a short one; 20: a short one alone
@pytest.mark.parametrize("bits", nano.WIDTHS)
def test_codes_scales_and_zeros_are_the_packages(bits: int, width: int):
    """Bit for bit: the arithmetic is elementwise in float32. Only the sum of squared errors may be taken in another order (a short
    group is filled up with zeros), so two steps of clipping whose errors agree to float32's rounding may change places there."""
    torch.manual_seed(width)
    weight = hard_weight(width)
    codes = rtn.quantize(weight, FORMATS[f"int{bits}_g{GROUP_SIZE}"])
    ours = nano.dequantize(*nano.quantize(weight, bits, GROUP_SIZE), GROUP_SIZE)
    theirs = codes.weight()
    whole = width // GROUP_SIZE * GROUP_SIZE
    assert torch.equal(ours[:, :whole], theirs[:, :whole])
    assert all(
        torch.equal(mine[:, : width // GROUP_SIZE], other[:, : width // GROUP_SIZE])
        for mine, other in zip(nano.quantize(weight, bits, GROUP_SIZE)[1:], (codes.scale, codes.zero), strict=True)
    )
    errors = [(each - weight)[:, whole:].double().square().sum(1) for each in (ours, theirs)]
    assert torch.allclose(*errors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bytes_are_the_packages(group_size: int):
    for shape in ((64, 96), (7, 33), (3, 1), (172, 172), (1, 4096)):
        for bits in nano.WIDTHS:
            assert nano.stored_bytes(shape, bits, group_size) == stored_bytes(shape, FORMATS[f"int{bits}_g{group_size}"])


# --- damage, values, plan


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # with and without units of several modules
def test_damage_of_widths_and_swaps_their_values_and_the_plan_are_the_packages(family: str, tmp_path: Path, text: Path):
    folder = make_checkpoint(tmp_path / family, family, num_hidden_layers=2)
    checkpoint = open_checkpoint(str(folder))
    decoder = checkpoint.load_model()
    bank = Bank(decoder, [module.name for module in checkpoint.modules], "rtn")
    meter = DamageMeter(decoder, bank, "", "rtn", Journal(None))
    units = units_of(checkpoint.modules)

    own_model, tokenizer = nano.load_checkpoint(str(folder))
    rows = nano.cut_rows(text.read_text(encoding="utf-8"), tokenizer, [4], 16)[0]
    own_units = nano.quantized_units(own_model, GROUP_SIZE)
    assert [(u.name, u.layer, u.weights) for u in own_units] == [(u.name, u.layer, u.weights) for u in units]
    for name, bits in zip(NAMES, nano.WIDTHS, strict=True):
        sizes = [sum(stored_bytes(m.shape, FORMATS[name]) for m in unit.modules) for unit in units]
        assert [u.size[bits] for u in own_units] == sizes

    measure = cache(partial(nano.damage, own_model, own_units, rows, nano.log_probabilities(own_model, rows)))
    around = {}
    means: dict[str, dict[str, dict[str, float]]] = {}
    levels: dict[str, float] = {}
    for base, bits in ((NAMES[-1], nano.WIDTHS[-1]), (NAMES[0], nano.WIDTHS[0])):
        whole = {module.name: base for module in checkpoint.modules}
        level = meter.plans({base: whole}, rows)[base]
        swaps = {(u.name, name): Swap(u.layer, {m.name: name for m in u.modules}) for u in units for name in NAMES}
        damage = meter.swaps(whole, swaps, rows)
        around[base] = nano.single_swaps(measure, bits, len(units))  # [units, widths, rows]
        theirs = torch.tensor(np.array([[damage[u.name, name] for name in NAMES] for u in units]))
        # the same weights in the same precision: passes in other batches and from other layers differ by float32's rounding
        assert torch.allclose(around[base], theirs, rtol=1e-4, atol=1e-6)
        assert torch.allclose(measure((bits,) * len(units)), torch.from_numpy(level), rtol=1e-4, atol=1e-6)
        assert theirs.std() > 1e-3  # else the tolerance would hide what differs
        means[f"uniform:{base}"] = {u.name: {name: float(damage[u.name, name].mean()) for name in NAMES} for u in units}
        levels[f"uniform:{base}"] = float(level.mean())

    ours = nano.unit_values(around[NAMES[-1]], around[NAMES[0]])
    tables = damage_tables([u.name for u in units], NAMES, means, levels).tables
    for name, table in zip(("others wide", "others narrow", "mean of both"), tables.values(), strict=True):
        assert np.allclose(ours[name].mean(-1).numpy(), table, rtol=1e-4, atol=2e-6)  # differences of two of the above
    assert list(tables) == ["high", "low", "mean of both"]

    cost = np.array([[bits * unit.weights for bits in nano.WIDTHS] for unit in units])
    for code_bits, table in itertools.product((2.0, 2.5, 3.0, 3.7), tables.values()):
        limit = int(code_bits * sum(unit.weights for unit in units))
        assert nano.knapsack(table.tolist(), cost.tolist(), limit) == tuple(solve_knapsack(table, cost, limit).choice)


def test_the_knapsacks_agree_with_ties():
    for seed in range(150):
        rng = np.random.default_rng(seed)
        units, formats = rng.integers(1, 9), rng.integers(1, 4)
        damage, cost = rng.integers(-3, 5, (units, formats)) / 8, rng.integers(1, [5, 10**9][seed % 2], (units, formats))
        limit = int(rng.integers(cost.min(1).sum(), cost.max(1).sum() + 1))
        solution = solve_knapsack(damage, cost, limit)  # eighths: sums are exact, ties are real
        assert nano.knapsack(damage.tolist(), cost.tolist(), limit) == tuple(solution.choice)


# --- the verdict


def test_the_interval_of_a_normal_sample_is_students():
    for rows in (8, 40):
        values = torch.from_numpy(np.random.default_rng(rows).standard_normal(rows))
        exact = stats.t.interval(0.95, rows - 1, values.mean(), stats.sem(values))
        # 10,000 draws know a quantile to 2 % of the width; the bootstrap's shape is not quite normal at 8 rows
        assert np.allclose(nano.interval(values), exact, atol=0.06 * (exact[1] - exact[0]))


def test_the_three_words():
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(50))
    noise -= noise.mean()
    hard = torch.linspace(0, 100, 50, dtype=torch.float64)  # what both plans share must not blur the difference
    words = [nano.verdict(hard + noise + shift, hard)[0] for shift in (-1, 0, 1)]
    assert words == ["better", "no worse shown", "worse"]


def test_simple_plans_fill_the_room_and_no_more():
    units = [nano.Unit(f"u{i}", i, [], weights, {}, {}) for i, weights in enumerate((10, 10, 10, 6))]
    plans = nano.simple_plans(units, 3 * 36)
    assert plans == {"uniform 3 bits": (3, 3, 3, 3), "first layers high": (4, 2, 2, 4), "last layers high": (2, 2, 4, 4)}


def test_sets_of_rows_share_no_run_of_tokens():
    class Spaced:
        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    third = list(range(400))
    words = [
        *third,
        *range(1000, 1400),
        *range(2000, 2320),
        *range(37, 77),
        *range(1037, 1077),
    ]  # the end repeats 40 tokens of each
    sets = nano.cut_rows(" ".join(map(str, words)), Spaced(), [9, 9, 7], 40)
    runs = [{tuple(row[i : i + 32]) for row in part.tolist() for i in range(9)} for part in sets]
    assert all(first.isdisjoint(other) for first, other in itertools.combinations(runs, 2))
    assert [part.min() // 1000 for part in sets] == [part.max() // 1000 for part in sets] == [0, 1, 2]


# --- the command


def run(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        nano.main(list(words))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_command_ends_with_a_table_and_a_verdict(tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture):
    code, out, err = run(capsys, str(tiny_llama), "--tokens", str(text), "--rows", "2", "2", "3", "--row-length", "16")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"] and "qkv" in lines[1]
    assert lines[-4].startswith("the plan") and all(
        re.search(r"\[.*\]: (better|no worse shown|worse)$", line) for line in lines[-3:]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: not a model"),
        (["--tokens", "nowhere.txt"], "--tokens nowhere.txt"),
        (["--code-bits", "5"], "--code-bits 5: from 2 to 4"),
        (["--code-bits", "nan"], "--code-bits nan: from 2 to 4"),
        (["--code-bits", "three"], "--code-bits"),
        (["--rows", "1", "4", "4"], "at least 2"),
        (["--rows", "6", "6", "4000"], "text too short"),
        (["--row-length", "4000"], "--row-length 4000: the model's context is 128"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: list[str], message: str, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture
):
    given = words if words == ["nowhere"] else [str(tiny_llama), "--tokens", str(text), *words]
    code, out, err = run(capsys, *given)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("nano_atlas: ") and message in err


def test_a_folder_without_weights_is_told_in_one_line(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    code, out, err = run(capsys, str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1) and "cannot load it" in err


@pytest.mark.parametrize(
    ("family", "scale", "message"), [("llama", 1e30, "not finite"), ("gpt2", 1.0, "no decoder layers with linear modules")]
)
def test_a_model_that_it_cannot_measure_is_refused(
    family: str, scale: float, message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = make_checkpoint(tmp_path / family, family, scale=scale, num_hidden_layers=1)
    code, out, err = run(capsys, str(folder), "--tokens", str(text), "--rows", "2", "2", "3", "--row-length", "16")
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
