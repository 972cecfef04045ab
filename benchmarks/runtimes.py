"""Export a plan to every runtime, quantize and load there what was exported, and write docs/runtimes.md's table.

    python benchmarks/runtimes.py [TARGET ...] [--model FOLDER] [--text FILE] [--envs .venv-runtimes]

Each runtime gets an environment of its own (1 to 6 GB), made where it is missing, torch first. The plan mixes all four widths, symmetric
and not, and leaves one module as it is. For each module the check asks the library for its bits and counts the levels of the weight that
is really multiplied by; the logits of the whole model are compared with those of plain linear layers with these weights (mlx, whose
codes are ours: with our own reconstruction in torch). Writes benchmarks/results/runtimes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bitatlas.export.mlx import CHECKED, path_of
from bitatlas.export.targets import export_plan
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import Bank
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS
from bitatlas.records.sizes import size_of

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CHECKS = Path(__file__).parent / "runtime_checks"
RESULTS = Path(__file__).parent / "results" / "runtimes.json"
PAGE = ROOT / "docs" / "runtimes.md"
BEGIN, END = "<!-- table: benchmarks/runtimes.py -->", "<!-- end of table -->"
TORCH = "torch==2.13.0"
WIDTHS = (2, 3, 4, 8)
KEPT = 6  # the unit of this number (q/k/v, o, gate/up, ...) stays as it is
WINDOW = 16  # tokens: the tiny Mistral's sliding window, which mlx-lm does not apply
LIMIT_S = 900  # of one program
# The most that logits may differ: float32 in another order of sums; float16, whose unit is 0.016 at the logits' size of 20 (a wrong width
# changes them by whole units).
EXACT, HALF = 1e-4, 0.15


@dataclass(frozen=True)
class Library:
    """How a runtime is checked. `arguments`: of the exported quantize.py, after MODEL and OUT; None: what was exported is loaded."""

    packages: tuple[str, ...]
    formats: tuple[str, ...]  # given to the modules in turn
    arguments: tuple[str, ...] | None
    tolerance: float
    module: str = ""  # of its check


MIXED = ("int2_g32", "int4_g32_sym", "int3_g32", "int8_g32_sym", "int4_g32")
LEARNED = ("--dataset", "TEXT", "--nsamples", "16", "--seqlen", "128")
LIBRARIES = {
    "mlx": Library(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), (*MIXED, "int8_g32", "int3_g32_sym"), None, EXACT),
    "torchao": Library(("torchao==0.18.0", "transformers==5.24.0", "accelerate"), (*MIXED, "int8_g32"), (), EXACT),
    "llm-compressor": Library(("llmcompressor==0.14.0.1",), (*MIXED, "int8_g32"), LEARNED, EXACT),
    "gptqmodel": Library(("gptqmodel==7.7.0",), (*MIXED, "int8_g32"), LEARNED, HALF),
    "autoround": Library(("auto-round==0.16.1", "accelerate"), MIXED, (*LEARNED, "--iters", "5"), HALF),
}
NOT_RUN = {  # exported alone: why, formats, and the package whose parser is asked
    "vllm": ("needs a GPU", ("int4_g32_sym", "int2_g32_sym", "int8_g32_sym", "int3_g32_sym"), ""),
    "exllamav3": ("needs a CUDA GPU", MIXED, "exllamav3==1.6.5"),
}


ROWS = (*LIBRARIES, *NOT_RUN, "llama.cpp")  # of the table; llama.cpp has a page of its own


def plan_for(checkpoint: Checkpoint, formats: tuple[str, ...]) -> Plan:
    """Return a plan of formats in turn, unit by unit (vLLM needs that, the others do not mind); one unit stays as it is."""
    units = list(dict.fromkeys(module.unit for module in checkpoint.modules))
    chosen = {unit: formats[k % len(formats)] for k, unit in enumerate(units) if k != KEPT}
    modules = {m.name: chosen[m.unit] for m in checkpoint.modules if m.unit in chosen}
    info = checkpoint.info
    size = size_of(checkpoint.modules, modules, info)
    table = {name: FORMATS[name] for name in dict.fromkeys(modules.values())}
    return Plan(PlanModel(info.name, None, info.weights_sha256), table, "rtn", modules, Budget("code_bits", 8.0), size, PlanDamage(None, None))  # fmt: skip


def job_for(checkpoint: Checkpoint, plan: Plan, tokens: torch.Tensor) -> dict[str, Any]:
    """Return what a check is told: the modules, the tokens, our logits on them."""
    names = [module.name for module in checkpoint.modules]
    decoder = checkpoint.load_model()
    with torch.no_grad():
        clean = decoder.model(tokens).logits
        with decoder.swapped(Bank(decoder, names, plan.quantizer, plan.formats).weights(plan.modules)):
            ours = decoder.model(tokens).logits
    fmts = {name: plan.formats[format_name] for name, format_name in plan.modules.items()}
    return {
        "modules": {n: {"bits": f.bits, "group_size": f.group_size, "symmetric": f.symmetric} for n, f in fmts.items()},
        "kept": [name for name in names if name not in plan.modules],
        "paths": {name: path_of(name, checkpoint.config.model_type) for name in names},
        "ids": tokens.tolist(),
        "logits": ours.tolist(),
        "clean": clean.tolist(),
    }


def environment(folder: Path, packages: tuple[str, ...], torch_first: bool = True) -> Path:
    """Return the environment's python; made where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for wanted in ((TORCH,), packages) if torch_first else (packages,):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def run(command: list[Any], folder: Path) -> str:
    """Run a program and return its last line, or raise a RuntimeError with what it said. Libraries write logs to the working folder: a temporary one."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_CPU_WORKERS": "2"}
    try:
        done = subprocess.run([str(part) for part in command], cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done in {LIMIT_S} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise RuntimeError(lines[-1][:200])
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def check(name: str, library: Library, checkpoint: Checkpoint, tokens: torch.Tensor, text: Path, envs: Path) -> dict[str, Any]:
    """Export, quantize there, load there."""
    plan = plan_for(checkpoint, library.formats)
    job = job_for(checkpoint, plan, tokens)
    result: dict[str, Any] = {"exported": False, "plan": plan.modules}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "plan.json").write_text(to_json(plan))
        (work / "job.json").write_text(json.dumps(job))
        model = checkpoint.folder.resolve()
        try:
            export_plan(work / "plan.json", name, work / "exported", str(model), Reporter(quiet=True))
            result["exported"] = True
            python = environment(envs / name, library.packages).absolute()
            ready = work / "exported"
            if library.arguments is not None:
                arguments = [str(text.resolve()) if part == "TEXT" else part for part in library.arguments]
                run([python, work / "exported" / "quantize.py", model, work / "quantized", *arguments], work)
                configs = sorted((work / "quantized").rglob("config.json"))  # AutoRound makes a folder in the folder
                ready = configs[0].parent
            program = CHECKS / f"check_{name.replace('-', '_')}.py"
            result |= json.loads(run([python, program, ready, model, work / "job.json"], work))
        except (RuntimeError, subprocess.CalledProcessError, json.JSONDecodeError) as error:
            return {**result, "error": str(error)}
    return {**result, "widths": judge(job, result), "logits_agree": result["largest_difference"] <= library.tolerance, "tolerance": library.tolerance}  # fmt: skip


def export_alone(name: str, checkpoint: Checkpoint, tokens: torch.Tensor, envs: Path) -> dict[str, Any]:
    """Return, for a runtime that cannot run here, what is written, and whether the library's own parser takes it, where that can be had."""
    reason, formats, package = NOT_RUN[name]
    plan = plan_for(checkpoint, formats)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "plan.json").write_text(to_json(plan))
        done = export_plan(work / "plan.json", name, work / "exported", str(checkpoint.folder.resolve()), Reporter(quiet=True))
        result = {"exported": True, "files": done.files, "plan": plan.modules, "error": reason}
        if not package:
            return result
        (work / "job.json").write_text(json.dumps(job_for(checkpoint, plan, tokens)))
        python = environment(envs / name, ("--no-deps", package, "pyyaml"), torch_first=False).absolute()
        program = CHECKS / f"check_{name}.py"
        return result | json.loads(
            run([python, program, work / "exported", checkpoint.folder.resolve(), work / "job.json"], work)
        )


