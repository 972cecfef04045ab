"""Sum up what was told of every prediction: means, quantiles and agreement with intervals over documents, pairs, ranks, and the front of size and damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitatlas.measure.predictions import COLUMNS, TOP
from bitatlas.measure.stream import CONTINUED, PROMPT, Stream
from bitatlas.records import Measured
from bitatlas.records.comparison import NOISE, TOLD_APART, UNTOLD, Bucket, Candidate, Comparison, Deviation, ModelFile, Pair
from bitatlas.stats.bootstrap import Floats, holm, measured
from bitatlas.stats.ranking import (
    block_sums,
    compare_pairs,
    front,
    quantiles_measured,
    ranks,
    ratio_measured,
    sign_flip_p,
    tokens_needed,
)

ALPHA = 0.05
QUANTILES = (50.0, 90.0, 99.0, 99.9)
BUCKETS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the reference's greatest probability
NATS = "nats/token"
ROWS = "text"


@dataclass(frozen=True)
class Measurement:
    """A file and where what was told of it lies. refused: why it was not compared on the text."""

    file: ModelFile
    folder: Path
    refused: str = ""


@dataclass(frozen=True)
class _Tokens:
    """Every scored prediction of a stream, all domains one after the other. row: of each prediction; blocks, domain: of each row."""

    row: NDArray[np.int64]  # [tokens]
    top: Floats  # [tokens], the reference's greatest probability
    loss: Floats  # [tokens]
    blocks: list[int]  # [rows]
    domain: NDArray[np.int64]  # [rows]
    names: list[str]  # of domains
    prompt_rows: list[int]  # the row of each continuation

    def sums(self, values: Floats) -> Floats:
        """Return the sums over each row: [tokens] -> [rows]."""
        return np.bincount(self.row, weights=values, minlength=len(self.blocks)).astype(np.float64)

    @property
    def counts(self) -> Floats:
        return self.sums(np.ones(len(self.row)))

    def of(self, domain: int) -> NDArray[np.bool_]:
        return self.domain == domain


def assemble(
    reference: ModelFile, stream: Stream | None, runs: Mapping[str, Measurement], noise: str, noise_what: str, seed: int
) -> Comparison:
    """Return what is told of the files; without `stream` none was compared on text."""
    refused = [Candidate(run.file, None, refused=run.refused) for run in runs.values() if run.refused]
    if stream is None:
        return Comparison(reference, None, [], refused, [], None, noise_what, [], [], [], [], {})
    tokens = _tokens_of(stream)
    values = {name: _values(stream, run.folder) for name, run in runs.items() if not run.refused}
    agreed = {name: stream.agreed(runs[name].folder).numpy() for name in values}
    deviations = {name: _deviation(tokens, table, agreed[name], stream, seed) for name, table in values.items()}
    floor = _values(stream, stream.folder / noise)
    noise_deviation = _deviation(tokens, floor, stream.agreed(stream.folder / noise).numpy(), stream, seed)
    pairs = _pairs(tokens, values, noise_deviation.damage.mean, seed)
    within = _within_noise(tokens, values, floor, seed)
    better = {
        (pair.first, pair.second) if pair.difference.mean > 0 else (pair.second, pair.first)
        for pair in pairs
        if pair.verdict == TOLD_APART
    }
    places = ranks(list(values), better)
    best = front({name: runs[name].file.bytes for name in values}, better)
    candidates = [
        Candidate(runs[name].file, deviations[name], places[name], name in best, name in within)
        for name in sorted(values, key=lambda name: (places[name], deviations[name].damage.mean))
    ]
    loss = ratio_measured(tokens.sums(tokens.loss), tokens.counts, tokens.blocks, NATS, "reference", ROWS, seed)
    return Comparison(
        replace(reference, run=stream.file.run), loss, [rows.domain for rows in stream.domains], [*candidates, *refused], pairs, noise_deviation,
        noise_what, [], [], [], [], {},
    )  # fmt: skip


def _tokens_of(stream: Stream) -> _Tokens:
    row, top, loss, blocks, domain, firsts = [], [], [], list[int](), [], {}
    for number, rows in enumerate(stream.domains):
        first, after = len(blocks), max(blocks, default=-1) + 1
        firsts[rows.domain.name] = first
        row.append(np.repeat(first + np.arange(len(rows.lengths)), rows.scored.sum(-1).numpy()))
        blocks += [after + block for block in rows.blocks]
        domain.append(np.full(len(rows.lengths), number))
    for rows, number, _ in stream.parts():
        kept = stream.load_kept(rows, number)
        top.append(kept.top.numpy())
        loss.append(kept.loss.numpy())
    _, prompts = stream.prompts()
    return _Tokens(
        np.concatenate(row), np.concatenate(top).astype(np.float64), np.concatenate(loss).astype(np.float64), blocks, np.concatenate(domain),
        [rows.domain.name for rows in stream.domains], [firsts[name] + index for name, index in prompts],
    )  # fmt: skip


def _values(stream: Stream, folder: Path) -> dict[str, Floats]:
    """Return what was told of a file's predictions, by column: [tokens]."""
    told = stream.told(folder)
    table = np.concatenate([told[rows.domain.name].numpy().astype(np.float64) for rows in stream.domains])
    return {name: table[:, index] for index, name in enumerate(COLUMNS)}


