"""The tables of compare.html, as plain text before any markup: ranks, pairs, domains, tasks, what is stored how, and where the numbers are from.

A file is called by its name everywhere, and by a letter where a name has no room; letters follow the ranks.
Left out: whatever the record does not hold; nothing is computed here but bits from bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from bitatlas.records import Measured
from bitatlas.records.comparison import NOISE, TOLD_APART, UNTOLD, Candidate, Comparison, Pair, StoredKind
from bitatlas.records.text import byte_size, given, interval, number, p_is, p_value, percent
from bitatlas.report.charts.compared import (
    deviations,
    family_marks,
    lanes_of,
    quantile_percents,
    ranked,
    seen_in,
    sure_strips,
)
from bitatlas.report.charts.labels import bare_names, fit, letter
from bitatlas.report.facts import Table, wilson_text

OTHERS = "norms and other vectors"  # a kind that files of every layout have
LONGEST_BARE = 230.0  # px
PAIR_CSS = {TOLD_APART: "told", UNTOLD: "untold", NOISE: "below"}


def named(comparison: Comparison) -> list[tuple[str, Candidate]]:
    """Return every candidate with its letter, those that were compared on text first."""
    order = [*ranked(comparison), *(candidate for candidate in comparison.candidates if candidate.deviation is None)]
    return [(letter(index), candidate) for index, candidate in enumerate(order)]


def bare(comparison: Comparison) -> dict[str, str]:
    """Return what each file is called where its full name would hide what differs: without what most names begin with."""
    names = [candidate.file.name for _, candidate in named(comparison)]
    return {name: fit(short, LONGEST_BARE) for name, short in zip(names, bare_names(names), strict=True)}


# --- ranks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankRow:
    """A file's line in the ranking. span: files that share its rank, 0 but at the first of them."""

    letter: str
    rank: str
    span: int
    name: str
    sign: str
    css: str
    marks: list[tuple[str, str]]  # (css class, words)
    cells: list[tuple[str, str]]  # what is said, and what is said below it


@dataclass(frozen=True)
class Ranking:
    """The ranking. heads: names of the columns behind the file; the quantiles' stand under a common one."""

    heads: list[str]
    percents: list[str]
    after: list[str]
    rows: list[RankRow]
    refused: list[tuple[str, str, str]]  # letter, name, reason


def ranking(comparison: Comparison) -> Ranking:
    """Make the ranking: one line a file, those that share a rank together, then what was not compared."""
    percents, marks, agreed = quantile_percents(comparison), family_marks(comparison), _agreement_head(comparison)
    letters = {candidate.file.name: mark for mark, candidate in named(comparison)}
    rows = []
    for rank, group in groupby(ranked(comparison), key=lambda candidate: candidate.rank):
        for index, candidate in enumerate(tied := list(group)):
            _, css, sign = marks[candidate.file.family]
            words = [("w-front", "on the front")] if candidate.on_front else []
            words += [("w-holds", "within the noise floor")] if candidate.within_noise else []
            place = "" if rank is None else str(rank)
            span = 0 if index else len(tied)
            name = candidate.file.name
            rows.append(
                RankRow(letters[name], place, span, name, sign, css, words, _rank_cells(candidate, percents, bool(agreed)))
            )
    refused = [(mark, c.file.name, c.refused) for mark, c in named(comparison) if c.deviation is None]
    heads = ["Size, bits a weight", "Damage, nats/token"]
    after = ["Same top token", "Top 5 in common", *agreed, "Loss, minus the reference’s"]
    return Ranking(heads, percents, after, rows, refused)


def _agreement_head(comparison: Comparison) -> list[str]:
    return ["Tokens until greedy text differs"] if any(d.agreement for d in deviations(comparison)) else []


def _rank_cells(candidate: Candidate, percents: Sequence[str], agreed: bool) -> list[tuple[str, str]]:
    file, seen = candidate.file, seen_in(candidate)
    agreement = []
    if agreed:
        never = f"{percent(seen.never_differ, 0)} never in {seen.agreement_limit:,}" if seen.agreement_limit else ""
        agreement = [(interval(seen.agreement), never)]
    return [
        (byte_size(file.bytes), f"{number(file.bits, 2)} bits"),
        (interval(seen.damage), ""),
        *((interval(seen.quantiles.get(p)), "") for p in percents),
        (interval(seen.same_top), ""),
        (interval(seen.top5), ""),
        *agreement,
        (interval(seen.loss_difference), ""),
    ]


