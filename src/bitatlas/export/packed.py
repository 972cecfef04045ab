"""A plan becomes a checkpoint: packed weights that transformers loads, with everything a model's folder needs beside them.

The checkpoint is never loaded. Its headers say what there is, the plan says what becomes of it, so the new files' sizes and headers
are known before a weight is read; then one module after the other goes from the bank (or through the quantizer) into its place, and
every other tensor is copied byte for byte, or written as transformers loads it where the checkpoint stores it in other pieces
(`export/conversion.py`). At most one module is held, beside its codes. All of it happens in a hidden folder next to the one that was
asked for; `config.json` and the files' headers come last, so that what an interrupted run leaves is nothing that loads, and the next
run to the same place removes it. The finished folder is loaded and run (`export/trial.py`), and only then renamed.

Not everything that compressed-tensors holds does transformers load: no embedding, no Conv1D, and experts only if all of them share one
symmetric format. Where a plan goes beyond that the folder holds the same tensors, says so in its config (`OURS`), so that nothing takes
it for what it cannot read, and is opened by `load_packed`.

A module whose weight transformers reads before it unpacks any is written whole, with the plan's own values: what was measured, in more
bytes than the plan counts; the note says which and how many. Left out: other runtimes' layouts.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.export.card import Evidence, card_text, evidence_beside
from bitatlas.export.compressed_tensors import PACKAGE, layout, overheads, part_bytes, quantization_config, tensors
from bitatlas.export.conversion import exchanged, pieces, unpackable
from bitatlas.export.trial import OURS, PACK_QUANTIZED, SUFFIXES, check_folder, named_class
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint, skeleton_of
from bitatlas.model.decoder import Decoder
from bitatlas.model.folder import atomic_folder, check_free_space, check_out, companion_files, find_folder, read_config
from bitatlas.model.linear import is_transposed
from bitatlas.model.tensor_files import DTYPES, SHARD_BYTES, Conversion, Entry, Shard, Writer, read_header, split_shards
from bitatlas.progress import Reporter
from bitatlas.quantize import get_quantizer
from bitatlas.quantize.bank import bank_of_plan, needs_bank
from bitatlas.quantize.codes import Codes
from bitatlas.quantize.ggml import Blocks
from bitatlas.records import Module, Plan
from bitatlas.records.files import read_record, to_json, write_text
from bitatlas.records.formats import stored_bytes
from bitatlas.records.text import listed

SMALL_BYTES = 2**20  # room for config, plan, card and index
COPIED_TOGETHER = 2**24  # bytes
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}
TRANSFORMERS = "5.24"  # in which was tried what it loads
EXPERTS_TARGET = "re:.*\\.experts\\.\\d+\\..*"
FLOATS = ("F64", "F32", "F16", "BF16")  # in which a module's values can be written whole

Conversions = dict[str, dict[str, Callable[[Tensor], Tensor]]]  # parameter of the model -> new tensors -> how each is made of it


@dataclass(frozen=True)
class Applied:
    """What was written. `causes`: bytes on disk that the plan does not count, or counts and are not there (negative)."""

    out: Path
    plan: Plan
    promised_bytes: int  # the plan's, of all weights
    disk_bytes: int  # of the weights' files
    causes: dict[str, int]
    carried: list[str]
    whole: list[str]  # modules of the plan that are not packed
    converted: list[str]  # tensors that are not written as the checkpoint stores them, packed ones apart
    tried: str  # how the folder was loaded and run
    beyond: str = ""  # why transformers alone does not load the folder

    @property
    def notes(self) -> list[str]:
        """Return lines that the command prints."""
        lines = []
        if self.beyond:
            lines.append(f"Opened by bitatlas.load_packed: {self.beyond}")
        if self.whole:
            lines.append(f"Written whole, since transformers reads them before it unpacks any: {listed(self.whole)}")
        if self.converted:
            lines.append(
                f"Written as transformers holds them, not as the checkpoint does: {len(self.converted)} tensors like {self.converted[0]}"
            )
        return [*lines, f"Tried: {self.tried}"]


@dataclass(frozen=True)
class Piece:
    """Some rows of a module, which are a tensor of their own: gate and up of an expert, for one."""

    prefix: str  # what its tensors' names begin with
    shape: tuple[int, int]
    start: int = 0  # its first row


@dataclass(frozen=True)
class Blueprint:
    """The new weights' files, before they are written."""

    sources: dict[str, tuple[Path, int, int]]  # tensor of the checkpoint -> its file, and where its bytes begin and end there
    conversion: Conversion
    packed: dict[str, list[Piece]]  # module of the plan -> what it is written as
    whole: dict[str, Entry]  # module of the plan that is not packed -> its tensor
    copied: list[str]  # tensors of the checkpoint
    converted: Conversions
    shards: list[Shard]
    causes: dict[str, int]
    aliases: dict[str, str]  # packed module -> its name in the class that the config names, where that is another one
    beyond: str  # why transformers alone does not load it

    @property
    def disk_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def unused(self) -> set[str]:
        """Return the tensors that the model passes over, by the names that transformers gives them."""
        return {name for key in self.copied if (name := self.conversion.target(key)[0]) not in self.conversion.origins}

    def read(self, parameter: str) -> Tensor:
        """Return a parameter of the model as the checkpoint has it."""
        return self.conversion.read(parameter, lambda key: read_tensor(self.sources[key][0], key))


