"""The runtimes that a plan can be exported to, and the export itself: everything is checked first, then written beside and renamed.

Left out: what `apply` does; its packed checkpoint is its own command.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitatlas.errors import UserError
from bitatlas.export import mlx, recipes
from bitatlas.export.blueprint import with_file
from bitatlas.export.card import atlas_beside
from bitatlas.export.gguf import write as gguf
from bitatlas.export.gguf.write import with_gguf
from bitatlas.export.packed import apply_plan, check_transposed, fitted
from bitatlas.export.target import Job, Target
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.model.folder import atomic_folder, check_out
from bitatlas.progress import Reporter
from bitatlas.records import Module, Plan
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.formats import GROUP_SIZES, LLAMA_CPP, Format
from bitatlas.records.plan import without_kept
from bitatlas.records.runtimes import MADE_FOR, WIDTHS, Integers
from bitatlas.records.sizes import unlike_experts, unlike_partners
from bitatlas.records.text import listed

# --- vLLM: the packed checkpoint of `apply`, refused where vLLM cannot be expected to run it ----------------------------
#
# vLLM reads compressed-tensors `pack-quantized` with one format for q/k/v and one for gate/up, which it runs as one matrix each. Its
# weight-only scheme has 2 to 8 bits symmetric; `apply` writes zero-points in a way that transformers reads and vLLM does not.
# Not run here: vLLM needs a GPU. Source: vLLM, `compressed_tensors/schemes/compressed_tensors_wNa16.py`.


def _write_packed(job: Job, folder: Path) -> list[str]:
    notes = apply_plan(job.model, job.plan_file, folder, job.reporter, runtime="vllm").notes
    return ["the packed checkpoint of bitatlas apply; in vLLM it was not run here", *notes]


VLLM = Target(
    "vllm",
    "the packed checkpoint of `apply`, where vLLM's rules allow it",
    Integers(bits=WIDTHS, symmetric=(True,)),
    _write_packed,
    needs_model=True,
    whole_groups=True,
    fused=True,
)

TARGETS: dict[str, Target] = {target.name: target for target in (VLLM, mlx.TARGET, *recipes.TARGETS, gguf.TARGET)}


def with_runtime_file(checkpoint: Checkpoint, runtime: str, quantizer: str) -> Checkpoint:
    """Return the checkpoint with what its modules, and all the rest, take in the runtime's files; as it is where that is not known here.

    UserError for a model of which no GGUF is written here.
    """
    return with_gguf(checkpoint) if runtime == LLAMA_CPP else with_file(checkpoint, runtime, quantizer)


TRANSPOSED = "--to {0}: {1} is a Conv1D (GPT-2's transposed linear layer), which {0} cannot quantize by rows"


@dataclass(frozen=True)
class Exported:
    """What was written, and the lines that the command prints about it."""

    out: Path
    target: Target
    files: list[str]
    notes: list[str]


def get_target(name: str) -> Target:
    """Return the runtime called `name`; UserError with the nearest valid name otherwise."""
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.0)[0]
        raise UserError(f"--to: unknown runtime {name!r}; nearest is {near!r} (valid: {', '.join(TARGETS)})")
    return TARGETS[name]


def export_plan(
    plan_file: Path, target_name: str, out: Path, model_name: str | None, reporter: Reporter, base_gguf: Path | None = None
) -> Exported:
    """Write `target_name`'s files for a plan to `out`; UserError, and nothing written, where that is impossible."""
    target = get_target(target_name)
    whole_plan = read_record(plan_file, Plan)
    plan = without_kept(whole_plan)
    check_out(out)
    if base_gguf is not None and (target is not gguf.TARGET or model_name is None):
        raise UserError(f"--base-gguf {base_gguf}: belongs to --to llama.cpp with --model")
    if model_name is None and target.needs_model:
        raise UserError(f"--to {target.name}: writes weights, so it needs --model, the checkpoint that the plan was made for")
    if not plan.modules:
        raise UserError(f"{plan_file}: the plan quantizes no module, so there is nothing to export")
    for name, format_name in plan.modules.items():
        _check_format(target, name, format_name, plan.formats[format_name])
    checkpoint = None
    if model_name is not None:
        with reporter.stage("opening the checkpoint"):
            if not target.transposed:
                check_transposed(plan, model_name, TRANSPOSED.format(target.name, "{}"))
            checkpoint = open_checkpoint(model_name, plan.model.revision)
            checkpoint = fitted(plan, checkpoint)
    modules = _modules(plan, plan_file, checkpoint)
    job = Job(plan, plan_file, checkpoint, modules, reporter, model_name or "", base_gguf)
    _check_outside(target, job)
    _check_experts(target, job)
    _check_rows(target, job)
    _check_fused(target, plan)
    notes = (
        [] if modules else ["the model's modules are not known here, so row lengths were not checked: --model MODEL does that"]
    )
    with atomic_folder(out) as folder:
        notes += target.write(job, folder)
        write_text(folder / "plan.json", to_json(whole_plan))
        files = sorted(file.name for file in folder.iterdir())
    return Exported(out, target, files, notes)


