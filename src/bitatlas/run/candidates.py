"""Open whatever holds a model's weights, so that one can be compared with another: what it is, how large, and its logits.

A folder in Hugging Face layout is run by transformers, quantized or not; what other tools packed and transformers does not load on this machine is
dequantized first (`model.foreign`). A GGUF is run in llama.cpp where that is at hand, with everything that this runtime rounds; tasks, and all where it
is not, use its dequantized weights in transformers. MLX's folders are dequantized. A plan is its checkpoint with the weights of the survey's bank.
Left out: runtimes that need a GPU that is not here; EXL2 and EXL3 folders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitatlas.errors import UserError
from bitatlas.export.card import atlas_beside
from bitatlas.export.gguf.run import LlamaSession, find_library, open_gguf
from bitatlas.export.packed import check_package, fitted
from bitatlas.export.trial import open_packed
from bitatlas.model.checkpoint import Checkpoint, check_finite, load_tokenizer, open_checkpoint, open_model, skeleton_of
from bitatlas.model.decoder import vocabulary_size
from bitatlas.model.folder import find_folder, read_config, sha256_of, weight_files
from bitatlas.model.foreign import open_foreign, quantization_of
from bitatlas.model.from_gguf import load_gguf, open_reader
from bitatlas.model.stored import kinds_of_files, kinds_of_gguf
from bitatlas.model.tensor_files import natural
from bitatlas.quantize.bank import bank_of_plan
from bitatlas.records import Plan
from bitatlas.records.comparison import ModelFile, StoredKind
from bitatlas.records.files import read_record
from bitatlas.records.formats import stored_bytes
from bitatlas.records.sizes import kept_bytes

PACKED = "compressed-tensors"
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
DEQUANTIZED = "dequantized, in transformers"
SPELT = {
    "mlx": "MLX",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
}  # what a method is called, where that is not its name


@dataclass(frozen=True)
class Running:
    """A model that is open. logits: of tokens int64 [rows, tokens] and each row's length -> float32 [rows, tokens, vocabulary].

    model: of transformers, None of one that llama.cpp runs; tokenizer: None where it has none.
    """

    logits: Callable[[Tensor, Sequence[int]], Tensor]
    vocabulary: int
    tokenizer: Any
    model: Any
    run: str


@dataclass(frozen=True)
class Subject:
    """A model's file before it is opened. opened(device, context, whole): a `Running` for rows of so many tokens, with a transformers model where
    `whole`; identity: a hash of what it is; weights: of the whole model; needs: bytes in memory, about; vocabulary: 0 where it is not known yet.
    """

    file: ModelFile
    identity: str
    opened: Callable[[str, int, bool], AbstractContextManager[Running]]
    weights: int = 0
    needs: int = 0
    vocabulary: int = 0


def subjects(reference: str, files: Sequence[str], kept: ModelFile | None = None) -> list[Subject]:
    """Return the reference and the candidates, each with a name of its own; UserError for one that cannot be what it should.

    A plan's checkpoint is looked for among them. kept: the reference, where only its predictions are at hand; the candidates alone are returned then.
    """
    paths = list(files) if kept else [reference, *files]
    shapes = {} if kept else _shapes_of(reference)
    weights = round(8 * kept.bytes / kept.bits) if kept and kept.bits else sum(shapes.values())
    return [_subject(path, name, paths, shapes, weights) for path, name in zip(paths, _names(paths), strict=True)]


def plan_file_of(name: str) -> Path | None:
    """Return the plan that an argument means: a file, or a survey's folder; a folder that is a checkpoint is one."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / "plan.json").is_file() and not (path / "config.json").exists():
        return path / "plan.json"
    return path if path.is_file() and path.suffix != ".gguf" else None


def _subject(path: str, name: str, paths: Sequence[str], shapes: dict[str, int], weights: int) -> Subject:
    if Path(path).suffix.lower() == ".gguf":
        subject = _gguf(Path(path).expanduser(), name)
    elif (plan_file := plan_file_of(path)) is not None:
        subject = _plan(plan_file, name, paths)
    else:
        subject = _folder(path, name, shapes)
    weights = weights or sum(kind.weights for kind in subject.file.kinds)
    bits = 8 * subject.file.bytes / weights if weights else 0.0
    return replace(subject, file=replace(subject.file, bits=bits), weights=weights, needs=subject.needs or 4 * weights)


