"""compare.html, and what else is said of a comparison: which of these files should one take?

One page in one file, like report.html: it needs no network, its policy lets no script run but its own, and text from outside is escaped.
The answer says no more than the pairs' verdicts: a file does less damage than another only where the two are told apart, and where they are
not, how many tokens would tell.
Left out: a choice between size and damage, which is the reader's; the front has all that can be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape as html_escape

from bitatlas.records import Measured
from bitatlas.records.comparison import TOLD_APART, UNTOLD, Candidate, Comparison, Pair
from bitatlas.records.text import byte_size, interval, listed, number, percent, visible
from bitatlas.report import comparison_tables as tables
from bitatlas.report.charts.compared import figures, ranked, seen_in
from bitatlas.report.charts.labels import fit
from bitatlas.report.facts import mean_text, wilson_text
from bitatlas.report.html import LONG_TABLE, Tile, render
from bitatlas.report.markdown import escape

LONGEST_NAME = 420.0  # px of a name in a sentence
LONGEST_FRONT = 6  # files of the front that a sentence lists


def comparison_html(comparison: Comparison) -> str:
    """Return the whole of compare.html; the same comparison gives the same text."""
    return render(
        "compare.html.j2",
        ("report.js",),
        ("report.css", "compare.css"),
        comparison=comparison,
        compared=ranked(comparison),
        named=tables.named(comparison),
        bare=tables.bare(comparison),
        answer=answer(comparison),
        tiles=_tiles(comparison),
        figures=figures(comparison),
        ranking=tables.ranking(comparison),
        domain_table=tables.domain_table(comparison),
        sure_table=tables.sure_table(comparison),
        loss_table=tables.loss_table(comparison),
        pair_rows=tables.pair_rows(comparison),
        pairs_by_domain=tables.pairs_by_domain(comparison),
        score_table=tables.score_table(comparison),
        task_pair_table=tables.task_pair_table(comparison),
        kind_tables=tables.kind_tables(comparison),
        file_table=tables.file_table(comparison),
        definitions=tables.definitions(comparison),
        provenance=tables.provenance(comparison),
        failed=[requirement for requirement in comparison.requirements if not requirement.kept],
        long_table=LONG_TABLE,
    )


def _tiles(comparison: Comparison) -> list[Tile]:
    compared = ranked(comparison)
    if not compared:
        return []
    tokens, documents = (sum(getattr(domain, key) for domain in comparison.domains) for key in ("tokens", "documents"))
    families = [candidate.file.family for candidate in compared]
    counted = ", ".join(f"{families.count(family)} {family}" for family in dict.fromkeys(families))
    left = len(comparison.candidates) - len(compared)
    tiles = [
        Tile("Files compared", str(len(compared)), counted + (f"; {left} not compared" if left else "")),
        Tile(
            "Tokens scored",
            f"{tokens:,}",
            f"{_plural(len(comparison.domains), 'domain')}, {_plural(documents, 'document')}",
        ),
    ]
    if comparison.noise is not None:
        tiles.append(Tile("Noise floor", mean_text(comparison.noise.damage), _ends_text(comparison.noise.damage)))
    best, least = chosen(comparison), _unbeaten(comparison)
    title = "Smallest within the noise floor" if best.within_noise else "Least damage"
    if not best.within_noise and len(least) > 1:
        title = f"Smallest of the {len(least)} at rank 1"
    if len(compared) == 1:
        title = "The file"
    detail = f"{byte_size(best.file.bytes)}, damage {interval(seen_in(best).damage)}"
    return [*tiles, Tile(title, fit(best.file.name, LONGEST_NAME), detail, "name")]


def _ends_text(m: Measured) -> str:
    """Return a damage's unit and its interval."""
    return "nats/token, no interval" if m.ci95 is None else f"nats/token, 95%{interval(m).removeprefix(mean_text(m))}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# --- the answer ----------------------------------------------------------------------------------------------------------


def answer(comparison: Comparison) -> str:
    """Return which file to take, the front from small to large, and what cannot be told apart: no more than the pairs' verdicts allow."""
    compared = ranked(comparison)
    if not compared and not comparison.domains:
        return "No text was compared on, so nothing is said of damage" + ("; the tasks are below." if comparison.tasks else ".")
    if not compared:
        return "None of the files could be compared on the text, so nothing is said of their damage."
    parts = [_choice(comparison)]
    if len(compared) > 1:
        parts.append(_front_text(comparison))
    missing = [fit(candidate.file.name, LONGEST_NAME) for candidate in comparison.candidates if candidate.refused]
    if missing:
        parts.append(f"Not compared on the text: {listed(missing)}.")
    return " ".join(filter(None, parts))