def _modules(plan: Plan, plan_file: Path, checkpoint: Checkpoint | None) -> Sequence[Module]:
    if checkpoint is not None:
        return checkpoint.modules
    atlas = atlas_beside(plan_file.absolute())
    return atlas.modules if atlas is not None and atlas.model.weights_sha256 == plan.model.weights_sha256 else ()


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_format(target: Target, module: str, name: str, fmt: Format) -> None:
    if not target.holds.fits(fmt):
        raise UserError(
            f"--to {target.name}: {module} has the format {name}, which {target.name} cannot hold; "
            f"the nearest that it can is {target.holds.nearest(fmt)}"
        )


def _check_outside(target: Target, job: Job) -> None:
    """Refuse an embedding or a head that the target's files can hold only as it is."""
    for module in job.modules:
        if module.part and module.name in job.formats and module.part not in MADE_FOR[target.name].outside:
            raise UserError(
                f"--to {target.name}: the plan quantizes {module.name} ({module.part}), which stays as it is there: "
                f"make the plan in a survey with --for {target.name}"
            )


def _check_experts(target: Target, job: Job) -> None:
    """Refuse experts that are not written for the target, or not in these formats."""
    if not any(module.expert is not None and module.name in job.formats for module in job.modules):
        return
    runtime, advice = MADE_FOR[target.name], f"make the plan in a survey with --for {target.name}"
    for module in job.modules:
        fmt = job.formats.get(module.name)
        if module.expert is None or fmt is None or fmt.bits in runtime.experts:
            continue
        widths = listed(f"{width}" for width in runtime.experts)
        held = f"holds experts of {widths} bits" if runtime.experts else "experts are not written here"
        raise UserError(f"--to {target.name}: the plan quantizes {module.name}, an expert, to {fmt.name}; {held}: {advice}")
    unlike = unlike_experts(job.plan, job.modules) if runtime.alike else None
    if unlike:
        raise UserError(
            f"--to {target.name}: {unlike[0]} and {unlike[1]} have different formats; a layer's experts have one there: {advice}"
        )


def _check_rows(target: Target, job: Job) -> None:
    """Refuse groups that do not divide the rows: a short last group is ours, many runtimes have none."""
    if not target.whole_groups:
        return
    for module in job.modules:
        fmt = job.formats.get(module.name)
        width = module.shape[1]
        if fmt is None or width % fmt.group_size == 0:
            continue
        fitting = [
            size for size in sorted(GROUP_SIZES, reverse=True) if width % size == 0 and target.holds.fits(_regrouped(fmt, size))
        ]
        hint = f"the nearest that it can is {_regrouped(fmt, fitting[0]).name}" if fitting else "no group size of it does"
        raise UserError(
            f"--to {target.name}: {module.name} has the format {fmt.name} and rows of {width} weights, which groups of "
            f"{fmt.group_size} do not divide, and {target.name} cannot hold a short last group; {hint}"
        )


def _regrouped(fmt: Format, size: int) -> Format:
    return Format(fmt.bits, size, fmt.symmetric, fmt.scale_bits, fmt.zero_bits)


def _check_fused(target: Target, plan: Plan) -> None:
    """Refuse several formats in modules that the runtime makes one matrix of."""
    if target.fused and (unlike := unlike_partners(plan)):
        name, format_name, other, other_format = unlike
        raise UserError(
            f"--to {target.name}: {name} has the format {format_name} and {other} {other_format}, but {target.name} runs them as one "
            "matrix in one format: make the plan in a survey with --fuse"
        )
