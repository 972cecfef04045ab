"""Run a GGUF in llama.cpp on the CPU: tokens in, logits out; everything else as llama.cpp itself has it by default.

Any build of llama.cpp's library at hand is called by ctypes: the file or folder that `BITATLAS_LLAMA_CPP` names, that of an installed
llama-cpp-python, or the system's. Of its structures only the first fields are set, which all builds since 2025 share; they are found
again by the library's own defaults, and a library with other ones is refused. What is behind them is handed back as it came.

So the cache is float16, and quantized weights are multiplied with inputs that llama.cpp rounds to 8 bits: that belongs to what runs.
Left out: sampling, several sequences at once, GPUs.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitatlas.errors import UserError
from bitatlas.quantize.ggml import check_packages

VARIABLE = "BITATLAS_LLAMA_CPP"
NAMES = ("libllama.so*", "libllama.v*.so", "libllama*.dylib", "llama.dll")
ERROR_LEVEL = 4  # of llama.cpp's log
_errors: list[str] = []  # of its log, since a model was last loaded
_callbacks: list[Any] = []  # must live as long as the library
# Decoding has a thread of its own: ggml sets up a processor's matrix tiles (AMX) once a thread, and torch's products, on the same thread,
# release them, after which the next tile instruction is illegal.
_thread = ThreadPoolExecutor(1, "llama.cpp")


class ModelParams(ctypes.Structure):
    """llama_model_params, as far as it is known here."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 492),
    )


class ContextParams(ctypes.Structure):
    """llama_context_params, as far as it is known here."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 496),
    )


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
        ("rest", ctypes.c_uint8 * 72),
    )


Pointer, Number, Text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, Text, Pointer)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # name: (result, arguments)
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, Pointer]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (Pointer, [Text, ModelParams]),
    "llama_model_free": (None, [Pointer]),
    "llama_model_get_vocab": (Pointer, [Pointer]),
    "llama_vocab_n_tokens": (Number, [Pointer]),
    "llama_tokenize": (Number, [Pointer, Text, Number, ctypes.POINTER(Number), Number, ctypes.c_bool, ctypes.c_bool]),
    "llama_init_from_model": (Pointer, [Pointer, ContextParams]),
    "llama_free": (None, [Pointer]),
    "llama_set_n_threads": (None, [Pointer, Number, Number]),
    "llama_n_ctx": (ctypes.c_uint32, [Pointer]),
    "llama_batch_init": (Batch, [Number, Number, Number]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (Number, [Pointer, Batch]),
    "llama_synchronize": (None, [Pointer]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [Pointer]),
    "llama_get_memory": (Pointer, [Pointer]),
    "llama_memory_clear": (None, [Pointer, ctypes.c_bool]),
}


class LlamaSession:
    """A model in a context of `context` tokens, with as many threads as torch uses."""

    def __init__(self, model: Any, vocabulary: int, file: Path, context: int):
        lib, params = library(), library().llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        self.vocabulary, self._lib, self._used = vocabulary, lib, 0
        self._context = lib.llama_init_from_model(model, params)
        if not self._context or lib.llama_n_ctx(self._context) < context:
            raise UserError(f"{file}: llama.cpp cannot make a context of {context} tokens{_reason()}")
        lib.llama_set_n_threads(self._context, torch.get_num_threads(), torch.get_num_threads())
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
        if code := _thread.submit(self._lib.llama_decode, self._context, batch).result():
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
    with _model(file) as (model, vocabulary):
        session = LlamaSession(model, library().llama_vocab_n_tokens(vocabulary), file, context)
        try:
            yield session
        finally:
            session.close()


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return llama.cpp's tokens of every text, without any at its ends."""
    result = []
    with _model(file) as (_, vocabulary):
        for text in texts:
            data = text.encode()
            room = (Number * (len(data) + 8))()
            count = library().llama_tokenize(vocabulary, data, len(data), room, len(room), False, False)
            result.append(list(room[: max(0, count)]))
    return result


@contextmanager
def _model(file: Path) -> Iterator[tuple[Any, Any]]:
    check_packages(str(file))
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    lib = library()
    params = lib.llama_model_default_params()
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


# --- the library -----------------------------------------------------------------------------------------------------------


def find_library() -> Path | str | None:
    """Return llama.cpp's library: where `BITATLAS_LLAMA_CPP` says, else llama-cpp-python's, else the system's name of it; None for none.

    UserError where the variable names something else.
    """
    if given := os.environ.get(VARIABLE):
        file = _in_folder(Path(given)) if Path(given).is_dir() else Path(given)
        if file is None or not file.is_file():
            raise UserError(f"{VARIABLE}={given}: no libllama there; give the library's file, or the folder that it is in")
        return file
    package = importlib.util.find_spec("llama_cpp")
    if package and package.origin and (file := _in_folder(Path(package.origin).parent / "lib")):
        return file
    return ctypes.util.find_library("llama")


def _in_folder(folder: Path) -> Path | None:
    return next((file for name in NAMES for file in sorted(folder.glob(name))), None)


def check_library(what: str) -> None:
    """Raise UserError where no llama.cpp is at hand."""
    if find_library() is None:
        raise UserError(
            f"{what}: needs llama.cpp's library, which is not at hand: set {VARIABLE} to a libllama, or pip install 'bitatlas[llama-cpp]'"
        )


@cache
def library() -> Any:
    """Return llama.cpp's library, its functions ready to be called; its log is kept, not printed."""
    check_library("llama.cpp")
    file = find_library()
    try:
        lib = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UserError(f"{file}: not a library of llama.cpp that can be used here ({' '.join(str(error).split())})") from None

    @LogCallback
    def listen(level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL:
            message = text.decode(errors="replace").strip()
            _errors.append(message.partition(": ")[2] or message)

    _callbacks.append(listen)
    lib.llama_log_set(listen, None)
    if isinstance(file, Path):
        _load_backends(lib, file)
    lib.llama_backend_init()
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    if model.devices or model.overrides or (context.n_ctx, context.n_batch, context.n_seq_max) != (512, 2048, 1):
        raise UserError(
            f"{file}: this llama.cpp keeps its settings in another order than is known here; take one of 2025 or later"
        )
    return lib


def _load_backends(lib: Any, file: Path) -> None:
    """Load what computes, where a build has it in files of its own beside the library."""
    try:
        load = lib.ggml_backend_load_all_from_path  # in a library that this one needs
    except AttributeError:
        return
    load.restype, load.argtypes = None, [Text]
    load(os.fsencode(file.parent))