def chosen(comparison: Comparison) -> Candidate:
    """Return the smallest file within the noise floor; without one the smallest of those that no file is told to do less damage than."""
    within = [candidate for candidate in ranked(comparison) if candidate.within_noise]
    return min(within or _unbeaten(comparison), key=lambda candidate: (candidate.file.bytes, seen_in(candidate).damage.mean))


def _unbeaten(comparison: Comparison) -> list[Candidate]:
    compared = ranked(comparison)
    return [candidate for candidate in compared if candidate.rank in (1, None)] or compared


def _choice(comparison: Comparison) -> str:
    """Return the sentence that names one file, and why."""
    compared, best = ranked(comparison), chosen(comparison)
    short = tables.bare(comparison)
    name = f"{fit(best.file.name, LONGEST_NAME)} ({byte_size(best.file.bytes)})"
    if len(compared) == 1:
        noise = "not told to be above the noise floor" if best.within_noise else "above the noise floor"
        after = f", {noise}" if comparison.noise is not None else ""
        return f"{name} is the only file that was compared; its damage is {interval(seen_in(best).damage, unit=True)}{after}."
    if best.within_noise:
        alone = sum(candidate.within_noise for candidate in compared) == 1
        which = "the only file" if alone else "the smallest file"
        beaten = [short[candidate.file.name] for candidate in compared if _told(comparison, candidate, best)]
        though = f", though {listed(beaten)} {'is' if len(beaten) == 1 else 'are'} told to do less" if beaten else ""
        return f"Take {name}: it is {which} whose damage is not told to be above the noise floor{though}."
    least = _unbeaten(comparison)
    if not any(pair.verdict == TOLD_APART for pair in comparison.pairs):
        return (
            f"No file is told to do less damage than another, so nothing that was measured speaks against the smallest, {name}."
        )
    if len(least) > 1:
        others = listed(short[candidate.file.name] for candidate in least if candidate is not best)
        rest = (
            f"{others} {'is' if len(least) == 2 else 'are'} not told to do less"
            if len(least) <= LONGEST_FRONT
            else f"none of the {len(compared) - 1} others is told to do less"
        )
        return f"Take {name} for the least damage: it is the smallest at rank 1, and {rest}."
    damage = interval(seen_in(best).damage, unit=True)
    if all(_told(comparison, best, candidate) for candidate in compared if candidate is not best):
        return f"Take {name} for the least damage, {damage}: every other file is told to do more."
    return f"Take {name} for the least damage, {damage}: it is the only one that no file is told to do less than."


def _told(comparison: Comparison, better: Candidate, worse: Candidate) -> bool:
    """Tell whether one file is told to do less damage than another."""
    pair = tables.pair_of(comparison, better.file.name, worse.file.name)
    if pair is None or pair.verdict != TOLD_APART:
        return False
    return tables.minus(pair, worse.file.name, pair.difference).mean > 0


def _front_text(comparison: Comparison) -> str:
    """Return the sentence of the front, and of what is not told apart on it; of all pairs where it is one file, or everything."""
    short = tables.bare(comparison)
    line = sorted((candidate for candidate in ranked(comparison) if candidate.on_front), key=lambda c: c.file.bytes)
    if not any(pair.verdict == TOLD_APART for pair in comparison.pairs):
        return _untold_text(comparison, comparison.pairs, alone=True)
    if len(line) == 1:
        text = f"The front of size and damage is {short[line[0].file.name]} alone: for every other file, one of at most its size is told to do less"
        return f"{text}{_untold_text(comparison, comparison.pairs)}."
    shown = [f"{short[candidate.file.name]} ({byte_size(candidate.file.bytes)})" for candidate in line]
    if len(shown) > LONGEST_FRONT:
        shown = [*shown[: LONGEST_FRONT - 1], f"{len(shown) - LONGEST_FRONT + 1} more"]
    names = {candidate.file.name for candidate in line}
    pairs = [pair for pair in comparison.pairs if {pair.first, pair.second} <= names]
    return f"From small to large, the front is {listed(shown)}{_untold_text(comparison, pairs)}."