def _names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart; a path that comes again is numbered."""
    parts = [Path(path).absolute().parts for path in paths]
    result = []
    for index, of_path in enumerate(parts):
        others = [other for other in parts if other != of_path]
        length = next(n for n in range(1, len(of_path) + 1) if all(other[-n:] != of_path[-n:] for other in others))
        again = parts[:index].count(of_path)
        result.append("/".join(of_path[-length:]) + (f" ({again + 1})" if again else ""))
    return result


def _shapes_of(reference: str) -> dict[str, int]:
    """Return the numbers of weights of the reference's tensors, by name; of a tied head one. Empty where its config does not tell."""
    if Path(reference).suffix.lower() == ".gguf" or plan_file_of(reference) is not None:
        return {}
    folder = find_folder(reference, None)
    config = read_config(folder, reference, quantized=True)
    return {name: parameter.numel() for name, parameter in skeleton_of(config, reference).named_parameters()}


# --- folders -----------------------------------------------------------------------------------------------------------


def _folder(name: str, label: str, shapes: dict[str, int]) -> Subject:
    folder = find_folder(name, None)
    method, _ = quantization_of(folder) or ("", {})
    files = weight_files(folder)
    if not method:
        read_config(folder, name)
    kinds = kinds_of_files(files, SPELT.get(method, method), shapes)
    file = ModelFile(
        label, name, SPELT.get(method, method) or "transformers", "", sum(part.stat().st_size for part in files), 0.0, kinds
    )
    identity = _hash(sha256_of(files), (folder / "config.json").read_text(encoding="utf-8"))

    @contextmanager
    def opened(device: str, context: int, whole: bool) -> Iterator[Running]:
        if method == PACKED:
            check_package()
            model, how = open_packed(folder, device)[0], "unpacked by compressed-tensors, in transformers"
        elif method:
            model, how = open_foreign(folder, name, device)
        else:
            model, how = open_model(name, device)[0], "in transformers"
        yield _running(model, _tokenizer_of(folder), how)

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0
    return Subject(file, identity, opened, vocabulary=int(vocabulary))


def _tokenizer_of(folder: Path) -> Any:
    """Return a folder's tokenizer, None where it has none."""
    try:
        return load_tokenizer(folder)
    except UserError:
        return None