def apply_plan(
    model_name: str, plan_file: Path, out: Path, reporter: Reporter, shard_bytes: int = SHARD_BYTES, runtime: str = "transformers"
) -> Applied:
    """Write the packed checkpoint to `out`; UserError, and nothing written, where that is impossible. `runtime`: that reads it, if not transformers."""
    check_package()
    plan = read_record(plan_file, Plan)
    _check_formats(plan)
    get_quantizer(plan.quantizer).check(list(plan.formats.values()))
    check_out(out)
    with reporter.stage("opening the checkpoint"):
        checkpoint = fitted(plan, open_checkpoint(model_name, plan.model.revision, fuse=False))
        skeleton, decoder = checkpoint.skeleton(), checkpoint.meta_decoder()
        blueprint = blueprint_of(plan, checkpoint, skeleton, shard_bytes)
        others = companion_files(checkpoint.folder)
        check_free_space(out, blueprint.disk_bytes + sum(file.stat().st_size for file in others) + SMALL_BYTES)
        if needs_bank(plan):
            for module in plan.modules:
                bank_of_plan(plan, plan_file, decoder, [module])
    evidence = evidence_beside(plan_file, plan)
    with atomic_folder(out) as folder:
        with reporter.stage("packing") as progress:
            _write_weights(folder, plan, plan_file, checkpoint, decoder, blueprint, progress)
        checkpoint.check_unchanged()
        for file in others:
            shutil.copyfile(file, folder / file.name)
        write_text(folder / "plan.json", to_json(plan))
        write_text(folder / "README.md", card_of(plan, checkpoint, evidence, blueprint.disk_bytes))
        layout_name = OURS if blueprint.beyond and runtime == "transformers" else PACK_QUANTIZED
        write_text(folder / "config.json", config_text(plan, checkpoint, skeleton, blueprint, layout_name))
        with reporter.stage("loading it in transformers"):
            dtypes = {name: DTYPES[entry.dtype] for name, entry in blueprint.whole.items()} | _rounded(
                plan, checkpoint, blueprint
            )
            tried = check_folder(folder, plan, plan_file, checkpoint, dtypes, blueprint.unused, bool(blueprint.beyond))
    return Applied(
        out, plan, plan.size.total_bytes, blueprint.disk_bytes, every_cause(plan, blueprint), [file.name for file in others],
        list(blueprint.whole), [name for parts in blueprint.converted.values() for name in parts], tried,
        blueprint.beyond,
    )  # fmt: skip


def _rounded(plan: Plan, checkpoint: Checkpoint, blueprint: Blueprint) -> dict[str, torch.dtype]:
    """Return what transformers unpacks in another dtype than float32: experts that it merges, in that of their scales."""
    experts = [m for m in _planned(plan, checkpoint) if _is_part(m) and _keys_of(m, blueprint.conversion)]
    return {} if blueprint.beyond else {module.name: torch.float16 for module in experts}


