"""Rows share no document and no long run of tokens, are hashed, and never fewer than was asked for."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import tiny
from bitatlas.data.rows import check_vocabulary, cut_rows, make_rows
from bitatlas.data.texts import read_documents
from bitatlas.errors import UserError

TOKENIZER = tiny.tokenizer()


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), st.integers(4, 24), st.integers(0, 99))
def test_rows_are_disjoint_and_reproducible(counts: tuple[int, int, int], length: int, seed: int):
    rows = make_rows([tiny.TEXT, tiny.TEXT], TOKENIZER, "text", counts, length, 128, seed)
    sets = [{tuple(row.tolist()) for row in part} for part in (rows.fit, rows.select, rows.test)]
    assert [len(s) for s in sets] == list(counts)
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert make_rows([tiny.TEXT, tiny.TEXT], TOKENIZER, "text", counts, length, 128, seed).info == rows.info
    assert len({rows.sha256(name) for name in ("fit", "select", "test")}) == 3


def test_short_text_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"give \d+ different rows of 16, but 24 are needed"):
        make_rows(["The red fox runs."], TOKENIZER, "text", (8, 8, 8), 16, 128, 0)


def test_repeated_text_does_not_count_twice():
    repeated = "The red fox runs 1. " * 4000
    with pytest.raises(UserError, match="different rows"):
        make_rows([repeated], TOKENIZER, "text", (40, 40, 40), 16, 128, 0)


@pytest.mark.parametrize("length", [16, 64])
def test_one_document_many_times_is_too_little(length: int):
    one = tiny.TEXT[:600]
    for copies in ([one] * 500, ["\n\n".join([one] * 500)], [f"{number}. {one}" for number in range(500)]):
        with pytest.raises(UserError, match=r"that repeat earlier text\), but 112 are needed"):
            make_rows(copies, TOKENIZER, "text", (24, 24, 64), length, 128, 0)


def test_documents_are_in_one_set_and_their_rows_in_order():
    words = ["red", "old", "tall", "wet", "fox", "oak", "stone", "boat", "girl", "runs", "stands", "sings", "falls"]
    chance = random.Random(0)
    documents = [" ".join([f"d{number}", *chance.choices(words, k=40 + 7 * (number % 9))]) for number in range(60)]
    rows = make_rows([*documents, documents[3]], TOKENIZER, "text", (8, 8, 12), 48, 128, 0)
    assert (rows.info.documents, rows.info.repeated_documents) == (60, 1)
    assert rows.info.by_document
    assert rows.info.separate_documents
    ids = [TOKENIZER(document)["input_ids"] for document in documents]
    seen: dict[str, set[int]] = {}
    for split in ("fit", "select", "test"):
        part = getattr(rows, split).tolist()
        owners = [
            next(n for n, own in enumerate(ids) if any(own[k : k + 24] == row[:24] for k in range(len(own)))) for row in part
        ]
        assert owners == sorted(owners)
        assert [owners.index(owner) for owner in owners] == [rows.blocks(split).index(block) for block in rows.blocks(split)]
        seen[split] = set(owners)
    assert not (seen["fit"] & seen["select"] or seen["fit"] & seen["test"] or seen["select"] & seen["test"])


def test_short_documents_fill_a_row_together():
    documents = [f"The {number} stones of fox {number * number} fall." for number in range(200)]
    rows = make_rows(documents, TOKENIZER, "text", (4, 4, 8), 64, 128, 0)
    assert rows.info.by_document
    assert len(set(rows.blocks("test"))) == 8
    text = TOKENIZER.decode(rows.fit[0])
    assert text.startswith("The ")  # a row begins with a document
    assert text.count("</s>") >= 2


def test_a_long_document_is_tokenized_piece_by_piece(monkeypatch: pytest.MonkeyPatch):
    text = "\n".join(tiny.TEXT.split(". "))
    whole = cut_rows([text], TOKENIZER, 20, 16, 0)
    monkeypatch.setattr("bitatlas.data.rows.PIECE", 100)
    assert torch.equal(cut_rows([text], TOKENIZER, 20, 16, 0), whole)  # this tokenizer merges nothing across a line end
    assert len(cut_rows(["x" * 1000 + text], TOKENIZER, 5, 16, 0)) == 5


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(UserError, match=r"--row-length 256.*128"):
        make_rows([tiny.TEXT], TOKENIZER, "text", (2, 2, 2), 256, 128, 0)


def test_text_and_jsonl_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("One. Two.", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n\n{"text": "Two."}\n', encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt")) == ["One. Two."]
    assert read_documents(str(tmp_path / "a.jsonl")) == ["One.", "Two."]


LINES = '{"text": "One."}\n{"text": "Two."}\n'


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("bom.txt", "\ufeffOne.".encode(), ["One."]),
        ("bom.jsonl", ("\ufeff" + LINES).encode(), ["One.", "Two."]),
        ("utf16.txt", "One.\r\nTwo.".encode("utf-16"), ["One.\nTwo."]),
        ("utf16.jsonl", LINES.encode("utf-16"), ["One.", "Two."]),
        ("utf32.txt", "One.".encode("utf-32"), ["One."]),
        ("UPPER.JSONL", LINES.encode(), ["One.", "Two."]),
        ("lines.json", LINES.encode(), ["One.", "Two."]),
        ("lines.ndjson", LINES.replace("\n", "\r\n").encode(), ["One.", "Two."]),
        ("lines.txt", LINES.encode(), ["One.", "Two."]),
        ("lines", b"\n" + LINES.encode(), ["One.", "Two."]),
        ("list.json", json.dumps([{"text": "One."}, {"text": "Two."}], indent=1).encode(), ["One.", "Two."]),
        ("list.txt", b'[{"text": "One."}]', ["One."]),
        ("one.json", json.dumps({"text": "One.", "id": 3}, indent=1).encode(), ["One."]),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), ["One.", "Two."]),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbfOne.", mtime=0), ["One."]),
        ("crlf.txt", b"One.\r\nTwo.\rThree.", ["One.\nTwo.\nThree."]),
        ("blank.jsonl", b'{"text": " \\n"}\n{"text": "One."}\n', ["One."]),
        ("notes.md", b"# One\n\n{not json}\n", ["# One\n\n{not json}\n"]),
        ("cited.txt", b"[1] One.\n[2] Two.\n", ["[1] One.\n[2] Two.\n"]),
        ("stories.txt", b"One.\nA.\n<|endoftext|>\nTwo.\n<|endoftext|>\n", ["One.\nA.\n", "\nTwo.\n"]),
        ("wiki.txt", b" \n = One = \n \n = = A = = \n a \n = Two = \n b", [" = One = \n \n = = A = = \n a \n", " = Two = \n b"]),
    ],
)
def test_documents_are_known_by_what_stands_in_the_file(tmp_path: Path, name: str, content: bytes, documents: list[str]):
    (tmp_path / name).write_bytes(content)
    assert read_documents(str(tmp_path / name)) == documents


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "no such file"),
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2"),
        ("bad.txt", b"\xff\xfe\x00", "UTF-8"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2: .* is null, not a string"),
        ("list.jsonl", b'{"text": ["a"]}\n', "line 1: .* not a string"),
        ("half.jsonl", b'{"text": "a"}\n\n{"text": "\\ud800"}\n', "line 3: .* surrogate"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not"),
        ("UPPER.JSONL", b"One.", "line 1 is not a JSON object"),
        ("object.json", b'{"title": "a",\n "body": "b"}', 'its object is not a JSON object with a "text" field'),
        ("list.json", b'[{"text": "a"}, 3]', "item 2 is not a JSON object"),
        ("numbers.txt", b"[1, 2, 3]", "item 1 is not a JSON object"),
        ("broken.json", b'[{"text": "a"},', "line 1 is not a JSON object"),
        ("empty.txt", b"", "holds no text"),
        ("empty.jsonl", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("blank.jsonl", b'{"text": ""}\n{"text": " "}\n', "holds no text"),
        ("nul.txt", b"One.\0Two.", "NUL characters"),
        ("utf16.txt", "One.".encode("utf-16-le"), "NUL characters"),
        ("latin.txt", "caf\u00e9 au lait".encode("latin-1"), "is not UTF-8 text"),
        ("a.parquet", b"PAR1\x15\x04", "is a Parquet, zip or PDF file"),
        ("cut.txt.gz", gzip.compress(b"One." * 100, mtime=0)[:20], "end-of-stream|ended before"),
        ("bad.txt.gz", b"\x1f\x8b\x08\x00" + b"x" * 40, "--tokens"),
    ],
)
def test_unreadable_sources_are_one_clear_line(tmp_path: Path, name: str, content: bytes | None, said: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_documents(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_jsonl_lines_end_at_line_ends_alone(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "One.\u2028Two."}\r\n{"text": "\\ud83e\\udd8a"}\n', encoding="utf-8")
    assert read_documents(str(tmp_path / "a.jsonl")) == ["One.\u2028Two.", "\N{FOX FACE}"]


def test_a_jsonl_file_that_is_too_large_ends_with_a_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n', encoding="utf-8")
    monkeypatch.setattr("bitatlas.data.texts.MOST_CHARACTERS", 20)
    assert read_documents(str(tmp_path / "a.jsonl")) == ["One."]


def test_a_folder_is_one_clear_line(tmp_path: Path):
    with pytest.raises(UserError, match="is a directory"):
        read_documents(str(tmp_path))


def test_home_of_nobody_is_one_clear_line():
    with pytest.raises(UserError, match=r"--tokens ~nobody-at-all/text\.txt: cannot be read"):
        read_documents("~nobody-at-all/text.txt")


def test_tokens_that_the_model_lacks_are_refused():
    most = max(TOKENIZER(tiny.TEXT)["input_ids"])
    make_rows([tiny.TEXT], TOKENIZER, "text", (2, 2, 2), 16, 128, 0, vocabulary=most + 1)
    check_vocabulary(TOKENIZER, [tiny.TEXT, ""], most + 1)
    check_vocabulary(TOKENIZER, [], 1)
    said = f"gives token {most}, but the model has {most}: tokenizer and weights do not belong together"
    with pytest.raises(UserError, match=said):
        make_rows([tiny.TEXT], TOKENIZER, "text", (2, 2, 2), 16, 128, 0, vocabulary=most)
    with pytest.raises(UserError, match=said):
        check_vocabulary(TOKENIZER, [tiny.TEXT], most)


@pytest.mark.parametrize(("counts", "length", "flag"), [((2, 2, 2), 0, "--row-length 0"), ((2, 0, 2), 16, "--rows 2,0,2")])
def test_rows_of_nothing_are_refused(counts: tuple[int, int, int], length: int, flag: str):
    with pytest.raises(UserError, match=flag):
        make_rows([tiny.TEXT], TOKENIZER, "text", counts, length, 128, 0)


def test_text_that_the_tokenizer_cannot_read():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"fox": 0}, unk_token="?")))
    with pytest.raises(UserError, match="tokenizer cannot read the text"):
        make_rows(["oak"], words, "text", (2, 2, 2), 16, 128, 0)


def test_hub_data_without_a_network_is_one_clear_line():
    with pytest.raises(UserError, match="--tokens hub:nobody/nothing"):
        read_documents("hub:nobody/nothing")
