"""AutoRound through its authors' package, `auto-round` (`pip install 'bitatlas[autoround]'`): rounding and clipping, learned.

Layer by layer, signed gradient descent moves every weight's rounding by up to half a step, and both ends of every group's range, so
that the layer's output changes least on the fit rows, given what the quantized layers before it put out. One run over the whole
model for each format, every module at that format: a plan that mixes formats meets other inputs than its modules were fitted to.

It works on a copy of the model. Codes, scales and zero-points are recovered exactly: its weights are multiples of float16 scales,
and the recovered codes are checked to give the same weights. Slow beside gptq: 200 steps forward and backward through every layer.
Runs are seeded; the random states of this process are put back, and what the package writes goes to a folder that is thrown away.

Left out: its other schemes, activation quantization, and its mixed-precision search (see benchmarks).
Source: Cheng et al., arXiv 2309.05516; auto-round 0.16.1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.model.decoder import Decoder
from bitatlas.model.linear import ExpertLinear, is_linear, weight_of
from bitatlas.model.modules import linear_modules
from bitatlas.quantize import rtn
from bitatlas.quantize.codes import Codes
from bitatlas.records.formats import Format

STEPS = 200  # the package's default
BATCH_ROWS = 8  # likewise
SEED = 42  # likewise
FOLDERS = ("AR_WORK_SPACE", "AUTO_ROUND_CACHE")  # where it would write, by environment variable


def quantize(decoder: Decoder, formats: Mapping[str, Sequence[Format]], rows: Tensor | None) -> Iterator[tuple[str, list[Codes]]]:
    """Yield every module in its formats (module -> formats, the same of all), fitted on `rows` int64 [rows, tokens]; UserError without them.

    The first module comes when the last format's run is done. Which modules are asked for changes nothing about their codes. Embeddings and heads,
    which the package leaves alone, are rounded to nearest.
    """
    if rows is None or not len(rows):
        raise UserError("--quantizer autoround fits the codes to rows of text: give a text with --tokens")
    return _quantize(decoder, formats, rows)


def _quantize(decoder: Decoder, formats: Mapping[str, Sequence[Format]], rows: Tensor) -> Iterator[tuple[str, list[Codes]]]:
    inside = {name: of_module for name, of_module in formats.items() if _is_tuned(decoder, name)}
    codes: dict[str, list[Codes]] = {name: [] for name in inside}
    for fmt in next(iter(inside.values()), []):
        tuned = tune(decoder, fmt, rows)
        for name in inside:
            codes[name].append(recover(tuned, name, fmt))
    yield from codes.items()
    for name, of_module in formats.items():
        if name not in inside:
            yield name, [rtn.quantize(decoder.weight(name), fmt) for fmt in of_module]


def _is_tuned(decoder: Decoder, name: str) -> bool:
    """Return whether the package takes a module: embedding, head and experts that the model holds in one tensor are rounded to nearest."""
    is_inside = 0 <= decoder.layer_of(name) < decoder.behind
    return is_inside and not isinstance(decoder.model.get_submodule(name), ExpertLinear)


def tune(decoder: Decoder, fmt: Format, rows: Tensor, steps: int = STEPS) -> nn.Module:
    """Return a copy of the model whose quantizable modules have weights in `fmt`, as the package leaves them: with `scale` and `zp`."""
    model = copy.deepcopy(decoder.model)
    chosen = {module.name for module in linear_modules(model, decoder.layers_path, fuse=False)}
    others = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and name not in chosen and not isinstance(module, ExpertLinear)
    ]
    with _isolated(), torch.enable_grad():
        from auto_round import AutoRound

        runner = AutoRound(
            model,
            tokenizer=object(),  # it wants one; rows that are tokens already need none
            bits=fmt.bits,
            group_size=fmt.group_size,
            sym=fmt.symmetric,
            # By their full names: "int" leaves out modules whose sizes 32 does not divide, and has negative scales if symmetric.
            data_type="int_sym_gptq" if fmt.symmetric else "int_asym",
            scale_dtype="fp16",
            layer_config={name: {"bits": 16, "data_type": "fp"} for name in others},
            dataset=list(rows.split(BATCH_ROWS)),
            seqlen=rows.shape[1],
            nsamples=len(rows),
            batch_size=min(BATCH_ROWS, len(rows)),
            iters=steps,
            seed=SEED,
            amp=False,
            device_map=str(next(model.parameters()).device),
            enable_torch_compile=False,
            low_cpu_mem_usage=False,
        )
        return runner.quantize()[0]


def recover(tuned: nn.Module, name: str, fmt: Format) -> Codes:
    """Return the codes behind module `name` of a model that `tune` returned.

    UserError where the package left the module alone; RuntimeError where the codes do not give its weight back, bit for bit.
    """
    module: Any = tuned.get_submodule(name)
    if not isinstance(getattr(module, "scale", None), Tensor):
        raise UserError(f"--quantizer autoround: the package leaves {name} as it is; another quantizer can take it")
    weight = weight_of(module)
    shape = (len(weight), -(-weight.shape[1] // fmt.group_size))
    scale = module.scale.detach().to(weight.device).reshape(shape)
    zero = torch.as_tensor(module.zp).detach().to(weight.device)
    zero = zero.reshape(shape) if zero.numel() > 1 else zero.expand(shape)
    wide_scale, wide_zero = (
        part.float().repeat_interleave(fmt.group_size, dim=1)[:, : weight.shape[1]] for part in (scale, zero)
    )  # [out, in]
    integers = ((weight.float() / wide_scale).round() + wide_zero).clamp(0, 2**fmt.bits - 1)
    codes = Codes(integers.to(torch.uint8), scale.half(), zero.to(torch.uint8), fmt.group_size)
    if not torch.equal(codes.weight(weight.dtype), weight):
        raise RuntimeError(f"{name}: auto-round's weights are not codes of {fmt.name}; another version of the package?")
    return codes


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Write nothing to the terminal and leave nothing on disk within the block; put the process's random states back after it."""
    states = random.getstate(), np.random.get_state()
    environment = {name: os.environ.get(name) for name in FOLDERS}
    disabled = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        os.environ.update(dict.fromkeys(FOLDERS, folder))
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
            for name, value in environment.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            random.setstate(states[0])
            np.random.set_state(states[1])
