"""The budget slider's stops: every verified plan of the atlas by size, and what the page says about each.

A stop is a plan whose damage was measured on the test rows: the survey's own, those of the curve, and the two uniform ends. Sizes
between them have no stop, because nothing was measured there. Each stop is plain HTML, so a page without scripts shows them all.
Memory at a context is `plan.budget`'s formula, worked out here for a few contexts; the page picks a number and computes none.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from bitatlas.plan.budget import activation_bytes, cache_bytes, workload_of
from bitatlas.records import Atlas, Budget, Module, Plan, PlanDamage, PlanModel, Uniform
from bitatlas.records.files import plan_place, to_json
from bitatlas.records.formats import FORMATS
from bitatlas.records.plan import MemoryShape
from bitatlas.records.runtimes import RUNTIMES, fits
from bitatlas.records.sizes import uniform as uniform_of
from bitatlas.records.text import byte_size, interval, number, percent, with_fewer_rows
from bitatlas.report import advice, facts
from bitatlas.report.charts import charts, heat

FIRST_CONTEXT = 128  # tokens: shorter ones are not offered, but for a model whose own is shorter
CACHES = {"float16": "16-bit cache", "float8_e4m3fn": "8-bit cache"}
HALF, NARROW = 460, 350  # px of the comparison beside the numbers, and on a phone


@dataclass(frozen=True)
class Stop:
    """One stop of the slider. `place`: the plan's file from the report's folder; `kept`: whether it lies there; `point`: its mark in the chart."""

    plan: Plan
    name: str
    place: str
    kept: bool
    point: str
    size: str
    facts: list[tuple[str, str, str]]  # name, value, detail
    verdict: str
    tasks: list[list[str]]
    wide: Markup | None  # the plan against what anybody could have made
    narrow: Markup | None
    commands: list[str]

    @property
    def told(self) -> str:
        """Return the stop in a sentence, for screen readers."""
        return f"{self.size}, {number(self.plan.size.code_bits, 2)} code bits: damage {interval(self.plan.damage.measured, unit=True)}; {self.name}"


def stops(atlas: Atlas) -> list[Stop]:
    """Return the stops from the smallest plan to the largest; none where no plan was measured."""
    own = atlas.plan
    if own is None or own.damage.measured is None:
        return []
    result = [_stop(atlas, own, "the survey's plan", "plan.json", True, "plan", "plan")]
    for plan in atlas.plans:
        point = f"plan of at most {byte_size(int(plan.budget.value))}"
        result.append(_stop(atlas, plan, "plan for this size", plan_place(plan), True, point, ""))
    for uniform in atlas.uniform:
        if uniform.format in (atlas.low, atlas.high):
            plan = _uniform_plan(atlas, own, uniform)
            name, place = f"uniform {uniform.format}", f"plan-uniform-{uniform.format}.json"
            result.append(_stop(atlas, plan, name, place, False, name, f"uniform:{uniform.format}"))
    return sorted(result, key=lambda stop: (stop.plan.size.total_bytes, stop.place))


def _uniform_plan(atlas: Atlas, own: Plan, uniform: Uniform) -> Plan:
    """Return the plan with every layer at one format."""
    modules = uniform_of((module for module in atlas.modules if module.name in own.modules), uniform.format)
    return Plan(
        PlanModel(atlas.model.name, atlas.model.revision, atlas.model.weights_sha256),
        {name: FORMATS[name] for name in dict.fromkeys(modules.values())},
        atlas.quantizer,
        modules,
        Budget("size", float(uniform.size.total_bytes)),
        uniform.size,
        PlanDamage(None, uniform.damage),
        verdict=f"uniform {uniform.format}",
        codes=own.codes,
    )


def _stop(atlas: Atlas, plan: Plan, name: str, place: str, kept: bool, point: str, precision: str) -> Stop:
    with_plan = replace(atlas, plan=plan)
    compared = bool(plan.baselines)
    format_name = name.removeprefix("uniform ")
    alone = f"Every module at {format_name}: one end of what these formats give, so there is no other plan of this size."
    return Stop(
        plan=plan,
        name=name,
        place=place,
        kept=kept,
        point=point,
        size=byte_size(plan.size.total_bytes),
        facts=_facts(atlas, plan),
        verdict=advice.plan_verdict(with_plan) if compared else alone,
        tasks=_tasks(atlas, precision),
        wide=charts.baselines(with_plan, HALF) if compared else None,
        narrow=charts.baselines(with_plan, NARROW) if compared else None,
        commands=commands(atlas, plan, place),
    )


def _facts(atlas: Atlas, plan: Plan) -> list[tuple[str, str, str]]:
    size, damage = plan.size, plan.damage.measured
    rests = f"{damage.n} {damage.rows} rows" if damage else ""
    bits = f"{number(size.code_bits, 2)} code bits, {number(size.stored_bits, 2)} stored bits"
    result = [
        ("Size of the whole model", byte_size(size.total_bytes), f"{bits}; {facts.parts_text(atlas, plan)}"),
        ("Damage", facts.mean_text(damage), f"{facts.ends_text(damage)}; {rests}"),
    ]
    rules = [baseline for baseline in plan.baselines if not baseline.is_random]
    if rules:
        best = min(rules, key=lambda baseline: baseline.damage.mean)
        difference = f"; plan minus this {interval(best.difference)}" if best.difference else ""
        name = with_fewer_rows(best.name, best.damage, plan)
        result.append(("Best simple rule", facts.mean_text(best.damage), f"nats/token: {name}{difference}"))
    return result


def _tasks(atlas: Atlas, precision: str) -> list[list[str]]:
    """Return task, right of all, accuracy with its interval, and the comparison with the reference; empty where no task was run at this plan."""
    rows = []
    for score in atlas.tasks:
        if score.precision == precision and score.n:
            pair = facts.comparison(atlas, score.task, precision)
            accuracy = f"{percent(score.correct / score.n)} {facts.wilson_text(score)}"
            rows.append([score.task, f"{score.correct}/{score.n}", accuracy, pair.verdict if pair else "not compared"])
    return rows


# --- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes beside the weights. `beside[cache][context]`: (cache, activations); `told`: what the page says where nothing is known."""

    contexts: list[int]
    caches: list[str]
    beside: list[list[tuple[int, int]]]
    told: str = ""

    def where(self, atlas: Atlas) -> str:
        """Return the context that stands there before anybody chooses: the model's own."""
        return f"{atlas.model.context:,} tokens"

    def total(self, plan: Plan, cache: int, context: int) -> tuple[str, str]:
        """Return the sum with the weights, and what it is made of, as text."""
        parts = dict(zip(("weights", "cache", "activations"), (plan.size.total_bytes, *self.beside[cache][context]), strict=True))
        return byte_size(sum(parts.values())), " + ".join(f"{byte_size(n)} {name}" for name, n in parts.items())


