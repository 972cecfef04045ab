"""AutoRound, ModelOpt and bitatlas itself: each run as its users run it, in a process (and an environment) of its own.

Environments are made once, under the folder given (`.venv-autoround`, `.venv-modelopt`). Where one cannot be made or a tool fails, `NotRunError`
carries the reason, and the table says so instead of a number. Homes and caches point into the run's own work folder, because AutoScheme
keeps its scores under the user's cache by the path of the text, and a later run would be answered from there.

A peer's plan may cost more than the budget by our count (each counts its own way): then its target is lowered until the plan
fits, and the remark says from what to what.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plan_peers.problem import SURVEY_TEST_ROWS, Problem, Question

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "autoround": ["auto-round==0.16.1"],
    "modelopt": ["nvidia-modelopt[hf]==0.47.0"],
}
TARGET_STEP = 0.02  # bits by which a peer's target is lowered while its plan is above the budget
MOST_TRIES = 12
REASON_CHARACTERS = 160
SEARCH_STAGE = re.compile(
    r"^units, one at a time|swaps around a plan|^pricing|^plans on (fit|select) rows"
)  # of a survey, by its log


class NotRunError(Exception):
    """Why a method gave no plan, in one line."""


@dataclass
class Answer:
    """plans: name -> (module -> format); seconds of the search alone and of the whole process."""

    plans: dict[str, dict[str, str]]
    seconds: float | None
    process_seconds: float
    peak_bytes: int
    remarks: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def python_of(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The environment's python, made first where there is none. NotRunError where it cannot be made."""
    place = folder / f".venv-{name}"
    python, ready = place / "bin" / "python", place / ".ready"
    wanted = "\n".join([TORCH, *ENVIRONMENTS[name]])
    if ready.is_file() and ready.read_text() == wanted:
        return python
    say(f"making the environment {place.name}")
    # torch by itself first: the version pinned decides which build everything else is resolved against
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(place)], [*install, TORCH], [*install, *ENVIRONMENTS[name]]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotRunError(f"its environment could not be made ({last_line(done.stderr)})")
    ready.write_text(wanted)
    return python


def last_line(text: str) -> str:
    """The last line that says something, without folders and addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = re.sub(r"https?://\S+", "(address)", lines[-1] if lines else "no message")
    return re.sub(r"/[^\s'\"]*/", "", found)[:REASON_CHARACTERS]


def run_measured(command: list[str], work: Path, name: str, extra: dict[str, str]) -> dict[str, Any]:
    """Run under `measure.py`; its figures. What the command prints goes to a file. NotRunError where it fails."""
    figures, log = work / f"{name}.figures.json", work / f"{name}.log"
    with log.open("w") as stream:
        subprocess.run(
            [sys.executable, str(HERE / "measure.py"), str(figures), *command],
            stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **extra}, check=False,
        )  # fmt: skip
    measured: dict[str, Any] = json.loads(figures.read_text())
    if measured["code"]:
        raise NotRunError(f"it failed ({last_line(log.read_text(errors='replace'))})")
    return measured


def home_in(work: Path) -> dict[str, str]:
    """Environment variables that keep a tool's caches out of the user's home, and off the network."""
    places = {"HOME": "home", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "XDG_DATA_HOME": "data", "HF_HOME": "hf"}
    for place in places.values():
        (work / place).mkdir(parents=True, exist_ok=True)
    return {name: str(work / place) for name, place in places.items()} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# --- this project's own processes ----------------------------------------------------------------------------------------


def run_own(method: str, question: Question, work: Path, **options: Any) -> Answer:
    """One of `own.RULES`."""
    name = "".join(letter if letter.isalnum() else "-" for letter in method)
    asked, answered = work / f"{name}.question.json", work / f"{name}.answer.json"
    question.write(asked, **options)
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "plan_peers.own", method, str(asked), str(answered)]
    figures = run_measured(command, work, name, {"PYTHONPATH": path})
    content = json.loads(answered.read_text())
    more = {"threads": content["threads"]}
    return Answer(content["plans"], content["seconds"], figures["seconds"], figures["peak_bytes"], content["remarks"], more)


def run_bitatlas(question: Question, text: Path, counts: tuple[int, int], work: Path) -> Answer:
    """`bitatlas survey ... --no-fuse --tasks none` in a fresh folder; the plan that it wrote, whether or not it recommends it."""
    out = work / "survey"
    rows = ",".join(map(str, (*counts, SURVEY_TEST_ROWS)))
    command = [
        sys.executable, "-m", "bitatlas", "survey", question.model, "--out", str(out), "--formats", ",".join(question.formats),
        "--quantizer", question.quantizer, "--code-bits", str(question.code_bits), "--tokens", str(text), "--rows", rows,
        "--row-length", str(len(question.rows[0])), "--tasks", "none", "--no-fuse", "--seed", str(question.seed),
    ]  # fmt: skip
    figures = run_measured(command, work, "bitatlas", {})
    plan = json.loads((out / "plan.json").read_text())
    remarks = [f"it does not recommend its own plan: {plan['verdict']}"] if plan.get("recommended") is False else []
    searched = figures["seconds"] - other_seconds((work / "bitatlas.log").read_text())
    more = {"versions": {"bitatlas": version("bitatlas")}}
    return Answer({"": plan["modules"]}, searched, figures["seconds"], figures["peak_bytes"], remarks, more)


def other_seconds(log: str) -> float:
    """What the survey's stages that look for no plan took, by its own log."""
    stages = re.finditer(r"^(.+): (\d+\.\d) s$", log, re.MULTILINE)
    return sum(float(stage[2]) for stage in stages if not SEARCH_STAGE.search(stage[1]))