def families(envs: Path) -> dict[str, Any]:
    """Check mlx, whose names of modules are its own, on the demo and on tiny random checkpoints of the families that are called checked."""
    from bitatlas.data import MODEL_DIR

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny import make_checkpoint

    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        changes = {"gpt_neox": {"intermediate_size": 256}}  # mlx-lm takes four times the hidden size for granted
        folders = {family: make_checkpoint(Path(temporary) / family, family, **changes.get(family, {})) for family in CHECKED}
        tanh = {**changes["gpt_neox"], "hidden_act": "gelu_pytorch_tanh"}  # which mlx-lm computes for every GPT-NeoX
        folders["gpt_neox, tanh GELU"] = make_checkpoint(Path(temporary) / "tanh", "gpt_neox", **tanh)
        for name, folder in {"demo": MODEL_DIR, **folders}.items():
            checkpoint = open_checkpoint(str(folder))
            tokens = torch.randint(checkpoint.vocabulary, (2, WINDOW), generator=torch.Generator().manual_seed(0))
            here = check("mlx", LIBRARIES["mlx"], checkpoint, tokens, folder, envs)
            result[name] = {key: here[key] for key in ("widths", "largest_difference", "largest_difference_unquantized", "unquantized", "error") if key in here}  # fmt: skip
    return result


