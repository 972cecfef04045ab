"""Every module in every candidate format, on disk, so that any plan is assembled without quantizing again.

One safetensors file a module and format: packed codes, scales, zero-points (or a runtime's own blocks), in exactly the bytes that
`formats.stored_bytes` counts. A bank belongs to the weights, the quantizer and, where the quantizer uses them, the rows it was fitted on; its folder is named after
these, so banks of several quantizers lie side by side and none is taken for another. Each file is written beside and renamed: an
interrupted run goes on with the next module. Each carries a hash of what it holds: a damaged or changed file is made again.

Unpacked codes of the last used modules are cached. Without a folder everything stays in memory. Of a streamed model (see
`streaming`) nothing is held of the weights themselves: what is asked for is read, or made of its codes, when it is looked up.
Left out: weights for runtimes (their layouts differ; see `export`), and more than one process writing at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitatlas.data.rows import rows_sha256
from bitatlas.errors import UserError
from bitatlas.model.decoder import Decoder
from bitatlas.model.streaming import LazyMapping
from bitatlas.quantize import get_quantizer
from bitatlas.quantize.codes import Codes, Kept, pack, unpack
from bitatlas.quantize.ggml import Blocks
from bitatlas.quantize.importance import ImportanceMatrix
from bitatlas.records import Module, Plan
from bitatlas.records.files import write_bytes, write_text
from bitatlas.records.formats import FORMATS, Format, stored_bytes
from bitatlas.records.journal import content_key

BANK = "bank"  # folder of quantized weights, in a run's folder
CACHE_BYTES = 2**31  # of unpacked codes in memory
TUNED = "-tuned-"  # in the identity of codes that were trained after they were chosen (see `tune`)
HEADER_BYTES = 1024  # of one file, at most
Key = tuple[str, str]  # module, format
Progress = Callable[[int, int], None]
Helper = Callable[
    [dict[str, list[str]], Progress | None], None
]  # makes module -> formats in other processes, in the bank's folder


class Bank:
    """Quantized weights of a decoder's modules."""

    def __init__(
        self,
        decoder: Decoder,
        modules: Sequence[str],
        quantizer: str,
        formats: Mapping[str, Format] = FORMATS,
        rows: Tensor | ImportanceMatrix | None = None,
        folder: Path | None = None,
        weights_sha256: str = "",
        identity: str | None = None,
    ):
        """rows: int64 [rows, tokens], for quantizers that are fitted on inputs, or what a user's file has of these. `folder`: where banks lie; None: in memory.

        `identity`: of a bank made earlier, whose rows are not at hand.
        """
        self.formats = dict(formats)
        self.decoder = decoder
        self.quantizer = get_quantizer(quantizer)
        self.rows = rows if self.quantizer.uses_rows else None
        fitted = [] if self.rows is None else [rows_sha256(self.rows) if isinstance(self.rows, Tensor) else self.rows.sha256]
        self.identity = identity or "-".join([quantizer, str(self.quantizer.version), *fitted])
        self.modules = list(modules)
        self._reference = decoder.references(self.modules)
        self.cache_bytes = CACHE_BYTES  # of unpacked codes that stay in memory
        self.folder = folder / f"{quantizer}-{content_key(weights_sha256, self.identity)[:12]}" if folder else None
        self._cache: OrderedDict[Key, Codes | Blocks] = OrderedDict()
        self._cached_bytes = 0
        self.helper: Helper | None = None
        self._ready: set[Key] = set()

    def fill(self, formats: Sequence[str], progress: Progress | None = None) -> None:
        """Quantize whatever is missing of all modules in `formats`."""
        self.ready([(module, name) for module in self.modules for name in formats], progress)

    def ready(self, keys: Iterable[Key], progress: Progress | None = None) -> None:
        """Make all of `keys` (module, format) that are missing, in other processes where a helper is set."""
        new = [key for key in keys if key not in self._ready and not self._is_kept(key)]
        if self.helper and self.folder:
            self._describe()
            self.helper(self._missing(new), progress)
        self._make(new, progress)
        self._ready.update(new)

    def holds(self, assignment: Mapping[str, str]) -> bool:
        """Return whether all of `assignment` (module -> format) is there already."""
        return all(self._is_kept(key) or key in self._cache or self._readable(key) for key in assignment.items())

    def _is_kept(self, key: Key) -> bool:
        return bool(self.formats[key[1]].dtype)

    def codes(self, module: str, format_name: str) -> Codes | Blocks | Kept:
        """Return the codes of one module in one format; made now if they are missing."""
        key = (module, format_name)
        if self._is_kept(key):
            return Kept(self.reference(module))
        if key not in self._cache:
            self._make([key])
        self._cache.move_to_end(key)
        return self._cache[key]

    def reference(self, module: str) -> Tensor:
        """Return the unquantized weight [out, in]."""
        return self._reference[module]

    def weights(self, assignment: Mapping[str, str]) -> Mapping[str, Tensor]:
        """Return module -> weight [out, in] in its assigned format, in the model's dtype, on its device; of a streamed model, when looked up."""
        if self.decoder.stream:
            return LazyMapping(assignment, lambda module: self._weight(module, assignment[module]))
        self._make(list(assignment.items()))
        return {module: self._weight(module, name) for module, name in assignment.items()}

    def _weight(self, module: str, format_name: str) -> Tensor:
        like = self.decoder.model.get_submodule(module).weight
        assert isinstance(like, Tensor)
        return self.codes(module, format_name).to(like.device).weight(like.dtype).to(like.device)

    def put(self, codes: Mapping[str, Codes | Blocks], formats: Mapping[str, str]) -> None:
        """Store codes of modules that were made elsewhere, each in its format."""
        for module, of_module in codes.items():
            self._store(module, [formats[module]], [of_module])

    # --- making what is missing ------------------------------------------------------------------------------------------

    def _make(self, keys: Iterable[Key], progress: Progress | None = None) -> None:
        missing = self._missing(keys)
        if not self.quantizer.by_format:
            self._quantize(missing, progress)
            return
        for formats in dict.fromkeys(tuple(names) for names in missing.values()):
            self._quantize({module: names for module, names in missing.items() if tuple(names) == formats}, progress)

    def _missing(self, keys: Iterable[Key]) -> dict[str, list[str]]:
        """Return module -> formats that are neither in memory nor whole on disk."""
        missing: dict[str, list[str]] = {}
        for module, name in keys:
            if self._is_kept((module, name)):
                continue
            if (module, name) not in self._cache and not self._readable((module, name)):
                missing.setdefault(module, []).append(name)
        return missing

    def _quantize(self, missing: Mapping[str, list[str]], progress: Progress | None) -> None:
        """Quantize every module in the formats that it lacks, in one run. missing: module -> formats"""
        if not missing:
            return
        table = {module: [self.formats[name] for name in names] for module, names in missing.items()}
        with self.decoder.swapped(self._reference):  # whatever swap is going on around us
            results = self.quantizer.quantize(self.decoder, table, self.rows)
            for done, (module, of_formats) in enumerate(results, start=1):
                self._store(module, missing[module], of_formats)
                if progress:
                    progress(done, len(missing))

    def _store(self, module: str, names: Sequence[str], of_formats: Sequence[Codes | Blocks]) -> None:
        for name, codes in zip(names, of_formats, strict=True):
            if self.folder:
                self._write((module, name), codes)
            self._add((module, name), codes)

    def _add(self, key: Key, codes: Codes | Blocks) -> None:
        """Add to the cache; the least recently used give way, if they can be read again."""
        self._cache[key] = codes
        self._cached_bytes += codes.held_bytes
        while self.folder and self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].held_bytes

    # --- files -----------------------------------------------------------------------------------------------------------

    def _file(self, key: Key) -> Path:
        assert self.folder is not None
        return self.folder / key[1] / f"{key[0]}.safetensors"

    def _readable(self, key: Key) -> bool:
        """Return whether there is a whole file. What is there is read into the cache, so that a damaged one is found out now."""
        if self.folder is None or not self._file(key).is_file():
            return False
        try:
            self._add(key, self._read(key))
        except (SafetensorError, KeyError, ValueError, OSError):
            return False
        return True

    def _read(self, key: Key) -> Codes | Blocks:
        return from_tensors(load_checked(self._file(key), " ".join(key)), self.formats[key[1]], self.decoder.shape(key[0]))

    def _write(self, key: Key, codes: Codes | Blocks) -> None:
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._describe()
        save_checked(to_tensors(codes, self.formats[key[1]]), file, " ".join(key))

    def _describe(self) -> None:
        """Write what the codes are of, for people who look into the folder."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "bank.json"
        if not file.exists():
            write_text(file, json.dumps({"schema": "bitatlas.bank/1", "codes_are_of": self.identity}, indent=1) + "\n")


def disk_bytes(modules: Sequence[Module], formats: Sequence[str]) -> int:
    """Return the bytes that a bank of these modules in these formats takes on disk, at most."""
    pairs = ((m, FORMATS[name]) for m in modules for name in m.formats(formats))
    return sum(stored_bytes(m.shape, fmt) + HEADER_BYTES for m, fmt in pairs if not fmt.dtype)


def needs_bank(plan: Plan) -> bool:
    """Return whether a plan's codes cannot be made again of the model alone."""
    return get_quantizer(plan.quantizer).uses_rows or TUNED in plan.codes


