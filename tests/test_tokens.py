"""Rows are disjoint, hashed, and never fewer than was asked for."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import tiny
from bitatlas.errors import UserError
from bitatlas.tokens import check_vocabulary, make_rows, read_documents

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


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(UserError, match=r"--row-length 256.*128"):
        make_rows([tiny.TEXT], TOKENIZER, "text", (2, 2, 2), 256, 128, 0)


def test_text_and_jsonl_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("One. Two.", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n\n{"text": "Two."}\n', encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt")) == ["One. Two."]
    assert read_documents(str(tmp_path / "a.jsonl")) == ["One.", "Two."]


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
    monkeypatch.setattr("bitatlas.texts.MOST_CHARACTERS", 20)
    assert read_documents(str(tmp_path / "a.jsonl")) == ["One."]


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
