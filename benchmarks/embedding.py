"""Measure the damage of embedding and head alone, the layers as they are: each in every width, rounded to nearest and by gptq.

    python benchmarks/embedding.py MODEL FIT JUDGED [--row-length 192] [--group 64]

gptq is fitted to 24 rows of FIT; damage on 32 rows of JUDGED, nats/token, with 95 % intervals over rows. Bytes are those of the weight with its scales
and zero-points. Results are added to benchmarks/results/embedding.json by model.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

from bitatlas.data.rows import make_rows
from bitatlas.data.texts import read_documents
from bitatlas.measure.damage import DamageMeter
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import Bank
from bitatlas.records.formats import FORMATS, stored_bytes
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import kept_bytes
from bitatlas.stats.bootstrap import measured

RESULTS = Path(__file__).parent / "results" / "embedding.json"
BITS = (2, 3, 4, 6, 8)
FIT_ROWS, JUDGED_ROWS = 24, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "fit", "judged"):
        parser.add_argument(name)
    parser.add_argument("--row-length", type=int, default=192)
    parser.add_argument("--group", type=int, default=64)
    words = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[Path(words.model).resolve().name] = measure(words)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(words: argparse.Namespace) -> dict[str, Any]:
    """Return damage, bytes and seconds of every outer module in every width."""
    checkpoint, reporter = open_checkpoint(words.model), Reporter()
    decoder, tokenizer, context = checkpoint.load_model(), checkpoint.load_tokenizer(), checkpoint.info.context

    def rows_of(file: str, counts: tuple[int, int, int]) -> Any:
        return make_rows(read_documents(file), tokenizer, file, counts, words.row_length, context, 0)

    if words.fit == words.judged:  # rows of one text must not be both
        test = rows_of(words.fit, (FIT_ROWS, 2, JUDGED_ROWS))
        fit = test.fit
    else:
        fit, test = rows_of(words.fit, (FIT_ROWS, 2, 2)).fit, rows_of(words.judged, (2, 2, JUDGED_ROWS))
    names, formats = [module.name for module in checkpoint.outer], [f"int{bits}_g{words.group}" for bits in BITS]
    result: dict[str, Any] = {"date": date.today().isoformat(), "modules": {}, "seconds": {}}
    damage: dict[str, dict[str, Any]] = {}
    for quantizer in ("rtn", "gptq"):
        bank = Bank(decoder, names, quantizer, rows=fit)
        begun = time.perf_counter()
        bank.fill(formats)
        result["seconds"][quantizer] = round(time.perf_counter() - begun, 1)
        meter = DamageMeter(decoder, bank, "", bank.identity, Journal(None))
        plans = {f"{name} {fmt}": {name: fmt} for name in names for fmt in formats}
        with reporter.stage(f"{quantizer}, {len(plans)} models") as progress:
            damage[quantizer] = meter.plans(plans, test.test, progress)
    for module in checkpoint.outer:
        lines = {
            fmt: {"bytes": stored_bytes(module.shape, FORMATS[fmt])}
            | {q: interval_of(damage[q][f"{module.name} {fmt}"], test.blocks("test")) for q in damage}
            for fmt in formats
        }
        kept = kept_bytes(module, checkpoint.info.dtype)
        result["modules"][module.name] = {
            "part": module.part,
            "bytes": kept,
            "of_file": kept / checkpoint.info.total_bytes,
            **lines,
        }
    print(json.dumps(result, indent=1), flush=True)
    return result


def interval_of(rows: Any, blocks: Any) -> list[float]:
    """Return mean, and the ends of its interval."""
    value = measured(rows, "nats/token", "reference", "test", 0, blocks)
    return [value.mean, *(value.ci95 or ())]


if __name__ == "__main__":
    main()
