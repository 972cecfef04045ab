"""Load the folder that this file lies in with mlx-lm, print what each of its modules is, and write a few words.

pip install mlx-lm        (Linux without a GPU: pip install 'mlx[cpu]' mlx-lm)
python load.py [--prompt TEXT]
"""

import argparse
from collections import Counter
from pathlib import Path

import mlx.nn as nn
from mlx_lm import generate, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()
    model, tokenizer = load(str(Path(__file__).parent))
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)}
    for name, module in sorted(found.items()):
        print(f"{name}: {module.bits} bits, groups of {module.group_size}")
    print(dict(Counter(f"{module.bits} bits" for module in found.values())))
    print(generate(model, tokenizer, prompt=args.prompt, max_tokens=32))


if __name__ == "__main__":
    main()