# --- beside the mean -----------------------------------------------------------------------------------------------------


def domain_table(comparison: Comparison) -> Table:
    """Make the table of damage by domain."""
    names = [domain.name for domain in comparison.domains]
    rows = [
        [lane.name, *(interval(deviation.domains.get(name)) for name in names)]
        for lane, deviation in zip(lanes_of(comparison), deviations(comparison), strict=True)
    ]
    return Table("domains", "Damage by domain", "nats/token, 95% intervals over documents.", ["File", *names], rows)


def sure_table(comparison: Comparison) -> Table:
    """Make the table of damage by the reference's greatest probability."""
    strips = sure_strips(comparison)
    rows = [[lane.name, *(interval(strip.values[index]) for strip in strips)] for index, lane in enumerate(lanes_of(comparison))]
    head = ["File", *(f"{strip.title} ({strip.note})" for strip in strips)]
    return Table("sure", "Damage by how sure the reference was", "nats/token, 95% intervals over documents.", head, rows)


def loss_table(comparison: Comparison) -> Table:
    """Make the table of losses and of what keeping a part of the reference's predictions adds to the error of damage."""
    rows = [
        [lane.name, interval(deviation.loss), interval(deviation.loss_difference), number(deviation.estimate_error)]
        for lane, deviation in zip(lanes_of(comparison), deviations(comparison), strict=True)
    ]
    if comparison.reference_loss is not None:
        rows.insert(0, [f"{comparison.reference.name} (reference)", interval(comparison.reference_loss), "", ""])
    head = ["File", "Loss", "Minus the reference’s", "Error of the estimate"]
    note = (
        "nats/token. Error of the estimate: standard error of the damage that comes from the kept part of the reference’s predictions "
        "alone."
    )
    return Table("loss", "Loss, and the error of the estimate", note, head, rows)


# --- pairs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairCell:
    """Two files: the damage of `row` minus that of `column`."""

    row: tuple[str, str]  # letter, name
    column: tuple[str, str]
    verdict: str
    css: str
    difference: str
    p: str
    needed: str


def pair_of(comparison: Comparison, one: str, other: str) -> Pair | None:
    """Return the pair of two files, whichever is first in it."""
    return next((pair for pair in comparison.pairs if {pair.first, pair.second} == {one, other}), None)


def minus(pair: Pair, name: str, m: Measured) -> Measured:
    """Return a difference of a pair the way round in which it is `name`'s minus the other's."""
    if pair.second == name:
        return m
    return replace(m, mean=-m.mean, ci95=(-m.ci95[1], -m.ci95[0]) if m.ci95 else None)


def pair_rows(comparison: Comparison) -> list[tuple[tuple[str, str], list[PairCell | None]]]:
    """Return the lower half of the matrix of pairs, by row: its file, and a cell for each file above it."""
    short = bare(comparison)
    files = [(mark, candidate.file.name) for mark, candidate in named(comparison) if candidate.deviation is not None]
    return [
        ((row[0], short[row[1]]), [_pair_cell(comparison, row, column, short) for column in files[:index]])
        for index, row in enumerate(files)
        if index
    ]


def _pair_cell(comparison: Comparison, row: tuple[str, str], column: tuple[str, str], short: dict[str, str]) -> PairCell | None:
    pair = pair_of(comparison, row[1], column[1])
    if pair is None:
        return None
    difference, p = interval(minus(pair, row[1], pair.difference)), p_is(pair.holm_p)
    texts = difference, p, needed_text(pair)
    css = PAIR_CSS.get(pair.verdict, "untold")
    return PairCell((row[0], short[row[1]]), (column[0], short[column[1]]), pair.verdict, css, *texts)


def needed_text(pair: Pair) -> str:
    """Return how many tokens would tell the two apart, where they are not."""
    if pair.verdict != UNTOLD:
        return ""
    return "no difference seen" if pair.tokens_needed is None else f"about {pair.tokens_needed:,} tokens"


