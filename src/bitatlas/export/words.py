"""What the folders of several targets share: their README, their scripts, JSON as it is written."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bitatlas.export.target import Job
from bitatlas.words import byte_size, interval, number

SCRIPTS = Path(__file__).parent / "scripts"
RECIPE = (
    "The formats carry over, the codes do not: the library quantizes by itself. The damage above is that of other codes in the same "
    "formats, so measure what comes out."
)


def json_text(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def yaml_text(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)


def copy_script(folder: Path, target: str, name: str = "quantize.py") -> None:
    """The target's program, under the name that its README gives."""
    shutil.copyfile(SCRIPTS / f"{target}.py", folder / name)


def write_readme(folder: Path, job: Job, title: str, *parts: str) -> None:
    """README.md: what plan this is, then the target's own paragraphs."""
    (folder / "README.md").write_text("\n\n".join([f"# {title}", plan_text(job), *parts]) + "\n", encoding="utf-8")


def write_recipe(folder: Path, job: Job, library: str, files: Mapping[str, str], script: str, use: str, codes: str = "") -> str:
    """Files that `library` quantizes by, its script and its README; the note that the command prints. `codes`: whose they will be."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    copy_script(folder, script)
    write_readme(folder, job, f"For {library}", RECIPE, use)
    codes = codes or f"quantize.py makes {library}'s own"
    return f"the formats carry over, the codes do not: {codes}"


def plan_text(job: Job) -> str:
    """The plan in a few lines, with what was promised and how that is known."""
    plan = job.plan
    counts = ", ".join(f"{count} at {name}" for name, count in sorted(Counter(plan.modules.values()).items()))
    if plan.damage.measured:
        damage = f"{interval(plan.damage.measured, unit=True)}, measured on {plan.damage.measured.rows} rows of its survey"
    elif plan.damage.predicted is not None:
        damage = f"{number(plan.damage.predicted)} nats/token, predicted and not measured"
    else:
        damage = "not measured"
    return (
        f"A plan of bitatlas for {plan.model.name} (weights with sha256 `{plan.model.weights_sha256}`): "
        f"{len(plan.modules)} modules, {counts}; {number(plan.size.code_bits)} bits of codes a weight, "
        f"{byte_size(plan.size.total_bytes)} by its own count. Damage (KL to the unquantized model) of {plan.quantizer} codes: {damage}. "
        "`plan.json` is the plan."
    )