def memory_of(atlas: Atlas) -> Memory:
    """Return the memory of one sequence, passes of 512 tokens, at contexts that double up to the model's own."""
    shape = atlas.model.memory
    if not isinstance(shape, MemoryShape):
        reason = shape or "this survey does not hold what it depends on"
        return Memory([], [], [], f"Memory beside the weights cannot be told: {reason}.")
    longest = atlas.model.context
    contexts = [*(length for k in range(longest.bit_length()) if (length := FIRST_CONTEXT << k) < longest), longest]
    beside = []
    for cache in CACHES:
        loads = [replace(workload_of(n, cache, None, None), activation_dtype=atlas.model.dtype) for n in contexts]
        beside.append([(cache_bytes(shape, load), activation_bytes(shape, load)) for load in loads])
    return Memory(contexts, list(CACHES.values()), beside)


# --- commands that go on from a plan, as text to copy -----------------------------------------------------------------


def commands(atlas: Atlas, plan: Plan, place: str) -> list[str]:
    """Return shell commands for the folder of the report: verify, tune, apply, and an export to every runtime that holds the plan.

    place: the plan's file, from there.
    """
    model, file = shlex.quote(str(atlas.settings.get("model", atlas.model.name))), shlex.quote(place)
    used = {name: plan.formats[name] for name in plan.modules.values()}
    result = [f"bitatlas verify {model} {file}"]
    stem = place.rpartition("/")[2].removesuffix(".json")
    if not any(fmt.runtime for fmt in used.values()):
        result.append(f"bitatlas tune {model} {file}")
        result.append(f"bitatlas apply {model} {file} --out {shlex.quote(f'{stem}-packed')}")
    for name, runtime in RUNTIMES.items():
        if fits(runtime, plan, atlas.modules):
            option = f" --model {model}" if runtime.model else ""
            result.append(f"bitatlas export {file} --to {name}{option} --out {shlex.quote(f'{stem}-{name}')}")
    return result


