"""Time what reading attention costs: the survey's stage against plain eager forward passes over the same sequences, taken in turns.

    python benchmarks/attention.py [MODEL ...] [--repeats 5]

At the reference the stage is compared with one forward pass over everything that it reads (text, repeated random tokens, word problems).
At a plan (all modules at int4_g32) drift is defined by four passes over the text (the reference, each layer changed alone, the changed
model, the reference in the other precision) and one over the rest; the ratio to those and, beside it, to a single pass are given.
The stage's time holds everything: role targets, permutation tests, intervals. A forward pass is `model(input_ids)` with the eager
attention and without attention outputs; `without_logits` is the same of the body alone, which is what the stage runs.
Processor time of one thread, since other programs may run; prints medians and writes benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitatlas.data as demo
from bitatlas.data.tasks import load_items
from bitatlas.measure.attention.capture import eager
from bitatlas.measure.attention.focus import problems_of, tokenize
from bitatlas.measure.attention.maps import in_dtype
from bitatlas.measure.attention.profile import REPEATED_SEQUENCES, AttentionTexts, attention_profile
from bitatlas.measure.attention.roles import repeated_tokens
from bitatlas.measure.screens import uniform
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize.bank import Bank
from bitatlas.run.survey import FOCUS_PROBLEMS, PROFILED_ROWS

FORMAT = "int4_g32"
LENGTH, BATCH = 192, 8
RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"


class Subject:
    """One checkpoint, and what its attention is read on."""

    def __init__(self, folder: str) -> None:
        checkpoint = open_checkpoint(folder)
        self.name, self.modules = checkpoint.info.name, checkpoint.modules
        self.decoder, self.tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()
        context = checkpoint.info.context
        ids = self.tokenizer(demo.TEXT_FILE.read_text(encoding="utf-8")[:100_000], verbose=False)["input_ids"]
        length = min(LENGTH, context)
        self.rows = torch.tensor(ids[: PROFILED_ROWS * length]).reshape(PROFILED_ROWS, length)
        self.problems = problems_of(load_items("demo_problems", None, FOCUS_PROBLEMS, 0))
        names = [module.name for module in self.modules]
        self.changed = Bank(self.decoder, names, "rtn").weights(uniform(self.modules, FORMAT))
        repeated = repeated_tokens(self.tokenizer, self.decoder.vocabulary, context, REPEATED_SEQUENCES, 0)
        self.text = list(self.rows.split(BATCH))
        self.rest = [part for group in repeated for part in group.split(BATCH)] + self._padded(context)

    def _padded(self, context: int) -> list[Tensor]:
        """Return the problems in the batches in which the stage reads them."""
        tokenized = [tokenize(problem, self.tokenizer).ids for problem in self.problems]
        ordered = sorted((ids for ids in tokenized if len(ids) <= context), key=len)
        batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
        return [torch.tensor([ids + [0] * (len(batch[-1]) - len(ids)) for ids in batch]) for batch in batches]

    def stage(self, changed: bool) -> None:
        base = f"uniform:{FORMAT}" if changed else "reference"
        weights = self.changed if changed else None
        attention_profile(
            self.decoder, self.tokenizer, self.modules, AttentionTexts(self.rows, self.problems), base, changed=weights
        )

    @torch.no_grad()
    def forward(self, batches: Sequence[Tensor], logits: bool = True) -> None:
        body: Any = self.decoder.model if logits else self.decoder.model.base_model
        for batch in batches:
            body(input_ids=batch, use_cache=False)


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def once(subject: Subject) -> dict[str, float]:
    """Time one turn of everything: seconds by name."""
    times = {"stage, reference": seconds(lambda: subject.stage(False))}
    with eager(subject.decoder.model):
        times["text"] = seconds(lambda: subject.forward(subject.text))
        times["rest"] = seconds(lambda: subject.forward(subject.rest))
        times["without logits"] = seconds(lambda: subject.forward([*subject.text, *subject.rest], logits=False))
        with in_dtype(subject.decoder.model, torch.bfloat16):
            times["text, bfloat16"] = seconds(lambda: subject.forward(subject.text))
    times["stage, plan"] = seconds(lambda: subject.stage(True))
    return times


def measure(folder: str, repeats: int) -> dict[str, Any]:
    """Measure the ratios of one checkpoint, a list a turn, and their medians."""
    subject = Subject(folder)
    once(subject)  # caches and pages warm up
    turns = [once(subject) for _ in range(repeats)]
    ratios = {
        "reference_to_forward": [t["stage, reference"] / (t["text"] + t["rest"]) for t in turns],
        "reference_to_forward_without_logits": [t["stage, reference"] / t["without logits"] for t in turns],
        "plan_to_its_forward_passes": [t["stage, plan"] / (3 * t["text"] + t["text, bfloat16"] + t["rest"]) for t in turns],
        "plan_to_one_forward": [t["stage, plan"] / (t["text"] + t["rest"]) for t in turns],
    }
    return {
        "model": subject.name,
        "sequences": {"text": [PROFILED_ROWS, subject.rows.shape[1]], "others": sum(len(batch) for batch in subject.rest)},
        "median_seconds": {name: round(statistics.median(t[name] for t in turns), 3) for name in turns[0]},
        "median_ratios": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "ratios": {name: [round(value, 2) for value in values] for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = [str(SHARED / name) for name in ("babyllama-105", "stories260K") if (SHARED / name).is_dir()]
    parser.add_argument("models", nargs="*", default=[str(demo.MODEL_DIR), *here])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "benchmark": "the survey's attention stage against plain eager forward passes over the same sequences",
        "plan": FORMAT,
        "repeats": args.repeats,
        "machine": f"{platform.machine()}, torch {torch.__version__}, 1 thread, processor time",
        "date": date.today().isoformat(),
        "models": [measure(folder, args.repeats) for folder in args.models],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attention.json").write_text(json.dumps(report, indent=1) + "\n")
    for model in report["models"]:
        print(model["model"], model["median_ratios"], model["median_seconds"])


if __name__ == "__main__":
    main()
