"""A reference's predictions on the disk, so that files can be compared with it one after the other, later, and where it is not.

A folder `reference/` holds `reference.json` (what was run on what), each domain's rows, and the kept predictions (`predictions`) in parts of `PART_ROWS`
rows; `files/<hash>/` holds what was told of each file's predictions, in the same parts. A part is written whole or not at all, so a run that was
interrupted goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from bitatlas.data.domains import DomainRows
from bitatlas.errors import UserError
from bitatlas.measure.predictions import COLUMNS, Kept, deviate, keep
from bitatlas.model.layerwise import batch_rows
from bitatlas.records.comparison import Domain, ModelFile
from bitatlas.records.files import write_bytes, write_text

STREAM_SCHEMA = "bitatlas.reference/1"
FOLDER, HEAD, VOCAB = "reference", "reference.json", "vocab.json"
PART_ROWS = 8
PROMPT, CONTINUED = 32, 64  # tokens of a prompt, and of its continuation
CONTINUATIONS = 64  # prompts at most

Logits = Callable[[Tensor, Sequence[int]], Tensor]
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Stream:
    """What the reference gave on the rows of some domains. `vocabulary`: tokens whose probabilities count."""

    folder: Path
    file: ModelFile
    identity: str
    vocabulary: int
    vocab_sha256: str
    domains: list[DomainRows]
    settings: dict[str, Any]

    @property
    def longest(self) -> int:
        """The tokens of the longest row that a model has to read."""
        return max([PROMPT + CONTINUED, *(rows.tokens.shape[1] for rows in self.domains)])

    def parts(self) -> Iterator[tuple[DomainRows, int, slice]]:
        """Yield (domain, number of its part, rows)."""
        for rows in self.domains:
            for number, start in enumerate(range(0, len(rows.lengths), PART_ROWS)):
                yield rows, number, slice(start, min(start + PART_ROWS, len(rows.lengths)))

    def keep_all(self, logits: Logits, progress: Advance) -> None:
        """Run the reference on what is not kept yet."""
        parts = list(self.parts())
        for done, (rows, number, span) in enumerate(parts, start=1):
            file = self.folder / f"kept-{rows.domain.name}-{number:03}.safetensors"
            if not file.is_file():
                write_bytes(file, save(self._kept_part(logits, rows, span)), sync=False)
            progress(done, len(parts))

    def _kept_part(self, logits: Logits, rows: DomainRows, span: slice) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(span.start)
        results = [keep(of_row, targets, generator) for of_row, targets in self._scored(logits, rows, span) if len(targets)]
        return {name: torch.cat([kept.tensors()[name] for kept in results]) for name in results[0].tensors()} | {
            "exact": torch.tensor([results[0].exact])
        }

    def _scored(self, logits: Logits, rows: DomainRows, span: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits [n, vocabulary], the tokens that came [n]) of each row's scored predictions."""
        step = batch_rows(rows.tokens.shape[1], self.vocabulary)
        for start in range(span.start, span.stop, step):
            stop = min(start + step, span.stop)
            tokens, lengths = rows.tokens[start:stop], rows.lengths[start:stop]
            for row, of_row, scored in zip(tokens, logits(tokens, lengths), rows.scored[start:stop], strict=True):
                yield of_row[:-1][scored.to(of_row.device)][:, : self.vocabulary], row[1:][scored]

    def load_kept(self, rows: DomainRows, number: int) -> Kept:
        """Return a part of the kept predictions."""
        file = self.folder / f"kept-{rows.domain.name}-{number:03}.safetensors"
        try:
            tensors = load_file(file)
            return Kept(tensors["ids"], tensors["log_p"], tensors["rest"], tensors["loss"], int(tensors["exact"]))
        except Exception as error:  # safetensors and the file system raise many kinds
            raise UserError(f"{file}: not readable ({error}); take it away, and compare again with the reference") from None

    def deviations(self, logits: Logits, folder: Path, progress: Advance) -> None:
        """Run another model on what `folder` does not tell yet."""
        parts = list(self.parts())
        for done, (rows, number, span) in enumerate(parts, start=1):
            file = folder / f"{rows.domain.name}-{number:03}.safetensors"
            if not file.is_file():
                kept, start, results = self.load_kept(rows, number), 0, []
                for of_row, targets in self._scored(logits, rows, span):
                    if len(targets):
                        results.append(deviate(_slice(kept, start, len(targets)), of_row, targets))
                        start += len(targets)
                write_bytes(file, save({"deviations": torch.cat(results)}), sync=False)
            progress(done, len(parts))

    def told(self, folder: Path) -> dict[str, Tensor]:
        """Return what `deviations` wrote: domain -> float32 [predictions, COLUMNS]."""
        results: dict[str, list[Tensor]] = {}
        for rows, number, _ in self.parts():
            part = load_file(folder / f"{rows.domain.name}-{number:03}.safetensors")["deviations"]
            assert part.shape[1] == len(COLUMNS)
            results.setdefault(rows.domain.name, []).append(part)
        return {name: torch.cat(parts) for name, parts in results.items()}

    # --- continuations -------------------------------------------------------------------------------------------------

    def prompts(self) -> tuple[Tensor, list[tuple[str, int]]]:
        """Return the beginnings of rows, evenly of all domains, int64 [prompts, PROMPT], and the (domain, row) of each."""
        each = max(1, CONTINUATIONS // max(1, len(self.domains)))
        chosen = [
            (rows.domain.name, index, rows.tokens[index, :PROMPT])
            for rows in self.domains
            for index in [i for i, length in enumerate(rows.lengths) if length >= PROMPT][:each]
        ]
        tokens = torch.stack([row for _, _, row in chosen]) if chosen else torch.zeros(0, PROMPT, dtype=torch.long)
        return tokens, [(name, index) for name, index, _ in chosen]

    def continuations(self) -> Tensor:
        """Return prompts and the reference's greedy continuations, int64 [prompts, PROMPT + at most CONTINUED]."""
        return load_file(self.folder / "continuations.safetensors")["tokens"]

    def agreements(self, logits: Logits, folder: Path, progress: Advance) -> None:
        """Find how far a model's own greedy continuations go with the reference's, read off one pass over these."""
        file = folder / "agreement.safetensors"
        if file.is_file():
            return
        tokens, results = self.continuations(), []
        batches = tokens.split(PART_ROWS)
        for done, batch in enumerate(batches, start=1):
            if batch.shape[1] > PROMPT:
                best = logits(batch, [batch.shape[1]] * len(batch))[:, PROMPT - 1 : -1, : self.vocabulary].argmax(-1).cpu()
                agrees = (best == batch[:, PROMPT:]).long().cumprod(-1)
                results.append(agrees.sum(-1))
            progress(done, len(batches))
        write_bytes(file, save({"tokens": torch.cat(results) if results else torch.zeros(0, dtype=torch.long)}), sync=False)

    def agreed(self, folder: Path) -> Tensor:
        """Return what `agreements` wrote: int64 [prompts], tokens."""
        return load_file(folder / "agreement.safetensors")["tokens"]

    # --- on the disk ---------------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """A hash of the reference and the rows."""
        return hashlib.sha256(json.dumps([self.identity, *(rows.domain.sha256 for rows in self.domains)]).encode()).hexdigest()[
            :16
        ]

    def vocab(self) -> dict[str, int]:
        """Return the reference's tokens and their numbers."""
        return json.loads((self.folder / VOCAB).read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def write(self, vocab: dict[str, int]) -> None:
        """Write what was run on what, the rows, and the tokens' numbers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for rows in self.domains:
            tensors = {
                "tokens": rows.tokens.int(), "scored": rows.scored, "lengths": torch.tensor(rows.lengths), "blocks": torch.tensor(rows.blocks),
            }  # fmt: skip
            write_bytes(self.folder / f"rows-{rows.domain.name}.safetensors", save(tensors))
        write_text(self.folder / VOCAB, json.dumps(vocab, ensure_ascii=True))
        write_text(self.folder / HEAD, json.dumps(self.head(), indent=1, ensure_ascii=False) + "\n")

    def head(self) -> dict[str, Any]:
        """Return what `reference.json` holds."""
        return {
            "schema": STREAM_SCHEMA, "file": asdict(self.file), "identity": self.identity, "vocabulary": self.vocabulary,
            "vocab_sha256": self.vocab_sha256, "domains": [asdict(rows.domain) for rows in self.domains], "settings": self.settings,
        }  # fmt: skip


def _slice(kept: Kept, start: int, count: int) -> Kept:
    end = start + count
    return Kept(kept.ids[start:end], kept.log_p[start:end], kept.rest[start:end], kept.loss[start:end], kept.exact)


def is_stream(folder: Path) -> bool:
    """Tell whether a folder is one that `compare --out` wrote."""
    return (folder / FOLDER / HEAD).is_file()


def read_stream(folder: Path) -> Stream:
    """Return the reference's predictions that lie in a folder that `compare --out` wrote; UserError where they are not whole."""
    inside = folder / FOLDER
    try:
        head = json.loads((inside / HEAD).read_text(encoding="utf-8"))
        if head.get("schema") != STREAM_SCHEMA:
            raise ValueError(f"schema is {head.get('schema')!r}, expected {STREAM_SCHEMA!r}")
        domains = []
        for content in head["domains"]:
            tensors = load_file(inside / f"rows-{content['name']}.safetensors")
            domains.append(
                DomainRows(
                    Domain(**content),
                    tensors["tokens"].long(),
                    tensors["lengths"].tolist(),
                    tensors["scored"].bool(),
                    tensors["blocks"].tolist(),
                )
            )
        file = ModelFile(**{**head["file"], "kinds": []})
        return Stream(inside, file, head["identity"], head["vocabulary"], head["vocab_sha256"], domains, head["settings"])
    except Exception as error:  # json, safetensors, missing fields
        raise UserError(f"{inside / HEAD}: not readable ({error})") from None


@torch.no_grad()
def continue_greedily(model: Any, prompts: Tensor, limit: int, batch: int = 64) -> Tensor:
    """Return prompts with the model's greedy continuations of `limit` tokens: int64 [prompts, tokens + limit]; ends of text do not stop it."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=limit, min_new_tokens=limit, do_sample=False, eos_token_id=None, pad_token_id=0)
    before, model.generation_config = model.generation_config, GenerationConfig()  # else the checkpoint's penalties are merged in
    try:
        parts = [
            model.generate(
                input_ids=part.to(model.device),
                attention_mask=torch.ones_like(part, device=model.device),
                generation_config=settings,
            ).cpu()
            for part in prompts.split(batch)
        ]
    finally:
        model.generation_config = before
    return torch.cat(parts) if parts else prompts
