"""Texts by domain, as rows that a model is compared on: prose, code, math, chat, or what `--tokens label=source` names.

A text is cut into rows like everywhere else (`rows`); a conversation is a row of its own, written out by the model's own chat template and cut
at the row's length. Of conversations the assistant's tokens alone may be scored: what stands between the template's own invitation to answer
and the end of that answer, found by writing out the conversation up to there.

The bundled texts were written for this project; no model was trained on them before its release.
Left out: tools and pictures in messages; a system prompt that nobody gave.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.data.rows import rows_sha256, text_rows
from bitatlas.data.texts import Conversation, read_texts
from bitatlas.errors import UserError
from bitatlas.records.comparison import Domain

BUNDLED_CHAT = "chat"
BUNDLED = ("prose", "code", "math", BUNDLED_CHAT)
SCORED = ("all", "assistant")
LEAST_ROWS = 4  # of a domain, below which nothing can be said of it
LABEL = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class DomainRows:
    """A domain's rows. tokens: int64 [rows, row_length], 0 behind a row's end; lengths: of each row, tokens.

    scored: bool [rows, row_length - 1], where the prediction of the next token counts; blocks: what each row belongs to, by number.
    """

    domain: Domain
    tokens: Tensor
    lengths: list[int]
    scored: Tensor
    blocks: list[int]


def parse_sources(sources: Sequence[str]) -> dict[str, str]:
    """Return {label: source} of words like `chat=talk.jsonl` or `talk.jsonl` (its label is then `talk`); UserError for a label that comes twice."""
    result: dict[str, str] = {}
    for word in map(str, sources):
        match = None if Path(word).expanduser().exists() else LABEL.fullmatch(word)
        label, source = (match[1], match[2]) if match else (word if word.startswith("hub:") else Path(word).stem, word)
        label = re.sub(r"[^\w.-]", "_", label)  # it becomes a part of files' names
        if label in result:
            raise UserError(f"--tokens {word}: there is a text called {label} already; give it a label, like other={source}")
        result[label] = source
    return result


def bundled_sources() -> dict[str, str]:
    """Return {label: file} of the texts that come with the package."""
    folder = resources.files("bitatlas.data") / "domains"
    return {name: str(folder / f"{name}.jsonl") for name in BUNDLED}


def domain_rows(
    label: str, source: str, tokenizer: Any, count: int, row_length: int, seed: int, vocabulary: int, scored: str = "all"
) -> DomainRows:
    """Cut at most `count` rows of `row_length` tokens out of a source; UserError where it gives fewer than `LEAST_ROWS`."""
    texts = read_texts(source)
    chat = isinstance(texts[0], list)
    if chat:
        rows, masks = _chat_rows(texts, tokenizer, count, row_length, seed, scored, f"--tokens {label}={source}")  # type: ignore[arg-type]
        blocks = list(range(len(rows)))
    else:
        cut, blocks = text_rows(texts, tokenizer, count, row_length, seed, vocabulary)  # type: ignore[arg-type]
        rows = list(cut.numpy())
        masks = [np.ones(row_length - 1, dtype=bool)] * len(rows)
    if len(rows) < min(count, LEAST_ROWS):
        raise UserError(f"--tokens {source}: gives {len(rows)} rows of {row_length} tokens; at least {LEAST_ROWS} are needed")
    tokens, mask = np.zeros((len(rows), row_length), dtype=np.int64), np.zeros((len(rows), row_length - 1), dtype=bool)
    for index, (row, of_row) in enumerate(zip(rows, masks, strict=True)):
        tokens[index, : len(row)] = row
        mask[index, : len(of_row)] = of_row
    if tokens.max() >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {tokens.max()}, but the model has {vocabulary}: tokenizer and weights do not belong together"
        )
    what = scored if chat else "all"
    domain = Domain(label, source, len(rows), int(mask.sum()), len(set(blocks)), chat, what, rows_sha256(tokens))
    return DomainRows(domain, torch.from_numpy(tokens), [len(row) for row in rows], torch.from_numpy(mask), blocks)


# --- conversations -----------------------------------------------------------------------------------------------------


def _chat_rows(
    conversations: list[Conversation], tokenizer: Any, count: int, row_length: int, seed: int, scored: str, where: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return tokens [at most row_length] of each of `count` conversations, and which of their predictions are scored, one fewer."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: holds conversations, but the model's tokenizer has no chat template; give records with a `text`"
        )
    order = np.random.default_rng(seed).permutation(len(conversations))
    rows, masks, seen = list[np.ndarray](), list[np.ndarray](), set[bytes]()
    for index in order:
        if len(rows) == count:
            break
        ids, mask = _written_out(conversations[index], tokenizer, scored, f"{where}: conversation {index + 1}")
        ids, mask = ids[:row_length], mask[1:row_length]
        if mask.any() and ids.tobytes() not in seen:
            rows.append(ids)
            masks.append(mask)
            seen.add(ids.tobytes())
    return rows, masks


def _written_out(messages: Conversation, tokenizer: Any, scored: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a conversation, int64 [tokens], and which of them are scored, bool [tokens]."""
    text = _rendered(messages, tokenizer, where)
    options = {"add_special_tokens": False, "verbose": False}
    if scored == "all":
        ids = np.array(tokenizer(text, **options)["input_ids"], dtype=np.int64)
        return ids, np.ones(len(ids), dtype=bool)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "--score assistant: the model's tokenizer does not tell where its tokens stand in a text; --score all works"
        )
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    starts, ends = np.array(encoded["offset_mapping"]).T
    mask = np.zeros(len(starts), dtype=bool)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendered(messages[:number], tokenizer, where, add_generation_prompt=True)
            through = _rendered(messages[: number + 1], tokenizer, where).rstrip()
            if not (text.startswith(before) and text.startswith(through) and through.startswith(before)):
                raise UserError(
                    f"{where}: the model's chat template does not begin a whole conversation as it writes its beginning, so the assistant's "
                    "tokens cannot be told; --score all works"
                )
            mask |= (ends > len(before)) & (starts < len(through))  # a token may begin in the template's last space
    return np.array(encoded["input_ids"], dtype=np.int64), mask


def _rendered(messages: Conversation, tokenizer: Any, where: str, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # templates raise what they like for roles that they do not know
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{where}: the model's chat template refuses it ({reason})") from None
