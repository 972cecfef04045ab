"""Read text files: their encoding, their form and their documents.

A plain text file is one document, unless it marks its documents itself: a line `<|endoftext|>` ends one, a line `= Title =` (a heading
of the first level, as in WikiText) starts one. JSON lines, or a JSON list of objects, hold one document an object, in the field `text`;
they are known by what stands in the file as well as by its name, so that JSON is never measured as if it were text.

Records with a field `messages` are conversations (`read_texts`): lists of {"role", "content"}, which a model's own chat template writes out.

Left out: Parquet, archives other than gzip, encodings other than UTF-8 and what a byte order mark names; tool calls and pictures in messages.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

from bitatlas.errors import UserError

MOST_CHARACTERS = 50_000_000  # of a larger file only the beginning is read
MOST_DOCUMENTS = 20_000  # of a hub data set
GZIP = b"\x1f\x8b"
# longest first: the mark of UTF-32 begins with that of UTF-16
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
BORDER = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$|^(?= ?= [^=\n]*[^=\s][^=\n]* = ?$)", re.MULTILINE)
ADVICE = "give a text file, JSON lines with a `text` field, or hub:owner/name"

Conversation = list[dict[str, str]]


def read_documents(source: str) -> list[str]:
    """Return the documents of a text file, a JSON file (field `text`), or `hub:owner/name[:config[:split]]`, without blank ones.

    Raises UserError, one line, where the source cannot be read, is no text, or holds none.
    """
    documents = read_texts(source)
    if any(not isinstance(document, str) for document in documents):
        raise UserError(f"--tokens {source}: holds conversations (a `messages` field), which only compare takes; {ADVICE}")
    return documents  # type: ignore[return-value]


def read_texts(source: str) -> list[str] | list[Conversation]:
    """Return what `read_documents` does, or the conversations of a JSON file or data set whose records have a field `messages`."""
    documents = _hub_documents(source) if source.startswith("hub:") else _file_documents(source)
    kinds = {type(document) for document in documents}
    if len(kinds) > 1:
        raise UserError(f"--tokens {source}: some records have a `text`, others have `messages`; give a file for each")
    documents = [document for document in documents if (document if isinstance(document, list) else document.strip())]
    if not documents:
        raise UserError(f"--tokens {source}: holds no text ({ADVICE})")
    return documents  # type: ignore[return-value]


def _file_documents(source: str) -> list[str | Conversation]:
    try:
        path = Path(source).expanduser()
        text = read_text(path, MOST_CHARACTERS)
    except (OSError, ValueError, EOFError, zlib.error, RuntimeError) as error:  # RuntimeError: ~nobody/text
        reason = getattr(error, "strerror", None) or ("cannot be read" if isinstance(error, RuntimeError) else str(error))
        raise UserError(f"--tokens {source}: {reason[:1].lower()}{reason[1:]} ({ADVICE})") from None
    records = json_records(path, text, whole=len(text) < MOST_CHARACTERS, where=f"--tokens {source}")
    return list(BORDER.split(text)) if records is None else [_content_of(record, where) for where, record in records]


def read_text(path: Path, most: int = -1) -> str:
    """Return at most `most` characters of a text file (-1: all), gzipped or not, without a byte order mark; line ends become "\\n".

    Raises OSError, or ValueError (EOFError and zlib.error for a damaged archive) with what is wrong with the content.
    """
    with path.open("rb") as stream:
        packed = stream.read(2) == GZIP
    opened = gzip.open if packed else open
    with opened(path, "rb") as stream:
        start = stream.read(4)
    if start.startswith((b"PAR1", b"PK\x03\x04", b"%PDF")):
        raise ValueError("is a Parquet, zip or PDF file, not text")
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    try:
        with opened(path, "rt", encoding=encoding) as stream:
            text = str(stream.read(most))
    except UnicodeError:
        raise ValueError("is not UTF-8 text") from None
    if "\0" in text:
        raise ValueError("is not text: it holds NUL characters")
    return text


def json_records(path: Path, text: str, whole: bool, where: str) -> list[tuple[str, Any]] | None:
    """Return (where, record) of each record of a JSON list, of a single object, or of JSON lines; None where `text` is no JSON.

    A file that is called JSON must be; another one is where its first line is an object, or all of it a list or an object. `whole`:
    the text was not cut short. A line that is no JSON has the record None.
    """
    suffix = next((s.lower() for s in reversed(path.suffixes) if s.lower() != ".gz"), "")
    start = text.lstrip()[:1]
    if suffix not in JSON_SUFFIXES and start not in ("{", "["):
        return None
    # not splitlines(), which splits at "\u2028" too
    lines = [(f"{where}: line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    lines = lines if whole else lines[:-1]
    if start == "{" and lines and isinstance(_parsed(lines[0][1]), dict):
        return [(position, _parsed(line)) for position, line in lines]
    content = _parsed(text) if start in ("{", "[") else None
    if isinstance(content, list):
        return [(f"{where}: item {number}", record) for number, record in enumerate(content, 1)]
    if isinstance(content, dict):
        return [(f"{where}: its object", content)]
    return [(position, _parsed(line)) for position, line in lines] if suffix in JSON_SUFFIXES else None


def _parsed(text: str) -> Any:
    """Return what JSON text says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _content_of(record: object, where: str) -> str | Conversation:
    """Return the text of a record, or its messages."""
    if isinstance(record, dict) and "text" not in record and "messages" in record:
        return checked_messages(record["messages"], where)
    if not isinstance(record, dict) or "text" not in record:
        raise UserError(f'{where} is not a JSON object with a "text" field')
    return checked_text(record["text"], where)


def checked_messages(messages: object, where: str) -> Conversation:
    """Return `messages`; UserError, naming `where`, unless they are a list of objects with a role and a text."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise UserError(f'{where}: "messages" must be a list of {{"role": text, "content": text}}')
    return [{"role": message["role"], "content": checked_text(message["content"], where)} for message in messages]


def checked_text(document: object, where: str) -> str:
    """Return `document`; UserError, naming `where`, unless it is text that UTF-8 can hold."""
    if not isinstance(document, str):
        raise UserError(f'{where}: "text" is {json.dumps(document)[:40]}, not a string')
    try:
        document.encode()
    except UnicodeEncodeError:
        raise UserError(f'{where}: "text" holds half of a surrogate pair, which is no character') from None
    return document


def _hub_documents(source: str) -> list[str | Conversation]:
    name, _, rest = source.removeprefix("hub:").partition(":")
    config, _, split = rest.partition(":")
    from datasets import load_dataset

    try:
        stream = load_dataset(name, config or None, split=split or "train", streaming=True)
        records = list(stream.take(MOST_DOCUMENTS))
    except Exception as error:  # the hub client raises many kinds; each means that the data cannot be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"--tokens {source}: the hub did not give it ({reason}); a local text file works without a network"
        ) from None
    return [_content_of(record, f"--tokens {source}: document {number}") for number, record in enumerate(records, 1)]
