"""Measure what a first plan costs and what it is worth, beside AutoRound's AutoScheme on the same rows, at equal code bits.

    python benchmarks/draft.py MODEL TEXT JUDGED [--code-bits 3] [--autoround PYTHON] [--out FOLDER]

`survey --draft` with gptq codes of 2, 3 and 4 bits in groups of 64, from 24 fit and 24 select rows of 192 tokens of TEXT; AutoScheme chooses among
the same widths on the same fit rows, in the environment of PYTHON (auto-round 0.16.1). Seconds are wall-clock, each alone on the machine: of the
first plan by stage, without and with its verdict, and of AutoScheme's choice with loading. Damage of both plans and of the middle width
everywhere, all with the survey's codes, on rows of JUDGED, nats/token, differences paired by row. Writes benchmarks/results/draft.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from bitatlas.data.rows import make_rows
from bitatlas.data.texts import read_documents
from bitatlas.measure.damage import DamageMeter
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.quantize.bank import Bank
from bitatlas.records.journal import Journal
from plan_peers.outside import number_text

RESULTS = Path(__file__).parent / "results" / "draft.json"
WORKER = Path(__file__).parent / "plan_peers" / "autoround_worker.py"
FORMATS = ("int2_g64", "int3_g64", "int4_g64")
ROWS, ROW_LENGTH, JUDGED_ROWS = (24, 24, 64), 192, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "judged"):
        parser.add_argument(name)
    parser.add_argument("--code-bits", type=float, default=3.0)
    parser.add_argument("--autoround")
    parser.add_argument("--out")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(words.out or folder)
        result: dict[str, Any] = {"model": Path(words.model).name, "code_bits": words.code_bits, "date": date.today().isoformat()}
        checkpoint = open_checkpoint(words.model)
        plans = {}
        if words.autoround:
            plans["AutoScheme"], result["autoscheme_seconds"] = autoscheme(words, checkpoint, Path(folder))
        result |= first_plan(words, out)
        plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
        plans = {"first plan": plan["modules"], **plans}
        result["damage"] = judged(words.judged, checkpoint, out, plan["codes"], plans)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def first_plan(words: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run `survey --draft`; seconds by stage, and the most memory that it had, as it printed them."""
    command = [
        sys.executable,
        "-m",
        "bitatlas",
        "survey",
        words.model,
        "--tokens",
        words.text,
        "--rows",
        ",".join(map(str, ROWS)),
    ]
    command += ["--formats", ",".join(FORMATS), "--quantizer", "gptq", "--code-bits", str(words.code_bits), "--tasks", "none"]
    begun = time.perf_counter()
    done = subprocess.run([*command, "--draft", "--out", str(out)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    stages = [(name, float(value)) for name, value in re.findall(r"^(.+): ([0-9.]+) s$", done.stderr, re.MULTILINE)]
    verdict = sum(value for name, value in stages if name.startswith("plans on") and "test" in name)
    return {
        "seconds_with_verdict": seconds,
        "seconds_without_verdict": seconds - verdict,
        "stages": stages,
        "said_before": re.search(r"^about .+$", done.stderr, re.MULTILINE)[0],  # type: ignore[index]
        "memory": re.search(r"^peak memory.+$", done.stderr, re.MULTILINE)[0],  # type: ignore[index]
    }


def autoscheme(words: argparse.Namespace, checkpoint: Checkpoint, folder: Path) -> tuple[dict[str, str], float]:
    """Return AutoScheme's plan, module -> format, and the seconds of its process."""
    documents, tokenizer = read_documents(words.text), checkpoint.load_tokenizer()
    rows = make_rows(
        documents, tokenizer, words.text, ROWS, ROW_LENGTH, checkpoint.info.context, 0, vocabulary=checkpoint.vocabulary
    ).fit.tolist()
    texts, request, answer = (folder / name for name in ("texts.jsonl", "request.json", "answer.json"))
    texts.write_text("".join(json.dumps({"text": number_text(row)}) + "\n" for row in rows))
    asked = {"model": words.model, "vocabulary": checkpoint.vocabulary, "ids": rows, "texts": str(texts), "bits": [2, 3, 4]}
    asked |= {"group_size": 64, "symmetric": False, "data_type": "int_asym", "code_bits": words.code_bits}
    request.write_text(json.dumps(asked))
    begun = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(
        [words.autoround, str(WORKER), str(request), str(answer)], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - begun
    layers = json.loads(answer.read_text())["layers"]
    return {module.name: f"int{layers[module.name]['bits']}_g64" for module in checkpoint.modules}, seconds


def judged(text: str, checkpoint: Checkpoint, out: Path, codes: str, plans: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return the damage of plans, and of the middle width everywhere, on rows of another text."""
    decoder, tokenizer, names = checkpoint.load_model(), checkpoint.load_tokenizer(), [m.name for m in checkpoint.modules]
    sha = checkpoint.info.weights_sha256
    meter = DamageMeter(
        decoder, Bank(decoder, names, "gptq", folder=out / "bank", weights_sha256=sha, identity=codes), sha, codes, Journal(None)
    )
    counts, context = (2, 2, JUDGED_ROWS), checkpoint.info.context
    rows = make_rows(read_documents(text), tokenizer, text, counts, ROW_LENGTH, context, 0, vocabulary=checkpoint.vocabulary).test
    uniform = f"uniform {FORMATS[1]}"
    damage = meter.plans({**plans, uniform: dict.fromkeys(names, FORMATS[1])}, rows)
    result = {}
    for name, values in damage.items():
        difference = values - damage[uniform]
        result[name] = {
            "mean": float(values.mean()),
            "minus_uniform": float(difference.mean()),
            "standard_error": float(difference.std(ddof=1) / len(rows) ** 0.5),
            "of_uniform": float(values.mean() / damage[uniform].mean()),
            "modules": dict(Counter(plans[name].values())) if name in plans else {},
        }
    return result


if __name__ == "__main__":
    main()
