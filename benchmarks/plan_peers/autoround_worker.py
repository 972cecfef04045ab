"""Runs inside AutoRound's own environment: one AutoScheme search, its chosen bits written down.

    python autoround_worker.py REQUEST.json ANSWER.json

The request names the checkpoint, a .jsonl of texts, the widths, the group size and the average code bits; the answer holds the layer
configuration as AutoScheme returned it. Scales and zero-points are left out of AutoScheme's average (`ignore_scale_zp_bits`).
AutoScheme reads texts alone, and decoding tokens and encoding them again does not give the same tokens. So the texts are token
numbers, with a tokenizer that reads numbers: it sees exactly the rows that everybody sees.
This file imports nothing of bitatlas: its environment has none of it.

Source: auto-round 0.16.1 (github.com/intel/auto-round), `AutoScheme` with its default method, delta loss.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def number_tokenizer(vocabulary: int) -> Any:
    """A tokenizer for which the text "17 4" is the tokens 17 and 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def search(request: dict[str, Any]) -> dict[str, Any]:
    """{"layers": module -> configuration, "seconds", "versions"}; the request's keys are those of `outside.request_of`."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="float32")
    tokenizer = number_tokenizer(request["vocabulary"])
    rows, row_length = len(request["ids"]), len(request["ids"][0])
    options = [
        QuantizationScheme(
            bits=bits, group_size=request["group_size"], sym=request["symmetric"], data_type=request["data_type"], act_bits=16
        )
        for bits in request["bits"]
    ]
    start = time.perf_counter()
    scheme = AutoScheme(
        avg_bits=request["code_bits"],
        options=options,
        ignore_scale_zp_bits=True,
        nsamples=rows,
        seqlen=row_length,
        dataset=request["texts"],
        device_map="cpu",
    )
    rounder = AutoRound(
        model, tokenizer, scheme=scheme, iters=0, nsamples=rows, seqlen=row_length,
        dataset=request["texts"], device_map="cpu", disable_opt_rtn=True, enable_torch_compile=False,
    )  # fmt: skip
    rounder.post_init()
    seconds = time.perf_counter() - start
    kept = ("bits", "group_size", "sym", "data_type")
    layers = {name: {key: entry.get(key) for key in kept} for name, entry in rounder.layer_config.items()}
    return {
        "layers": layers,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers")},
    }


if __name__ == "__main__":  # auto-round starts subprocesses, which import this file again
    answer = search(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
