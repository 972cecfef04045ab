"""The model card of a packed checkpoint: front matter that a hub reads, what was measured, the plan by layer, how to make it again.

Figures come from the plan and, where it lies beside the plan and is about the same one, from the survey's atlas; nothing is measured
here. A figure says whether the reconstruction was measured (by the survey) or this checkpoint itself (by `verify`).
Left out: everything that a person must write, such as intended use; the base model's card is where that stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitatlas.errors import UserError
from bitatlas.records import Atlas, Measured, ModelInfo, Module, Plan, TaskScore
from bitatlas.records.files import read_record
from bitatlas.records.sizes import inner
from bitatlas.records.text import byte_size, interval, number

TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the base model's card
SURVEYED = "the plan's reconstruction, measured by the survey"
VERIFIED = "this checkpoint, loaded by transformers, measured by `bitatlas verify`"


@dataclass(frozen=True)
class Evidence:
    """What was measured of a plan, for its model card."""

    text: str  # whose rows the damage was measured on
    tasks: tuple[TaskScore, ...]
    damage: Measured | None
    source: str = SURVEYED
    survey: str = ""  # the survey's settings, as a sentence


def atlas_beside(plan_file: Path) -> Atlas | None:
    """Return the survey that a plan lies in, or an applied folder beside it; None where there is none that can be read."""
    for folder in (plan_file.parent, plan_file.parent.parent):
        try:
            if (folder / "atlas.json").is_file():
                return read_record(folder / "atlas.json", Atlas)
        except UserError:
            return None
    return None


def evidence_beside(plan_file: Path, plan: Plan) -> Evidence:
    """Return what the atlas beside the plan says, where it is about the same model and the same choice of formats."""
    atlas = atlas_beside(plan_file.absolute())
    if atlas is None or atlas.model.weights_sha256 != plan.model.weights_sha256:
        return Evidence("rows of a text that is not recorded beside the plan", (), plan.damage.measured)
    same = atlas.plan is not None and (atlas.plan.modules, atlas.plan.codes) == (plan.modules, plan.codes)
    tasks = tuple(score for score in atlas.tasks if score.precision == "plan") if same else ()
    settings = atlas.settings
    survey = (
        f"Surveyed with formats {', '.join(atlas.formats)}, rows {','.join(map(str, settings.get('rows', ())))} of "
        f"{atlas.tokens.row_length} tokens, seed {settings.get('seed')}; bitatlas {atlas.versions.get('bitatlas', 'unknown')}."
    )
    return Evidence(Path(atlas.tokens.source).name, tasks, plan.damage.measured, survey=survey)


def card_text(
    plan: Plan, modules: Sequence[Module], evidence: Evidence, base_card: Path | None, disk_bytes: int, info: ModelInfo
) -> str:
    """Return README.md."""
    name = Path(plan.model.name).name
    parts = [
        f"---\n{_front_matter(plan, evidence, base_card)}---",
        f"# {name}, {number(plan.size.code_bits)} bits a weight",
        (
            f"{plan.model.name} with mixed-precision weights: {len(plan.modules)} linear modules at "
            f"{number(plan.size.code_bits)} bits of codes a weight ({number(plan.size.stored_bits)} with scales and zero-points), "
            f"chosen by bitatlas, quantized by {plan.quantizer}{_tuned(plan)}; everything else as it was ({info.dtype}). "
            f"{byte_size(disk_bytes)} of weights, {byte_size(info.total_bytes)} before. Format: compressed-tensors `pack-quantized`."
        ),
        _usage(info),
        "## What was measured\n\n" + _results(plan, evidence),
        "## Formats by layer\n\n" + formats_table(plan, modules),
        "## How to make it again\n\n" + _reproduce(plan, evidence),
    ]
    return "\n\n".join(parts) + "\n"


def _tuned(plan: Plan) -> str:
    """Return what was done to the codes after they were chosen."""
    tuned = plan.solver.get("tuned")
    return f", then their scales trained on the unquantized model's predictions for {tuned['steps']} steps" if tuned else ""


def _front_matter(plan: Plan, evidence: Evidence, base_card: Path | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    def result(kind: str, dataset: str, metric: str, label: str, value: float) -> Any:
        return EvalResult(
            task_type=kind, dataset_type=dataset, dataset_name=dataset, metric_type=metric, metric_name=label, metric_value=value
        )

    results = []
    if evidence.damage:
        label = "KL(reference || this model), nats/token"
        results.append(result("text-generation", evidence.text, "kl_divergence", label, round(evidence.damage.mean, 6)))
    for score in evidence.tasks:
        accuracy = round(100 * score.correct / score.n, 2)
        results.append(result("text-generation", score.task, "accuracy", f"accuracy, % of {score.n}", accuracy))
    facts: dict[str, Any] = {
        "base_model": plan.model.name,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["bitatlas", "compressed-tensors", "mixed-precision"],
        **_taken_over(base_card),
    }
    if results:
        facts |= {"model_name": Path(plan.model.name).name, "eval_results": results}
    return f"{ModelCardData(**facts).to_yaml()}\n"


def _taken_over(base_card: Path | None) -> dict[str, Any]:
    """Return the base model's licence and language; nothing where its card has no front matter."""
    if base_card is None:
        return {}
    from huggingface_hub import metadata_load

    try:
        content = metadata_load(base_card) or {}
    except Exception:  # yaml raises many kinds; a card that cannot be read has nothing to take over
        return {}
    return {key: content[key] for key in TAKEN_OVER if content.get(key)}