def promised_disk_bytes(plan: Plan, blueprint: Blueprint) -> int:
    """Return the bytes of the weights' files, if the plan counts rightly."""
    return plan.size.total_bytes + sum(blueprint.causes.values())


def every_cause(plan: Plan, blueprint: Blueprint) -> dict[str, int]:
    """Return the blueprint's causes, and what the plan counts wrongly."""
    wrong = blueprint.disk_bytes - promised_disk_bytes(plan, blueprint)
    return {**blueprint.causes, **({"counted otherwise by the plan": wrong} if wrong else {})}


# --- checks ------------------------------------------------------------------------------------------------------------


def check_package() -> None:
    """Raise UserError where the package that reads packed checkpoints is not here."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError("packed checkpoints need a package that is not here: pip install 'bitatlas[export]'")


def fitted(plan: Plan, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the outer modules that the plan names among its modules; UserError where the plan is about other weights."""
    if plan.model.weights_sha256 != checkpoint.info.weights_sha256:
        raise UserError(f"{checkpoint.info.name}: these are not the weights that the plan was made for ({plan.model.name})")
    checkpoint = checkpoint.planning(module for module in checkpoint.outer if module.name in plan.modules)
    unknown = sorted(set(plan.modules) - {module.name for module in checkpoint.modules})
    if unknown:
        raise UserError(f"the plan names {unknown[0]}, which the checkpoint lacks")
    return checkpoint


def check_transposed(plan: Plan, model_name: str, message: str) -> None:
    """Raise UserError for GPT-2's transposed layers, from the config alone: before a byte of the weights is read. `message`: about a module."""
    folder = find_folder(model_name, plan.model.revision)
    kinds = dict(skeleton_of(read_config(folder, model_name), model_name).named_modules())
    for name in plan.modules:
        if is_transposed(kinds.get(name)):
            raise UserError(message.format(name))


def _check_formats(plan: Plan) -> None:
    foreign = [fmt for fmt in plan.formats.values() if fmt.runtime]
    if foreign:
        raise UserError(
            f"the plan's formats ({foreign[0].name}) are of the runtime {foreign[0].runtime}: use bitatlas export --to {foreign[0].runtime}"
        )


# --- what will be written ----------------------------------------------------------------------------------------------


def blueprint_of(plan: Plan, checkpoint: Checkpoint, skeleton: nn.Module, shard_bytes: int = SHARD_BYTES) -> Blueprint:
    """Return names, places and sizes of all tensors; UserError where a module cannot be packed."""
    entries, sources = sources_of(checkpoint)
    conversion = conversion_of(skeleton, entries)
    modules = _planned(plan, checkpoint)
    _check_origins(modules, conversion)
    early, beyond = _beyond_transformers(plan, modules, skeleton, conversion)
    whole = {name: _whole_entry(name, conversion, entries) for name in ([] if beyond else early)}
    swapped = {} if beyond else exchanged(skeleton)
    packed = {m.name: _pieces(m, conversion, entries, swapped) for m in modules if m.name not in whole}
    other = _named_conversion(checkpoint, conversion, entries)
    converted = _converted(modules, swapped, conversion, other)
    taken = {module.parameter for module in modules} | set(converted)
    gone = {key for parameter in taken for key in conversion.origins[parameter].all_keys}
    copied = [key for key in entries if key not in gone]
    new_entries = [
        _entry(name, how(_meta(conversion, p, entries))) for p, parts in converted.items() for name, how in parts.items()
    ]
    wanted = [entries[key] for key in copied] + new_entries + list(whole.values())
    causes = Counter[str]()
    whole_zeros = get_quantizer(plan.quantizer).whole_zeros
    for module in modules:
        fmt = plan.formats[plan.modules[module.name]]
        if module.name in whole:
            causes["modules written whole, not packed"] += whole[module.name].size_bytes - stored_bytes(module.shape, fmt)
            continue
        for piece in packed[module.name]:
            for suffix, part in layout(piece.shape, fmt, whole_zeros).items():
                wanted.append(Entry(piece.prefix + suffix, DTYPE_WORDS[part[0]], part[1], part_bytes(part)))
            causes.update(overheads(piece.shape, fmt, whole_zeros))
        parted = sum(stored_bytes(piece.shape, fmt) for piece in packed[module.name]) - stored_bytes(module.shape, fmt)
        causes["weights in parts, each padded to whole bytes"] += parted
    merged = {*converted, *conversion.converted} & taken
    stored = {key for parameter in merged for key in conversion.origins[parameter].all_keys}
    apart = [_entry(name, conversion.converted[name]) for name in merged - set(converted)]  # of planned modules
    grown = sum(entry.size_bytes for entry in new_entries + apart) - sum(entries[key].size_bytes for key in stored)
    causes["tensors in the form that transformers loads"] = grown
    shards = split_shards(wanted, shard_bytes)
    causes["headers of the files"] = sum(len(shard.header) for shard in shards)
    nonzero = {name: count for name, count in causes.items() if count}
    aliases = _aliases((m.name for m in modules if m.name in packed and not _is_part(m)), conversion, other)
    return Blueprint(sources, conversion, packed, whole, copied, converted, shards, nonzero, aliases, beyond)


