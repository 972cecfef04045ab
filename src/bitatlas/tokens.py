"""Rows of tokens: documents in, three sets of rows out that share no document and no long run of tokens, each with its hash.

*fit* rows find a plan, *select* rows choose among plans, *test* rows judge the chosen one, once. A document is cut into rows of equal
length from its beginning, its last tokens are left out; documents shorter than a row are put one after the other until they fill one.
Rows that repeat earlier text are dropped, the others dealt out by whole documents or, of one long text, by stretches (see `dealing`).
Text too short for the rows that were asked for is refused: nothing is ever scored on fewer rows than the report says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.dealing import Dealt, Ints, deal, repeated_rows
from bitatlas.errors import UserError
from bitatlas.records import Split, TokensInfo
from bitatlas.texts import read_documents

__all__ = ["Rows", "check_vocabulary", "cut_rows", "make_rows", "read_documents", "rows_sha256"]

SPLITS = ("fit", "select", "test")
SHORTEST_ROW = 2
BATCH = 100  # documents that the tokenizer gets at once
PIECE = 2_000_000  # characters of a longer document that it gets at once


@dataclass(frozen=True)
class Rows:
    """fit, select and test: int64 [rows, row_length]."""

    fit: Tensor
    select: Tensor
    test: Tensor
    info: TokensInfo

    def sha256(self, split: str) -> str:
        return self.info.splits[split].sha256

    def blocks(self, split: str) -> list[int]:
        """Of each row, its document or, of a long one, its stretch: rows of one block are not independent, blocks are."""
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

    def kept(self, everywhere: bool = False) -> Ints:
        """The rows that do not repeat earlier text: their indices, ascending."""
        if not len(self.starts):
            return self.starts
        return np.flatnonzero(~repeated_rows(self.ids, self.starts, self.row_length, self.owner, everywhere))

    def deal(self, kept: Ints, counts: Sequence[int], seed: int) -> Dealt | None:
        return deal(self.owner[self.starts[kept]], self.row_length, counts, seed)


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
    kept = cut.kept()
    dealt = cut.deal(kept, counts, seed)
    if dealt is None:
        kept = cut.kept(everywhere=True)
        dealt = cut.deal(kept, counts, seed)
    if dealt is None:
        raise UserError(_too_little(cut, len(kept), source, counts))
    parts = {name: cut.rows(kept[rows]) for name, rows in zip(SPLITS, dealt.rows, strict=True)}
    _assert_disjoint(parts)
    blocks = dict(zip(SPLITS, dealt.blocks, strict=True))
    splits = {n: Split(len(part), part.size, rows_sha256(part), blocks[n].tolist()) for n, part in parts.items()}
    told = (cut.documents, cut.repeated_documents, len(cut.starts) - len(kept), dealt.documents, dealt.by_document)
    info = TokensInfo(source, row_length, splits, *told)
    return Rows(**{name: torch.from_numpy(part) for name, part in parts.items()}, info=info)


def _too_little(cut: _Cut, kept: int, source: str, counts: Sequence[int]) -> str:
    dropped = {"documents": cut.repeated_documents, "rows": len(cut.starts) - kept}
    named = " and ".join(f"{count} {what}" for what, count in dropped.items() if count)
    told = f" (without {named} that repeat earlier text)" if named else ""
    return (
        f"--tokens {source}: {len(cut.ids)} tokens give {kept} different rows of {cut.row_length}{told}, but {sum(counts)} are needed "
        f"(--rows fit,select,test = {','.join(map(str, counts))}); give more text, or ask for fewer or shorter rows"
    )


def cut_rows(documents: Sequence[str], tokenizer: Any, count: int, row_length: int, seed: int) -> Tensor:
    """At most `count` rows of `row_length` tokens that do not repeat each other, drawn by the seed: int64 [rows, row_length]."""
    cut = _cut(documents, tokenizer, row_length)
    kept = cut.kept(everywhere=True)
    dealt = cut.deal(kept, (min(count, len(kept)),), seed) if len(kept) else None
    return torch.from_numpy(cut.rows(kept[dealt.rows[0]] if dealt else kept))


def _cut(documents: Sequence[str], tokenizer: Any, row_length: int, vocabulary: int | None = None) -> _Cut:
    """Each document, or pack of short ones, from its beginning."""
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
    """The pack of each document: consecutive ones belong to one until it has tokens for a row. int64 [documents], ascending."""
    packs, number, tokens = [], 0, 0
    for length in lengths.tolist():
        packs.append(number)
        tokens += length
        if tokens >= row_length:
            number, tokens = number + 1, 0
    return np.array(packs, dtype=np.int64)


def _token_ids(documents: Sequence[str], tokenizer: Any) -> list[Ints]:
    """The tokens of each document, with the end-of-text token after each but the last, where there is one."""
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
    """The tokens of a document piece by piece, cut at line ends: a tokenizer needs about 150 bytes for each character it gets at once."""
    start = 0
    while start < len(document):
        stop = len(document) if len(document) - start <= PIECE else max(document.rfind("\n", start, start + PIECE) + 1, 0)
        stop = stop if stop > start else start + PIECE
        yield from _tokenized([document[start:stop]], tokenizer, add_special_tokens=start == 0)
        start = stop


def _tokenized(texts: Sequence[str], tokenizer: Any, **options: Any) -> list[Ints]:
    try:
        found = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    except Exception as error:  # tokenizers raises bare Exceptions, like for a missing unknown-token
        raise UserError(f"the model's tokenizer cannot read the text ({' '.join(str(error).split())[:160]})") from None
    return [np.array(ids, dtype=np.int64) for ids in found]


def check_vocabulary(tokenizer: Any, texts: list[str], vocabulary: int) -> None:
    """UserError where the tokenizer gives a token of `texts` an id that the model's `vocabulary` (a count) does not have."""
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
        own = {row.tobytes() for row in part}
        if len(own) != len(part) or own & seen:
            raise AssertionError(f"a row of {name} stands in another set")
        seen |= own


def rows_sha256(rows: np.ndarray | Tensor) -> str:
    array = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array, dtype=np.int64).tobytes()).hexdigest()
