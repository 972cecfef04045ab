"""Cut documents into rows of tokens and deal these out as three sets that share no document and no long run of tokens, each with its hash.

*fit* rows find a plan, *select* rows choose among plans, *test* rows judge the chosen one, once. A document is cut into rows of equal
length from its beginning, its last tokens are left out; documents shorter than a row are put one after the other until they fill one.
Text too short for the rows that were asked for is refused: nothing is ever scored on fewer rows than the report says.

A row that repeats the text before it is dropped (`repeated_rows`). The others are dealt out so that fit, select and test share no document;
where there are too few documents for that, a long one is cut into stretches of consecutive rows, and these are dealt out. What is dealt
out, a document or a stretch, is a *block*: rows of different blocks count as independent, those of one block do not. As many blocks as can
be are used, with as few rows of each, spread over it, since an interval rests on the number of blocks.

Repeats are found as runs of `RUN` tokens, by a rolling polynomial hash modulo 2**64 (as in Lee et al., arXiv:2107.06499, who look for runs
of 50); two runs that differ meet with a probability of about 1e-5 in a text of 50 million characters, and then cost one row.
Left out: repeats with a change every few words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.records import Split, TokensInfo

SPLITS = ("fit", "select", "test")
SHORTEST_ROW = 2
BATCH = 100  # documents that the tokenizer gets at once
PIECE = 2_000_000  # characters of a longer document that it gets at once
RUN = 32  # tokens that two rows may not have in common
EVERYWHERE = 0.1  # of the documents: a run that stands in so many is the text's own form, like a heading or a licence
STRETCH = 1024  # tokens, at least, where the text has room: what is nearer is not independent
LEAST_BLOCKS = 8  # of a set, below which documents are cut up

Ints = np.ndarray


@dataclass(frozen=True)
class Rows:
    """fit, select and test: int64 [rows, row_length]."""

    fit: Tensor
    select: Tensor
    test: Tensor
    info: TokensInfo

    def sha256(self, split: str) -> str:
        """Return the hash of a set's rows."""
        return self.info.splits[split].sha256

    def blocks(self, split: str) -> list[int]:
        """Return of each row its document or, of a long one, its stretch: rows of one block are not independent, blocks are."""
        return self.info.splits[split].blocks


@dataclass(frozen=True)
class _Cut:
    """Documents cut into rows. ids: int64 [tokens]; owner: the document of each; starts: int64 [rows], ascending."""

    ids: Ints
    owner: Ints
    starts: Ints
    row_length: int
    documents: int
    repeated_documents: int

    def rows(self, index: Ints) -> Ints:
        return np.asarray(self.ids[self.starts[index][:, None] + np.arange(self.row_length)])

    def distinct(self, everywhere: bool = False) -> Ints:
        """Return the indices of the rows that do not repeat earlier text, ascending."""
        if not len(self.starts):
            return self.starts
        return np.flatnonzero(~repeated_rows(self.ids, self.starts, self.row_length, self.owner, everywhere))

    def deal(self, index: Ints, counts: Sequence[int], seed: int) -> Dealt | None:
        return deal(self.owner[self.starts[index]], self.row_length, counts, seed)


def make_rows(
    documents: list[str],
    tokenizer: Any,
    source: str,
    counts: tuple[int, int, int],
    row_length: int,
    context: int,
    seed: int,
    vocabulary: int | None = None,
) -> Rows:
    """Cut `documents` into rows and deal them out as `counts` = (fit, select, test) rows of `row_length` tokens.

    Raises UserError where the text is too short, a row is longer than the model's context, or a token is not one of the model's
    `vocabulary`.
    """
    if row_length < SHORTEST_ROW:
        raise UserError(f"--row-length {row_length}: at least {SHORTEST_ROW} tokens, one to read and one to predict")
    if min(counts) < 1:
        raise UserError(f"--rows {','.join(map(str, counts))}: each of fit,select,test needs at least 1 row")
    if row_length > context:
        raise UserError(f"--row-length {row_length}: the model's context is {context} tokens; give at most that")
    cut = _cut(documents, tokenizer, row_length, vocabulary)
    index, dealt = _dealt_rows(cut, counts, seed)
    if dealt is None:
        raise UserError(_too_little(cut, len(index), source, counts))
    parts = {name: cut.rows(index[rows]) for name, rows in zip(SPLITS, dealt.rows, strict=True)}
    _assert_disjoint(parts)
    blocks = dict(zip(SPLITS, dealt.blocks, strict=True))
    splits = {n: Split(len(part), part.size, rows_sha256(part), blocks[n].tolist()) for n, part in parts.items()}
    repeated = len(cut.starts) - len(index)
    info = TokensInfo(
        source, row_length, splits, cut.documents, cut.repeated_documents, repeated, dealt.documents, dealt.by_document
    )
    return Rows(**{name: torch.from_numpy(part) for name, part in parts.items()}, info=info)


