"""report.md: the overview that users asked for, then every table, as GitHub-flavoured Markdown.

Text from outside (names, notes, findings) is data: every character that Markdown or HTML could read as markup is escaped.
No date and no machine: the same atlas gives the same bytes. Left out: pictures; report.html has them.
"""

from __future__ import annotations

import re

from bitatlas.records import Atlas, Finding
from bitatlas.records.text import visible
from bitatlas.report import advice, facts
from bitatlas.report.facts import Table
from bitatlas.report.overview import LINK_NOTE, overview
from bitatlas.report.tables import tables

MARKS = {
    "holds": "✅",
    "does not hold": "❌",
    "inconclusive": "⚠️",
    "critical": "🔴",
    "safe": "✅",
    "light": "🟣",
    "uncertain": "⚠️",
    "falls": "📉",
    "rises": "📈",
}

# an interval of numbers is no link, and an underscore between word characters is no emphasis: both stay readable
_ESCAPED = re.compile(r"(\[[−0-9., ]+\](?![\[(:])|(?<=[^\W_])_(?=[^\W_]))|([\\`*_\[\]{}#|~$!@])")


def escape(text: str) -> str:
    """Return text as literal Markdown on one line, fit for a table cell."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _ESCAPED.sub(lambda match: match[1] or f"\\{match[2]}", line)


def markdown(atlas: Atlas) -> str:
    """Return the whole of report.md, ending in a newline; the same atlas gives the same text."""
    blocks = [
        "# Quantization Analysis Overview",
        f"## {escape(facts.title_of(atlas))} Strategic Analysis",
        f"Model: {escape(atlas.model.name)}, quantizer {escape(atlas.quantizer)}, formats {escape(facts.formats_text(atlas))}.",
        f"**{escape(advice.answer(atlas))}**",
        f"```mermaid\n{overview(atlas)}```",
        escape(LINK_NOTE),
        *_key_findings(atlas),
        *_strategy(atlas),
    ]
    for table in tables(atlas):
        blocks += _table(table)
    return visible("\n\n".join(blocks) + "\n")  # for people who print it on a terminal


def _key_findings(atlas: Atlas) -> list[str]:
    blocks = ["## Key Findings", "**Critical Layers Identified:**"]
    lines = facts.critical_lines(atlas)
    blocks.append("\n".join(f"- {'🔴 ' if line.startswith('Layer ') else ''}{escape(line)}" for line in lines))
    for title, findings in facts.findings_by_topic(atlas).items():
        blocks += [f"**{escape(title)}:**", "\n".join(map(_finding_line, findings))]
    return blocks


def _finding_line(finding: Finding) -> str:
    parts = facts.evidence(finding)
    evidence = f" ({escape('; '.join(parts))})" if parts else ""
    mark = f"{MARKS[finding.verdict]} " if finding.verdict in MARKS else "✅ " if finding.verdict.startswith("no loss") else ""
    return f"- {mark}{escape(finding.claim)}: **{escape(finding.verdict)}**. {escape(finding.text)}{evidence}"


def _strategy(atlas: Atlas) -> list[str]:
    marks = {"SAFE": "✅", "MIXED": "⚠️", "PRESERVE": "🔴", "TASKS": "🎯"}
    lines = []
    for part in advice.strategy(atlas):
        detail = "; ".join(line.rstrip(".") for line in part.lines)
        lines.append(f"- {marks[part.key]} **{escape(part.title)}**" + (f": {escape(detail)}." if detail else ""))
    blocks = ["## Optimization Strategy", "\n".join(lines)]
    if atlas.plan is not None and atlas.plan.recommended is not False:
        blocks.append(
            "To check the plan on a model: `bitatlas verify MODEL plan.json`. "
            "For another size without measuring again: `bitatlas plan DIR --code-bits BITS`."
        )
    return blocks


def _table(table: Table) -> list[str]:
    blocks = [f"## {escape(table.title)}"]
    if table.note:
        blocks.append(escape(table.note))
    if not table.rows:
        return [*blocks, escape(table.empty)]
    if table.points:
        blocks.append("\n".join(f"- {escape(point)}" for point in table.points))
    lines = [_row(table.head), "|" + " --- |" * len(table.head), *map(_row, table.rows)]
    return [*blocks, "\n".join(lines)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"
