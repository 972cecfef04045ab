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
_errors: list[str] = []  # of its log, since a model was last loaded
_callbacks: list[Any] = []  # must live as long as the library


class LlamaSession:
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
        """Decode tokens after those that were decoded before."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self._used + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = True
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {code}{_reason()}")
        self._used += len(tokens)
        self._lib.llama_synchronize(self._context)

    def logits(self, count: int) -> np.ndarray:
        """Return the logits of the last batch's `count` tokens: float32 [count, vocabulary]."""
        logits = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(count, self.vocabulary)).copy()

    def clear(self) -> None:
        """Forget the tokens that were decoded."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._used = 0

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)


@contextmanager
def open_gguf(file: Path, context: int) -> Iterator[LlamaSession]:
    """Load a GGUF; UserError where llama.cpp cannot."""
    with _model(file, vocab_only=False) as (model, vocabulary):
        session = LlamaSession(model, library().llama_vocab_n_tokens(vocabulary), file, context)
        try:
            yield session
        finally:
            session.close()


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return llama.cpp's tokens of every text, without any at its ends."""
    result = []
    with _model(file, vocab_only=True) as (_, vocabulary):
        for text in texts:
            data = text.encode()
            room = (ctypes.c_int32 * (len(data) + 8))()
            count = library().llama_tokenize(vocabulary, data, len(data), room, len(room), False, False)
            result.append(list(room[: max(0, count)]))
    return result


@contextmanager
def _model(file: Path, vocab_only: bool) -> Iterator[tuple[Any, Any]]:
    check_packages(str(file))
    lib = library()
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    _errors.clear()
    model = lib.llama_model_load_from_file(os.fsencode(file), params)
    if not model:
        raise UserError(f"{file}: llama.cpp cannot load it{_reason()}")
    try:
        yield model, lib.llama_model_get_vocab(model)
    finally:
        lib.llama_model_free(model)


def _reason() -> str:
    return f" ({_errors[0]})" if _errors else ""


@cache
def library() -> Any:
    """Return llama-cpp-python's functions, ready to be called; its log is kept, not printed."""
    from llama_cpp import llama_cpp

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL:
            message = text.decode(errors="replace").strip()
            _errors.append(message.partition(": ")[2] or message)

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    _callbacks.append(listen)
    llama_cpp.llama_backend_init()
    return llama_cpp