def pairs_by_domain(comparison: Comparison) -> Table:
    """Make the table of differences by domain, in the order of the matrix."""
    short = bare(comparison)
    names = [domain.name for domain in comparison.domains]
    rows = []
    for row, column in ((b, a) for index, b in enumerate(ranked(comparison)) for a in ranked(comparison)[:index]):
        pair = pair_of(comparison, row.file.name, column.file.name)
        if pair is not None:
            inside = {name: minus(pair, row.file.name, m) for name, m in pair.domains.items()}
            title = f"{short[row.file.name]} − {short[column.file.name]}"
            rows.append([title, *(interval(inside.get(name)) for name in names), p_value(pair.p)])
    note = "Damage of the first minus the second’s, nats/token. p: over all domains, before Holm’s correction."
    return Table("bydomain", "Differences by domain", note, ["Pair", *names, "p, uncorrected"], rows)


# --- tasks ---------------------------------------------------------------------------------------------------------------


def score_table(comparison: Comparison) -> Table:
    """Make the table of right answers."""
    rows = [
        [
            score.task,
            f"{score.precision} (reference)" if score.precision == comparison.reference.name else score.precision,
            f"{score.correct:,} of {score.n:,}",
            f"{percent(score.correct / max(1, score.n))} {wilson_text(score)}",
            percent(score.chance),
            "above chance" if score.above_chance else "below chance" if score.below_chance else "at chance",
        ]
        for score in comparison.tasks
    ]
    head = ["Task", "File", "Right", "Accuracy, 95%", "Chance", "Against chance"]
    return Table("scores", "Scores", "", head, rows)


def task_pair_table(comparison: Comparison) -> Table:
    """Make the table of pairs of files on the same items."""
    short = {comparison.reference.name: "the reference", **bare(comparison)}
    rows = [
        [
            pair.task,
            f"{short.get(pair.first, pair.first)} → {short.get(pair.second, pair.second)}",
            pair.verdict,
            interval(pair.difference),
            f"{pair.lost} lost, {pair.gained} gained",
            p_value(pair.holm_p),
            number(pair.detectable_points, 1),
            f"about {pair.items_needed:,}" if pair.items_needed else "",
        ]
        for pair in comparison.task_pairs
    ]
    note = (
        "Second minus first, in percentage points, paired 95% interval. p: exact McNemar, Holm over all pairs of all tasks. "
        "Detectable: the smallest difference that so many items could have shown."
    )
    head = ["Task", "Pair", "Verdict", "Difference, points", "Flips", "p", "Detectable, points", "Items needed"]
    return Table("taskpairs", "Pairs on the same items", note, head, rows)


# --- files ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KindTable:
    """What files of one layout store: kinds of module by file; a cell has a line for each format."""

    files: list[tuple[str, str]]  # letter ("" of the reference), name
    rows: list[tuple[str, list[list[str]]]]


def kind_tables(comparison: Comparison) -> list[KindTable]:
    """Return a table for each layout, since their names of kinds differ: files that share most of their kinds stand together."""
    short = bare(comparison)
    files = [
        ("", replace(comparison.reference, name=fit(comparison.reference.name, LONGEST_BARE))),
        *((mark, replace(candidate.file, name=short[candidate.file.name])) for mark, candidate in named(comparison)),
    ]
    groups: list[tuple[set[str], list[Any]]] = []
    for mark, file in files:
        kinds = {kind.kind for kind in file.kinds} - {OTHERS}
        if not file.kinds:
            continue
        for known, members in groups:
            if len(kinds & known) * 2 > len(kinds):
                known |= kinds
                members.append((mark, file))
                break
        else:
            groups.append((set(kinds), [(mark, file)]))
    return [_kind_table(members) for _, members in groups]


def _kind_table(members: Sequence[Any]) -> KindTable:
    kinds = list(dict.fromkeys(kind.kind for _, file in members for kind in file.kinds))
    kinds.sort(key=lambda kind: kind == OTHERS)
    rows = [(kind, [_stored([k for k in file.kinds if k.kind == kind]) for _, file in members]) for kind in kinds]
    return KindTable([(mark, file.name) for mark, file in members], rows)


def _stored(kinds: Sequence[StoredKind]) -> list[str]:
    """Return `Q4_K, 4.50 bits` a format, with the tensors where there are several formats; the bits are the bytes', scales and all."""
    lines = []
    for kind in sorted(kinds, key=lambda kind: -kind.weights):
        bits = f", {number(8 * kind.bytes / kind.weights, 2)} bits" if kind.weights else ""
        count = f", {kind.tensors} tensor{'' if kind.tensors == 1 else 's'}" if len(kinds) > 1 else ""
        lines.append(f"{kind.format}{bits}{count}")
    return lines or ["–"]


