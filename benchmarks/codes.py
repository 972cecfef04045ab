"""Measure what better codes are worth: one width everywhere, rounded to nearest, by gptq, tuned, and where it is installed by AutoRound.

    python benchmarks/codes.py MODEL FIT JUDGED [--other TEXT] [--formats int2_g64,int3_g64,int4_g64] [--minutes 10 | --steps N]

gptq is fitted to 24 rows of 192 tokens of FIT; tuning starts from its codes and reads all rows of FIT's fit part, and 12 select rows decide. AutoRound
has its package's default steps on the same 24 rows; where it is there, gptq and tuning together get its time in the place of --minutes. Damage on 64 rows of JUDGED, nats/token, paired by row with gptq's, and on 16 rows of another
text, where tuning must not do harm. Seconds are wall-clock, on all threads. Results are added to benchmarks/results/codes.json by model and format.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from bitatlas.data.rows import fit_pool, make_rows
from bitatlas.data.texts import read_documents
from bitatlas.measure.damage import DamageMeter, Reference
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import Bank
from bitatlas.quantize.codes import Codes
from bitatlas.quantize.tune import Tuned, Tuner, Tuning
from bitatlas.records.formats import FORMATS
from bitatlas.records.journal import Journal
from bitatlas.run.tune import SELECT_ROWS

RESULTS = Path(__file__).parent / "results" / "codes.json"
FORMAT_NAMES = "int2_g64,int3_g64,int4_g64"
ROWS, ROW_LENGTH, JUDGED_ROWS, OTHER_ROWS = (24, 24, 64), 192, 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "fit", "judged"):
        parser.add_argument(name)
    parser.add_argument("--other")
    parser.add_argument("--formats", default=FORMAT_NAMES)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--row-length", type=int, default=ROW_LENGTH)
    words = parser.parse_args()
    checkpoint = open_checkpoint(words.model)
    bench = Bench(words, checkpoint)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    of_model = results.setdefault(Path(words.model).resolve().name, {})
    for name in words.formats.split(","):
        of_model[name] = bench.measure(name)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: of_model[name]}, indent=1), flush=True)


class Bench:
    """A model with the rows to fit, to tune and to judge on."""

    def __init__(self, words: argparse.Namespace, checkpoint: Checkpoint):
        self.words, self.checkpoint, self.reporter = words, checkpoint, Reporter()
        self.decoder, self.names = checkpoint.load_model(), [module.name for module in checkpoint.modules]
        tokenizer, documents = checkpoint.load_tokenizer(), read_documents(words.fit)
        self.reference: Reference | None = None
        self.rows = make_rows(documents, tokenizer, words.fit, ROWS, words.row_length, checkpoint.info.context, 0)
        self.pool = fit_pool(documents, tokenizer, self.rows, 0)
        self.judged = {"judged": self._test_rows(words.judged, JUDGED_ROWS)}
        if words.other:
            self.judged["other"] = self._test_rows(words.other, OTHER_ROWS)

    def _test_rows(self, text: str, count: int) -> Tensor:
        tokenizer, context = self.checkpoint.load_tokenizer(), self.checkpoint.info.context
        return make_rows(read_documents(text), tokenizer, text, (2, 2, count), self.words.row_length, context, 0).test

    def measure(self, format_name: str) -> dict[str, Any]:
        """Return damage and seconds of every way to choose codes of one format."""
        methods: dict[str, tuple[Bank, float, dict[str, Any]]] = {}
        for quantizer in ("rtn", "gptq", *(["autoround"] if find_spec("auto_round") else [])):
            bank = Bank(self.decoder, self.names, quantizer, rows=self.rows.fit)
            begun = time.perf_counter()
            with self.reporter.stage(f"{format_name} by {quantizer}") as progress:
                bank.fill([format_name], progress)
            methods[quantizer] = bank, time.perf_counter() - begun, {}
        begun = time.perf_counter()
        seconds = 60 * self.words.minutes
        if "autoround" in methods:
            seconds = methods["autoround"][1] - methods["gptq"][1]
        bank, tuned = self._tuned(methods["gptq"][0], format_name, seconds)
        more = {"steps": tuned.steps, "select": tuned.select}
        methods["tuned"] = bank, time.perf_counter() - begun, more
        return {"date": date.today().isoformat(), "rows_to_tune_on": len(self.pool), **self._damages(methods, format_name)}

    def _tuned(self, bank: Bank, format_name: str, seconds: float) -> tuple[Bank, Tuned]:
        codes = {name: of_module for name in self.names if isinstance(of_module := bank.codes(name, format_name), Codes)}
        tuning = Tuning(self.pool, self.rows.select[:SELECT_ROWS], self.words.steps or 0)
        tuner = Tuner(self.decoder, codes, dict.fromkeys(codes, FORMATS[format_name].bits), tuning)
        if not self.words.steps:
            steps = tuner.steps_within(seconds, tuner.pace())
            tuner.tuning = Tuning(tuning.rows, tuning.select, steps)
        with self.reporter.stage(f"{format_name} tuned for {tuner.tuning.steps} steps") as progress:
            tuned = tuner.run(progress)
        new = Bank(self.decoder, self.names, "gptq", identity="tuned")
        new.put(tuned.codes, dict.fromkeys(codes, format_name))
        return new, tuned

    def _damage(self, bank: Bank, format_name: str, rows: Tensor) -> Any:
        """Return the damage of one format everywhere, float64 [rows]. The reference reads the rows once for all banks."""
        meter = DamageMeter(self.decoder, bank, "", bank.identity, Journal(None))
        meter.reference = self.reference = self.reference or meter.reference
        return meter.plans({"": dict.fromkeys(self.names, format_name)}, rows)[""]

    def _damages(self, methods: Mapping[str, tuple[Bank, float, dict[str, Any]]], format_name: str) -> dict[str, Any]:
        damage = {
            name: {text: self._damage(bank, format_name, rows) for text, rows in self.judged.items()}
            for name, (bank, *_) in methods.items()
        }
        results: dict[str, Any] = {}
        for name, (_, seconds, more) in methods.items():
            result: dict[str, Any] = {"seconds": round(seconds, 1), **more}
            for text, values in damage[name].items():
                difference = values - damage["gptq"][text]
                result[text] = {"mean": float(values.mean()), "of_gptq": float(values.mean() / damage["gptq"][text].mean())}
                result[text]["standard_error_of_difference"] = float(difference.std(ddof=1) / len(difference) ** 0.5)
            results[name] = result
        return results


if __name__ == "__main__":
    main()