def _is_part(module: Module) -> bool:
    """Return whether a module's weight is a part of a tensor."""
    return module.parameter != f"{module.name}.weight"


def _beyond_transformers(
    plan: Plan, modules: Sequence[Module], skeleton: nn.Module, conversion: Conversion
) -> tuple[list[str], str]:
    """Return (modules whose weight transformers reads before it unpacks any, why it does not load the others packed; "": it does)."""
    kinds = dict(skeleton.named_modules())
    alone = [module for module in modules if not _is_part(module)]
    embedding = next((m.name for m in alone if isinstance(kinds[m.name], nn.Embedding)), "")
    transposed = next((m.name for m in alone if is_transposed(kinds[m.name])), "")
    if embedding or transposed:
        what = f"{embedding} is an embedding" if embedding else f"{transposed} is a Conv1D (GPT-2's transposed linear layer)"
        return [], f"{what}, which transformers {TRANSFORMERS} does not load packed"
    swapped = exchanged(skeleton)
    experts = [m for m in modules if _is_part(m) and m.parameter.rpartition(".")[0] not in swapped]
    formats = {plan.modules[module.name] for module in experts}
    is_usual = len(formats) < 2 and all(
        plan.formats[plan.modules[m.name]].symmetric and m.shape[1] % plan.formats[plan.modules[m.name]].group_size == 0
        for m in experts
    )
    by_rule = all(_keys_of(module, conversion) for module in experts)
    if not (is_usual and by_rule):
        how = "in one symmetric format for all" if by_rule else "where the checkpoint stores them one by one"
        return [], f"transformers {TRANSFORMERS} loads packed experts only {how}"
    early = unpackable(skeleton, (module.name for module in alone))
    if early and len(early) == len(modules):
        return [], f"transformers {TRANSFORMERS} reads {early[0]}, and every other module of the plan, before it unpacks any"
    return early, ""


def _keys_of(module: Module, conversion: Conversion) -> list[str]:
    """Return the checkpoint's tensors that one expert's weight is made of, its rows' order; [] where experts are not stored one by one."""
    origin, count = conversion.origins[module.parameter], conversion.shapes[module.parameter][0]
    lists = list(origin.keys.values())
    if origin.rule is None or any(len(keys) != count for keys in lists):
        return []
    assert module.expert is not None
    patterns = [p for p in origin.rule.source_patterns if p in origin.keys]
    return [origin.keys[pattern][module.expert] for pattern in patterns]


