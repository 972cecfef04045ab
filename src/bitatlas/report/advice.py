"""What the report advises: the answer in two sentences, the four parts of the optimization strategy, why a module has its bits.

All of it follows from verdicts and the plan in the atlas; nothing is weighed anew here. A plan that lost to a baseline is not recommended,
and a task that does not beat chance supports no advice about bits. A layer's verdict says how harmful the layer is, not how many bits
it gets: the plan decides that by module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bitatlas.findings.shares import VERDICTS
from bitatlas.plan.judge import problem_of, scores_of
from bitatlas.plan.looks import relation
from bitatlas.records import Atlas, Finding, Plan
from bitatlas.records.text import MINUS, NOT_MEASURED, byte_size, interval, named_layers, number, percent
from bitatlas.report.facts import low_share, narrowest_bits, outside_formats, precision_name, task_names, width_of, with_verdict

# --- the answer ------------------------------------------------------------------------------------------------------


def answer(atlas: Atlas) -> str:
    """Return the run's answer: what the plan does or why it is not recommended, which layers are critical, which safe."""
    return f"{_plan_clause(atlas)}. {_capital(_layer_clause(atlas))}."


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _plan_clause(atlas: Atlas) -> str:
    plan = atlas.plan
    if plan is None:
        return "No plan was made"
    size = f"{number(plan.size.code_bits, 2)} code bits ({byte_size(plan.size.total_bytes)} for the whole model)"
    if plan.recommended is False:
        return f"Mixed plan not recommended at {size}: {_reason(plan).rstrip('.;') or 'a baseline of its size does less damage'}"
    damage = interval(plan.damage.measured, unit=True)
    ends = [u for u in atlas.uniform if u.format in (atlas.high, atlas.low)]
    uniform = [f"{interval(u.damage)} at uniform {width_of(atlas, u.format)}" for u in ends]
    against = f", against {' and '.join(uniform)}" if uniform else ""
    judged = "" if plan.recommended else " (not yet judged against baselines)"
    return f"At {size} the mixed plan does {damage} of damage{against}{judged}"


def _reason(plan: Plan) -> str:
    """Return the verdict's reason on one line, without the word that is printed before it.

    Where a format that was not in --formats does less damage than the plan, it ends with the advice to add it.
    """
    reason = re.sub(r"^not recommended: *", "", " ".join(plan.verdict.split()), flags=re.IGNORECASE)
    ours = plan.damage.measured
    if plan.recommended is not False or ours is None or "to --formats" in reason:
        return reason
    less = [b for b in plan.baselines if b.damage.mean < ours.mean]
    outside = outside_formats(b.name for b in sorted(less, key=lambda b: b.damage.mean))
    return f"{reason.rstrip('.;')}; add {outside[0]} to --formats".lstrip("; ") if outside else reason


def _layer_clause(atlas: Atlas) -> str:
    if not atlas.layers:
        return "the layers were not measured"
    critical, safe, light, uncertain = (with_verdict(atlas, verdict) for verdict in VERDICTS)
    low = width_of(atlas, atlas.low)
    stay = f"{_are(critical)} critical ({_harm('critical', critical)})" if critical else "no layer is shown to be critical"
    go = f"{_are(safe)} safe at {low} ({_harm('safe', safe)})" if safe else f"no layer is shown to be safe at {low}"
    go += _together(atlas, safe)
    other = f"{_are(light)} light ({_harm('light', light)}), " if light else ""
    rest = f"{_are(uncertain)} uncertain" if uncertain else "none is uncertain"
    decides = "; the plan decides by module" if atlas.plan else ""
    return f"{stay}, {go}, {other}and {rest}{decides}"


def _together(atlas: Atlas, safe: list[int]) -> str:
    """Return what safe layers do when all of them are lowered; "" where that was not measured."""
    joint = atlas.joint
    if joint is None or not safe:
        return ""
    if joint.together == joint.layers:
        return f" (and together: {interval(joint.added)} nats/token)"
    group = f"safe together: {named_layers(joint.together)}" if len(joint.together) > 1 else "no two shown to be safe together"
    return f" (all of them together add {interval(joint.added)} nats/token; {group})"


def _are(layers: list[int]) -> str:
    return f"{named_layers(layers)} {'is' if len(layers) == 1 else 'are'}"


def _harm(verdict: str, layers: list[int]) -> str:
    """Return what a verdict on layers says, and no more than was measured."""
    its = "its" if len(layers) == 1 else "their"
    if verdict == "critical":
        return f"more harmful than {its} size"
    within = "but not shown to be within the tolerance" if verdict == "light" else "and within the tolerance if lowered alone"
    return f"less harmful than {its} size, {within}"


# --- the strategy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """One line of the optimization strategy. `follows`: the verdicts of the zones that lead to it."""

    key: str
    follows: tuple[str, ...]
    title: str
    lines: list[str]


