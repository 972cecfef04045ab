"""What a packed folder will hold: names, places and sizes of all tensors, from the checkpoint's headers and the plan alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bitatlas.errors import UserError
from bitatlas.export.compressed_tensors import layout, overheads, part_bytes
from bitatlas.export.conversion import exchanged, pieces, unpackable
from bitatlas.export.trial import PACK_QUANTIZED, SUFFIXES, named_class
from bitatlas.model.checkpoint import Checkpoint
from bitatlas.model.linear import is_transposed
from bitatlas.model.tensor_files import DTYPES, SHARD_BYTES, Conversion, Entry, Shard, padded, read_header, split_shards
from bitatlas.quantize import get_quantizer
from bitatlas.records import Module, Plan
from bitatlas.records.formats import stored_bytes
from bitatlas.records.plan import FileLayout, ModuleFile
from bitatlas.records.sizes import FILES, entry_bytes

DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}
TRANSFORMERS = "5.24"  # in which was tried what it loads
HEADER_BASE = 64  # bytes of a file's header beside its tensors' entries, at most, in whole 8
FLOATS = ("F64", "F32", "F16", "BF16")  # in which a module's values can be written whole

Conversions = dict[str, dict[str, Callable[[Tensor], Tensor]]]  # parameter of the model -> new tensors -> how each is made of it


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


def promised_disk_bytes(plan: Plan, blueprint: Blueprint) -> int:
    """Return the bytes of the weights' files, if the plan counts rightly."""
    if plan.runtime in FILES:
        return plan.size.total_bytes if _is_counted(plan) else blueprint.disk_bytes
    return plan.size.total_bytes + sum(blueprint.causes.values())


def _is_counted(plan: Plan) -> bool:
    """Return whether the plan's size is that of a packed folder, to the byte."""
    return FILES.get(plan.runtime) == PACK_QUANTIZED


def every_cause(plan: Plan, blueprint: Blueprint) -> dict[str, int]:
    """Return the blueprint's causes, and what the plan counts wrongly."""
    if plan.runtime in FILES and not _is_counted(plan):
        return {f"the plan counts the files of {plan.runtime}": blueprint.disk_bytes - plan.size.total_bytes}
    wrong = blueprint.disk_bytes - promised_disk_bytes(plan, blueprint)
    causes = {} if _is_counted(plan) else blueprint.causes
    return {**causes, **({"counted otherwise by the plan": wrong} if wrong else {})}


# --- what the files will take, before there is a plan ----------------------------------------------------------------------


