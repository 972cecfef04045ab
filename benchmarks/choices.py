"""Measure what the candidates are worth: more formats at equal stored bits, and better quantizers at equal code bits, each as a whole survey.

    python benchmarks/choices.py MODEL TEXT [--formats | --quantizers] [--rows 24,24,64]

*Formats*: the plan from {2, 3, 4, 8} bits in two group sizes, against plans from {2, 4} bits in either group size, under the same limit of
stored bits. *Quantizers*: rtn, gptq and (where it is installed) hqq, the same formats and code bits; every plan is found for the quantizer
that it is measured with, and rtn's own plan is also measured with the other codes, to tell better codes from a better plan.
Damage on the survey's test rows, nats/token, with 95 % intervals and paired differences by row. Appends to benchmarks/results/choices.json
and writes the tables of docs/choices.md from it (`--table-only`: nothing else).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.errors import UserError
from bitatlas.progress import Reporter
from bitatlas.quantize import QUANTIZERS
from bitatlas.records import Atlas, Budget
from bitatlas.run.options import SurveyOptions, parse_rows, split_names
from bitatlas.run.prepare import Session, reopen
from bitatlas.run.settings import Settings
from bitatlas.run.survey import run_survey
from bitatlas.stats.bootstrap import measured

RESULTS = Path(__file__).parent / "results" / "choices.json"
PAGE = Path(__file__).parent.parent / "docs" / "choices.md"
GROUPS = ("g32", "g64")
FEW = {f"2, 4 bits, {group}": f"int2_{group},int4_{group}" for group in GROUPS}
MANY = {"2, 3, 4, 8 bits, g32 and g64": ",".join(f"int{bits}_{group}" for bits in (2, 3, 4, 8) for group in GROUPS)}
STORED_BITS = (3.5, 4.0)
CODE_BITS = (2.5, 3.0)
QUANTIZED_FORMATS = "int2_g32,int4_g32"


class Bench:
    """Surveys of one model in a temporary folder."""

    def __init__(self, model: str, text: str, rows: str, folder: Path):
        self.model, self.text, self.rows, self.folder = model, text, rows, folder
        self.reporter = Reporter(quiet=True)

    def survey(self, name: str, formats: str, budget: Budget, quantizer: str = "rtn") -> tuple[Atlas, Path, float]:
        """Return the finished survey, its folder, and the seconds it took."""
        out = self.folder / name.replace(" ", "_").replace(",", "")
        options = SurveyOptions(
            self.model,
            tokens=self.text,
            formats=split_names(formats),
            quantizer=quantizer,
            rows=parse_rows(self.rows),
            tasks=(),
            limit=None,
            fuse=False,
        )
        settings = replace(Settings.of(options), budget=budget)
        start = time.monotonic()
        return run_survey(settings, out, False, self.reporter), out, time.monotonic() - start

    def damage(self, session: Session, plan: dict[str, str]) -> np.ndarray:
        return session.meter.plans({"plan": plan}, session.rows.test)["plan"]


def summary(name: str, rows: np.ndarray, other: np.ndarray | None, **more: Any) -> dict[str, Any]:
    """Return one line: damage, and its paired difference and ratio to `other` [rows]."""
    line: dict[str, Any] = {"name": name, "damage": asdict(measured(rows, "nats/token", "plan", "test", 0)), **more}
    if other is not None:
        line["difference"] = asdict(measured(rows - other, "nats/token", "plan", "test", 0))
        line["ratio"] = float(rows.mean() / other.mean())
    difference = f", {line['ratio']:.3f} of the first" if other is not None else ""
    print(f"  {name}: {line['damage']['mean']:.4f} {line['damage']['ci95']}{difference}", flush=True)
    return line


def compare_formats(bench: Bench) -> list[dict[str, Any]]:
    results = []
    for limit in STORED_BITS:
        print(f"stored bits <= {limit}")
        lines: list[dict[str, Any]] = []
        first = None
        for name, formats in {**MANY, **FEW}.items():
            try:
                atlas, out, seconds = bench.survey(f"formats {limit} {name}", formats, Budget("stored_bits", limit))
            except UserError as error:
                print(f"  {name}: not possible: {error}")
                continue
            assert atlas.plan is not None
            rows = bench.damage(reopen(out, atlas, None, None, bench.reporter), atlas.plan.modules)
            lines.append(summary(name, rows, first, stored_bits=atlas.plan.size.stored_bits, seconds=round(seconds, 1)))
            first = rows if first is None else first
        results.append({"stored_bits": limit, "plans": lines})
    return results


def compare_quantizers(bench: Bench) -> list[dict[str, Any]]:
    results = []
    for limit in CODE_BITS:
        print(f"code bits <= {limit}, {QUANTIZED_FORMATS}")
        lines: list[dict[str, Any]] = []
        first, rtn_plan = None, {}
        for name in QUANTIZERS:
            try:
                budget = Budget("code_bits", limit)
                atlas, out, seconds = bench.survey(f"quantizer {limit} {name}", QUANTIZED_FORMATS, budget, name)
            except UserError as error:
                print(f"  {name}: not run: {error}")
                continue
            assert atlas.plan is not None
            session = reopen(out, atlas, None, None, bench.reporter)
            rows = bench.damage(session, atlas.plan.modules)
            bits = {"code_bits": atlas.plan.size.code_bits, "quantized_bytes": atlas.plan.size.quantized_bytes}
            lines.append(summary(name, rows, first, **bits, seconds=round(seconds, 1)))
            if first is None:
                first, rtn_plan = rows, atlas.plan.modules
            else:
                lines.append(summary(f"{name} codes in rtn's plan", bench.damage(session, rtn_plan), first))
        results.append({"code_bits": limit, "formats": QUANTIZED_FORMATS, "plans": lines})
    return results


def page(content: dict[str, Any]) -> str:
    """Return docs/choices.md."""
    origin = content["made"]
    lines = [
        "# What the candidates are worth",
        "",
        "Made by `benchmarks/choices.py` from `benchmarks/results/choices.json`; do not edit. Whole surveys at the same limit; damage on 64 test rows that",
        f"found nothing, nats/token, with 95 % intervals over rows. {origin['date']}, torch {origin['versions']['torch']}, CPU.",
        "",
        "Ratio: to the first plan of its group.",
    ]
    for comparison, limit, title in (
        ("formats", "stored_bits", "More formats at the same stored bits (rtn)"),
        ("quantizers", "code_bits", f"Better codes at the same code bits ({QUANTIZED_FORMATS})"),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            f"| checkpoint | {limit.replace('_', ' ')} ≤ | plan | damage | ratio |",
            "|---|---|---|---|---|",
        ]
        for model, results in content.items():
            for group in results.get(comparison, []):
                lines += [f"| {model} | {group[limit]} | {_cells(plan)} |" for plan in group["plans"]]
    return "\n".join(lines) + "\n"


def _cells(plan: dict[str, Any]) -> str:
    damage = plan["damage"]
    low, high = damage["ci95"]
    return f"{plan['name']} | {damage['mean']:.3f} [{low:.3f}, {high:.3f}] | {plan.get('ratio', 1.0):.2f}"


def write(content: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--rows", default="24,24,64")
    parser.add_argument("--formats", action="store_true", help="only this comparison")
    parser.add_argument("--quantizers", action="store_true", help="only this comparison")
    args = parser.parse_args()
    both = args.formats == args.quantizers
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if args.table_only:
        write(content)
        return
    if not args.model or not args.text:
        parser.error("give a model and a text")
    results = content.setdefault(Path(args.model).name, {})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.model, args.text, args.rows, Path(folder))
        if args.formats or both:
            results["formats"] = compare_formats(bench)
        if args.quantizers or both:
            results["quantizers"] = compare_quantizers(bench)
    results["text"], results["rows"] = Path(args.text).name, args.rows
    content["made"] = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("bitatlas", "torch", "transformers")},
        "machine": platform.machine(),
    }
    write(content)


if __name__ == "__main__":
    main()