def strategy(atlas: Atlas) -> list[Advice]:
    """Return the four parts of the strategy, always all four: the mixed plan, safe layers, critical layers, tasks."""
    return [
        Advice("MIXED", ("uncertain", "light"), "Mixed precision strategy", _mixed(atlas)),
        Advice("SAFE", ("safe",), _group_title(atlas, "safe"), _group(atlas, "safe")),
        Advice("PRESERVE", ("critical",), _group_title(atlas, "critical"), _group(atlas, "critical")),
        Advice("TASKS", (), "Tasks: higher precision?", _tasks(atlas)),
    ]


def _mixed(atlas: Atlas) -> list[str]:
    lines = []
    if atlas.plan is None:
        lines.append("No plan was made")
    else:
        size = atlas.plan.size
        lines.append(f"Plan: {number(size.code_bits, 2)} code bits, {number(size.stored_bits, 2)} stored bits")
        lines.append(f"Whole model: {byte_size(size.total_bytes)}, from {byte_size(atlas.model.total_bytes)}")
        lines.append(f"Damage: {interval(atlas.plan.damage.measured, unit=True)}")
        lines += map(_capital, plan_verdict(atlas).split("; "))
        lines += _by_layers(atlas)
    for verdict in ("uncertain", "light"):
        if layers := with_verdict(atlas, verdict):
            lines.append(f"{verdict.capitalize()}, so left to the plan: {named_layers(layers)}")
    return lines


def plan_verdict(atlas: Atlas) -> str:
    """Return whether the plan is recommended, with the reason that the record gives."""
    if atlas.plan is None:
        return "No plan was made"
    word = {True: "Recommended", False: "Not recommended", None: "Not judged against baselines"}[atlas.plan.recommended]
    reason = _reason(atlas.plan)
    return f"{word}: {reason}" if reason else word


def _by_layers(atlas: Atlas) -> list[str]:
    """Return what raising whole layers by criticality does at the plan's size, where that was measured."""
    baselines = atlas.plan.baselines if atlas.plan else []
    other = next((baseline for baseline in baselines if baseline.name == "most critical layers high"), None)
    if other is None:
        return []
    text = f"Raising whole critical layers instead does {interval(other.damage, unit=True)} at the same size"
    if other.difference is None:
        return [text]
    return [f"{text}; the plan {relation(other.difference)} it (plan minus this: {interval(other.difference)})"]


def _group_title(atlas: Atlas, verdict: str) -> str:
    layers, width = with_verdict(atlas, verdict), width_of(atlas, atlas.low if verdict == "safe" else atlas.high)
    if not atlas.layers:
        return f"Layers: {NOT_MEASURED}"
    if not layers:
        return f"No layer shown to be safe at {width}" if verdict == "safe" else "No layer shown to be critical"
    heading = f"{width} safe" if verdict == "safe" else f"keep {width} first"
    return f"{_capital(named_layers(layers))}: {heading}"


def _group(atlas: Atlas, verdict: str) -> list[str]:
    layers = with_verdict(atlas, verdict)
    if not layers:
        meaning = "below 1, and damage within the tolerance" if verdict == "safe" else "above 1"
        return [f"It would take a criticality whose interval lies {meaning}"]
    count = f"{len(layers)} of {len(atlas.layers)} layers, {_harm(verdict, layers)}"
    share, its = low_share(atlas, layers), "its" if len(layers) == 1 else "their"
    if share is None:
        return [count, "Bits are decided by module, in a plan; none was made"]
    lines = [count, f"The plan decides by module: {percent(share, 0)} of {its} weights at {narrowest_bits(atlas)}-bit"]
    joint = _together(atlas, layers).strip(" ()") if verdict == "safe" else ""
    return [*lines, _capital(joint)] if joint else lines


def task_claim(atlas: Atlas) -> Finding | None:
    """Return the finding on whether some task needs more bits than others."""
    about = [finding for finding in atlas.findings if finding.topic == "tasks"]
    return next((finding for finding in about if "precision" in finding.claim or "protect" in finding.claim), None)


def _tasks(atlas: Atlas) -> list[str]:
    claim = task_claim(atlas)
    lines = []
    if claim is not None:
        lines.append(f"{claim.claim}: {'not tested' if claim.text.startswith('Not tested') else claim.verdict}")
    if not atlas.tasks:
        return [*lines, f"Tasks: {NOT_MEASURED}, so no claim about any"]
    falls = [f"{p.task} at {precision_name(atlas, p.second)}" for p in atlas.task_pairs if p.verdict == "falls"]
    lines.append(f"Scores that fall: {', '.join(dict.fromkeys(falls))}" if falls else "No task's score is shown to fall")
    of_task = {task: [s for s in atlas.tasks if s.task == task] for task in task_names(atlas)}
    chance = [task for task, scores in of_task.items() if not any(s.above_chance for s in scores)]
    if chance:
        lines.append(f"Not above chance, so no claim: {', '.join(chance)}")
    return lines