# --- what the page's script needs to show another plan in the same heat map, and to hand out its plan.json, as JSON ------
#
# The script computes nothing that could be wrong: texts come from here, bits are looked up by cell. A plan.json is kept without its list
# of modules, which is the same names in every plan; the script puts that between `head` and `tail`, so what is copied is the file to the byte.

CODES = "0123456789abcdefghijklmnopqrstuvwxyz"  # one letter a format, and "-" for a module that the plan does not list


def slider_data(atlas: Atlas, stops: list[Stop], memory: Memory) -> Markup:
    """Return the JSON text for the page's data block: no character of it can end the block or open another."""
    cells = heat.cells_of(atlas)
    formats = list(dict.fromkeys(name for stop in stops for name in stop.plan.formats))
    modules = list(dict.fromkeys(name for stop in stops for name in stop.plan.modules))
    index_of = {name: index for index, name in enumerate(modules)}
    plans = [_plan(stop.plan, cells, formats, modules) for stop in stops]
    bits = {text for plan in plans for text in plan["bits"]}
    widest = heat.widest_bits(atlas)
    content = {
        "formats": formats,
        "modules": modules,
        "cells": [[cells.where(index), *_members(members, index_of)] for index, members in enumerate(cells.members)],
        "units": _units(cells),
        "order": cells.steps.formats if cells.steps else [],
        "shades": {text: heat.shade(float(text), widest) for text in sorted(bits) if text},
        "plans": plans,
        "memory": [
            [
                [memory.total(stop.plan, cache, context) for context in range(len(memory.contexts))]
                for cache in range(len(memory.caches))
            ]
            for stop in stops
        ],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _plan(plan: Plan, cells: heat.Cells, formats: list[str], modules: list[str]) -> dict[str, Any]:
    head, tail = to_json(plan), ""
    listed = ",\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(plan.modules[name])}" for name in plan.modules)
    if list(plan.modules) == modules and listed in head:
        head, _, tail = head.partition(listed)
    codes = "".join(CODES[formats.index(plan.modules[name])] if name in plan.modules else "-" for name in modules)
    mean = [facts.mean_bits(plan, members) for members in cells.members]
    return {
        "head": head,
        "tail": tail,
        "modules": codes,
        "bits": ["" if bits is None else heat.bits_text(bits) for bits in mean],
        "raises": cells.raises(plan),
    }


def _members(members: list[Module], index_of: dict[str, int]) -> tuple[list[int], str]:
    """Return the indices of a cell's modules, and its unit where it has one alone."""
    units = {module.unit for module in members if not module.part}
    return [index_of[module.name] for module in members if module.name in index_of], units.pop() if len(units) == 1 else ""


def _units(cells: heat.Cells) -> dict[str, Any]:
    """Return unit -> modules, and the parts of its sentences, step by step."""
    if cells.steps is None:
        return {}
    return {unit: [cells.steps.modules[unit], [step.parts for step in steps]] for unit, steps in cells.steps.steps.items()}