def bank_of_plan(plan: Plan, plan_file: Path, decoder: Decoder, modules: Sequence[str]) -> Bank:
    """Return the bank of a plan's `modules`: its survey's, or a new one where the codes depend on the model alone; else UserError."""
    folders = [folder / BANK for folder in (plan_file.parent, plan_file.parent.parent) if (folder / BANK).is_dir()]
    bank = Bank(
        decoder,
        modules,
        plan.quantizer,
        plan.formats,
        folder=folders[0] if folders else None,
        weights_sha256=plan.model.weights_sha256,
        identity=plan.codes or None,
    )
    if needs_bank(plan) and not bank.holds({module: plan.modules[module] for module in modules}):
        what = "tuned" if TUNED in plan.codes else plan.quantizer
        raise UserError(
            f"{plan_file}: {what} weights depend on the text they were fitted on, so the survey's folder {BANK!r} must lie "
            "beside the plan, whole; or run the survey again with --resume"
        )
    return bank


# --- what a file holds ------------------------------------------------------------------------------------------------------


def to_tensors(codes: Codes | Blocks, fmt: Format) -> dict[str, Tensor]:
    """Return what a file holds, on the CPU, in exactly the bytes that `formats.stored_bytes` counts."""
    if isinstance(codes, Blocks):
        return {"blocks": codes.blocks.cpu().contiguous()}
    tensors = {"codes": pack(codes.codes.cpu(), fmt.bits), "scale": codes.scale.cpu().contiguous()}
    if not fmt.symmetric:
        tensors["zero"] = codes.zero.cpu().contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]) -> Codes | Blocks:
    """Return the codes of a weight [out, in] that `to_tensors` gave. KeyError, ValueError for tensors of another format or shape."""
    if fmt.runtime:
        expected = (shape[0], shape[1] * (fmt.bits * fmt.group_size + fmt.scale_bits) // (8 * fmt.group_size))
        if tuple(tensors["blocks"].shape) != expected:
            raise ValueError(f"blocks of shape {tuple(tensors['blocks'].shape)}, not {expected}")
        return Blocks(tensors["blocks"], fmt.own_name)
    scale = tensors["scale"]
    zero = tensors["zero"] if "zero" in tensors else torch.full_like(scale, 2 ** (fmt.bits - 1), dtype=torch.uint8)
    return Codes(unpack(tensors["codes"], fmt.bits, shape), scale, zero, fmt.group_size)


# Safetensors has no checksum: a byte that changed on the disk is another number and nothing else. So the SHA-256 of names, dtypes, shapes
# and bytes stands in a file's metadata, with the file's own name in it, so that one file is not taken for another. Left out: protection
# against someone who means to change it, who would change the hash too.
CHECKSUM = "sha256"


def save_checked(tensors: Mapping[str, Tensor], file: Path, name: str) -> None:
    """Write `tensors` to `file` with their checksum, beside first, then renamed; OSError where the disk does not take them."""
    # A file that a power cut empties fails its check and is made again, so it need not be waited for.
    write_bytes(file, save(dict(tensors), metadata={CHECKSUM: _checksum(tensors, name)}), sync=False)


def load_checked(file: Path, name: str) -> dict[str, Tensor]:
    """Read what was saved under `name`; ValueError or the library's own error where the file holds anything else."""
    with safe_open(file, framework="pt") as reader:
        tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (safe_open is not a dict)
        checksum = (reader.metadata() or {}).get(CHECKSUM)
    if checksum != _checksum(tensors, name):
        raise ValueError(f"{file}: holds something else than was written")
    return tensors


def _checksum(tensors: Mapping[str, Tensor], name: str) -> str:
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
