"""Quantize a model with torchao as the plan beside this file says, and save it with transformers.

    pip install torchao transformers
    python quantize.py MODEL OUT

torchao rounds to nearest by itself, so measure the result: the plan's damage is that of other codes in the same formats.
"""

import argparse
import json
from pathlib import Path

from torchao.core.config import config_from_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    args = parser.parse_args()
    modules = config_from_dict(json.loads((Path(__file__).parent / "torchao.json").read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", quantization_config=TorchAoConfig(modules))
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
