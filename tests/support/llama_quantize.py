"""llama.cpp's own `llama_model_quantize`, by ctypes: what llama-quantize makes of a GGUF."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bitatlas.export.gguf import run


class Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class Entry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Params(ctypes.Structure):
    """llama_model_quantize_params of v0.5, and room behind it."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *(
            (name, ctypes.c_bool)
            for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")
        ),
        ("imatrix", ctypes.POINTER(Entry)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.POINTER(Override)),
        ("prune_layers", ctypes.c_void_p),
        ("rest", ctypes.c_uint8 * 256),
    )


def llama_quantize(
    source: Path,
    target: Path,
    recipe: str,
    imatrix: Mapping[str, np.ndarray] | None = None,
    types: Mapping[str, str] | None = None,
    outside: str | None = None,
) -> dict[str, Any]:
    """Quantize; returns the new file's tensors by name. types: pattern -> type; outside: type of embedding and head."""
    lib = run.library()
    lib.llama_model_quantize_default_params.restype = Params
    lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)]
    params = lib.llama_model_quantize_default_params()
    assert (params.nthread, params.quantize_output_tensor, params.pure) == (0, True, False)
    params.nthread = 1
    params.ftype = int(next(kind for name, kind in gguf.LlamaFileType.__members__.items() if name == f"MOSTLY_{recipe}"))
    if outside:
        params.output_tensor_type = params.token_embedding_type = int(gguf.GGMLQuantizationType[outside.upper()])
    kept = []  # must live until the call
    if imatrix is not None:
        entries = (Entry * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            values = np.ascontiguousarray(values, np.float32)
            kept.append(values)
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if types is not None:
        overrides = (Override * (len(types) + 1))()
        for override, (pattern, kind) in zip(overrides, types.items(), strict=False):
            override.pattern, override.type = pattern.encode(), int(gguf.GGMLQuantizationType[kind.upper()])
        params.tt_overrides = overrides
    code = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    assert code == 0, run._errors
    return {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
