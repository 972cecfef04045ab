"""Compare who finds the better plan at equal bytes: bitatlas, its peers' own tools, their rules re-implemented, and plans anybody would make.

    python benchmarks/peers.py [--methods ...] [--checkpoints ...] [--code-bits 2.5,3] [--search-seconds 600] [--table-only]

One run, one machine: the same checkpoint, rows, two formats, codec and budget for everybody; the plans are judged by one meter on rows nobody
has seen. Writes benchmarks/results/peers.json (resumable) and docs/peers.md, which says what each method is. Two peers run
in environments that this script makes (`--envs`); without a network they are "not run", never a number from elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import bitatlas.data as demo
from bitatlas.data.rows import rows_sha256
from bitatlas.errors import UserError
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.run.options import split_names
from bitatlas.run.settings import parse_formats
from plan_peers.judging import BEST, MEAN, Entry, entries_of, judge
from plan_peers.outside import Answer, NotRunError, run_bitatlas, run_own, run_peer
from plan_peers.problem import Problem, Question, assert_disjoint, fit_rows, judging_rows
from plan_peers.results import OURS, cell_of, open_results, save_results
from plan_peers.table import render

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
RESULTS = REPOSITORY / "benchmarks" / "results" / "peers.json"
DEMO_FIT_SHARE = 0.6  # of the demo's one text; the rest is what it is judged on

METHODS: dict[str, tuple[str, ...]] = {  # word for --methods -> its rows of the table
    "thumb": ("uniform", "first layers high", "last layers high", MEAN, BEST),
    "relative": ("relative weight error",),
    "mlx": ("mlx-lm's gradient rule",),
    "swaps": ("single-swap KL + knapsack (reference)",),
    "swaps-high": ("single-swap KL + knapsack (all high)",),
    "fisher": ("g²ΔW² + knapsack",),
    "gradient": ("|g·ΔW| + knapsack",),
    "exllamav3": ("exllamav3's greedy",),
    "autoround": ("AutoRound AutoScheme",),
    "modelopt": ("ModelOpt auto_quantize (gradient)",),
    "modelopt-kl": ("ModelOpt auto_quantize (KL)",),
    "bitatlas": (OURS,),
    "search": ("swap search",),
}
OWN = {
    "thumb": "rules of thumb", "relative": "relative error", "mlx": "mlx-lm", "swaps": "KL swaps (reference)",
    "swaps-high": "KL swaps (high)", "fisher": "g2dW2", "gradient": "|g dW|", "exllamav3": "exllamav3",
}  # fmt: skip
ORDER = [label for labels in METHODS.values() for label in labels]


@dataclass(frozen=True)
class Case:
    """A checkpoint and its two texts: one to fit on, one to be judged on."""

    model: str
    fit: Path
    test: Path


@dataclass(frozen=True)
class Cell:
    """One checkpoint at one budget, while it is being measured."""

    problem: Problem
    case: Case
    test: torch.Tensor
    entries: dict[str, Entry]
    work: Path


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def read_cases(names: list[str] | None, work: Path, fit: str | None, test: str | None) -> list[Case]:
    """Return the checkpoints asked for: "demo", a name in the shared models, or a folder. UserError where there is none."""
    models, data = SHARED / "models", SHARED / "data"
    if names is None:
        names = [name for name in ("babyllama-105", "stories260K") if (models / name).is_dir()] + ["demo"]
    cases = []
    for name in names:
        if name == "demo":
            cases.append(Case(str(demo.MODEL_DIR), *halves(demo.TEXT_FILE, work)))
            continue
        folder = models / name if (models / name).is_dir() else Path(name)
        texts = Path(fit or data / "tinystories_fit.txt"), Path(test or data / "tinystories_test.txt")
        if not folder.is_dir() or not all(text.is_file() for text in texts):
            raise UserError(
                f"--checkpoints {name}: give demo, a folder with --fit-text and --test-text, or a shared model's name"
            )
        cases.append(Case(str(folder), *texts))
    return cases


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    """Return one text cut in two at the end of a line, so that nobody is judged on what was fitted on."""
    content = text.read_text(encoding="utf-8")
    cut = content.index("\n", int(len(content) * DEMO_FIT_SHARE)) + 1
    fit, test = work / f"{text.stem}-fit.txt", work / f"{text.stem}-test.txt"
    fit.write_text(content[:cut], encoding="utf-8"), test.write_text(content[cut:], encoding="utf-8")
    return fit, test


def measure(method: str, cell: Cell, args: argparse.Namespace) -> Answer:
    """Run one method: its plans for one cell. NotRunError where it gives none."""
    question = cell.problem.question
    if method in OWN:
        return run_own(OWN[method], question, cell.work)
    if method == "bitatlas":
        return run_bitatlas(question, cell.place.fit, (args.fit_rows, args.select_rows), cell.work)
    if method == "search":
        return run_own("search", question, cell.work, start=best_so_far(cell), seconds=args.search_seconds)
    name, _, scoring = method.partition("-")
    scorings = {"autoround": "", "modelopt": "kl_div" if scoring else "gradient"}
    return run_peer(name, cell.problem, cell.work, args.envs, say, scorings[name])


def best_so_far(cell: Cell) -> dict[str, str]:
    """Return the finished plan of least damage on the rows that everybody may fit on. NotRunError where there is none."""
    problem = cell.problem
    plans = {
        label: {m.name: problem.high if m.name in set(entry["high"]) else problem.low for m in problem.modules}
        for label, entry in cell.entries.items()
        if "high" in entry and label != METHODS["search"][0]
    }
    if not plans:
        raise NotRunError("no other method's plan to start from")
    damage = problem.meter.plans(plans, problem.rows)
    return plans[min(plans, key=lambda label: float(damage[label].mean()))]


def run_cell(cell: Cell, args: argparse.Namespace, save: Callable[[], None]) -> None:
    """Run every method asked for that is not finished."""
    for method in args.methods:
        labels = METHODS[method]
        if method == "search" and not args.search_seconds:
            continue
        if not args.again and all("rows" in cell.entries.get(label, {}) for label in labels):
            continue
        say(f"{cell.problem.checkpoint.info.name}, {cell.problem.question.code_bits:g} code bits: {method}")
        try:
            answer = measure(method, cell, args)
            cell.entries.update(entries_of(method, labels, answer, judge(cell.problem, answer.plans, cell.test)))
        except NotRunError as reason:
            say(f"  not run: {reason}")
            cell.entries.update({label: {"method": method, "not_run": str(reason)} for label in labels})
        save()


def run_case(case: Case, args: argparse.Namespace, content: dict, work: Path) -> None:
    """Run all budgets of one checkpoint; its model is read once."""
    checkpoint = open_checkpoint(case.model, fuse=False)
    fit = fit_rows(checkpoint, case.fit, (args.fit_rows, args.select_rows), args.row_length, args.seed)
    test = judging_rows(checkpoint, case.test, args.test_rows, args.row_length)
    assert_disjoint(fit, test)
    low, high = args.formats
    like = None
    for code_bits in args.code_bits:
        question = Question(case.model, (low, high), args.quantizer, code_bits, args.seed, fit.tolist())
        like = problem = Problem(question, like)
        name = checkpoint.info.name
        facts = {
            "checkpoint": name,
            "code_bits": code_bits,
            "weights_sha256": checkpoint.info.weights_sha256,
            "fit_rows_sha256": rows_sha256(fit),
            "test_rows_sha256": rows_sha256(test),
        }
        key = f"{name}, {code_bits:g}"
        entries = cell_of(content, key, facts)["methods"]
        with tempfile.TemporaryDirectory(dir=work) as folder:
            run_cell(Cell(problem, case, test, entries, Path(folder)), args, lambda: save_results(args.results, content))


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--methods", type=words, default=list(METHODS), help=f"any of {','.join(METHODS)}")
    add("--checkpoints", type=words, help="demo, shared models' names, folders; default: all at hand")
    add("--code-bits", type=lambda text: [float(word) for word in words(text)], default=[2.5, 3.0])
    add("--formats", default="int2_g32,int4_g32", help="two: low and high")
    add("--quantizer", default="rtn", help="handed to bitatlas survey and to the judge")
    add("--fit-text"), add("--test-text", help="for checkpoints given as folders")
    add("--fit-rows", type=int, default=24), add("--select-rows", type=int, default=24), add("--test-rows", type=int, default=96)
    add("--row-length", type=int, default=192), add("--seed", type=int, default=0)
    add("--search-seconds", type=float, default=0.0, help="swap search on true KL from the best plan; 0: off")
    add("--results", type=Path, default=RESULTS), add("--table", type=Path, default=REPOSITORY / "docs" / "peers.md")
    add("--envs", type=Path, default=REPOSITORY, help="where the peers' environments stand or are made")
    add("--again", action="store_true", help="measure again what is finished")
    add("--fresh", action="store_true", help="forget the results file")
    add("--table-only", action="store_true", help="write the table from the results file, measure nothing")
    args = parser.parse_args(arguments)
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        parser.error(f"--methods: {unknown[0]!r} is unknown; known are {', '.join(METHODS)}")
    args.formats = parse_formats(split_names(args.formats))
    if len(args.formats) != 2:
        parser.error("--formats: give two, a low and a high one")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    settings = {
        "formats": list(args.formats),
        "quantizer": args.quantizer,
        "rows": {"fit": args.fit_rows, "select": args.select_rows, "test": args.test_rows},
        "row_length": args.row_length,
        "seed": args.seed,
    }
    content = open_results(args.results, settings, args.fresh)
    if not args.table_only:
        with tempfile.TemporaryDirectory(prefix="peers-") as work:
            for case in read_cases(args.checkpoints, Path(work), args.fit_text, args.test_text):
                run_case(case, args, content, Path(work))
        save_results(args.results, content)
    args.table.write_text(render(content, ORDER, args.results.name))
    print(args.table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"peers.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