def with_file(checkpoint: Checkpoint, runtime: str, quantizer: str) -> Checkpoint:
    """Return the checkpoint with what its modules, and all the rest, take in the runtime's files; as it is where that is not known here.

    A bound that the writer fills up with spaces, so that the files are as large as was said, to the byte.
    """
    if runtime not in FILES:
        return checkpoint
    info, skeleton, modules = checkpoint.info, checkpoint.skeleton(), checkpoint.modules
    entries, _ = sources_of(checkpoint)
    conversion, is_mlx, digits = conversion_of(skeleton, entries), FILES[runtime] == "mlx", len(str(2 * info.total_bytes))
    if any(module.parameter not in conversion.origins for module in modules):  # apply says so, and refuses
        return checkpoint

    def in_file(found: Iterable[Entry]) -> int:
        return sum(entry.size_bytes + entry_bytes(len(entry.name.encode()), entry.dtype, entry.shape, digits) for entry in found)

    alone = [module.name for module in modules if not is_part(module)]
    early = unpackable(skeleton, alone) if runtime in ("transformers", "vllm") else []
    early = early if len(early) < len(modules) else []
    swapped = {} if is_mlx else exchanged(skeleton)
    converted = {} if is_mlx else _converted(modules, swapped, conversion, _named_conversion(checkpoint, conversion, entries))
    copied = _copied({module.parameter for module in modules} | set(converted), conversion, entries)
    rest = [entries[key] for key in copied] + _new_entries(converted, conversion, entries)
    shards = 1 + 2 * (info.total_bytes // SHARD_BYTES)
    with_files = []
    for module in modules:
        kept = in_file(entries[key] for key in keys_of(module, conversion) or conversion.origins[module.parameter].all_keys)
        if is_part(module) and not keys_of(module, conversion):
            kept = -(-kept // conversion.shapes[module.parameter][0])
        if module.name in early:
            file = ModuleFile((), in_file([_whole_entry(module.name, conversion, entries)]))
        else:
            pieces_of = _mlx_pieces(module, conversion) if is_mlx else _pieces(module, conversion, entries, swapped)
            file = ModuleFile(tuple((len(piece.prefix.encode()), piece.shape[0]) for piece in pieces_of), kept)
        with_files.append(replace(module, file=file))
    sides = 4 if is_mlx and info.dtype in ("float32", "float64") else 2
    zero = 1 if get_quantizer(quantizer).whole_zeros else 4
    layout_of = FileLayout(runtime, FILES[runtime], shards * HEADER_BASE + in_file(rest), digits, zero, sides)
    return replace(checkpoint, modules=with_files, info=replace(info, file=layout_of))


def _mlx_pieces(module: Module, conversion: Conversion) -> list[Piece]:
    key = conversion.key(module.parameter) or module.parameter
    return [Piece(key.removesuffix("weight"), module.shape)]


def _copied(taken: set[str], conversion: Conversion, entries: Mapping[str, Entry]) -> list[str]:
    """Return the tensors of the checkpoint that stay as they are: those that none of the parameters `taken` is made of."""
    gone = {key for parameter in taken for key in conversion.origins[parameter].all_keys}
    return [key for key in entries if key not in gone]


def _new_entries(converted: Conversions, conversion: Conversion, entries: Mapping[str, Entry]) -> list[Entry]:
    return [
        _entry(name, how(_meta(conversion, parameter, entries)))
        for parameter, parts in converted.items()
        for name, how in parts.items()
    ]


def blueprint_of(plan: Plan, checkpoint: Checkpoint, skeleton: nn.Module, shard_bytes: int = SHARD_BYTES) -> Blueprint:
    """Return names, places and sizes of all tensors; UserError where a module cannot be packed."""
    entries, sources = sources_of(checkpoint)
    conversion = conversion_of(skeleton, entries)
    modules = planned_modules(plan, checkpoint)
    _check_origins(modules, conversion)
    early, beyond = _beyond_transformers(plan, modules, skeleton, conversion)
    whole = {name: _whole_entry(name, conversion, entries) for name in ([] if beyond else early)}
    swapped = {} if beyond else exchanged(skeleton)
    packed = {m.name: _pieces(m, conversion, entries, swapped) for m in modules if m.name not in whole}
    other = _named_conversion(checkpoint, conversion, entries)
    converted = _converted(modules, swapped, conversion, other)
    taken = {module.parameter for module in modules} | set(converted)
    copied = _copied(taken, conversion, entries)
    new_entries = _new_entries(converted, conversion, entries)
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
    shards = padded(split_shards(wanted, shard_bytes), plan.size.total_bytes if _is_counted(plan) else 0)
    causes["headers of the files"] = sum(len(shard.header) for shard in shards)
    nonzero = {name: count for name, count in causes.items() if count}
    aliases = _aliases((m.name for m in modules if m.name in packed and not is_part(m)), conversion, other)
    return Blueprint(sources, conversion, packed, whole, copied, converted, shards, nonzero, aliases, beyond)


def is_part(module: Module) -> bool:
    """Return whether a module's weight is a part of a tensor."""
    return module.parameter != f"{module.name}.weight"


def _beyond_transformers(
    plan: Plan, modules: Sequence[Module], skeleton: nn.Module, conversion: Conversion
) -> tuple[list[str], str]:
    """Return (modules whose weight transformers reads before it unpacks any, why it does not load the others packed; "": it does)."""
    kinds = dict(skeleton.named_modules())
    alone = [module for module in modules if not is_part(module)]
    embedding = next((m.name for m in alone if isinstance(kinds[m.name], nn.Embedding)), "")
    transposed = next((m.name for m in alone if is_transposed(kinds[m.name])), "")
    if embedding or transposed:
        what = f"{embedding} is an embedding" if embedding else f"{transposed} is a Conv1D (GPT-2's transposed linear layer)"
        return [], f"{what}, which transformers {TRANSFORMERS} does not load packed"
    swapped = exchanged(skeleton)
    experts = [m for m in modules if is_part(m) and m.parameter.rpartition(".")[0] not in swapped]
    formats = {plan.modules[module.name] for module in experts}
    is_usual = len(formats) < 2 and all(
        plan.formats[plan.modules[m.name]].symmetric and m.shape[1] % plan.formats[plan.modules[m.name]].group_size == 0
        for m in experts
    )
    by_rule = all(keys_of(module, conversion) for module in experts)
    if not (is_usual and by_rule):
        how = "in one symmetric format for all" if by_rule else "where the checkpoint stores them one by one"
        return [], f"transformers {TRANSFORMERS} loads packed experts only {how}"
    early = unpackable(skeleton, (module.name for module in alone))
    if early and len(early) == len(modules):
        return [], f"transformers {TRANSFORMERS} reads {early[0]}, and every other module of the plan, before it unpacks any"
    return early, ""


def keys_of(module: Module, conversion: Conversion) -> list[str]:
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
    if not is_part(module):
        return [Piece(_prefix(conversion, module.name), module.shape)]
    owner = module.parameter.rpartition(".")[0]
    if owner in swapped:
        cuts = pieces(swapped[owner], owner)
        inside = f"{owner}.{module.expert}."
        names = [name for name, (source, _) in cuts.items() if source == module.parameter and name.startswith(inside)]
        return _stacked([name.removesuffix("weight") for name in names], [module.shape[0] // len(names)] * len(names), module)
    keys = keys_of(module, conversion)
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
    experts = Counter(module.parameter for module in modules if is_part(module))
    for module in modules:
        if module.parameter not in conversion.origins:
            raise UserError(f"{module.name}: the checkpoint stores this weight in a way that cannot be followed")
        count = conversion.shapes[module.parameter][0] if is_part(module) else 0
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


def planned_modules(plan: Plan, checkpoint: Checkpoint) -> list[Module]:
    return [module for module in checkpoint.modules if module.name in plan.modules]


def read_weight(blueprint: Blueprint, module: Module) -> Tensor:
    """Return a module's weight as its parameter keeps it, of an expert its part."""
    if not is_part(module):
        return blueprint.read(module.parameter)
    assert module.expert is not None
    return blueprint.conversion.read_expert(
        module.parameter, module.expert, lambda key, index=None: read_tensor(blueprint.sources[key][0], key, index)
    )


def read_tensor(file: Path, key: str, index: int | None = None) -> Tensor:
    """Return a tensor of a safetensors file, or the part `index` of its first axis."""
    with safe_open(file, framework="pt") as reader:
        return reader.get_tensor(key) if index is None else reader.get_slice(key)[index]