def _untold_text(comparison: Comparison, pairs: Sequence[Pair], alone: bool = False) -> str:
    """Return what is not told apart among some pairs and how many tokens would tell; a sentence of its own where it stands `alone`."""
    untold = [pair for pair in pairs if pair.verdict == UNTOLD]
    needed = sorted(pair.tokens_needed for pair in untold if pair.tokens_needed is not None)
    scored = sum(domain.tokens for domain in comparison.domains)
    if alone:
        if not untold:
            return "What is told of their differences is smaller than the noise floor." if pairs else ""
        if not needed:
            return "No difference between them is seen."
        return f"About {_range(needed)} tokens would tell differences like those seen four times in five; {scored:,} were scored."
    if not untold:
        told = all(pair.verdict == TOLD_APART for pair in pairs)
        return "; all of them are told apart" if told and len(pairs) > 1 else "; they are told apart" if told and pairs else ""
    such = "a difference" if len(untold) == 1 else "differences"
    cost = "no difference is seen"
    if needed:
        cost = f"about {_range(needed)} tokens would tell such {such} four times in five, {scored:,} were scored"
    if len(untold) == 1:
        short = tables.bare(comparison)
        names = [short[name] for name in (untold[0].first, untold[0].second)]
        return f"; {listed(names)} are not told apart ({cost})"
    return f"; {len(untold)} of {'its' if len(pairs) < len(comparison.pairs) else 'all'} {len(pairs)} pairs are not told apart ({cost})"


def _range(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"


# --- a table for a model card ----------------------------------------------------------------------------------------------


def comparison_markdown(comparison: Comparison) -> str:
    """Return a table for a model card, ending in a newline: files by rank, how they were measured, and right answers where there are tasks."""
    blocks = []
    if ranked(comparison):
        rows = [_card_row(candidate) for candidate in comparison.candidates]
        head = ["Rank", "File", "Size", "Bits a weight", "Damage, nats/token", "99 % of tokens below", "Same top token"]
        blocks += [_markdown_table(head, rows), escape(_method(comparison))]
    if comparison.tasks:
        blocks.append(_markdown_table(*_task_columns(comparison)))
    if not blocks:
        blocks.append(escape(answer(comparison)))
    return visible("\n\n".join(blocks) + "\n")


def _card_row(candidate: Candidate) -> list[str]:
    file, seen = candidate.file, candidate.deviation
    first = ["" if candidate.rank is None else str(candidate.rank), file.name, byte_size(file.bytes), number(file.bits, 2)]
    if seen is None:
        return [*first, f"not compared: {candidate.refused}", "", ""]
    return [*first, interval(seen.damage), interval(seen.quantiles.get("99")), interval(seen.same_top)]


def _method(comparison: Comparison) -> str:
    """Return one line on how the numbers were made."""
    tokens, documents = (sum(getattr(domain, key) for domain in comparison.domains) for key in ("tokens", "documents"))
    names = listed(domain.name for domain in comparison.domains)
    text = (
        f"Damage: KL(reference || file), the reference being {comparison.reference.name} ({byte_size(comparison.reference.bytes)}), "
        f"over {tokens:,} tokens of {names}; in brackets 95% intervals over {_plural(documents, 'document')}. "
        "Rank: 1 + the number of files that are told to do less damage."
    )
    if comparison.noise is None:
        return text
    return f"{text} Noise floor ({comparison.noise_what}): {interval(comparison.noise.damage, unit=True)}."


def _task_columns(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    tasks = list(dict.fromkeys(score.task for score in comparison.tasks))
    cells = {
        (score.precision, score.task): f"{percent(score.correct / max(1, score.n))} {wilson_text(score)}"
        for score in comparison.tasks
    }
    names = [comparison.reference.name, *(candidate.file.name for candidate in comparison.candidates)]
    rows = [
        [f"{name} (reference)" if name == comparison.reference.name else name, *(cells.get((name, task), "") for task in tasks)]
        for name in names
        if any((name, task) in cells for task in tasks)
    ]
    return ["File", *(f"{task}, right" for task in tasks)], rows


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell if cell == "---" else escape(cell) for cell in line) + " |" for line in lines)


# --- a notebook --------------------------------------------------------------------------------------------------------------


def comparison_notebook_html(comparison: Comparison) -> str:
    """Return HTML of the files by rank and of the answer, for a notebook."""
    head = ["rank", "file", "size", "bits a weight", "damage", "same top token", ""]
    rows = []
    for candidate in comparison.candidates:
        words = ["on the front"] * candidate.on_front + ["within the noise floor"] * candidate.within_noise
        if candidate.refused:
            words.append(f"not compared: {candidate.refused}")
        seen = candidate.deviation
        found = [interval(seen.damage, unit=True), interval(seen.same_top)] if seen else ["", ""]
        place = "" if candidate.rank is None else str(candidate.rank)
        file = candidate.file
        rows.append([place, file.name, byte_size(file.bytes), number(file.bits, 2), *found, ", ".join(words)])
    title = f"Files beside {comparison.reference.name} ({byte_size(comparison.reference.bytes)})"
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{html_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><caption>{html_escape(title)}</caption><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"
    return f"{table}<p>{html_escape(answer(comparison))}</p>"
