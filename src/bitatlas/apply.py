"""A plan becomes a checkpoint: packed weights that transformers loads, with everything a model's folder needs beside them.

The checkpoint is never loaded. Its headers say what there is, the plan says what becomes of it, so the new files' sizes and headers
are known before a weight is read; then one module after the other goes from the bank (or through the quantizer) into its place, and
every other tensor is copied byte for byte. At most one module is held, beside its codes. All of it happens in a hidden folder next
to the one that was asked for, which is renamed when it is whole; `config.json` and the files' headers come last, so that what an
interrupted run leaves is nothing that loads, and the next run to the same place removes it.

Left out: other runtimes' layouts, and weights that a checkpoint stores under names that the model does not have (fused, renamed).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitatlas.bank import bank_of_plan
from bitatlas.checkpoint import Checkpoint, open_checkpoint
from bitatlas.errors import UserError
from bitatlas.export.card import Story, card_text, story_beside
from bitatlas.export.compressed_tensors import PACKAGE, layout, overheads, part_bytes, quantization_config, tensors
from bitatlas.export.place import beside, carried, check_out, check_room
from bitatlas.export.shards import SHARD_BYTES, Entry, Shard, Writer, cut
from bitatlas.files import read_record, to_json, write_text
from bitatlas.folder import read_header
from bitatlas.planning.budget import size_of
from bitatlas.progress import Reporter
from bitatlas.quantizers import get_quantizer
from bitatlas.quantizers.codes import Blocks, Codes
from bitatlas.records import Module, Plan

SMALL_BYTES = 2**20  # room for config, plan, card and index
COPIED_TOGETHER = 2**24  # bytes
DTYPE_WORDS = {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Applied:
    """What was written. `causes`: bytes on disk that the plan does not count, or counts and are not there (negative)."""

    out: Path
    plan: Plan
    promised_bytes: int  # the plan's, of all weights
    disk_bytes: int  # of the weights' files
    causes: dict[str, int]
    carried: list[str]


@dataclass(frozen=True)
class Blueprint:
    """The new weights' files, before they are written."""

    sources: dict[str, tuple[Path, int, int]]  # tensor of the checkpoint -> its file, and its bytes' place there
    keys: dict[str, str]  # module of the plan -> its tensor in the checkpoint
    kept: list[str]  # the other tensors
    shards: list[Shard]
    causes: dict[str, int]

    @property
    def disk_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)


def apply_plan(model_name: str, plan_file: Path, out: Path, reporter: Reporter, shard_bytes: int = SHARD_BYTES) -> Applied:
    """Write the packed checkpoint to `out`; UserError, and nothing written, where that is impossible."""
    check_package()
    plan = read_record(plan_file, Plan)
    _check_formats(plan)
    get_quantizer(plan.quantizer).check(list(plan.formats.values()))
    check_out(out)
    with reporter.stage("opening the checkpoint"):
        checkpoint = open_checkpoint(model_name, plan.model.revision, fuse=False)
        check_fits(plan, checkpoint)
        skeleton = checkpoint.skeleton()
        blueprint = draw(plan, checkpoint, skeleton, shard_bytes)
        others = carried(checkpoint.folder)
        check_room(out, blueprint.disk_bytes + sum(file.stat().st_size for file in others) + SMALL_BYTES)
        if get_quantizer(plan.quantizer).uses_rows:
            for module in plan.modules:
                bank_of_plan(plan, plan_file, skeleton, [module])
    size = size_of(checkpoint.modules, plan.modules, checkpoint.info)
    found = Applied(out, plan, size.total_bytes, blueprint.disk_bytes, blueprint.causes, [file.name for file in others])
    story = story_beside(plan_file, plan)
    with beside(out) as folder:
        with reporter.stage("packing") as progress:
            _write_weights(folder, plan, plan_file, checkpoint, skeleton, blueprint, progress)
        checkpoint.check_unchanged()
        for file in others:
            shutil.copyfile(file, folder / file.name)
        write_text(folder / "plan.json", to_json(plan))
        write_text(folder / "README.md", card_of(plan, checkpoint, story, found.disk_bytes))
        write_text(folder / "config.json", config_text(plan, checkpoint, skeleton))
    return found


# --- checks ------------------------------------------------------------------------------------------------------------


