"""Which rows of a text may be measured on, and which of them go to fit, select and test: arrays in, arrays out.

A row that repeats the text before it is dropped (`repeated_rows`). The others are dealt out so that fit, select and test share no document;
where there are too few documents for that, a long one is cut into stretches of consecutive rows, and these are dealt out. What is dealt
out, a document or a stretch, is a *block*: rows of different blocks count as independent, those of one block do not. As many blocks as can
be are used, with as few rows of each, spread over it, since an interval rests on the number of blocks.

Repeats are found as runs of `RUN` tokens, by a rolling polynomial hash modulo 2**64 (as in Lee et al., arXiv:2107.06499, who look for runs
of 50); two runs that differ meet with a probability of about 1e-5 in a text of 50 million characters, and then cost one row.
Left out: repeats with a change every few words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Ints = np.ndarray

RUN = 32  # tokens that two rows may not have in common
EVERYWHERE = 0.1  # of the documents: a run that stands in so many is the text's own form, like a heading or a licence
STRETCH = 1024  # tokens, at least, where the text has room: what is nearer is not independent
LEAST_BLOCKS = 8  # of a set, below which documents are cut up


@dataclass(frozen=True)
class Dealt:
    """`rows`: indices of rows, ascending, one array a set; `blocks`: the block of each. `documents`: no two sets share a document."""

    rows: list[Ints]
    blocks: list[Ints]
    documents: bool
    by_document: bool  # a block is a whole document


def repeated_rows(ids: Ints, starts: Ints, row_length: int, document: Ints, everywhere: bool = False) -> np.ndarray:
    """Which rows repeat the text before them: bool [rows].

    ids: int64 [tokens], all documents one after the other; starts: int64 [rows], ascending; document: int64 [tokens], ascending.
    A row repeats where `RUN` of its tokens (or all of a shorter row) stand in runs of `RUN` tokens that an earlier row or what lies between
    rows has as well. `everywhere`: runs that stand in a tenth of the documents (of the rows, where documents are few) are let pass, unless
    they make up half of the row.
    """
    tokens_of = starts[:, None] + np.arange(row_length)  # [rows, row_length]
    again = np.zeros(len(starts), dtype=bool)
    if row_length < RUN:  # a longer row that stood before is all runs that stood before
        again[:] = True
        again[np.unique(ids[tokens_of], axis=0, return_index=True)[1]] = False
    if len(ids) < RUN:
        return again
    row_of = np.searchsorted(starts, np.arange(len(ids)), side="right")  # [tokens]; what follows a row belongs to it
    _, first, inverse = np.unique(_hashes(ids), return_index=True, return_inverse=True)
    repeated = row_of[first][inverse] != row_of[: len(inverse)]  # [windows]
    covered = _covered(repeated, len(ids))[tokens_of].sum(axis=1)  # [rows], tokens
    least = min(RUN, row_length)
    if not everywhere:
        return again | (covered >= least)
    units = document if document[-1] + 1 >= 1 / EVERYWHERE else row_of
    common = _in_many(inverse, units[: len(inverse)])[inverse]
    rare = _covered(repeated & ~common, len(ids))[tokens_of].sum(axis=1)
    return again | (rare >= least) | (2 * covered >= row_length)


def _hashes(ids: Ints) -> Ints:
    """A hash of each run of `RUN` tokens: uint64 [tokens - RUN + 1]."""
    base = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)  # an array's product wraps without a warning
    hashes, length = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93), 1
    hashes ^= hashes >> np.uint64(29)
    while length < RUN:  # of runs twice as long, from two neighbours
        hashes = hashes[:-length] * base + hashes[length:]
        base, length = base * base, 2 * length
    return hashes


def _covered(runs: np.ndarray, tokens: int) -> np.ndarray:
    """Which tokens lie in one of the runs that begin where `runs` is true: bool [tokens]."""
    edges = np.zeros(tokens + 1, dtype=np.int64)
    edges[: len(runs)] += runs
    edges[RUN : RUN + len(runs)] -= runs
    return np.cumsum(edges)[:-1] > 0


def _in_many(inverse: Ints, units: Ints) -> np.ndarray:
    """Which of the different runs stand in at least `EVERYWHERE` of the units: bool [different runs]."""
    count = int(units.max()) + 1
    pairs = np.unique(inverse * count + units)
    return np.bincount(pairs // count) >= max(2.0, EVERYWHERE * count)


# --- dealing out -----------------------------------------------------------------------------------------------------


def deal(document: Ints, row_length: int, counts: Sequence[int], seed: int) -> Dealt | None:
    """Deal rows out to sets of `counts` rows, seeded; None where there are too few. document: int64 [rows], ascending.

    Documents stay whole where each set gets its rows so. Blocks are documents where each set has `LEAST_BLOCKS` of them (or one a row),
    else stretches.
    """
    if len(document) < sum(counts):
        return None
    rng = np.random.default_rng(seed)
    whole = _assigned(document, counts, rng)
    if whole is not None:
        found = [np.unique(document[whole == part]).size for part in range(len(counts))]
        by_document = all(n >= min(LEAST_BLOCKS, count) for n, count in zip(found, counts, strict=True))
        blocks = document if by_document else _stretches(document, row_length, sum(counts), 1)
        return _dealt(whole, blocks, counts, rng, documents=True, by_document=by_document)
    finer = 1
    while True:
        blocks = _stretches(document, row_length, sum(counts), finer)
        parts = _assigned(blocks, counts, rng)
        if parts is not None:
            return _dealt(parts, blocks, counts, rng, documents=False, by_document=False)
        finer *= 2


def _stretches(document: Ints, row_length: int, needed: int, finer: int) -> Ints:
    """Cut each document into stretches of rows as equal as can be: the stretch of each row, int64 [rows].

    As many as rows are needed, but none shorter than `STRETCH` tokens while that leaves three sets `LEAST_BLOCKS` each; `finer` times more.
    """
    rows = len(document)
    target = min(needed, max(rows * row_length // STRETCH, 3 * LEAST_BLOCKS)) * finer
    _, first, sizes = np.unique(document, return_index=True, return_counts=True)
    pieces = np.clip(np.round(sizes * target / rows), 1, sizes).astype(np.int64)  # [documents]
    before = np.cumsum(pieces) - pieces
    index = np.repeat(np.arange(len(sizes)), sizes)  # [rows]
    return before[index] + (np.arange(rows) - first[index]) * pieces[index] // sizes[index]


def _assigned(units: Ints, counts: Sequence[int], rng: np.random.Generator) -> Ints | None:
    """The set of each row, so that no unit is in two sets and each has at least its count of rows; None where no order of units did it."""
    _, index, sizes = np.unique(units, return_inverse=True, return_counts=True)
    if len(sizes) < len(counts):
        return None
    cap = max(1, -(-2 * sum(counts) // len(sizes)))  # a unit counts for no more rows than twice its share
    drawn = rng.permutation(len(sizes))
    for order, worth in ((drawn, np.minimum(sizes, cap)), (drawn[np.argsort(-sizes[drawn], kind="stable")], sizes)):
        part, have = np.zeros(len(sizes), dtype=np.int64), np.zeros(len(counts))
        for unit in order:
            part[unit] = np.argmin(have / counts)
            have[part[unit]] += worth[unit]
        rows = np.bincount(part[index], minlength=len(counts))
        if (rows >= counts).all():
            return np.asarray(part[index])
    return None


def _dealt(
    parts: Ints, blocks: Ints, counts: Sequence[int], rng: np.random.Generator, documents: bool, by_document: bool
) -> Dealt:
    phase = None if by_document else float(rng.random())
    rows = [_spread(np.flatnonzero(parts == part), blocks, count, rng, phase) for part, count in enumerate(counts)]
    return Dealt(rows, [blocks[chosen] for chosen in rows], documents, by_document)


def _spread(rows: Ints, blocks: Ints, count: int, rng: np.random.Generator, phase: float | None) -> Ints:
    """`count` of `rows`, ascending: as equally many of each block as can be, at equal distances within it. A draw decides the rest.

    phase: how far into each block its first row lies, 0..1, so that rows of neighbouring stretches are apart as well; None: drawn.
    """
    _, sizes = np.unique(blocks[rows], return_counts=True)  # rows of a block are neighbours
    order = rng.permutation(len(sizes))
    take = np.zeros(len(sizes), dtype=np.int64)
    for level in range(count):  # one of each block before a second of any
        open_blocks = order[sizes[order] > level][: count - int(take.sum())]
        if not len(open_blocks):
            break
        take[open_blocks] += 1
    first = np.cumsum(sizes) - sizes
    phases = rng.random(len(sizes)) if phase is None else np.full(len(sizes), phase)
    chosen = [
        start + np.floor((np.arange(n) + depth) * size / n).astype(np.int64)
        for start, size, n, depth in zip(first, sizes, take, phases, strict=True)
        if n
    ]
    return np.asarray(rows[np.concatenate(chosen)])
