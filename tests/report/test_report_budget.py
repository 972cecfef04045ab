"""The budget slider's contents: every verified plan is a stop, what a stop says is what the record holds, its commands are ones that work."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest

from atlas_factory import Recipe, make_atlas
from bitatlas.export.targets import TARGETS
from bitatlas.plan.budget import activation_bytes, cache_bytes
from bitatlas.records import Atlas, Plan
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS
from bitatlas.records.plan import Workload
from bitatlas.records.runtimes import RUNTIMES
from bitatlas.records.sizes import unlike_partners
from bitatlas.records.text import interval, number
from bitatlas.report import budget
from bitatlas.report.advice import steps_of
from bitatlas.report.budget import CODES, slider_data
from bitatlas.report.charts import heat
from bitatlas.report.html import html
from report_cases import RECIPES, emptied


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return make_atlas()


def test_every_verified_plan_and_both_ends_are_stops_from_small_to_large(atlas: Atlas) -> None:
    found = budget.stops(atlas)
    assert len(found) == 1 + len(atlas.plans) + 2
    sizes = [stop.plan.size.total_bytes for stop in found]
    assert sizes == sorted(sizes)
    assert {stop.plan.size.total_bytes for stop in found if not stop.kept} == {
        u.size.total_bytes for u in atlas.uniform if u.format in (atlas.low, atlas.high)
    }
    for stop in found:
        damage = stop.plan.damage.measured
        assert damage is not None
        assert damage.rows == "test"
        assert interval(damage, unit=True) in stop.told
        assert stop.place in html(atlas)
    assert [stop.plan for stop in found if stop.place == "plan.json"] == [atlas.plan]


def test_without_a_measured_plan_there_is_no_slider(atlas: Atlas) -> None:
    assert budget.stops(emptied(atlas)) == []
    assert 'id="budget"' not in html(emptied(atlas))


def test_tasks_stand_at_the_stops_where_they_were_run_and_nowhere_else(atlas: Atlas) -> None:
    for stop in budget.stops(atlas):
        precision = {"plan.json": "plan"}.get(stop.place, f"uniform:{stop.place[13:-5]}")
        scored = [f"{score.correct}/{score.n}" for score in atlas.tasks if score.precision == precision]
        assert [row[1] for row in stop.tasks] == scored
        assert bool(scored) == (stop.place == "plan.json" or not stop.kept)


def test_memory_is_the_planners_formula(atlas: Atlas) -> None:
    memory = budget.memory_of(atlas)
    assert memory.contexts == [128, 256, 512, 1000]
    shape = atlas.model.memory
    assert shape is not None
    assert not isinstance(shape, str)
    for cache, dtype in enumerate(("float16", "float8_e4m3fn")):
        for place, context in enumerate(memory.contexts):
            load = Workload(context, 1, 512, dtype, "float32")
            assert memory.beside[cache][place] == (cache_bytes(shape, load), activation_bytes(shape, load))
    told = budget.memory_of(dataclasses.replace(atlas, model=dataclasses.replace(atlas.model, memory="it has latent attention")))
    assert told.contexts == []
    assert "it has latent attention" in told.told


# --- why -------------------------------------------------------------------------------------------------------------------


def test_a_step_is_its_exact_bytes_and_the_mean_of_both_bases(atlas: Atlas) -> None:
    steps = steps_of(atlas)
    assert steps is not None
    low, high = f"uniform:{atlas.low}", f"uniform:{atlas.high}"
    for unit, (step,) in steps.steps.items():
        inside = [m.name for m in atlas.modules if m.unit == unit]
        assert step.bytes == sum(atlas.module_bytes[name][atlas.high] - atlas.module_bytes[name][atlas.low] for name in inside)
        lowered = atlas.unit_damage[high][unit][atlas.low] - atlas.base_damage[high]
        raised = atlas.base_damage[low] - atlas.unit_damage[low][unit][atlas.high]
        assert step.saved == pytest.approx((lowered + raised) / 2, rel=1e-12)


def test_the_best_other_use_saves_most_for_its_bytes(atlas: Atlas) -> None:
    steps, cells = steps_of(atlas), heat.cells_of(atlas)
    assert steps is not None
    assert atlas.plan is not None
    lows = {m.unit for m in atlas.modules if atlas.plan.modules[m.name] == atlas.low}
    worth = {unit: steps.steps[unit][0].saved / steps.steps[unit][0].bytes for unit in lows}
    (best, said), (second, _) = cells.raises(atlas.plan)
    assert [best, second] == sorted(worth, key=lambda unit: -worth[unit])[:2]
    assert number(steps.steps[best][0].saved) in said
    own = next(i for i, members in enumerate(cells.members) if members[0].unit == best)
    assert said not in cells.words(own, atlas.plan, cells.raises(atlas.plan))  # a unit is no other use than itself


def test_what_does_harm_is_not_called_a_saving(atlas: Atlas) -> None:
    unit = next(iter(steps_of(atlas).steps))  # type: ignore[union-attr]
    damage = {base: {name: dict(row) for name, row in rows.items()} for base, rows in atlas.unit_damage.items()}
    damage[f"uniform:{atlas.low}"][unit][atlas.high] = atlas.base_damage[f"uniform:{atlas.low}"] + 9
    steps = steps_of(dataclasses.replace(atlas, unit_damage=damage))
    assert steps is not None
    assert "and cost 4.4" in steps.sentence(unit, 0, []) or "and cost 4.5" in steps.sentence(unit, 0, [])
    assert "and save 4." in steps.sentence(unit, 1, [])


# --- what the script gets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_the_data_block_cannot_be_left_and_says_what_the_plans_hold(recipe: Recipe) -> None:
    atlas = make_atlas(recipe)
    stops = budget.stops(atlas)
    if not stops:
        return
    text = str(slider_data(atlas, stops, budget.memory_of(atlas)))
    assert not set("<>&") & set(text)
    content = json.loads(text)
    for stop, plan in zip(stops, content["plans"], strict=True):
        names = [content["formats"][CODES.index(letter)] for letter in plan["modules"]]
        assert dict(zip(content["modules"], names, strict=True)) == stop.plan.modules
        middle = ",\n".join(
            f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(fmt)}" for name, fmt in stop.plan.modules.items()
        )
        assert plan["head"] + middle + plan["tail"] == to_json(stop.plan)


# --- commands --------------------------------------------------------------------------------------------------------------


def test_the_runtimes_are_those_of_the_export_and_hold_what_it_says() -> None:
    assert set(RUNTIMES) == set(TARGETS)
    for name, target in TARGETS.items():
        own = RUNTIMES[name]
        assert (own.whole, own.fused) == (target.whole_groups, target.fused)
        assert own.model or not target.needs_model
        for fmt in (fmt for fmt in FORMATS.values() if not fmt.dtype):
            assert own.holds(fmt) == target.holds.fits(fmt), (name, fmt.name)


def test_vllm_is_offered_only_where_what_it_fuses_is_alike() -> None:
    atlas = make_atlas(Recipe(low="int2_g32_sym", high="int4_g32_sym"))
    assert atlas.plan is not None
    alike = {m.name: atlas.high if m.kind == "q_proj" else atlas.low for m in atlas.modules}
    offered = set()
    for plan in (atlas.plan, *atlas.plans, dataclasses.replace(atlas.plan, modules=alike)):
        told = any("--to vllm" in line for line in budget.commands(atlas, plan, "plan.json"))
        assert told == (unlike_partners(plan) is None)
        offered.add(told)
    assert offered == {True, False}
    short = make_atlas(Recipe(low="int2_g64_sym", high="int4_g64_sym"))  # 64 does not divide 352
    assert not any("--to vllm" in line for line in budget.stops(short)[0].commands)


def test_a_command_survives_any_name() -> None:
    atlas = make_atlas()
    name = "a b'; rm -rf $HOME #"
    atlas = dataclasses.replace(atlas, settings={**atlas.settings, "model": name})
    plan = atlas.plan
    assert isinstance(plan, Plan)
    for line in budget.commands(atlas, plan, "curve/plan-1.json"):
        parts = shlex.split(line)
        assert parts[0] == "bitatlas"
        assert "rm" not in parts
        assert "--model" not in parts or parts[parts.index("--model") + 1] == name