def file_table(comparison: Comparison) -> Table:
    """Make the table of all files, the reference first."""
    rows = []
    for mark, file in [("", comparison.reference), *((mark, candidate.file) for mark, candidate in named(comparison))]:
        name = f"{mark} {file.name}" if mark else f"{file.name} (reference)"
        rows.append([name, file.family, byte_size(file.bytes), number(file.bits, 2), file.run or "not run", file.path])
    head = ["File", "Kind", "Size", "Bits a weight", "How it was run", "Path"]
    return Table("files", "Files", "Bits a weight: of the files’ bytes over all weights of the model.", head, rows)


# --- method --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """What the numbers came from: the texts, the settings."""

    domains: Table
    settings: Table
    requirements: Table = field(default_factory=lambda: Table("requirements", "", "", []))


def provenance(comparison: Comparison) -> Provenance:
    """Make the tables of texts, settings and requirements."""
    texts = [
        [
            domain.name,
            domain.source,
            f"{domain.rows:,}",
            f"{domain.tokens:,}",
            f"{domain.documents:,}",
            "in the model’s template" if domain.chat else "no",
            {"assistant": "the assistant’s tokens alone"}.get(domain.scored, domain.scored),
            domain.sha256[:16],
        ]
        for domain in comparison.domains
    ]
    head = ["Domain", "Text", "Rows", "Tokens scored", "Documents", "Chat", "Scored", "sha256 of the rows, its start"]
    settings = [[f"setting {key}", line] for key, value in sorted(comparison.settings.items()) for line in _plain(value)]
    settings += [["schema", comparison.schema]]
    asked = [
        [
            requirement.name,
            f"at most {given(requirement.limit)}",
            "not measured" if requirement.damage is None else number(requirement.damage),
            "kept" if requirement.kept else "not kept",
        ]
        for requirement in comparison.requirements
    ]
    return Provenance(
        Table("texts", "Texts", "", head, texts, "No text was compared on."),
        Table("settings", "Settings", "", ["What", "Value"], settings),
        Table("requirements", "Requirements", "", ["File", "Mean damage, nats/token", "Measured", "Verdict"], asked),
    )


def _plain(value: Any) -> Iterator[str]:
    """Yield the lines of a setting."""
    if isinstance(value, dict):
        yield from (f"{key}: {item}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from map(str, value)
    else:
        yield "none" if value is None else str(value)


def definitions(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what each word of the page means."""
    documents = sum(domain.documents for domain in comparison.domains)
    told = [
        ("damage", "KL(reference ‖ file) of the next token’s distribution: its mean over all scored tokens, nats/token. 0: the same predictions."),
        ("intervals", f"95%, over documents ({documents:,} of them), which are resampled whole: they speak of texts like these, not of any text."),
        ("KL of so many % of tokens", "That share of the tokens has a KL of at most so much; the mean hides what the worst tokens suffer."),
        ("same top token, top 5 in common", "Share of tokens with the same most probable token, and share of the five most probable in common."),
        ("tokens until greedy text differs", "Of the reference’s own greedy continuations of prompts from the texts, up to a limit, and the share that never differs within it."),
        ("told apart", "Two files on the same tokens: signs of documents’ differences are flipped at random; p is corrected by Holm over all pairs. Not told apart does not mean equal."),
        ("below the noise floor", "The difference of two files is told, but smaller than what rounding alone does to the reference."),
        ("tokens needed", "About so many tokens like these would tell a difference as large as the one seen, with 80% power, before Holm’s correction."),
        ("rank", "1 + the number of files that are told to do less damage. Files that the data do not tell apart mostly share one; which pairs are told stands under Pairs."),
        ("on the front", "No file of at most its size is told to do less damage."),
        ("within the noise floor", "The file’s damage is not told to be above the noise floor."),
    ]  # fmt: skip
    if comparison.noise is not None:
        told.insert(7, ("noise floor", f"The damage of {comparison.noise_what}: {interval(comparison.noise.damage, unit=True)}."))
    if not comparison.domains:
        told = []
    told.append(
        ("bits a weight", "Bits of a file’s bytes over the number of weights of the model, scales and zero-points counted.")
    )
    return told
