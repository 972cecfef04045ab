"""Which models llama.cpp can be given, and what it calls their tensors. Pure: no weights, no llama.cpp.

Written here: Llama and Mistral (llama.cpp's `llama`, whose rotary embedding pairs neighbouring rows where transformers pairs halves, so
the rows of q and k change places) and Qwen2 and Qwen3 (which keep them). Other models' tensors are named by the package `gguf`, for the
list of types that llama-quantize reads; their weights are not written.
Source: llama.cpp's conversion/llama.py and qwen.py; the permutation is theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.export.gguf.run import find_library, tokenize

CONVERT = "make one in f16 or bf16 with llama.cpp's convert_hf_to_gguf.py and give it as --base-gguf"
SPELLED = {"mixtral": "llama", "phi": "phi2", "cohere": "commandr"}  # transformers' word, its letters alone -> llama.cpp's
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    name: str  # llama.cpp's
    permuted: bool  # rows of q and k change places


ARCHITECTURES = {
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
}


def architecture_of(config: Any) -> Architecture:
    """Return what llama.cpp calls the model; UserError for one that cannot be written here, saying what can be done."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"--to llama.cpp: a GGUF of {config.model_type} is not written here (only of {known}); {CONVERT}")
    if config.hidden_act != "silu":
        raise UserError(
            f"--to llama.cpp: llama.cpp's {architecture.name} computes silu, the model {config.hidden_act}; {CONVERT}"
        )
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"--to llama.cpp: rotary embeddings of the kind {kind} are not written here; {CONVERT}")
    return architecture


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary embedding's parameters; UserError where layers differ in them."""
    rope = dict(config.rope_parameters or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"--to llama.cpp: layers with rotary embeddings of several kinds are not written here; {CONVERT}")
    return rope


def tensor_name(key: str) -> str | None:
    """Return the name of a checkpoint's tensor in a GGUF of one of `ARCHITECTURES`; None where there is none."""
    key = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"  # checkpoints of the bare base model
    stem, _, suffix = key.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{suffix}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{match[1]}.{INNER[match[2]]}.{suffix}" if match and match[2] in INNER else None


def weight_names(modules: list[str], model_type: str, layers: int) -> dict[str, str]:
    """Return module -> the GGUF's name of its weight, for any model that llama.cpp knows; UserError otherwise."""
    named = _named(modules, model_type, layers)
    lost = [module for module, name in named.items() if name is None]
    if lost:
        raise UserError(f"--to llama.cpp: what llama.cpp calls {lost[0]} of a {model_type} model is not known here")
    return {module: str(name) for module, name in named.items()}


def gguf_architecture(model_type: str) -> str:
    """Return what llama.cpp calls an architecture of transformers; UserError where it has none."""
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type].name
    import gguf

    return str(gguf.MODEL_ARCH_NAMES[_foreign_architecture(model_type)])


def _foreign_architecture(model_type: str) -> Any:
    """Return the package `gguf`'s number of an architecture."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"--to llama.cpp: the names of a {model_type} model's tensors come from a package that is not here: pip install 'bitatlas[gguf]'"
        ) from None
    letters = re.sub(r"[^a-z0-9]", "", model_type.removesuffix("_text"))
    letters = SPELLED.get(letters, letters)
    for architecture, name in gguf.MODEL_ARCH_NAMES.items():
        if re.sub(r"[^a-z0-9]", "", name) == letters:
            return architecture
    raise UserError(f"--to llama.cpp: llama.cpp has no architecture that is called {model_type}")


def known_names(modules: list[str], model_type: str, layers: int) -> dict[str, str]:
    """Return module -> the GGUF's name of its weight, of those for which llama.cpp has one."""
    try:
        return {module: name for module, name in _named(modules, model_type, layers).items() if name is not None}
    except UserError:
        return {}


def _named(modules: list[str], model_type: str, layers: int) -> dict[str, str | None]:
    if model_type in ARCHITECTURES:
        return {module: tensor_name(f"{module}.weight") for module in modules}
    return _foreign_names(modules, model_type, layers)


