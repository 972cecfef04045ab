"""Quantize a model with GPTQModel as the plan beside this file says.

    pip install gptqmodel
    python quantize.py MODEL OUT --dataset TEXT_FILE [--nsamples 256] [--seqlen 2048]

GPTQModel chooses its own codes, so measure the result: the plan's damage is that of other codes in the same formats.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

if (os.cpu_count() or 1) < 3:  # GPTQModel 7.7 needs two workers, and makes one by itself where there are two cores
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer


def samples(tokenizer: Any, text: str, count: int, length: int) -> list[dict]:
    """Consecutive pieces of the text, `length` tokens each."""
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    return [{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--dataset", required=True, help="a text file")
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    told = json.loads((Path(__file__).parent / "quantize_config.json").read_text(encoding="utf-8"))
    text = Path(args.dataset).read_text(encoding="utf-8")
    data = samples(AutoTokenizer.from_pretrained(args.model), text, args.nsamples, args.seqlen)
    model = GPTQModel.load(args.model, QuantizeConfig(**told))
    model.quantize(data, batch_size=1)
    model.save(args.out)


if __name__ == "__main__":
    main()
