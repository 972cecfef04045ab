"""What the report advises: the answer in one sentence, and the four parts of the optimization strategy.

Both follow from verdicts and the plan in the atlas; nothing is weighed anew here. A plan that lost to a baseline is not recommended,
and a task that does not beat chance supports no advice about bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitatlas.records import Atlas, Finding
from bitatlas.report.facts import low_share, narrowest_bits, precision_name, task_names, width_of, with_verdict
from bitatlas.words import NOT_MEASURED, byte_size, interval, named_layers, number, percent

# --- the answer ------------------------------------------------------------------------------------------------------


def answer(atlas: Atlas) -> str:
    """The run's answer in one sentence: what the plan does, which layers must stay wide, which can go narrow."""
    return f"{_plan_clause(atlas)}; {_layer_clause(atlas)}."


def _plan_clause(atlas: Atlas) -> str:
    plan = atlas.plan
    if plan is None:
        return "No plan was made"
    size = f"{number(plan.size.code_bits, 2)} code bits ({byte_size(plan.size.total_bytes)} for the whole model)"
    if plan.recommended is False:
        why = " ".join(plan.verdict.split()).rstrip(".;") or "a baseline of its size does less damage"
        return f"No mixed plan is recommended at {size}: {why}"
    damage = interval(plan.damage.measured, unit=True)
    ends = [u for u in atlas.uniform if u.format in (atlas.high, atlas.low)]
    uniform = [f"{interval(u.damage)} at uniform {width_of(atlas, u.format)}" for u in ends]
    against = f", against {' and '.join(uniform)}" if uniform else ""
    judged = "" if plan.recommended else " (not yet judged against baselines)"
    return f"At {size} the mixed plan does {damage} of damage{against}{judged}"


def _layer_clause(atlas: Atlas) -> str:
    if not atlas.layers:
        return "the layers were not measured"
    critical, safe, open_ = (with_verdict(atlas, verdict) for verdict in ("critical", "safe", "uncertain"))
    high, low = width_of(atlas, atlas.high), width_of(atlas, atlas.low)
    one = len(critical) == 1
    stay = f"{named_layers(critical)} {'is' if one else 'are'} critical and should get {high} first"
    stay = stay if critical else f"no layer is shown to need {high}"
    go = f"{named_layers(safe)} can go to {low}" if safe else f"no layer is shown safe at {low}"
    rest = f"{named_layers(open_)} {'is' if len(open_) == 1 else 'are'} uncertain" if open_ else "none is uncertain"
    return f"{stay}, {go}, and {rest}"


# --- the strategy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """One line of the optimization strategy. `follows` is the verdict of the zones that lead to it ("" for none)."""

    key: str
    follows: str
    title: str
    lines: list[str]


def strategy(atlas: Atlas) -> list[Advice]:
    """The four parts of the strategy, always all four: the mixed plan, safe layers, critical layers, tasks."""
    return [
        Advice("MIXED", "uncertain", "Mixed precision strategy", _mixed(atlas)),
        Advice("SAFE", "safe", _group_title(atlas, "safe"), _group(atlas, "safe")),
        Advice("PRESERVE", "critical", _group_title(atlas, "critical"), _group(atlas, "critical")),
        Advice("TASKS", "", "Tasks: higher precision?", _tasks(atlas)),
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
        lines.append(plan_verdict(atlas))
    open_ = with_verdict(atlas, "uncertain")
    if open_:
        lines.append(f"Uncertain, so left to the plan: {named_layers(open_)}")
    return lines


def plan_verdict(atlas: Atlas) -> str:
    """Whether the plan is recommended, with the reason that the record gives."""
    if atlas.plan is None:
        return "No plan was made"
    word = {True: "Recommended", False: "Not recommended", None: "Not judged against baselines"}[atlas.plan.recommended]
    reason = " ".join(atlas.plan.verdict.split())
    return f"{word}: {reason}" if reason else word


def _group_title(atlas: Atlas, verdict: str) -> str:
    layers, width = with_verdict(atlas, verdict), width_of(atlas, atlas.low if verdict == "safe" else atlas.high)
    if not atlas.layers:
        return f"Layers: {NOT_MEASURED}"
    if not layers:
        return f"No layer shown safe at {width}" if verdict == "safe" else f"No layer shown to need {width}"
    name = named_layers(layers)
    return f"{name[:1].upper()}{name[1:]}: {width} safe" if verdict == "safe" else f"{name[:1].upper()}{name[1:]}: keep {width}"


def _group(atlas: Atlas, verdict: str) -> list[str]:
    layers = with_verdict(atlas, verdict)
    if not layers:
        meaning = "below 1, and damage within the tolerance" if verdict == "safe" else "above 1"
        return [f"It would take a criticality whose interval lies {meaning}"]
    lines = [f"{len(layers)} of {len(atlas.layers)} layers"]
    share = low_share(atlas, layers)
    if share is not None:
        lines.append(f"The plan, by module, puts {percent(share, 0)} of their weights at {narrowest_bits(atlas)}-bit")
    return lines


def task_claim(atlas: Atlas) -> Finding | None:
    """The finding on whether some task needs more bits than others."""
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
    chance = [task for task in task_names(atlas) if not any(s.above_chance for s in atlas.tasks if s.task == task)]
    if chance:
        lines.append(f"At chance, so no claim: {', '.join(chance)}")
    return lines
