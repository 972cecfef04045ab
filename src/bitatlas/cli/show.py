"""Show what a command found, from records alone: a few tables on the terminal, or one JSON object for a script (`--json`).

For a script only stdout changes: progress stays on stderr, and files, refusals and exit codes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitatlas.export.packed import Applied
from bitatlas.export.targets import Exported
from bitatlas.findings.tasks import smallest_held, task_widths
from bitatlas.plan.budget import budget_text
from bitatlas.progress import SafeConsole
from bitatlas.records import Atlas, Measured, Plan, Size, TaskPair, TaskScore
from bitatlas.records.comparison import Comparison
from bitatlas.records.text import (
    MINUS,
    against_chance,
    byte_size,
    interval,
    listed,
    memory_text,
    number,
    protect_text,
    with_fewer_rows,
)
from bitatlas.report.comparison import answer
from bitatlas.run.curve import Curve
from bitatlas.run.quantize import Quantized
from bitatlas.run.verify import Verification

STYLES = {"critical": "red", "safe": "green", "light": "magenta", "uncertain": "yellow"}


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _nats(value: Measured | None) -> str:
    return interval(value, unit=True) if value else "not measured"


def show_summary(atlas: Atlas) -> None:
    """Show the plan against its baselines, the layers, the tasks, the findings."""
    console = SafeConsole()
    if atlas.plan:
        show_plan(atlas.plan)
    layers = _table("Layers (criticality = share of damage / share of weights)", ["layer", "criticality", "verdict"])
    for layer in atlas.layers:
        style = STYLES[layer.verdict]
        layers.add_row(str(layer.layer), interval(layer.criticality), Text(layer.verdict, style))
    console.print(layers)
    _show_scores(console, atlas.tasks)
    _show_widths(console, atlas.task_pairs)
    console.print()
    for finding in atlas.findings:
        line = Text.assemble((f"{finding.claim}: ", ""), (finding.verdict, "bold"), f". {finding.text}")
        console.print(line, soft_wrap=True)


def show_plan(plan: Plan) -> None:
    """Show size, damage and, where it was verified, its baselines."""
    console = SafeConsole()
    table = _table(
        f"Plan ({plan.budget.kind} {protect_text(plan) or budget_text(plan.budget)})", ["", "size", "code bits", "damage"]
    )
    predicted = f"{number(plan.damage.predicted)} (predicted)" if plan.damage.predicted is not None else "not predicted"
    damage = _nats(plan.damage.measured) if plan.damage.measured else predicted
    table.add_row("this plan", byte_size(plan.size.total_bytes), number(plan.size.code_bits), damage)
    for baseline in plan.baselines:
        if not baseline.is_random:
            name = with_fewer_rows(baseline.name, baseline.damage, plan)
            table.add_row(name, "", number(baseline.code_bits), _nats(baseline.damage))
    random = [baseline for baseline in plan.baselines if baseline.is_random]
    if random:
        best = min(random, key=lambda baseline: baseline.damage.mean)
        name = with_fewer_rows(f"best of {len(random)} random plans", best.damage, plan)
        table.add_row(name, "", number(best.code_bits), _nats(best.damage))
    console.print(table)
    if memory := memory_text(plan):
        console.print(memory, soft_wrap=True)
    if plan.budget.protect:
        console.print(f"Verdict: {plan.verdict}", soft_wrap=True)


def show_draft(plan: Plan) -> None:
    """Show the plan, what it is worth, and how to go on."""
    show_plan(plan)
    console = SafeConsole()
    console.print(f"Verdict: {plan.verdict}", soft_wrap=True)
    console.print("A survey goes on from here: the same command, with --resume in the place of --draft.", soft_wrap=True)


def show_quantized(result: Quantized) -> None:
    """Show the file beside what llama.cpp's recipes of its size do, and whether it keeps the plan's promise."""
    console = SafeConsole()
    if result.recipes:
        plan, check = result.plan, result.verification
        table = _table("This file beside llama.cpp's recipes, test rows", ["", "size", "damage"])
        measured = check.damage if check else plan.damage.measured
        table.add_row(
            "this file" + (", in llama.cpp" if check else ", as planned"), byte_size(plan.size.total_bytes), _nats(measured)
        )
        for baseline, size in result.recipes:
            table.add_row(with_fewer_rows(baseline.name, baseline.damage, plan), byte_size(size), _nats(baseline.damage))
        console.print(table)
    else:
        show_plan(result.plan)
    for note in result.notes:
        console.print(note, soft_wrap=True)
    if result.verification:
        show_verification(result.verification)
    else:
        console.print("not run here: its runtime is not at hand (bitatlas verify measures it)", soft_wrap=True)
    if result.plan.verdict:
        console.print(f"Verdict: {result.plan.verdict}", soft_wrap=True)
    print(result.out)


def show_curve(curve: Curve) -> None:
    """Show the uniform widths and the plans between them, by size."""
    table = _table("Damage by size, test rows", ["", "size", "code bits", "damage", ""])
    lines: list[tuple[Size, str, Measured | None, str]] = [
        (u.size, f"uniform {u.format}", u.damage, "") for u in curve.atlas.uniform
    ]
    for plan, file in curve.plans:
        lines.append((plan.size, file.name, plan.damage.measured, "" if plan.recommended else "not recommended"))
    for size, name, damage, word in sorted(lines, key=lambda line: line[0].total_bytes):
        table.add_row(name, byte_size(size.total_bytes), number(size.code_bits), _nats(damage), word)
    SafeConsole().print(table)


def show_exported(exported: Exported) -> None:
    """Show what was written for which runtime, and what to know about it."""
    console = SafeConsole()
    for line in (f"{exported.target.name}: {', '.join(exported.files)}", *exported.notes):
        console.print(line, soft_wrap=True)


def show_applied(result: Applied) -> None:
    """Show bytes promised and bytes on disk, with every cause of a difference."""
    table = _table("Packed checkpoint", ["", "bytes"])
    table.add_row("weights, as the plan promises", f"{result.promised_bytes:,}")
    for cause, count in result.causes.items():
        table.add_row(f"  {cause}", f"{count:+,}".replace("-", MINUS))
    table.add_row("weights' files on disk", f"{result.disk_bytes:,}")
    console = SafeConsole()
    console.print(table)
    for line in (f"Carried over: {listed(result.carried)}", *result.notes):
        console.print(line, soft_wrap=True)


def show_verification(result: Verification) -> None:
    """Show what was promised and what was found, side by side."""
    console = SafeConsole()
    table = _table("Verification", ["", "promised", "found", ""])
    sizes: list[tuple[str, Size]] = [("promised", result.plan.size), ("found", result.size)]
    table.add_row("quantized bytes", *(f"{size.quantized_bytes:,}" for _, size in sizes), _kept(result.size_kept))
    table.add_row("total bytes", *(f"{size.total_bytes:,}" for _, size in sizes), _kept(result.size_kept))
    if result.disk:
        table.add_row(result.disk_what, *(f"{count:,}" for count in result.disk), _kept(result.disk[0] == result.disk[1]))
    promised = "nothing" if result.promised is None else f"{number(result.promised)} nats/token"
    table.add_row("damage", promised, _nats(result.damage), _kept(result.damage_kept))
    for task in result.tasks:
        table.add_row(task.task, f"{task.promised}/{task.n}", f"{task.found.correct}/{task.n}", _kept(task.kept))
    console.print(table)


def _kept(kept: bool) -> Text:
    return Text("kept", "green") if kept else Text("NOT KEPT", "red")


def show_comparison(result: Comparison) -> None:
    """Show files by rank with size and damage, task results, and what can be said."""
    console = SafeConsole()
    if result.domains:
        tokens = sum(domain.tokens for domain in result.domains)
        title = f"Files beside {result.reference.name}, on {tokens:,} tokens of {listed(domain.name for domain in result.domains)} (nats/token)"
        table = _table(title, ["rank", "file", "size", "bits", "damage", "99 %", "same top", ""])
        for candidate in result.candidates:
            if (seen := candidate.deviation) is not None:
                words = ["on the front"] * candidate.on_front + ["within the noise floor"] * candidate.within_noise
                table.add_row(
                    str(candidate.rank), candidate.file.name, byte_size(candidate.file.bytes), number(candidate.file.bits, 2), interval(seen.damage),
                    number(seen.quantiles["99"].mean), interval(seen.same_top), ", ".join(words),
                )  # fmt: skip
        if result.noise:
            table.add_row(
                "", "noise floor", "", "", interval(result.noise.damage), number(result.noise.quantiles["99"].mean), "", ""
            )
        console.print(table)
    for candidate in result.candidates:
        if candidate.refused and result.domains:
            console.print(f"{candidate.file.name}: not compared on text: {candidate.refused}", soft_wrap=True)
    _show_scores(console, result.tasks)
    for pair in result.task_pairs:
        seen_points = f"(smallest detectable difference {number(pair.detectable_points, 1)} points)"
        console.print(f"{pair.task}, {pair.first} to {pair.second}: {pair.text} {seen_points}", soft_wrap=True)
    for note in result.notes:
        console.print(note, soft_wrap=True)
    for requirement in result.requirements:
        word = Text("kept", "green") if requirement.kept else Text("NOT KEPT", "red")
        damage = "not measured" if requirement.damage is None else number(requirement.damage)
        console.print(Text.assemble(f"{requirement.name}<={requirement.limit:g}: {damage} ", word), soft_wrap=True)
    if result.domains:
        console.print(answer(result), soft_wrap=True)


def _show_widths(console: Console, pairs: list[TaskPair]) -> None:
    by_task = task_widths(pairs)
    if not by_task:
        return
    table = _table("Widths that hold each task (difference from the reference, points)", ["task", "width", "difference", "", ""])
    for task, widths in by_task.items():
        best = smallest_held(widths)
        for width in widths:
            note = "smallest held" if width is best else ""
            table.add_row(task, width.format, interval(width.pair.difference), width.verdict, note)
    console.print(table)


def _show_scores(console: Console, scores: list[TaskScore]) -> None:
    if not scores:
        return
    table = _table("Tasks (95 % Wilson intervals)", ["task", "precision", "right", "accuracy", "acc_norm", ""])
    for score in scores:
        low, high = (100 * end for end in score.wilson95)
        accuracy = f"{100 * score.correct / score.n:.1f}% [{low:.1f}, {high:.1f}]"
        norm = "" if score.correct_norm is None else f"{100 * score.correct_norm / score.n:.1f}%"
        table.add_row(score.task, score.precision, f"{score.correct}/{score.n}", accuracy, norm, against_chance(score))
    console.print(table)


# --- scripts ---------------------------------------------------------------------------------------------------------------

SURVEYED = ("model", "uniform", "layers", "zones", "tasks", "task_pairs", "plan", "findings", "notes")


def print_survey(atlas: Atlas, out: Path) -> None:
    """Print the main results, and where the files are; `atlas.json` there has everything."""
    files = {"atlas": out / "atlas.json", "plan": out / "plan.json", "report": out / "report.html"}
    _print("bitatlas.survey/1", files=files, **{name: getattr(atlas, name) for name in SURVEYED})


def print_plan(plan: Plan, file: Path) -> None:
    _print("bitatlas.planned/1", file=file, plan=plan)


def print_quantized(result: Quantized) -> None:
    """Print where the file is, its size, and damage as planned and as measured in its runtime."""
    check = result.verification
    _print(
        "bitatlas.quantized/1", file=result.out, plan_file=result.plan_file, size=result.plan.size, planned=result.plan.damage,
        recommended=result.plan.recommended, verdict=result.plan.verdict,
        measured=check.damage if check else None, kept=check.kept if check else None,
        recipes=[{"name": baseline.name, "bytes": size, "damage": baseline.damage} for baseline, size in result.recipes],
    )  # fmt: skip


def print_curve(curve: Curve) -> None:
    _print("bitatlas.curve/1", uniform=curve.atlas.uniform, plans=[{"file": file, "plan": plan} for plan, file in curve.plans])


def print_verification(result: Verification) -> None:
    """Print a verification; `kept` is the exit code's word: true means 0."""
    disk = {"what": result.disk_what, "promised": result.disk[0], "found": result.disk[1]} if result.disk else None
    promised = {"size": result.plan.size, "damage_nats": result.promised}
    found = {"size": result.size, "damage": result.damage, "disk_bytes": disk}
    tasks = [{**asdict(task), "kept": task.kept} for task in result.tasks]
    kept = {"kept": result.kept, "size_kept": result.size_kept, "damage_kept": result.damage_kept}
    _print("bitatlas.verification/1", **kept, promised=promised, found=found, tasks=tasks)


def print_comparison(result: Comparison) -> None:
    """Print all of comparison.json; `kept` is the exit code's word: true means 0."""
    content = dict(vars(result))
    _print(content.pop("schema"), kept=result.kept, **content)


def print_files(files: list[Path]) -> None:
    _print("bitatlas.files/1", files=files)


def _print(schema: str, **parts: Any) -> None:
    """Print one object, its schema named, records as they are in the files."""
    text = json.dumps({"schema": schema, **parts}, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
    print(text)


def _plain(value: Any) -> Any:
    """Return a path or a record as JSON has it."""
    return str(value) if isinstance(value, Path) else asdict(value)