def _deviation(tokens: _Tokens, table: Mapping[str, Floats], agreed: NDArray[np.int64], stream: Stream, seed: int) -> Deviation:
    counts, kl = tokens.counts, tokens.sums(table["kl"])

    def mean(values: Floats, unit: str) -> Measured:
        return ratio_measured(tokens.sums(values), counts, tokens.blocks, unit, "reference", ROWS, seed)

    quantiles = quantiles_measured(table["kl"], tokens.row, tokens.blocks, QUANTILES, "nats", "reference", ROWS, seed)
    domains = {
        name: ratio_measured(kl[rows], counts[rows], _some(tokens.blocks, rows), NATS, "reference", name, seed)
        for index, name in enumerate(tokens.names)
        if (rows := tokens.of(index)).any()
    }
    limit = min(CONTINUED, int(stream.continuations().shape[1]) - PROMPT)
    agreement = None
    if limit > 0 and len(agreed):
        agreement = measured(
            agreed, "tokens", "reference", "continuations", seed, [tokens.blocks[row] for row in tokens.prompt_rows]
        )
    return Deviation(
        damage=mean(table["kl"], NATS),
        quantiles={f"{percent:g}": value for percent, value in zip(QUANTILES, quantiles, strict=True)},
        same_top=mean(table["same_top"], "share"),
        top5=mean(table["top5"] / TOP, "share"),
        loss=mean(table["loss"], NATS),
        loss_difference=mean(table["loss"] - tokens.loss, NATS),
        domains=domains,
        buckets=_buckets(tokens, table["kl"], seed),
        estimate_error=float(np.sqrt(table["variance"].sum()) / len(table["kl"])),
        agreement=agreement,
        agreement_limit=max(0, limit),
        never_differ=float((agreed >= limit).mean()) if agreement else 0.0,
    )


def _some(values: list[int], chosen: NDArray[np.bool_]) -> list[int]:
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]


def _buckets(tokens: _Tokens, kl: Floats, seed: int) -> list[Bucket]:
    """Return damage by how sure the reference was."""
    result = []
    for low, high in pairwise(BUCKETS):
        inside = ((tokens.top >= low) & ((tokens.top < high) | (high == 1.0))).astype(np.float64)
        counts = tokens.sums(inside)
        rows = counts > 0
        damage = None
        if rows.any():
            sums = tokens.sums(kl * inside)[rows]
            damage = ratio_measured(sums, counts[rows], _some(tokens.blocks, rows), NATS, "reference", ROWS, seed)
        result.append(Bucket(low, high, float(inside.mean()), damage))
    return result


def _pairs(tokens: _Tokens, values: Mapping[str, Mapping[str, Floats]], floor: float, seed: int) -> list[Pair]:
    rows = {name: tokens.sums(table["kl"]) for name, table in values.items()}
    tests = compare_pairs({name: block_sums(sums, tokens.blocks) for name, sums in rows.items()}, seed)
    counts = tokens.counts
    result = []
    for first, second in combinations(rows, 2):
        sums = rows[second] - rows[first]
        difference = ratio_measured(sums, counts, tokens.blocks, NATS, first, ROWS, seed)
        p, adjusted = tests[first, second]
        verdict = UNTOLD if adjusted >= ALPHA else NOISE if abs(difference.mean) < floor else TOLD_APART
        domains = {
            name: ratio_measured(sums[chosen], counts[chosen], _some(tokens.blocks, chosen), NATS, first, name, seed)
            for index, name in enumerate(tokens.names)
            if (chosen := tokens.of(index)).any()
        }
        needed = tokens_needed(block_sums(sums, tokens.blocks), len(tokens.row))
        result.append(Pair(first, second, difference, p, adjusted, verdict, needed, domains))
    return result


def _within_noise(
    tokens: _Tokens, values: Mapping[str, Mapping[str, Floats]], floor: Mapping[str, Floats], seed: int
) -> set[str]:
    """Return the files whose damage is not told to be above the noise floor, corrected over the files."""
    differences = {name: block_sums(tokens.sums(table["kl"] - floor["kl"]), tokens.blocks) for name, table in values.items()}
    p = holm([sign_flip_p(sums, seed) if sums.sum() > 0 else 1.0 for sums in differences.values()])
    return {name for name, of_file in zip(differences, p, strict=True) if of_file >= ALPHA}