def check_package() -> None:
    """UserError where the package that reads packed checkpoints is not here."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError("packed checkpoints need a package that is not here: pip install 'bitatlas[export]'")


def check_fits(plan: Plan, checkpoint: Checkpoint) -> None:
    """UserError where the plan is about other weights."""
    if plan.model.weights_sha256 != checkpoint.info.weights_sha256:
        raise UserError(f"{checkpoint.info.name}: these are not the weights that the plan was made for ({plan.model.name})")
    unknown = sorted(set(plan.modules) - {module.name for module in checkpoint.modules})
    if unknown:
        raise UserError(f"the plan names {unknown[0]}, which the checkpoint lacks")


def _check_formats(plan: Plan) -> None:
    foreign = [fmt for fmt in plan.formats.values() if fmt.runtime]
    if foreign:
        raise UserError(
            f"the plan's formats ({foreign[0].name}) are of the runtime {foreign[0].runtime}: use bitatlas export --to {foreign[0].runtime}"
        )


# --- what will be written ----------------------------------------------------------------------------------------------


def draw(plan: Plan, checkpoint: Checkpoint, skeleton: nn.Module, shard_bytes: int = SHARD_BYTES) -> Blueprint:
    """Names, places and sizes of all tensors; UserError where a module cannot be packed."""
    entries, sources = sources_of(checkpoint)
    keys = weight_keys(plan, skeleton, entries)
    kept = [key for key in entries if key not in set(keys.values())]
    whole = get_quantizer(plan.quantizer).whole_zeros
    wanted, causes = [entries[key] for key in kept], Counter[str]()
    for module in _planned(plan, checkpoint):
        fmt = plan.formats[plan.modules[module.name]]
        prefix = keys[module.name].removesuffix("weight")
        for suffix, part in layout(module.shape, fmt, whole).items():
            wanted.append(Entry(prefix + suffix, DTYPE_WORDS[part[0]], part[1], part_bytes(part)))
        causes.update(overheads(module.shape, fmt, whole))
    shards = cut(wanted, shard_bytes)
    causes["headers of the files"] = sum(len(shard.header) for shard in shards)
    return Blueprint(sources, keys, kept, shards, {name: count for name, count in causes.items() if count})


def sources_of(checkpoint: Checkpoint) -> tuple[dict[str, Entry], dict[str, tuple[Path, int, int]]]:
    """Every tensor of the checkpoint: what it is, and its file with its bytes' first place and end there."""
    entries, sources = {}, {}
    for file in checkpoint.files:
        header = read_header(file)
        start = file.stat().st_size - max((e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"), default=0)
        for key, entry in header.items():
            if key != "__metadata__":
                first, end = entry["data_offsets"]
                entries[key] = Entry(key, entry["dtype"], tuple(entry["shape"]), end - first)
                sources[key] = (file, start + first, start + end)
    return entries, sources


def weight_keys(plan: Plan, skeleton: nn.Module, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Module of the plan -> the checkpoint's name of its weight; UserError where it has none that can be packed."""
    return {name: _key(name, skeleton, entries) for name in plan.modules}


def _planned(plan: Plan, checkpoint: Checkpoint) -> list[Module]:
    return [module for module in checkpoint.modules if module.name in plan.modules]


def _key(name: str, skeleton: nn.Module, entries: Mapping[str, Entry]) -> str:
    """The checkpoint's name of a module's weight: the model's own, or without the base model's prefix."""
    if isinstance(skeleton.get_submodule(name), Conv1D):
        raise UserError(f"{name}: is a Conv1D (GPT-2's transposed linear layer), whose weight cannot be packed")
    bare = name.removeprefix(f"{getattr(skeleton, 'base_model_prefix', '')}.")
    for key in (f"{name}.weight", f"{bare}.weight"):
        if key in entries:
            return key
    raise UserError(f"{name}: the checkpoint stores this weight under another name, which cannot be followed")


def config_text(plan: Plan, checkpoint: Checkpoint, skeleton: nn.Module) -> str:
    """The checkpoint's own config, with how to read the weights."""
    content: dict[str, Any] = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    ignored = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear) and name not in plan.modules]
    modules = _planned(plan, checkpoint)
    content["quantization_config"] = quantization_config(
        {module.name: plan.formats[plan.modules[module.name]] for module in modules},
        {module.name: module.shape for module in modules},
        ignored,
        get_quantizer(plan.quantizer).whole_zeros,
        version("compressed-tensors"),
    )
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def card_of(plan: Plan, checkpoint: Checkpoint, story: Story, disk_bytes: int) -> str:
    source = checkpoint.folder / "README.md"
    return card_text(plan, checkpoint.modules, story, source if source.is_file() else None, disk_bytes, checkpoint.info)


# --- writing -----------------------------------------------------------------------------------------------------------


def _write_weights(
    folder: Path, plan: Plan, plan_file: Path, checkpoint: Checkpoint, skeleton: nn.Module, blueprint: Blueprint, progress: Any
) -> None:
    with Writer(folder, blueprint.shards) as writer:
        for key in blueprint.kept:
            copy_tensor(writer, key, *blueprint.sources[key])
        modules = _planned(plan, checkpoint)
        for done, module in enumerate(modules, start=1):
            key = blueprint.keys[module.name]
            weight = read_tensor(blueprint.sources[key][0], key)
            for suffix, tensor in _packed(plan, plan_file, skeleton, module.name, weight).items():
                writer.write(key.removesuffix("weight") + suffix, _bytes(tensor))
            progress(done, len(modules))


def copy_tensor(writer: Writer, key: str, file: Path, start: int, end: int) -> None:
    """The bytes of `file` from `start` to `end` become the tensor `key`."""
    with file.open("rb") as stream:
        stream.seek(start)
        while start < end:
            if not (piece := stream.read(min(COPIED_TOGETHER, end - start))):
                raise UserError(f"{file}: ends too early")
            start += len(piece)
            writer.write(key, piece)


def read_tensor(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as reader:
        return reader.get_tensor(key)


def codes_of(plan: Plan, plan_file: Path, skeleton: nn.Module, name: str, weight: Tensor) -> Codes:
    """The module's codes, of a plan of integer formats."""
    found = stored_of(plan, plan_file, skeleton, name, weight)
    assert isinstance(found, Codes)
    return found


def stored_of(plan: Plan, plan_file: Path, skeleton: nn.Module, name: str, weight: Tensor) -> Codes | Blocks:
    """What the bank holds of a module. `skeleton` holds its weight, in float32 as everything was measured, for this long alone."""
    module = skeleton.get_submodule(name)
    before = module.weight
    module.weight = nn.Parameter(weight.float(), requires_grad=False)
    try:
        return bank_of_plan(plan, plan_file, skeleton, [name]).codes(name, plan.modules[name])
    finally:
        module.weight = before


def _packed(plan: Plan, plan_file: Path, skeleton: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
    """The module's tensors."""
    codes = codes_of(plan, plan_file, skeleton, name, weight)
    try:
        return tensors(codes, plan.formats[plan.modules[name]])
    except ValueError as error:
        raise UserError(f"{name}: cannot be packed as {plan.modules[name]}: {error}") from None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
