"""Quantize a model with llm-compressor as the plan beside this file says.

    pip install llmcompressor
    python quantize.py MODEL OUT [--dataset TEXT_FILE] [--nsamples 256] [--seqlen 2048]

With a text: GPTQ (recipe.yaml). Without: round to nearest (recipe-rtn.yaml). It chooses its own codes, so measure the result.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def samples(tokenizer: Any, text: str, count: int, length: int) -> Dataset:
    """Consecutive pieces of the text, `length` tokens each."""
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    return Dataset.from_dict({"input_ids": pieces, "attention_mask": [[1] * len(piece) for piece in pieces]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--dataset", help="a text file")
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    here = Path(__file__).parent
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.dataset:
        data = samples(tokenizer, Path(args.dataset).read_text(encoding="utf-8"), args.nsamples, args.seqlen)
        oneshot(
            model=model, recipe=str(here / "recipe.yaml"), dataset=data, num_calibration_samples=len(data), max_seq_length=args.seqlen
        )  # fmt: skip
    else:
        oneshot(model=model, recipe=str(here / "recipe-rtn.yaml"))
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