def judge(job: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    """Return width -> "ok", or what the first wrong module is instead."""
    verdicts = {str(width): "ok" for width in WIDTHS}
    for name, expected in job["modules"].items():
        here = result["modules"][name]
        wrong = [f"{key} {here[key]}, not {expected[key]}" for key in expected if key in here and here[key] != expected[key]]
        if not 2 ** (expected["bits"] - 1) < here["levels"] <= 2 ** expected["bits"] and expected["bits"] < 8:
            wrong.append(f"{here['levels']} levels")
        if expected["bits"] == 8 and here["levels"] <= 16:
            wrong.append(f"{here['levels']} levels")
        if wrong and verdicts[str(expected["bits"])] == "ok":
            verdicts[str(expected["bits"])] = f"{name}: {'; '.join(wrong)}"
    changed = [name for name in job["kept"] if not result["modules"][name]["unchanged"]]
    return verdicts if not changed else {**verdicts, "kept": f"{changed[0]} was changed"}


def table(results: dict[str, Any]) -> str:
    """Return Markdown: a line a runtime and width."""
    lines = [
        "| runtime | width | exported | loads, bits as planned | logits checked | tokens/s (unquantized) |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        result = results["runtimes"].get(name)
        for width in WIDTHS:
            lines.append(f"| {name} | {width} | {' | '.join(_cells(name, result, str(width)))} |")
    return "\n".join([*lines, "", *family_table(results["runtimes"].get("mlx", {}).get("families", {}))])


def family_table(result: dict[str, Any]) -> list[str]:
    """Return the table of mlx on more checkpoints: the largest difference of logits, of what was exported and of the checkpoint as mlx-lm itself reads it."""
    lines = ["| in `mlx` | bits as planned | exported, against our reconstruction | the checkpoint itself, against transformers |", "|---|---|---|---|"]  # fmt: skip
    for name, here in result.items():
        if "error" in here:
            lines.append(f"| {name} | **no**: {here['error']} | | |")
            continue
        itself = f"{here['largest_difference_unquantized']:.1g}" if "largest_difference_unquantized" in here else "does not load"
        fine = all(verdict == "ok" for verdict in here["widths"].values())
        lines.append(f"| {name} | {'yes' if fine else '**no**'} | {here['largest_difference']:.1g} | {itself} |")
    return lines if result else []


def _cells(name: str, result: dict[str, Any] | None, width: str) -> list[str]:
    if name == "llama.cpp":
        return ["see [gguf.md](gguf.md)"] * 4
    if result is None:
        return ["not run here"] * 4
    if "error" in result:
        parsed = {None: "", True: "; its parser takes it as planned", False: "; **its parser takes it otherwise**"}[
            result.get("as_planned")
        ]
        return ["yes" if result["exported"] else "no", f"not run here: {result['error']}{parsed}", "not run here", "not run here"]
    verdict = result["widths"][width]
    logits = f"{'yes' if result['logits_agree'] else '**no**'}, {result['largest_difference']:.1g}"
    speed = f"{result['tokens_per_second']:,.0f} ({result['tokens_per_second_unquantized']:,.0f})"
    return ["yes", "yes" if verdict == "ok" else f"**no**: {verdict}", logits, speed]


def write_page(results: dict[str, Any]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", help="default: all that run here")
    parser.add_argument("--model", default=str(SHARED / "models" / "babyllama-105"))
    parser.add_argument("--text", type=Path, default=SHARED / "data" / "tinystories_fit.txt")
    parser.add_argument("--envs", type=Path, default=ROOT / ".venv-runtimes")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    ids = checkpoint.load_tokenizer()(args.text.read_text(encoding="utf-8")[:4000])["input_ids"]
    tokens = torch.tensor(ids[:256]).view(2, 128)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runtimes": {}}
    for name in args.targets or [*LIBRARIES, *NOT_RUN]:
        if name in NOT_RUN:
            result = export_alone(name, checkpoint, tokens, args.envs)
        else:
            result = check(name, LIBRARIES[name], checkpoint, tokens, args.text, args.envs)
        if name == "mlx":
            result["families"] = families(args.envs)
        results["runtimes"][name] = {**result, "model": checkpoint.info.name, "date": date.today().isoformat()}
        print(
            name,
            {key: result.get(key) for key in ("package", "widths", "largest_difference", "damage_nats", "error")},
            flush=True,
        )
        results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_page(results)


if __name__ == "__main__":
    main()
