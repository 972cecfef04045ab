"""Does a GGUF keep its plan's promise? It is run in llama.cpp on the test rows, beside the reference model in transformers.

The file's own tensors say which types and how many bytes it holds. A file that llama-quantize made is verified too, where the plan lies
beside it as plan.json.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitatlas.apply import check_fits
from bitatlas.checkpoint import Checkpoint, check_finite, open_checkpoint
from bitatlas.errors import UserError
from bitatlas.evaluation.bootstrap import measured
from bitatlas.files import parse_record, read_record
from bitatlas.formats import FORMATS
from bitatlas.llamacpp.library import check_packages
from bitatlas.llamacpp.names import weight_names
from bitatlas.llamacpp.run import Session, opened
from bitatlas.llamacpp.write import PLAN_KEY
from bitatlas.planning.budget import size_of
from bitatlas.progress import Reporter
from bitatlas.records import Plan
from bitatlas.sensitivity.damage import kl_per_row
from bitatlas.settings import check_device
from bitatlas.verify import Verification, rows_for

ROW = "in the file, bytes"


def verify_gguf(
    model_name: str, file: Path, tokens: str | None, rows: tuple[int, int, int], row_length: int, device: str, seed: int,
    reporter: Reporter,
) -> Verification:  # fmt: skip
    """Measure a GGUF against what its plan promises. Without `tokens`, the rows of the survey in whose folder it lies."""
    check_packages(str(file))
    reader = _open(file)
    plan = _plan_of(file, reader)
    checkpoint = open_checkpoint(model_name, plan.model.revision, fuse=False)
    check_fits(plan, checkpoint)
    chosen = rows_for(file, checkpoint, tokens, rows, row_length, seed)
    test = chosen.test
    context = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.context_length")
    if context is not None and test.shape[1] > context.contents():
        raise UserError(f"--row-length {test.shape[1]}: the GGUF's context is {context.contents()} tokens; give at most that")
    check_finite(checkpoint)
    model = checkpoint.load_model(check_device(device))
    with opened(file, test.shape[1]) as session, reporter.stage("damage in llama.cpp") as progress:
        nats = damage_in_llama_cpp(model, session, test, progress)
    damage = measured(nats, "nats/token", "plan", "test", seed, chosen.blocks("test"))
    found, held = _held(reader, plan, checkpoint)
    size = size_of(checkpoint.modules, found, checkpoint.info)
    kept = found == plan.modules and size == plan.size and held == plan.size.quantized_bytes
    disk = plan.size.quantized_bytes, held
    return Verification(plan, size, damage, kept, disk, disk_what=ROW)


@torch.no_grad()
def damage_in_llama_cpp(model: Any, session: Session, rows: Tensor, progress: Callable[[int, int], None]) -> np.ndarray:
    """KL(reference || the GGUF), rows int64 [rows, tokens] -> float64 [rows], nats/token."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    if session.vocabulary != vocabulary:
        raise UserError(f"the GGUF has {session.vocabulary} tokens, the model {vocabulary}")
    found = []
    for done, row in enumerate(rows, start=1):
        reference = model(input_ids=row[None].to(model.device), use_cache=False).logits.float().cpu()
        session.clear()
        session.decode(row.tolist())
        logits = torch.from_numpy(session.logits(len(row)))[None]  # [1, tokens, vocabulary]
        found.append(kl_per_row(torch.log_softmax(reference, -1), logits))
        progress(done, len(rows))
    return torch.cat(found).numpy()


def _open(file: Path) -> Any:
    from gguf import GGUFReader

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return GGUFReader(file)
    except Exception as error:  # numpy and struct raise many kinds on a damaged file
        raise UserError(f"{file}: not a whole GGUF ({' '.join(str(error).split())[:120]})") from None


def _plan_of(file: Path, reader: Any) -> Plan:
    entry = reader.fields.get(PLAN_KEY)
    if entry is not None:
        return parse_record(str(entry.contents()), str(file), Plan)
    if not (file.parent / "plan.json").is_file():
        raise UserError(f"{file}: holds no plan, and no plan.json lies beside it")
    return read_record(file.parent / "plan.json", Plan)


def _held(reader: Any, plan: Plan, checkpoint: Checkpoint) -> tuple[dict[str, str], int]:
    """(module -> format, bytes of these modules) as the file's own tensors have it."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = weight_names([m.name for m in checkpoint.modules], checkpoint.config.model_type, checkpoint.info.layers)
    found, held = {}, 0
    for module, name in names.items():
        if name not in tensors:
            raise UserError(f"the GGUF lacks {name}, which {module} should be")
        kind = tensors[name].tensor_type.name.lower()
        if kind in FORMATS:
            found[module] = kind
            held += int(tensors[name].n_bytes)
    return {name: found[name] for name in plan.modules if name in found} | found, held
