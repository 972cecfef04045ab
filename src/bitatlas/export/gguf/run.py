"""Run a GGUF in llama.cpp on the CPU: tokens in, logits out; everything else as llama.cpp itself has it by default.

So the cache is float16, and quantized weights are multiplied with inputs that llama.cpp rounds to 8 bits: that belongs to what runs.
Left out: sampling, several sequences at once, GPUs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitatlas.errors import UserError
from bitatlas.quantize.ggml import check_packages

ERROR_LEVEL = 3  # of llama.cpp's log
_heard: list[str] = []  # what it said at that level
_listeners: list[Any] = []  # must live as long as the library


class Session:
    """A model in a context of `context` tokens, with as many threads as torch uses."""

    def __init__(self, model: Any, vocabulary: int, file: Path, context: int):
        lib, params = library(), library().llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.vocabulary, self._lib, self._used = vocabulary, lib, 0
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise UserError(f"{file}: llama.cpp cannot make a context of {context} tokens{_reason()}")
        self._batch = lib.llama_batch_init(context, 0, 1)

    def decode(self, tokens: Sequence[int]) -> None:
        """Go on after what was decoded before."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = self._used + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = True
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {code}{_reason()}")
        self._used += len(tokens)
        self._lib.llama_synchronize(self._context)

    def logits(self, count: int) -> np.ndarray:
        """Of the last batch's `count` tokens: float32 [count, vocabulary]."""
        found = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, shape=(count, self.vocabulary)).copy()

    def clear(self) -> None:
        """Forget what was decoded."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._used = 0

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)


@contextmanager
def opened(file: Path, context: int) -> Iterator[Session]:
    """A GGUF, loaded; UserError where llama.cpp cannot."""
    with _model(file, vocab_only=False) as (model, vocabulary):
        session = Session(model, library().llama_vocab_n_tokens(vocabulary), file, context)
        try:
            yield session
        finally:
            session.close()


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """llama.cpp's tokens of every text, without any at its ends."""
    found = []
    with _model(file, vocab_only=True) as (_, vocabulary):
        for text in texts:
            data = text.encode()
            room = (ctypes.c_int32 * (len(data) + 8))()
            count = library().llama_tokenize(vocabulary, data, len(data), room, len(room), False, False)
            found.append(list(room[: max(0, count)]))
    return found


@contextmanager
def _model(file: Path, vocab_only: bool) -> Iterator[tuple[Any, Any]]:
    check_packages(str(file))
    lib = library()
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    _heard.clear()
    model = lib.llama_model_load_from_file(os.fsencode(file), params)
    if not model:
        raise UserError(f"{file}: llama.cpp cannot load it{_reason()}")
    try:
        yield model, lib.llama_model_get_vocab(model)
    finally:
        lib.llama_model_free(model)


def _reason() -> str:
    return f" ({_heard[0]})" if _heard else ""


@cache
def library() -> Any:
    """llama-cpp-python's functions, ready to be called; what llama.cpp has to say is kept, not printed."""
    from llama_cpp import llama_cpp

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL:
            _heard.append(text.decode(errors="replace").strip().partition(": ")[2] or text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    _listeners.append(listen)
    llama_cpp.llama_backend_init()
    return llama_cpp
