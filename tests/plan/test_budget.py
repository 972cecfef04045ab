"""Sizes to the byte, limits that are never exceeded by one, and refusals that say what would be possible."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.errors import UserError
from bitatlas.plan.budget import KINDS, check_budget, costs_of, runtime_bytes, size_range
from bitatlas.plan.knapsack import solve_knapsack
from bitatlas.records import Budget, ModelInfo, Module
from bitatlas.records.formats import FORMATS
from bitatlas.records.plan import Workload
from bitatlas.records.sizes import assignment_of, parse_size, show_bytes, size_of, units_of

SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "up_proj": (172, 64), "down_proj": (64, 172)}
PAIR = ["int2_g64", "int4_g64"]
LOAD = Workload(64, 1, 16, "float16", "bfloat16", cache_bytes=5000, activation_bytes=3001)


def modules_of(layers: int = 3, fuse: bool = False, shapes: dict[str, tuple[int, int]] = SHAPES) -> list[Module]:
    def unit(layer: int, kind: str) -> str:
        return f"layers.{layer}.qk" if fuse and kind in {"q_proj", "k_proj"} else f"layers.{layer}.{kind}"

    return [
        Module(f"layers.{layer}.{kind}", layer, kind, shape, unit(layer, kind))
        for layer in range(layers)
        for kind, shape in shapes.items()
    ]


def info_of(modules: list[Module], dtype: str = "bfloat16", other: int = 12345) -> ModelInfo:
    weights = sum(module.weights for module in modules)
    return ModelInfo("tiny", None, "0" * 64, "Tiny", 3, 4, 128, dtype, weights, other, other + 2 * weights)


def budget_of(kind: str, value: float) -> Budget:
    return Budget(kind, value, LOAD if kind == "vram" else None)


def test_size_counts_codes_scales_zeros_padding_and_what_stays():
    modules = modules_of(layers=1)
    size = size_of(modules, {"layers.0.q_proj": "int2_g64", "layers.0.down_proj": "int4_g32_sym"}, info_of(modules))
    q_bytes = 64 * 64 * 2 // 8 + 64 * 4  # one group a row, 16 + 16 bits each
    down_bytes = 64 * 172 * 4 // 8 + 64 * 6 * 2  # six groups a row (172 = 5 * 32 + 12), no zero-point
    kept_bytes = 2 * (32 * 64 + 172 * 64)
    assert size.quantized_bytes == q_bytes + down_bytes
    assert size.total_bytes == 12345 + q_bytes + down_bytes + kept_bytes
    assert size.code_bits == (64 * 64 * 2 + 64 * 172 * 4) / (64 * 64 + 64 * 172)
    assert size.stored_bits == 8 * (q_bytes + down_bytes) / (64 * 64 + 64 * 172)


def test_an_empty_plan_is_the_checkpoint():
    modules = modules_of()
    size = size_of(modules, {}, info_of(modules))
    assert (size.code_bits, size.stored_bits, size.quantized_bytes) == (16.0, 16.0, 0)
    assert size.total_bytes == info_of(modules).total_bytes


def test_size_refuses_modules_and_dtypes_it_does_not_know():
    modules = modules_of()
    with pytest.raises(UserError, match=r"checkpoint lacks, for example 'layers\.9\.q_proj'"):
        size_of(modules, {"layers.9.q_proj": "int2_g64"}, info_of(modules))
    with pytest.raises(UserError, match="nearest is 'int2_g64'"):
        size_of(modules, {"layers.0.q_proj": "int2g64"}, info_of(modules))
    with pytest.raises(UserError, match="dtype 'float4'"):
        size_of(modules, {}, info_of(modules, dtype="float4"))


def test_units_keep_their_order_and_share_one_format():
    units = units_of(modules_of(layers=2, fuse=True))
    assert [unit.name for unit in units[:3]] == ["layers.0.qk", "layers.0.up_proj", "layers.0.down_proj"]
    assert (units[0].layer, units[3].layer, units[0].weights) == (0, 1, 64 * 64 + 32 * 64)
    assignment = assignment_of(units, PAIR, np.array([1, 0, 0, 0, 1, 0]))
    assert assignment["layers.0.q_proj"] == assignment["layers.0.k_proj"] == "int4_g64"
    assert assignment["layers.1.q_proj"] == "int2_g64"
    assert len(assignment) == 8


def test_a_unit_over_two_layers_is_an_error():
    with pytest.raises(ValueError, match="more than one layer"):
        units_of([Module("a", 0, "q_proj", (2, 2), "u"), Module("b", 1, "q_proj", (2, 2), "u")])


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    place=st.floats(0, 1),
    formats=st.lists(st.sampled_from(sorted(FORMATS)), min_size=1, max_size=4, unique=True),
    shapes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4),
)
def test_a_plan_at_the_limit_keeps_the_budget_and_one_more_breaks_it(kind, place, formats, shapes):
    modules = modules_of(2, shapes={f"kind{i}": shape for i, shape in enumerate(shapes)})
    info, units = info_of(modules), units_of(modules)
    least, most = size_range(kind, modules, formats, info, runtime_bytes(budget_of(kind, 1)))
    budget = budget_of(kind, least + place * (most - least))
    check_budget(budget, modules, formats, info)
    costs = costs_of(budget, units, formats, info)
    # the limit is exact: its worth is within the budget, one more is not
    weights = sum(unit.weights for unit in units)
    beside = 8001 if kind == "vram" else 0
    assert float(KINDS[kind].worth(costs.limit, weights, info.other_bytes + beside)) <= budget.value
    assert float(KINDS[kind].worth(costs.limit + 1, weights, info.other_bytes + beside)) > budget.value
    # and the size of a plan, computed module by module, says the same as the sum of costs
    plan = solve_knapsack(-costs.cost.astype(float), costs.cost, costs.limit)
    size = size_of(modules, assignment_of(units, formats, plan.choice), info)
    sizes = {"code_bits": size.code_bits, "stored_bits": size.stored_bits, "size": size.total_bytes}
    shown = (sizes | {"vram": size.total_bytes + beside})[kind]
    assert shown <= budget.value
    assert shown == float(KINDS[kind].worth(-int(plan.value), weights, info.other_bytes + beside))


@pytest.mark.parametrize(("value", "weights", "limit"), [(2.9, 10, 29), (2.1, 10, 21), (7 / 3, 3, 7), (3.0, 7, 21)])
def test_decimal_budgets_mean_what_is_written(value, weights, limit):
    # 2.9 in float64 is below 29/10, 2.1 above 21/10
    modules = [Module("layers.0.q_proj", 0, "q_proj", (1, weights), "u")]
    costs = costs_of(Budget("code_bits", value), units_of(modules), PAIR, info_of(modules))
    assert (costs.limit, costs.what) == (limit, "bits")


def test_the_size_of_a_plan_is_a_budget_that_the_plan_meets():
    modules = modules_of(7)
    units, info = units_of(modules), info_of(modules)
    assignment = assignment_of(units, PAIR, np.arange(len(units)) % 3 // 2)
    size = size_of(modules, assignment, info)
    for kind, value in (("code_bits", size.code_bits), ("stored_bits", size.stored_bits), ("size", size.total_bytes)):
        costs = costs_of(Budget(kind, value), units, PAIR, info)
        assert costs.limit == costs.cost[np.arange(len(units)), np.arange(len(units)) % 3 // 2].sum()


def test_a_tolerated_damage_is_paid_in_bytes_without_a_limit():
    modules = modules_of()
    costs = costs_of(Budget("max_damage", 0.05), units_of(modules), PAIR, info_of(modules))
    assert (costs.limit, costs.what) == (None, "bytes")
    everything_low = size_of(modules, {module.name: "int2_g64" for module in modules}, info_of(modules))
    assert costs.cost[:, 0].sum() == everything_low.quantized_bytes


refusals = [
    (Budget("code_bits", 1.5), "--code-bits 1.5 is below 2.0, the least that int2_g64 gives; possible: 2.0 to 4.0"),
    (Budget("code_bits", 1.9999999), "--code-bits 1.9999999 is below 2.0, the least that int2_g64 gives; possible: 2.0 to 4.0"),
    (Budget("code_bits", 4.00000001), "--code-bits 4.00000001 is above 4.0, the most that int4_g64 gives; possible: 2.0 to 4.0"),
    (
        Budget("size", 2**30 + 1),
        "--size 1.073741825GB is above 60.11kB, the most that int4_g64 gives; possible: 38.99kB to 60.11kB",
    ),
    (
        Budget("size", 1234567.75 * 2**30),
        "--size 1234567.75GiB is above 60.11kB, the most that int4_g64 gives; possible: 38.99kB to 60.11kB",
    ),
    (Budget("code_bits", 4.5), "--code-bits 4.5 is above 4.0, the most that int4_g64 gives; possible: 2.0 to 4.0"),
    (Budget("stored_bits", 2), "--stored-bits 2 is below 2.523, the least that int2_g64 gives; possible: 2.523 to 4.523"),
    (Budget("size", 4 * 2**30), "--size 4GiB is above 60.11kB, the most that int4_g64 gives; possible: 38.99kB to 60.11kB"),
    (Budget("size", 20000), "--size 20kB is below 38.99kB, the least that int2_g64 gives; possible: 38.99kB to 60.11kB"),
    (
        Budget("vram", 2**14, LOAD),
        "--vram 16.384kB is below 46.99kB, the least that int2_g64 gives; the cache of 64 tokens and the activations alone take "
        "8.001kB; possible: 46.99kB to 68.11kB",
    ),
    (Budget("vram", 2**30, LOAD), "--vram 1GiB is above 68.11kB, the most that int4_g64 gives; possible: 46.99kB to 68.11kB"),
    (Budget("max_damage", 0), "--max-damage 0 must be a positive number"),
    (Budget("code_bits", math.nan), "--code-bits nan must be a positive number"),
]


@pytest.mark.parametrize(("budget", "line"), refusals, ids=[line.split(",")[0] for _, line in refusals])
def test_impossible_budgets_are_refused_with_the_possible_range(budget, line):
    modules = modules_of()
    with pytest.raises(UserError) as caught:
        check_budget(budget, modules, PAIR, info_of(modules))
    assert str(caught.value) == line


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_both_ends_of_the_printed_range_are_accepted(kind):
    modules = modules_of()
    with pytest.raises(UserError) as caught:
        check_budget(budget_of(kind, 1), modules, PAIR, info_of(modules))
    for end in str(caught.value).split("possible: ")[1].split(" to "):
        value = parse_size(end) if kind in ("size", "vram") else float(end)
        check_budget(budget_of(kind, value), modules, PAIR, info_of(modules))


def test_one_format_leaves_one_budget():
    modules = modules_of()
    check_budget(Budget("code_bits", 2), modules, ["int2_g64"], info_of(modules))
    with pytest.raises(UserError, match=r"possible: 2\.0$"):
        check_budget(Budget("code_bits", 3), modules, ["int2_g64"], info_of(modules))


def test_a_checkpoint_without_linear_weights_and_a_kind_unheard_of():
    with pytest.raises(UserError, match="no linear weights"):
        check_budget(Budget("code_bits", 3), [], PAIR, info_of([]))
    with pytest.raises(ValueError, match="known are code_bits, stored_bits, size, vram and max_damage"):
        size_range("watts", modules_of(), PAIR, info_of(modules_of()))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("600MB", 600_000_000),
        ("1.5 GiB", 3 * 2**29),
        (" 7kb ", 7000),
        ("123456", 123456),
        ("12 B", 12),
        (".5TiB", 2**39),
        ("0.1GB", 100_000_000),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "4G", "1e9", "4 parsecs", "1,5GB", "nan", "0", "0.1B", "٣GB"])
def test_what_is_not_a_size_is_refused_naming_the_flag(text):
    with pytest.raises(UserError, match="--vram"):
        parse_size(text, flag="--vram")


def test_a_lone_letter_is_told_its_two_readings():
    with pytest.raises(UserError, match=r"GB counts in 1000s, GiB in 1024s"):
        parse_size("4G")


@settings(max_examples=200)
@given(size=st.integers(1, 10**15), digits=st.integers(1, 15))
def test_a_shown_size_is_read_again_as_no_less_and_hardly_more(size, digits):
    again = parse_size(show_bytes(size, digits))
    assert size <= again <= size + max(1, Fraction(size, 1) * 10 ** max(1 - digits, -1))