# --- the two peers -------------------------------------------------------------------------------------------------------


def request_of(problem: Problem, work: Path, target: float) -> dict[str, Any]:
    """What both workers are asked. `ids`: [rows, tokens]; `texts`: the same rows for AutoScheme, which reads texts alone."""
    question = problem.question
    low, high = (problem.meter.bank.formats[name] for name in question.formats)
    texts = work / "texts.jsonl"
    if not texts.exists():
        texts.write_text("".join(json.dumps({"text": number_text(row)}) + "\n" for row in question.rows))
    return {
        "model": str(problem.checkpoint.folder),
        "modules": [module.name for module in problem.modules],
        "bits": [low.bits, high.bits],
        "group_size": low.group_size,
        "symmetric": low.symmetric,
        # spelled out: with plain "int" AutoRound leaves modules alone whose sides 32 does not divide, and counts them at 16 bits
        "data_type": "int_sym" if low.symmetric else "int_asym",
        "code_bits": target,
        "ids": question.rows,
        "texts": str(texts),
        "vocabulary": problem.meter.decoder.vocabulary,
    }


def number_text(row: list[int]) -> str:
    """A row as a text of token numbers, twice: AutoScheme drops a text that is shorter than its window without a word, and cuts a longer one."""
    return " ".join(map(str, row + row))


def autoround_bits(answer: dict[str, Any]) -> dict[str, int]:
    """module -> bits out of AutoScheme's layer configuration."""
    return {name: int(entry["bits"]) for name, entry in answer["layers"].items()}


def modelopt_bits(answer: dict[str, Any]) -> dict[str, int]:
    """module -> bits out of ModelOpt's recipes, like "model.layers.0.mlp.up_proj.quant_recipe": "CUSTOM_0(effective-bits: 2.0)"."""
    found = {}
    for name, recipe in answer["recipe"].items():
        width = float(recipe.rpartition("effective-bits: ")[2].rstrip(")"))
        found[name.removesuffix(".quant_recipe")] = round(width)
    return found


def plan_of_bits(problem: Problem, bits: dict[str, int]) -> dict[str, str]:
    """module -> format. NotRunError where a module is missing or got a width that is no candidate."""
    names = {problem.meter.bank.formats[name].bits: name for name in problem.formats}
    plan = {}
    for module in problem.modules:
        if bits.get(module.name) not in names:
            raise NotRunError(f"it gave {module.name} {bits.get(module.name, 'no')} bits, which is no candidate")
        plan[module.name] = names[bits[module.name]]
    return plan


def refuse_unscored(problem: Problem, plan: dict[str, str]) -> None:
    """NotRunError for a plan that raises nothing although there is room: what AutoScheme answers when it has dropped every text."""
    if problem.high not in plan.values() and int(problem.extra.min()) <= problem.room:
        raise NotRunError("it raised no module although there is room, as it does when it has scored nothing")


def run_peer(name: str, problem: Problem, work: Path, folder: Path, say: Callable[[str], None], scoring: str = "") -> Answer:
    """AutoScheme ("autoround") or auto_quantize ("modelopt", with its scoring); its target is lowered while its plan is above the budget."""
    python = python_of(name, folder, say)
    read = {"autoround": autoround_bits, "modelopt": modelopt_bits}[name]
    target = problem.question.code_bits
    label, environment = f"{name}{scoring}", home_in(work / f"{name}{scoring}-home")
    seconds = process_seconds = 0.0
    peak, first = 0, target
    for _ in range(MOST_TRIES):
        asked, answered = work / f"{label}.question.json", work / f"{label}.answer.json"
        request = request_of(problem, work, target)
        asked.write_text(
            json.dumps({**request, "scoring": scoring, "calibration": "mse", "checkpoint": str(work / f"{label}.scores")})
        )
        command = [str(python), str(HERE / f"{name}_worker.py"), str(asked), str(answered)]
        figures = run_measured(command, work, label, {**environment, "PYTHONPATH": ""})
        content = json.loads(answered.read_text())
        seconds, process_seconds = seconds + content["seconds"], process_seconds + figures["seconds"]
        peak = max(peak, figures["peak_bytes"])
        plan = plan_of_bits(problem, read(content))
        if name == "autoround":
            refuse_unscored(problem, plan)
        if problem.spent(problem.choice(plan)) <= problem.limit:
            remarks = (
                [f"its target was lowered from {first:.3f} to {target:.3f} bits to stay within the budget"]
                if target < first
                else []
            )
            return Answer(
                {"": plan}, seconds, process_seconds, peak, remarks, {"versions": content["versions"], "target": target}
            )
        target -= TARGET_STEP
    raise NotRunError(f"its plans stayed above the budget down to a target of {target:.3f} bits")