# --- why a module has its bits ---------------------------------------------------------------------------------------
#
# What the next wider and the next narrower format would cost and save, and what else the bytes would buy. Every amount is measured: the
# unit alone, one step between two neighbouring formats, as the mean of what it does at base uniform high and at base uniform low, on the
# fit rows. That mean is a table that the planner chooses from (`plan.judge.scores_of`), so the sentences are about the numbers that
# decided. A refined plan was searched on from there with its interactions, which no single step shows.
# The page's script makes these sentences for every other plan from the same parts (`Steps`).


@dataclass(frozen=True)
class Step:
    """A step from a format to the next wider one: exact bytes, and damage saved, nats/token (negative where it does harm)."""

    bytes: int
    saved: float

    @property
    def parts(self) -> tuple[str, str, str]:
        """Return bytes, what raising does and what lowering does, as text."""
        amount = number(abs(self.saved))
        up, down = ("save", "cost") if self.saved >= 0 else ("cost", "save")
        return byte_size(self.bytes), f"{up} {amount}", f"{down} {amount}"


@dataclass(frozen=True)
class Steps:
    """All steps: `steps[unit][k]` goes from format k to k + 1 of `formats`, narrowest first.

    names: unit -> its name for people. modules: unit -> how many modules share its format.
    """

    formats: list[str]
    steps: dict[str, list[Step]]
    names: dict[str, str]
    modules: dict[str, int]

    def raises(self, assignment: Mapping[str, int]) -> list[tuple[str, str]]:
        """Return the two best uses of more bytes in a plan (unit -> index of its format), by damage saved a byte: (unit, sentence)."""
        steps = [(unit, k, self.steps[unit][k]) for unit, k in assignment.items() if k + 1 < len(self.formats)]
        best = sorted(steps, key=lambda entry: (-entry[2].saved / max(1, entry[2].bytes), entry[0]))
        return [(unit, self._use(unit, k)) for unit, k, _ in best[:2]]

    def _use(self, unit: str, k: int) -> str:
        size, saves, _ = self.steps[unit][k].parts
        amount = saves.removeprefix("save ") if saves.startswith("save ") else f"{MINUS}{saves.removeprefix('cost ')}"
        return f"The best other use of more bytes: {self.names[unit]} to {self.formats[k + 1]}, {size} for {amount} nats/token."

    def sentence(self, unit: str, k: int, raises: list[tuple[str, str]]) -> str:
        """Return why the unit has format `k`, in a plan with these `raises`."""
        others = self.modules[unit] - 1
        it = "it" if not others else f"it and the {others} that share{'s' if others == 1 else ''} its format"
        sentences = []
        if k + 1 < len(self.formats):
            size, up, _ = self.steps[unit][k].parts
            sentences.append(f"Raising {it} to {self.formats[k + 1]} would cost {size} and {up} nats/token.")
        if k > 0:
            size, _, down = self.steps[unit][k - 1].parts
            sentences.append(f"Lowering {it} to {self.formats[k - 1]} would free {size} and {down} nats/token.")
        other = next((use for name, use in raises if name != unit), "")
        return " ".join([*sentences, *([other] if other else [])])


def steps_of(atlas: Atlas) -> Steps | None:
    """Return the steps of every unit; None where the screens of units are not in the atlas."""
    if not {f"uniform:{atlas.low}", f"uniform:{atlas.high}"} <= set(atlas.unit_damage) & set(atlas.base_damage):
        return None
    subject = problem_of(atlas)
    formats, every = list(subject.formats), subject.units
    units = [unit for unit in every if not unit.part]
    table = scores_of(atlas).tables["mean of both"][[not unit.part for unit in every]]  # [units, formats], nats/token
    sizes = {unit.name: [sum(atlas.module_bytes[m.name][name] for m in unit.modules) for name in formats] for unit in units}
    steps = {
        unit.name: [
            Step(sizes[unit.name][k + 1] - sizes[unit.name][k], float(row[k] - row[k + 1])) for k in range(len(formats) - 1)
        ]
        for unit, row in zip(units, table, strict=True)
    }
    names = {unit.name: f"layer {unit.layer} {unit.name.rpartition('.')[2]}" for unit in units}
    return Steps(formats, steps, names, {unit.name: len(unit.modules) for unit in units})


def basis(atlas: Atlas) -> str:
    """Return what the amounts rest on."""
    return (
        f"Costs and savings: the unit alone, mean of bases uniform:{atlas.high} and uniform:{atlas.low}, on fit rows "
        "(one number, no interval)."
    )
