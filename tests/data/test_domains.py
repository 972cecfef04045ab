"""Texts by domain: labels, rows of documents, and conversations in a model's own chat template with the assistant's tokens marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from bitatlas.data.domains import BUNDLED, bundled_sources, domain_rows, parse_sources
from bitatlas.data.texts import read_documents, read_texts
from bitatlas.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TALK = [
    [
        {"role": "user", "content": f"The red fox {number}?"},
        {"role": "assistant", "content": f"The old oak {number} stands."},
        {"role": "user", "content": "The tall girl?"},
        {"role": "assistant", "content": f"The wet boat sings {number} falls."},
    ]
    for number in range(9)
]


def chat_tokenizer(template: str = TEMPLATE):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write_talk(folder: Path, talk=TALK, name: str = "talk.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk), encoding="utf-8")
    return str(folder / name)


def test_labels(tmp_path: Path):
    (tmp_path / "a=b.txt").write_text("text", encoding="utf-8")
    sources = ["chat=talk.jsonl", "notes/prose.txt", str(tmp_path / "a=b.txt"), "hub:owner/name:config:test", "c=hub:owner/name"]
    assert parse_sources(sources) == {
        "chat": "talk.jsonl",
        "prose": "notes/prose.txt",
        "a_b": str(tmp_path / "a=b.txt"),  # a file whose own name has the sign
        "hub_owner_name_config_test": "hub:owner/name:config:test",
        "c": "hub:owner/name",
    }
    with pytest.raises(UserError, match=r"there is a text called prose already; give it a label, like other=b/prose.txt"):
        parse_sources(["a/prose.txt", "b/prose.txt"])


def test_the_assistants_tokens_alone(tmp_path: Path):
    tokenizer = chat_tokenizer()
    rows = domain_rows("talk", write_talk(tmp_path), tokenizer, 6, 128, 0, 300, "assistant")
    assert rows.domain.chat
    assert rows.domain.scored == "assistant"
    assert rows.domain.tokens == int(rows.scored.sum())
    assert len(set(rows.blocks)) == 6
    for tokens, length, scored in zip(rows.tokens, rows.lengths, rows.scored, strict=True):
        text = tokenizer.decode(tokens[:length])
        answers = tokenizer.decode(tokens[1:][scored])
        inside = [part.split("</assistant>")[0] + "</assistant>" for part in text.split("<assistant>")[1:]]  # " The" is one token
        assert answers == "".join(inside)
        assert not scored[length - 1 :].any()
    everything = domain_rows("talk", write_talk(tmp_path), tokenizer, 6, 128, 0, 300, "all")
    assert torch.equal(everything.tokens, rows.tokens)
    assert int(everything.scored.sum()) == sum(everything.lengths) - 6  # every prediction but of what follows the last token


def test_a_long_conversation_is_cut_and_equal_ones_counted_once(tmp_path: Path):
    long = [{"role": "user", "content": tiny.TEXT}, {"role": "assistant", "content": tiny.TEXT}]
    source = write_talk(tmp_path, [*TALK, long, TALK[0]])
    rows = domain_rows("talk", source, chat_tokenizer(), 50, 40, 0, 300)
    assert len(rows.lengths) == 10
    assert max(rows.lengths) == 40
    assistant = domain_rows("talk", source, chat_tokenizer(), 50, 40, 0, 300, "assistant")
    assert len(assistant.lengths) < 10  # of the long one no answer is within reach


def test_what_a_chat_template_cannot_do_is_said(tmp_path: Path):
    source = write_talk(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        domain_rows("talk", source, tiny.tokenizer(), 6, 64, 0, 300)
    last_alone = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(UserError, match="tokens cannot be told; --score all works"):
        domain_rows("talk", source, chat_tokenizer(last_alone), 6, 64, 0, 300, "assistant")
    assert domain_rows("talk", source, chat_tokenizer(last_alone), 4, 64, 0, 300).domain.rows == 4
    refusing = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match=r"conversation \d+: the model's chat template refuses it \(no such role\)"):
        domain_rows("talk", source, chat_tokenizer(refusing), 6, 64, 0, 300)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hello"}, 'line 1: "messages" must be a list of'),
        ({"messages": [{"role": "user"}]}, 'line 1: "messages" must be a list of'),
        ({"messages": [{"role": "user", "content": None}]}, 'line 1: "messages" must be a list of'),
        ({"content": "a"}, 'line 1 is not a JSON object with a "text" field'),
    ],
)
def test_bad_records_are_named(tmp_path: Path, record: dict, message: str):
    (tmp_path / "talk.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        read_texts(str(tmp_path / "talk.jsonl"))
    assert message in str(raised.value)


def test_text_and_chat_are_not_mixed(tmp_path: Path):
    lines = [{"text": "a"}, {"messages": TALK[0]}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(UserError, match="some records have a `text`, others have `messages`"):
        read_texts(str(tmp_path / "mixed.jsonl"))
    with pytest.raises(UserError, match="holds conversations"):  # where rows are cut for a survey
        read_documents(write_talk(tmp_path))


def test_too_little_text_is_refused(tmp_path: Path):
    (tmp_path / "short.txt").write_text("The red fox runs.", encoding="utf-8")
    with pytest.raises(UserError, match="gives 0 rows of 64 tokens; at least 4 are needed"):
        domain_rows("short", str(tmp_path / "short.txt"), tiny.tokenizer(), 16, 64, 0, 300)


def test_a_text_is_cut_into_rows_with_their_blocks(text: Path):
    rows = domain_rows("text", str(text), tiny.tokenizer(), 8, 24, 0, 300)
    assert rows.tokens.shape == (8, 24)
    assert rows.lengths == [24] * 8
    assert rows.domain.tokens == 8 * 23
    assert len(set(rows.blocks)) == rows.domain.documents > 1


def test_bundled_texts_are_whole():
    sources = bundled_sources()
    assert tuple(sources) == BUNDLED
    runs: set[tuple[str, ...]] = set()
    for name, file in sources.items():
        texts = read_texts(file)
        assert len(texts) >= 16
        for item in texts:
            whole = item if isinstance(item, str) else " ".join(message["content"] for message in item)
            assert 500 < len(whole) < 2500, name
            words = whole.split()
            mine = {tuple(words[i : i + 12]) for i in range(len(words) - 11)}
            assert not mine & runs, f"{name}: a run of 12 words stands in two texts"
            runs |= mine
            if not isinstance(item, str):
                assert item[-1]["role"] == "assistant"