def _usage(info: ModelInfo) -> str:
    rounded = (
        "\n\nScales are float16 numbers. bfloat16 rounds them: load in float32 for the figures below, or in float16."
        if info.dtype == "bfloat16"
        else ""
    )
    return (
        "```python\n# pip install transformers 'compressed-tensors>=0.20'\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")\n'
        f"tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```{rounded}"
    )


def _results(plan: Plan, evidence: Evidence) -> str:
    lines = ["| | |", "|---|---|"]
    if evidence.damage:
        where = f"{evidence.damage.n} {evidence.damage.rows} rows, {evidence.text}"
        lines.append(f"| damage, KL to the unquantized model ({where}) | {interval(evidence.damage, unit=True)} |")
    elif plan.damage.predicted is not None:
        lines.append(f"| damage, predicted and not measured | {number(plan.damage.predicted)} nats/token |")
    else:
        lines.append("| damage | not measured |")
    for score in evidence.tasks:
        low, high = (100 * end for end in score.wilson95)
        chance = "" if score.above_chance else ", below chance" if score.below_chance else ", not above chance"
        lines.append(
            f"| {score.task} | {score.correct}/{score.n}, {100 * score.correct / score.n:.1f}% [{low:.1f}, {high:.1f}]{chance} |"
        )
    verdict = f"\n\n{plan.verdict}" if plan.verdict else ""
    return "\n".join(lines) + f"\n\nMeasured on: {evidence.source}. Intervals: 95 %.{verdict}"


def formats_table(plan: Plan, modules: Sequence[Module]) -> str:
    """Return the formats, a line a layer and a column a kind of module; modules that stay as they are have no format."""
    layers = inner(modules)
    kinds = list(dict.fromkeys(module.kind for module in layers))
    cells: dict[int, dict[str, str]] = {}
    for module in layers:
        row = cells.setdefault(module.layer, {})
        name = plan.modules.get(module.name, "as it was")
        row[module.kind] = name if row.get(module.kind, name) == name else "mixed"
    lines = [f"| layer | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 1)]
    lines += [f"| {layer} | {' | '.join(row.get(kind, '') for kind in kinds)} |" for layer, row in sorted(cells.items())]
    outside = [
        f"{module.part} (`{module.name}`): {plan.modules[module.name]}"
        for module in modules
        if module.name in plan.modules and module.part
    ]
    return "\n".join([*lines, *(["", *outside] if outside else [])])


def _reproduce(plan: Plan, evidence: Evidence) -> str:
    revision = f"revision {plan.model.revision}, " if plan.model.revision else ""
    return (
        "`plan.json` here says which module has which format.\n\n```\n"
        f"pip install 'bitatlas[export]=={version('bitatlas')}'\n"
        f"bitatlas apply {plan.model.name} plan.json --out packed\n"
        f"bitatlas verify {plan.model.name} packed --tokens TEXT\n```\n\n"
        f"The plan is about the weights with sha256 `{plan.model.weights_sha256}` ({revision}quantizer {plan.codes or plan.quantizer})."
        + (f" {evidence.survey}" if evidence.survey else "")
    )