def _foreign_names(modules: list[str], model_type: str, layers: int) -> dict[str, str | None]:
    architecture = _foreign_architecture(model_type)
    import gguf

    table = gguf.get_tensor_name_map(architecture, layers)
    names = {module: table.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
    return {module: name and f"{name.removesuffix('.weight')}.weight" for module, name in names.items()}


def heads_to_permute(key: str, config: Any) -> int:
    """Return the heads among whose rows those of this tensor change places; 0: they stay."""
    architecture = ARCHITECTURES[config.model_type]
    if architecture.permuted and ".q_proj." in key:
        return int(config.num_attention_heads)
    if architecture.permuted and ".k_proj." in key:
        return int(config.num_key_value_heads)
    return 0


def permute(rows: Tensor, heads: int) -> Tensor:
    """Bring `rows` [out, ...] from transformers' order into llama.cpp's: the two halves of every head one by one in turn."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(config: Any) -> Tensor | None:
    """Return float32 [head size / 2], by which llama.cpp divides the rotary frequencies; None where it need not.

    From transformers' own frequencies of the kind `llama3`, whichever way they come about.
    """
    if rope_of(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / (rope_of(config)["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    return (plain / scaled).float()


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# --- a tokenizer as llama.cpp's vocabulary -----------------------------------------------------------------------------
#
# Byte-level BPE becomes llama.cpp's `gpt2` with its merges; BPE whose spaces are "▁", as tokenizers made from SentencePiece have it, becomes
# `llama`, whose scores are the ranks of the merges. How text is cut before merging is a fixed list in llama.cpp, not a pattern in the
# file: the entry is found by trial, as the first whose tokens on a set of texts are the tokenizer's own. Where none agrees on all
# texts, the best is taken, and a note says on how many it does.
# Left out: Unigram, WordPiece and WordLevel tokenizers.
# Source: llama.cpp's llama-vocab.cpp and conversion/base.py.

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
PRE_TOKENIZERS = (
    "llama-bpe", "qwen2", "gpt-2", "smollm", "default", "tekken", "gpt-4o", "deepseek-llm", "deepseek-coder", "starcoder", "falcon",
    "command-r", "stablelm2", "mpt", "olmo", "bloom",
)  # fmt: skip
TRIAL_WIDTH = 32  # of the model whose vocabulary is tried
NO_MERGE = -1e6  # score of a token that no merge makes
TEXTS = (
    "Hello world", " leading and trailing ", "It's what they'll say: I'D, we've, you're.", "12345 67 8 3.14159 1,000,000",
    "tabs\tand\nlines\n\n  twice  spaced   out", "for (int i = 0; i < n; ++i) { x[i] += 1; }", "Ünïcödé Straße naïve café",
    "日本語とemoji 🙂👍🏽 mixed", "Привет, мир!", "!!! ??? ... ---", "a" * 40, "CamelCase snake_case http://example.org/?q=1&r=2",
    "Tom has 3 apples and buys 14 more. How many apples does he have?", "\n", "   ", "once upon a time, there was a little girl named lily.",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    model: str  # "gpt2" or "llama"
    tokens: list[str]
    types: list[int]
    special: dict[str, int]  # bos, eos, unk, pad
    add_bos: bool
    add_eos: bool
    merges: list[str] = field(default_factory=list)  # of "gpt2"
    scores: list[float] = field(default_factory=list)  # of "llama"
    space_prefix: bool = False  # of "llama"
    pre_tokenizer: str = "default"  # which of llama.cpp's ways to cut text
    chat_template: str | None = None


def vocabulary_of(tokenizer: Any, size: int, trial: bool = True) -> tuple[Vocabulary, str]:
    """Return (vocabulary of `size` tokens, a note or ""). `tokenizer`: of transformers. UserError for a kind that is not written here.

    trial: find out how llama.cpp has to cut text, where it is at hand.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(f"--to llama.cpp: a vocabulary of the kind {model['type']} is not written here; {CONVERT}")
    if max(model["vocab"].values()) >= size:
        raise UserError(
            f"--to llama.cpp: the tokenizer has {max(model['vocab'].values()) + 1} tokens, the model's embedding {size}"
        )
    # A token that was added without a row of the embedding cannot be given to the model: it has no place here either.
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"] if token["id"] < size}}
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for text, number in ids.items():
        tokens[number], types[number] = text, added.get(number, NORMAL)
    special = {
        name: number
        for name in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None and number < size
    }
    ends = tokenizer("a").input_ids
    vocabulary = Vocabulary(
        "gpt2",
        tokens,
        types,
        special,
        add_bos=ends[0] == special.get("bos"),
        add_eos=ends[-1] == special.get("eos"),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary = replace(vocabulary, merges=merges) if _is_byte_level(content) else _scored(vocabulary, merges, content)
    return _with_pre_tokenizer(vocabulary, tokenizer) if trial else (vocabulary, "")


def _is_byte_level(content: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))


def _scored(vocabulary: Vocabulary, merges: list[str], content: dict[str, Any]) -> Vocabulary:
    """Score tokens in SentencePiece's way: of all pairs that make a token, the one with the highest score is merged first."""
    if "▁" not in json.dumps([content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False):
        raise UserError(f"--to llama.cpp: BPE that is neither byte-level nor like SentencePiece's is not written here; {CONVERT}")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = [float(-ranks[token]) if token in ranks else NO_MERGE for token in vocabulary.tokens]
    types = [
        BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else UNKNOWN if number == vocabulary.special.get("unk") else kind
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    ]
    prefix = '"Prepend"' in json.dumps(content.get("normalizer")) or '"Metaspace"' in json.dumps(content.get("pre_tokenizer"))
    return replace(vocabulary, model="llama", scores=scores, types=types, space_prefix=prefix)


def _with_pre_tokenizer(vocabulary: Vocabulary, tokenizer: Any) -> tuple[Vocabulary, str]:
    if find_library() is None:
        return vocabulary, "llama.cpp is not here, so its tokens of a text were not compared with the tokenizer's"
    texts = _known_texts(vocabulary)
    wanted = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    candidates = (replace(vocabulary, pre_tokenizer=name) for name in PRE_TOKENIZERS)
    best, most = vocabulary, -1
    for candidate in [vocabulary] if vocabulary.model == "llama" else candidates:
        same = sum(ours == theirs for ours, theirs in zip(wanted, _tokenized(candidate, texts), strict=True))
        if same > most:
            best, most = candidate, same
        if same == len(texts):
            break
    notes = []
    if most < len(texts):
        notes.append(
            f"llama.cpp cuts text in none of its ways as this tokenizer does: the nearest ({best.pre_tokenizer}) gives the same tokens for {most} of "
            f"{len(texts)} texts; what was measured are the tokenizer's own tokens"
        )
    if vocabulary.model == "llama" and BYTE not in vocabulary.types:
        notes.append("the vocabulary has no bytes: llama.cpp takes no text with characters that are not in it")
    return best, "; ".join(notes)


def _known_texts(vocabulary: Vocabulary) -> list[str]:
    """Return `TEXTS`, but those with characters that the vocabulary has no token for, if it has no bytes: llama.cpp would end the process."""
    if vocabulary.model != "llama" or BYTE in vocabulary.types:
        return list(TEXTS)
    tokens = set(vocabulary.tokens)
    return [text for text in TEXTS if set(text.replace(" ", "▁")) | {"▁"} <= tokens]


def _tokenized(vocabulary: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
    """Return llama.cpp's tokens of `texts`, by the smallest model that has the vocabulary: one layer of zeros."""
    from gguf import GGUFWriter

    with TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter(file, "llama")
        writer.add_block_count(1)
        for add in (writer.add_embedding_length, writer.add_feed_forward_length, writer.add_context_length):
            add(TRIAL_WIDTH)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        add_vocabulary(writer, vocabulary)
        writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary.tokens), TRIAL_WIDTH), np.float16))
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            writer.add_tensor(f"{name}.weight", np.zeros(TRIAL_WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros((TRIAL_WIDTH, TRIAL_WIDTH), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tokenize(file, texts)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the vocabulary into a `gguf.GGUFWriter`'s metadata."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
