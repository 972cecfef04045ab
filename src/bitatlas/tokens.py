"""Rows of tokens: text in, three disjoint sets of rows out, each with its hash.

*fit* rows find a plan, *select* rows choose among plans, *test* rows judge the chosen one, once. Text is cut into rows of equal
length; repeated rows are dropped before the rows are dealt out (seeded), so no row can stand in two sets, and that is asserted.
Text too short for the rows that were asked for is refused: nothing is ever scored on fewer rows than the report says.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.records import Split, TokensInfo

SPLITS = ("fit", "select", "test")
MOST_CHARACTERS = 50_000_000  # of a larger file only the beginning is read
MOST_DOCUMENTS = 20_000  # of a hub data set
SHORTEST_ROW = 2


@dataclass(frozen=True)
class Rows:
    """fit, select and test: int64 [rows, row_length]."""

    fit: Tensor
    select: Tensor
    test: Tensor
    info: TokensInfo

    def sha256(self, split: str) -> str:
        return self.info.splits[split].sha256


def read_documents(source: str) -> list[str]:
    """Documents of a text file (one document), a JSONL file (field `text`), or `hub:owner/name[:config[:split]]`."""
    if source.startswith("hub:"):
        return _hub_documents(source)
    try:
        path = Path(source).expanduser()
        with path.open(encoding="utf-8") as stream:
            text = stream.read(MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: ~nobody/text
        told = (getattr(error, "strerror", None) or "cannot be read").lower()
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else told
        raise UserError(
            f"--tokens {source}: {reason} (give a text file, a JSONL file with a `text` field, or hub:owner/name)"
        ) from None
    if path.suffix != ".jsonl":
        return [text]
    return _jsonl_documents(source, text if len(text) < MOST_CHARACTERS else text[: text.rfind("\n") + 1])


def _jsonl_documents(source: str, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut inside a JSON string
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'--tokens {source}: line {number} is not a JSON object with a "text" field') from None
        documents.append(_checked_text(document, f"--tokens {source}: line {number}"))
    return documents


def _checked_text(document: object, where: str) -> str:
    """UserError, naming `where`, unless it is text that UTF-8 can hold."""
    if not isinstance(document, str):
        raise UserError(f'{where}: "text" is {json.dumps(document)[:40]}, not a string')
    try:
        document.encode()
    except UnicodeEncodeError:
        raise UserError(f'{where}: "text" holds half of a surrogate pair, which is no character') from None
    return document


def _hub_documents(source: str) -> list[str]:
    name, _, rest = source.removeprefix("hub:").partition(":")
    config, _, split = rest.partition(":")
    from datasets import load_dataset

    try:
        stream = load_dataset(name, config or None, split=split or "train", streaming=True)
        documents = [item["text"] for item in stream.take(MOST_DOCUMENTS)]
    except Exception as error:  # the hub client raises many kinds; each means that the data cannot be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"--tokens {source}: the hub did not give it ({reason}); a local text file works without a network"
        ) from None
    return [_checked_text(document, f"--tokens {source}: document {number}") for number, document in enumerate(documents, 1)]


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
    ids = _token_ids(documents, tokenizer)
    _refuse_unknown(ids, vocabulary)
    whole = len(ids) // row_length
    rows = np.unique(ids[: whole * row_length].reshape(whole, row_length), axis=0) if whole else ids[:0].reshape(0, row_length)
    if len(rows) < sum(counts):
        raise UserError(
            f"--tokens {source}: {len(ids)} tokens give {len(rows)} different rows of {row_length}, but {sum(counts)} are needed "
            f"(--rows fit,select,test = {','.join(map(str, counts))}); give more text, or ask for fewer or shorter rows"
        )
    order = np.random.default_rng(seed).permutation(len(rows))[: sum(counts)]
    ends = np.cumsum(counts)
    parts = dict(zip(SPLITS, np.split(rows[order], ends[:-1]), strict=True))
    _assert_disjoint(parts)
    info = TokensInfo(source, row_length, {name: Split(len(part), part.size, rows_sha256(part)) for name, part in parts.items()})
    return Rows(**{name: torch.from_numpy(part.copy()) for name, part in parts.items()}, info=info)


def cut_rows(documents: list[str], tokenizer: Any, count: int, row_length: int, seed: int) -> Tensor:
    """At most `count` different rows of `row_length` tokens, drawn by the seed: int64 [rows, row_length]."""
    ids = _token_ids(documents, tokenizer)
    whole = len(ids) // row_length
    rows = np.unique(ids[: whole * row_length].reshape(whole, row_length), axis=0)
    return torch.from_numpy(rows[np.random.default_rng(seed).permutation(len(rows))[:count]])


def _token_ids(documents: list[str], tokenizer: Any) -> np.ndarray:
    """All documents' tokens in one line, with the end-of-text token between documents where there is one."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for number, document in enumerate(documents):
        try:
            ids += (separator if number else []) + tokenizer(document, verbose=False)["input_ids"]
        except Exception as error:  # tokenizers raises bare Exceptions, like for a missing unknown-token
            raise UserError(f"the model's tokenizer cannot read the text ({' '.join(str(error).split())[:160]})") from None
    return np.asarray(ids, dtype=np.int64)


def check_vocabulary(tokenizer: Any, texts: list[str], vocabulary: int) -> None:
    """UserError where the tokenizer gives a token of `texts` an id that the model's `vocabulary` (a count) does not have."""
    _refuse_unknown(_token_ids(texts, tokenizer), vocabulary)


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