def _running(model: Any, tokenizer: Any, how: str) -> Running:
    @torch.no_grad()
    def logits(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        return model(input_ids=tokens.to(model.device), use_cache=False).logits  # type: ignore[no-any-return]

    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    vocabulary = int(weight.shape[0]) if weight is not None and weight.dim() == 2 else vocabulary_size(model.config)
    return Running(logits, max(vocabulary, vocabulary_size(model.config)), tokenizer, model, how)


# --- plans -------------------------------------------------------------------------------------------------------------


def _plan(plan_file: Path, label: str, paths: Sequence[str]) -> Subject:
    plan = read_record(plan_file, Plan)
    kinds: dict[tuple[str, str], list[int]] = {}
    checkpoint = _checkpoint_of(plan, plan_file, paths)
    for module in checkpoint.modules:
        name = plan.modules.get(module.name)
        size = kept_bytes(module, checkpoint.info.dtype) if name is None else stored_bytes(module.shape, plan.formats[name])
        entry = kinds.setdefault((module.name.rpartition(".")[2], name or checkpoint.info.dtype), [0, 0, 0])
        entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + module.weights, entry[2] + size
    stored = [StoredKind(kind, stored, *numbers) for (kind, stored), numbers in sorted(kinds.items())]
    file = ModelFile(label, str(plan_file), "plan", "", plan.size.total_bytes, 0.0, stored)

    @contextmanager
    def opened(device: str, context: int, whole: bool) -> Iterator[Running]:
        check_finite(checkpoint)
        decoder = checkpoint.load_model(device)
        weights = bank_of_plan(plan, plan_file, decoder, list(plan.modules)).weights(plan.modules)
        for module, weight in weights.items():
            decoder.weight(module).copy_(weight)
        yield _running(decoder.model, checkpoint.load_tokenizer(), "its checkpoint with the plan's weights, in transformers")

    return Subject(file, _hash(plan_file.read_text(encoding="utf-8")), opened, vocabulary=checkpoint.vocabulary)


def _checkpoint_of(plan: Plan, plan_file: Path, paths: Sequence[str]) -> Checkpoint:
    """Return the checkpoint that a plan was made for: one of `paths`, or the one that its survey names."""
    for path in paths:
        if Path(path).suffix.lower() == ".gguf" or plan_file_of(path) is not None:
            continue
        folder = find_folder(path, None)
        if quantization_of(folder) is None and sha256_of(weight_files(folder)) == plan.model.weights_sha256:
            return fitted(plan, open_checkpoint(path, None, fuse=False))
    atlas = atlas_beside(plan_file.absolute())
    if atlas is None:
        raise UserError(
            f"{plan_file}: a plan of {plan.model.name}, but neither is that among the other models nor does an atlas.json beside it say where "
            "it is; compare it with its checkpoint, or leave it in its survey's folder"
        )
    return fitted(plan, open_checkpoint(str(atlas.settings["model"]), plan.model.revision, fuse=False))


# --- GGUF ----------------------------------------------------------------------------------------------------------------


def _gguf(path: Path, label: str) -> Subject:
    parts = _parts(path)
    kinds = [kind for part in parts for kind in kinds_of_gguf(part)]
    file = ModelFile(label, str(path), "GGUF", "", sum(part.stat().st_size for part in parts), 0.0, _joined(kinds))
    in_llama_cpp = find_library() is not None and find_spec("libgguf") is not None

    @contextmanager
    def opened(device: str, context: int, whole: bool) -> Iterator[Running]:
        if whole or not in_llama_cpp:
            if len(parts) > 1:
                raise UserError(f"{path}: a GGUF in parts is only run in llama.cpp")
            model, tokenizer = load_gguf(path)
            yield _running(model.to(device).eval().requires_grad_(False), tokenizer, DEQUANTIZED)
            return
        with open_gguf(path, context) as session:
            yield Running(_llama_logits(session), session.vocabulary, _GgufTokens(path), None, "in llama.cpp")

    return Subject(file, _hash(sha256_of(parts), str(in_llama_cpp)), opened, needs=file.bytes if in_llama_cpp else 0)


class _GgufTokens:
    """The tokens of a GGUF, as far as they tell whether another tokenizer has the same."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get_vocab(self) -> dict[str, int]:
        entry = open_reader(self.path).fields.get("tokenizer.ggml.tokens")
        tokens = [] if entry is None else entry.contents()
        return {str(token): index for index, token in enumerate(tokens)}


def _llama_logits(session: LlamaSession) -> Callable[[Tensor, Sequence[int]], Tensor]:
    def logits(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        result = torch.zeros(*tokens.shape, session.vocabulary)
        for index, (row, length) in enumerate(zip(tokens.tolist(), lengths, strict=True)):
            session.clear()
            session.decode(row[:length])
            result[index, :length] = torch.from_numpy(session.logits(length))
        return result

    return logits


def _parts(path: Path) -> list[Path]:
    """Return the files of a GGUF that was split; the file itself of any other."""
    match = PART.search(path.name)
    if match is None:
        return [path]
    parts = sorted(path.parent.glob(f"{path.name[: match.start()]}-*-of-{match[1]}.gguf"), key=lambda part: natural(part.name))
    if len(parts) != int(match[1]):
        raise UserError(f"{path}: {len(parts)} of its {int(match[1])} parts are there")
    return parts


def _joined(kinds: Sequence[StoredKind]) -> list[StoredKind]:
    """Return kinds with those of the same kind and format in one."""
    sums: dict[tuple[str, str], list[int]] = {}
    for kind in kinds:
        entry = sums.setdefault((kind.kind, kind.format), [0, 0, 0])
        for index, count in enumerate((kind.tensors, kind.weights, kind.bytes)):
            entry[index] += count
    return [StoredKind(kind, stored, *numbers) for (kind, stored), numbers in sums.items()]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