def _pieces(
    module: Module, conversion: Conversion, entries: Mapping[str, Entry], swapped: Mapping[str, nn.Module]
) -> list[Piece]:
    """Return what a module is written as: most are one piece; experts what they are in the checkpoint, or in transformers' successor of theirs."""
    if not _is_part(module):
        return [Piece(_prefix(conversion, module.name), module.shape)]
    owner = module.parameter.rpartition(".")[0]
    if owner in swapped:
        cuts = pieces(swapped[owner], owner)
        inside = f"{owner}.{module.expert}."
        names = [name for name, (source, _) in cuts.items() if source == module.parameter and name.startswith(inside)]
        return _stacked([name.removesuffix("weight") for name in names], [module.shape[0] // len(names)] * len(names), module)
    keys = _keys_of(module, conversion)
    if keys:
        return _stacked([key.removesuffix("weight") for key in keys], [entries[key].shape[0] for key in keys], module)
    stem = (conversion.key(module.parameter) or module.parameter).removesuffix(".weight")
    return [Piece(f"{stem}.{module.expert}.", module.shape)]


def _stacked(prefixes: Sequence[str], rows: Sequence[int], module: Module) -> list[Piece]:
    """Return pieces of a module's rows, one below the other."""
    starts = [sum(rows[:number]) for number in range(len(rows))]
    return [Piece(prefix, (count, module.shape[1]), start) for prefix, count, start in zip(prefixes, rows, starts, strict=True)]


def _named_conversion(checkpoint: Checkpoint, conversion: Conversion, entries: Mapping[str, Entry]) -> Conversion | None:
    """Return the conversion of the model class that the config names, where that is another one than the skeleton's.

    A checkpoint that also sees is opened as its text part where transformers has a class for that: one file, two names.
    """
    kind = named_class(checkpoint.config)
    if kind is None or kind is conversion.kind:
        return None
    with torch.device("meta"):
        return conversion_of(kind(checkpoint.config), entries)


def _aliases(names: Iterable[str], conversion: Conversion, other: Conversion | None) -> dict[str, str]:
    """Return module -> its name in the other class, of those that are called otherwise there."""
    aliases: dict[str, str] = {}
    if other is None:
        return aliases
    for name in names:
        key = conversion.key(f"{name}.weight")
        target = other.target(key)[0].removesuffix(".weight") if key else name
        if target != name:
            aliases[name] = target
    return aliases


def conversion_of(skeleton: nn.Module, entries: Mapping[str, Entry]) -> Conversion:
    """Return what transformers makes of the tensors."""
    return Conversion(skeleton, {key: _empty(entry) for key, entry in entries.items()})


def _empty(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.uint8), device="meta")


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, DTYPE_WORDS[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


def _meta(conversion: Conversion, parameter: str, entries: Mapping[str, Entry]) -> Tensor:
    """Return the parameter without its data."""
    return conversion.read(parameter, lambda key: _empty(entries[key]))


def _converted(
    modules: Iterable[Module], swapped: Mapping[str, nn.Module], conversion: Conversion, other: Conversion | None
) -> Conversions:
    """Return what is written otherwise than it is stored, the planned `modules` apart (see `Blueprint.converted`). swapped: see `exchanged`."""
    planned = {module.parameter for module in modules}
    again = {name for name in conversion.converted if conversion.target(name)[1]}  # a rule takes its own result: the tensors stay
    converted: Conversions = {
        name: {name: lambda tensor: tensor} for name in conversion.converted if name not in planned and name not in again
    }
    for path, module in swapped.items():
        cuts = pieces(module, path)
        for parameter in {source: None for source, _ in cuts.values() if source not in planned}:
            converted[parameter] = {name: how for name, (source, how) in cuts.items() if source == parameter}
    if other is None:
        return converted
    return {
        parameter: {_known_to_both(name, parameter, conversion, other): how for name, how in parts.items()}
        for parameter, parts in converted.items()
    }


def _known_to_both(name: str, parameter: str, conversion: Conversion, other: Conversion) -> str:
    """Return what the tensor `name`, made of `parameter`, is called in the other class, where that name leads to it in this one, too."""
    there, _ = other.target(conversion.origins[parameter].all_keys[0])
    parent = parameter.rpartition(".")[0]
    renamed = there.rpartition(".")[0] + name.removeprefix(parent)
    return renamed if conversion.target(renamed, [name])[0] == name else name


def _whole_entry(name: str, conversion: Conversion, entries: Mapping[str, Entry]) -> Entry:
    weight = _meta(conversion, f"{name}.weight", entries)
    entry = _entry(conversion.key(f"{name}.weight") or f"{name}.weight", weight)
    return entry if entry.dtype in FLOATS else _entry(entry.name, weight.float())


def _prefix(conversion: Conversion, name: str) -> str:
    """Return what the names of a packed module's tensors begin with: as the checkpoint has it, where that leads to the module; else its name."""
    key, packed = conversion.key(f"{name}.weight"), [f"{name}.{suffix}" for suffix in SUFFIXES]
    stem = (key or "").removesuffix("weight")
    if key and stem != key and all(conversion.target(stem + s, packed) == (f"{name}.{s}", None) for s in SUFFIXES):
        return stem
    return f"{name}."


def sources_of(checkpoint: Checkpoint) -> tuple[dict[str, Entry], dict[str, tuple[Path, int, int]]]:
    """Return every tensor of the checkpoint: what it is, and its file with its bytes' first place and end there."""
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


def _check_origins(modules: Sequence[Module], conversion: Conversion) -> None:
    """Raise UserError where the checkpoint has no weight of a planned module that can be followed, or a plan names some of a layer's experts alone."""
    experts = Counter(module.parameter for module in modules if _is_part(module))
    for module in modules:
        if module.parameter not in conversion.origins:
            raise UserError(f"{module.name}: the checkpoint stores this weight in a way that cannot be followed")
        count = conversion.shapes[module.parameter][0] if _is_part(module) else 0
        if count != experts[module.parameter]:
            raise UserError(
                f"{module.parameter}: the plan names {experts[module.parameter]} of its {count} experts; it must name all"
            )


def weight_keys(plan: Plan, skeleton: nn.Module, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return module of the plan -> the checkpoint's name of its weight; UserError where it is no tensor of its own there."""
    conversion, keys = conversion_of(skeleton, entries), {}
    for name in plan.modules:
        key = conversion.key(f"{name}.weight")
        if key is None:
            raise UserError(
                f"{name}: the checkpoint stores this weight merged with others, which is not taken apart for this runtime"
            )
        keys[name] = key
    return keys


def _planned(plan: Plan, checkpoint: Checkpoint) -> list[Module]:
    return [module for module in checkpoint.modules if module.name in plan.modules]


def config_text(plan: Plan, checkpoint: Checkpoint, skeleton: nn.Module, blueprint: Blueprint, layout_name: str) -> str:
    """Return the checkpoint's own config, with how to read the weights. layout_name: `PACK_QUANTIZED` or `OURS`."""
    content: dict[str, Any] = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    linear = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    pieces_of = [
        name.removesuffix(".weight") for parts in blueprint.converted.values() for name in parts if name.endswith(".weight")
    ]
    ignored = [name for name in [*linear, *pieces_of] if name not in blueprint.packed]
    named: dict[str, tuple[Module, tuple[int, int]]] = {}  # what a format belongs to -> module, shape
    for module in (module for module in _planned(plan, checkpoint) if module.name in blueprint.packed):
        parts = blueprint.packed[module.name]
        if layout_name == OURS or _is_part(module):
            named |= {piece.prefix.removesuffix("."): (module, piece.shape) for piece in parts}
        else:
            names = dict.fromkeys([module.name, blueprint.aliases.get(module.name, module.name)])
            named |= dict.fromkeys(names, (module, module.shape))
    quantization = quantization_config(
        {name: plan.formats[plan.modules[module.name]] for name, (module, _) in named.items()},
        {name: shape for name, (_, shape) in named.items()},
        ignored,
        get_quantizer(plan.quantizer).whole_zeros,
        version("compressed-tensors"),
        layout_name,
    )
    if layout_name == PACK_QUANTIZED:
        _name_experts(quantization, [name for name, (module, _) in named.items() if _is_part(module)])
    content["quantization_config"] = quantization
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _name_experts(quantization: dict[str, Any], experts: Sequence[str]) -> None:
    """Let the group of the experts be known as theirs, in place: transformers takes the one that has such a target for all of them."""
    for group in quantization["config_groups"].values():
        if experts and experts[0] in group["targets"]:
            group["targets"].append(EXPERTS_TARGET)


def card_of(plan: Plan, checkpoint: Checkpoint, evidence: Evidence, disk_bytes: int) -> str:
    """Return the model card."""
    source = checkpoint.folder / "README.md"
    return card_text(plan, checkpoint.modules, evidence, source if source.is_file() else None, disk_bytes, checkpoint.info)


# --- writing -----------------------------------------------------------------------------------------------------------


def _write_weights(
    folder: Path, plan: Plan, plan_file: Path, checkpoint: Checkpoint, decoder: Decoder, blueprint: Blueprint, progress: Any
) -> None:
    with Writer(folder, blueprint.shards) as writer:
        for key in blueprint.copied:
            copy_tensor(writer, key, *blueprint.sources[key])
        for parameter, parts in blueprint.converted.items():
            tensor = blueprint.read(parameter)
            for name, how in parts.items():
                writer.write(name, _bytes(how(tensor)))
        modules = _planned(plan, checkpoint)
        for done, module in enumerate(modules, start=1):
            weight = read_weight(blueprint, module)
            if entry := blueprint.whole.get(module.name):
                values = stored_of(plan, plan_file, decoder, module.name, weight).weight()
                writer.write(entry.name, _bytes(values.to(DTYPES[entry.dtype])))
            else:
                codes = codes_of(plan, plan_file, decoder, module.name, weight)
                for piece in blueprint.packed[module.name]:
                    rows = codes.rows(torch.arange(piece.start, piece.start + piece.shape[0]))
                    for suffix, tensor in _packed(plan, module.name, rows).items():
                        writer.write(piece.prefix + suffix, _bytes(tensor))
            progress(done, len(modules))


def read_weight(blueprint: Blueprint, module: Module) -> Tensor:
    """Return a module's weight as its parameter keeps it, of an expert its part."""
    if not _is_part(module):
        return blueprint.read(module.parameter)
    assert module.expert is not None
    return blueprint.conversion.read_expert(
        module.parameter, module.expert, lambda key, index=None: read_tensor(blueprint.sources[key][0], key, index)
    )


def copy_tensor(writer: Writer, key: str, file: Path, start: int, end: int) -> None:
    """Write the bytes of `file` from `start` to `end` as the tensor `key`."""
    with file.open("rb") as stream:
        stream.seek(start)
        while start < end:
            if not (piece := stream.read(min(COPIED_TOGETHER, end - start))):
                raise UserError(f"{file}: ends too early")
            start += len(piece)
            writer.write(key, piece)


def read_tensor(file: Path, key: str, index: int | None = None) -> Tensor:
    """Return a tensor of a safetensors file, or the part `index` of its first axis."""
    with safe_open(file, framework="pt") as reader:
        return reader.get_tensor(key) if index is None else reader.get_slice(key)[index]


def codes_of(plan: Plan, plan_file: Path, decoder: Decoder, name: str, weight: Tensor) -> Codes:
    """Return the module's codes, of a plan of integer formats."""
    codes = stored_of(plan, plan_file, decoder, name, weight)
    assert isinstance(codes, Codes)
    return codes


def stored_of(plan: Plan, plan_file: Path, decoder: Decoder, name: str, weight: Tensor) -> Codes | Blocks:
    """Return what the bank holds of a module.

    The model of `decoder`, a skeleton, holds its weight, in float32 as everything was measured, for this long alone.
    """
    module = decoder.model.get_submodule(name)
    before = module.weight
    module.weight = nn.Parameter(weight.float(), requires_grad=False)
    try:
        return bank_of_plan(plan, plan_file, decoder, [name]).codes(name, plan.modules[name])
    finally:
        module.weight = before


def _packed(plan: Plan, name: str, codes: Codes) -> dict[str, Tensor]:
    """Return the tensors of some rows of a module."""
    try:
        return tensors(codes, plan.formats[plan.modules[name]])
    except ValueError as error:
        raise UserError(f"{name}: cannot be packed as {plan.modules[name]}: {error}") from None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
