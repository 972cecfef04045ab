"""Quantize a model with AutoRound as the plan beside this file says.

    pip install auto-round
    python quantize.py MODEL OUT [--dataset TEXT_FILE] [--iters 200] [--nsamples 128] [--seqlen 2048]

AutoRound learns its own codes, so measure the result: the plan's damage is that of other codes in the same formats.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8  # rows


def samples(tokenizer: Any, text: str, count: int, length: int) -> list[torch.Tensor]:
    """Consecutive pieces of the text, in batches [rows, length]."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)[:count]
    return list(rows.split(BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--dataset", help="a text file; default: AutoRound's own, from the hub")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    told = json.loads((Path(__file__).parent / "autoround.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    more = {}
    if args.dataset:
        more["dataset"] = samples(tokenizer, Path(args.dataset).read_text(encoding="utf-8"), args.nsamples, args.seqlen)
    rounding = AutoRound(
        model, tokenizer, **told["scheme"], layer_config=told["layer_config"], iters=args.iters, nsamples=args.nsamples,
        seqlen=args.seqlen, batch_size=BATCH, enable_torch_compile=torch.cuda.is_available(), **more
    )  # fmt: skip
    rounding.quantize_and_save(args.out, format="auto_round")


if __name__ == "__main__":  # AutoRound starts processes
    main()