def fit_pool(documents: Sequence[str], tokenizer: Any, rows: Rows, seed: int) -> Tensor:
    """Return every row of what `make_rows` took its fit rows from, in the text's order: int64 [rows, row_length].

    They share no document, or stretch, with the select and test rows. `rows`, `seed`: what it returned, and was given.
    """
    cut = _cut(documents, tokenizer, rows.info.row_length)
    counts = [len(part) for part in (rows.fit, rows.select, rows.test)]
    index, dealt = _dealt_rows(cut, counts, seed)
    if dealt is None or rows_sha256(cut.rows(index[dealt.rows[0]])) != rows.sha256("fit"):
        raise ValueError("these rows were not made of this text")
    return torch.from_numpy(cut.rows(index[dealt.parts == 0]))


def _dealt_rows(cut: _Cut, counts: Sequence[int], seed: int) -> tuple[Ints, Dealt | None]:
    """Return the indices of the different rows, and how they are dealt out; None where there are too few."""
    index = cut.distinct()
    dealt = cut.deal(index, counts, seed)
    if dealt is None:
        index = cut.distinct(everywhere=True)
        dealt = cut.deal(index, counts, seed)
    return index, dealt


def _too_little(cut: _Cut, rows: int, source: str, counts: Sequence[int]) -> str:
    dropped = {"documents": cut.repeated_documents, "rows": len(cut.starts) - rows}
    named = " and ".join(f"{count} {what}" for what, count in dropped.items() if count)
    without = f" (without {named} that repeat earlier text)" if named else ""
    return (
        f"--tokens {source}: {len(cut.ids)} tokens give {rows} different rows of {cut.row_length}{without}, but {sum(counts)} are needed "
        f"(--rows fit,select,test = {','.join(map(str, counts))}); give more text, or ask for fewer or shorter rows"
    )


def text_rows(
    documents: Sequence[str], tokenizer: Any, count: int, row_length: int, seed: int, vocabulary: int | None = None
) -> tuple[Tensor, list[int]]:
    """Return at most `count` rows of `row_length` tokens that do not repeat each other, drawn by the seed, and the block of each: int64 [rows, row_length]."""
    cut = _cut(documents, tokenizer, row_length, vocabulary)
    index = cut.distinct(everywhere=True)
    dealt = cut.deal(index, (min(count, len(index)),), seed) if len(index) else None
    if dealt is None:
        return torch.zeros(0, row_length, dtype=torch.long), []
    return torch.from_numpy(cut.rows(index[dealt.rows[0]])), dealt.blocks[0].tolist()


def cut_rows(documents: Sequence[str], tokenizer: Any, count: int, row_length: int, seed: int) -> Tensor:
    """Return the rows of `text_rows`."""
    return text_rows(documents, tokenizer, count, row_length, seed)[0]


def _cut(documents: Sequence[str], tokenizer: Any, row_length: int, vocabulary: int | None = None) -> _Cut:
    """Cut each document, or pack of short ones, from its beginning."""
    different = list(dict.fromkeys(documents))
    parts = _token_ids(different, tokenizer)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    ids = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
    _refuse_unknown(ids, vocabulary)
    tokens = np.bincount(_packed(lengths, row_length), weights=lengths).astype(np.int64)  # [packs]
    rows = tokens // row_length  # [packs]
    index = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)  # of each row in its pack
    starts = np.repeat(np.cumsum(tokens) - tokens, rows) + index * row_length
    owner = np.repeat(np.arange(len(tokens)), tokens)
    return _Cut(ids, owner, starts, row_length, len(different), len(documents) - len(different))


def _packed(lengths: Ints, row_length: int) -> Ints:
    """Return the pack of each document: consecutive ones belong to one until it has tokens for a row. int64 [documents], ascending."""
    packs, number, tokens = [], 0, 0
    for length in lengths.tolist():
        packs.append(number)
        tokens += length
        if tokens >= row_length:
            number, tokens = number + 1, 0
    return np.array(packs, dtype=np.int64)


def _token_ids(documents: Sequence[str], tokenizer: Any) -> list[Ints]:
    """Return the tokens of each document, with the end-of-text token after each but the last, where there is one."""
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int64)
    parts: list[Ints] = []
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        if max(map(len, batch)) <= PIECE:
            parts += [np.append(ids, end) for ids in _tokenized(batch, tokenizer)]
        else:
            parts += [np.concatenate([*_pieces(document, tokenizer), end]) for document in batch]
    if parts and len(end):
        parts[-1] = parts[-1][:-1]
    return parts


def _pieces(document: str, tokenizer: Any) -> Iterator[Ints]:
    """Yield the tokens of a document piece by piece, cut at line ends: a tokenizer needs about 150 bytes for each character it gets at once."""
    start = 0
    while start < len(document):
        stop = len(document) if len(document) - start <= PIECE else max(document.rfind("\n", start, start + PIECE) + 1, 0)
        stop = stop if stop > start else start + PIECE
        yield from _tokenized([document[start:stop]], tokenizer, add_special_tokens=start == 0)
        start = stop


def _tokenized(texts: Sequence[str], tokenizer: Any, **options: Any) -> list[Ints]:
    try:
        rows = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    except Exception as error:  # tokenizers raises bare Exceptions, like for a missing unknown-token
        raise UserError(f"the model's tokenizer cannot read the text ({' '.join(str(error).split())[:160]})") from None
    return [np.array(ids, dtype=np.int64) for ids in rows]


def check_vocabulary(tokenizer: Any, texts: list[str], vocabulary: int) -> None:
    """Refuse, with UserError, a tokenizer that gives a token of `texts` an id that the model's `vocabulary` (a count) does not have."""
    for ids in _token_ids(texts, tokenizer):
        _refuse_unknown(ids, vocabulary)


def _refuse_unknown(ids: np.ndarray, vocabulary: int | None) -> None:
    if vocabulary is not None and len(ids) and ids.max() >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {ids.max()}, but the model has {vocabulary}: tokenizer and weights do not belong together"
        )


def _assert_disjoint(parts: dict[str, np.ndarray]) -> None:
    seen: set[bytes] = set()
    for name, part in parts.items():
        rows = {row.tobytes() for row in part}
        if len(rows) != len(part) or rows & seen:
            raise AssertionError(f"a row of {name} stands in another set")
        seen |= rows


def rows_sha256(rows: np.ndarray | Tensor) -> str:
    """Return a hash of rows [rows, row_length], of their shape and their tokens."""
    array = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array, dtype=np.int64).tobytes()).hexdigest()


# --- repeats -----------------------------------------------------------------------------------------------------------


def repeated_rows(ids: Ints, starts: Ints, row_length: int, document: Ints, everywhere: bool = False) -> np.ndarray:
    """Return which rows repeat the text before them: bool [rows].

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
    """Return a hash of each run of `RUN` tokens: uint64 [tokens - RUN + 1]."""
    base = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)  # an array's product wraps without a warning
    hashes, length = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93), 1
    hashes ^= hashes >> np.uint64(29)
    while length < RUN:  # of runs twice as long, from two neighbours
        hashes = hashes[:-length] * base + hashes[length:]
        base, length = base * base, 2 * length
    return hashes


def _covered(runs: np.ndarray, tokens: int) -> np.ndarray:
    """Return which tokens lie in one of the runs that begin where `runs` is true: bool [tokens]."""
    edges = np.zeros(tokens + 1, dtype=np.int64)
    edges[: len(runs)] += runs
    edges[RUN : RUN + len(runs)] -= runs
    return np.cumsum(edges)[:-1] > 0


def _in_many(inverse: Ints, units: Ints) -> np.ndarray:
    """Return which of the different runs stand in at least `EVERYWHERE` of the units: bool [different runs]."""
    count = int(units.max()) + 1
    pairs = np.unique(inverse * count + units)
    return np.bincount(pairs // count) >= max(2.0, EVERYWHERE * count)


# --- dealing out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dealt:
    """`rows`: indices of rows, ascending, one array a set; `blocks`: the block of each. `documents`: no two sets share a document.

    `parts`: of every row, whether it is needed or not, the set whose block it lies in.
    """

    rows: list[Ints]
    blocks: list[Ints]
    parts: Ints
    documents: bool
    by_document: bool  # a block is a whole document


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
        sizes = [np.unique(document[whole == part]).size for part in range(len(counts))]
        by_document = all(n >= min(LEAST_BLOCKS, count) for n, count in zip(sizes, counts, strict=True))
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
    """Return the set of each row, so that no unit is in two sets and each has at least its count of rows; None where no order of units did it."""
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
    return Dealt(rows, [blocks[chosen] for chosen in rows], parts, documents, by_document)


def _spread(rows: Ints, blocks: Ints, count: int, rng: np.random.Generator, phase: float | None) -> Ints:
    """Return `count` of `rows`, ascending: as equally many of each block as can be, at equal distances within it. A draw decides the rest.

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
