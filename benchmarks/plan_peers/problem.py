"""What every method is given: a checkpoint, two formats, a budget in code bits, and the rows it may look at.

Fit and select rows are those that `bitatlas survey --rows 24,24,...` deals out of the same text with the same seed, so that peers may fit on
everything bitatlas sees (both sets together). Test rows come from another text, cut and drawn as the project's independent plan
checker does it (whole rows of the text in order, shuffled by torch with seed 1, the first 24 passed over).
Left out: more than two formats, fused units (every module is a unit), budgets that count scales.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitatlas.data.rows import make_rows
from bitatlas.data.texts import read_documents
from bitatlas.measure.damage import DamageMeter
from bitatlas.measure.screens import uniform
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.plan.budget import costs_of
from bitatlas.quantize.bank import Bank
from bitatlas.records import Budget
from bitatlas.records.journal import Journal
from bitatlas.records.sizes import Unit, assignment_of, units_of

Ints = NDArray[np.int64]

TEST_SKIP = 24
TEST_SEED = 1
SURVEY_TEST_ROWS = 64  # of the fit text; bitatlas judges its own plan on them


@dataclass(frozen=True)
class Question:
    """One budget of one checkpoint, small enough to be handed to another process as JSON. `rows`: [rows, tokens] of token ids."""

    model: str
    formats: tuple[str, str]  # low, high
    quantizer: str
    code_bits: float
    seed: int
    rows: list[list[int]]

    def write(self, path: Path, **options: Any) -> None:
        """As JSON, with what one method is told besides."""
        path.write_text(json.dumps({**asdict(self), "options": options}))

    @classmethod
    def of(cls, content: dict[str, Any]) -> Question:
        low, high = content["formats"]
        return cls(**{**content, "formats": (low, high)})


class Problem:
    """A question with its checkpoint opened. Weights are read when first needed; `like` lends its checkpoint and its meter."""

    def __init__(self, question: Question, like: Problem | None = None):
        self.question = question
        self.like = like
        self.checkpoint: Checkpoint = like.checkpoint if like else open_checkpoint(question.model, fuse=False)
        self.modules = self.checkpoint.modules
        self.units: list[Unit] = units_of(self.modules)
        self.formats = list(question.formats)
        self.low, self.high = self.formats
        costs = costs_of(Budget("code_bits", question.code_bits), self.units, self.formats, self.checkpoint.info)
        assert costs.limit is not None
        self.cost, self.limit = costs.cost, costs.limit  # [units, formats], bits
        self.extra: Ints = self.cost[:, 1] - self.cost[:, 0]  # [units]
        self.room = self.limit - int(self.cost[:, 0].sum())
        self.rows = torch.tensor(question.rows)  # int64 [rows, tokens]

    @cached_property
    def meter(self) -> DamageMeter:
        """The meter, with every module quantized in both formats, so that the clock of a search does not see it."""
        if self.like:
            return self.like.meter
        names = [module.name for module in self.modules]
        decoder = self.checkpoint.load_model()
        bank = Bank(decoder, names, self.question.quantizer)
        for name in self.formats:
            bank.weights(uniform(self.modules, name))
        return DamageMeter(decoder, bank, self.checkpoint.info.weights_sha256, self.question.quantizer, Journal(None))

    def assignment(self, choice: NDArray[Any]) -> dict[str, str]:
        """choice: [units] of 0 (low) and 1 (high), or bools -> module -> format. AssertionError above the budget."""
        columns = np.asarray(choice).astype(np.int64)
        assert self.spent(columns) <= self.limit, "a plan above the budget"
        return assignment_of(self.units, self.formats, columns)

    def spent(self, columns: Ints) -> int:
        """Code bits of a choice [units]."""
        return int(self.cost[np.arange(len(columns)), columns].sum())

    def choice(self, assignment: dict[str, str]) -> Ints:
        """module -> format, back to columns [units]."""
        return np.array([self.formats.index(assignment[unit.modules[0].name]) for unit in self.units], dtype=np.int64)


def fit_rows(checkpoint: Checkpoint, text: Path, counts: tuple[int, int], row_length: int, seed: int) -> Tensor:
    """Fit and select rows together, as the survey deals them. int64 [sum(counts), row_length]"""
    info = checkpoint.info
    rows = make_rows(
        read_documents(str(text)),
        checkpoint.load_tokenizer(),
        text.name,
        (*counts, SURVEY_TEST_ROWS),
        row_length,
        info.context,
        seed,
    )
    return torch.cat([rows.fit, rows.select])


def judging_rows(checkpoint: Checkpoint, text: Path, count: int, row_length: int) -> Tensor:
    """Rows to judge on, the independent checker's. int64 [count, row_length]; ValueError where the text is too short."""
    ids = torch.tensor(checkpoint.load_tokenizer()(text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    whole = ids[: len(ids) // row_length * row_length].view(-1, row_length)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(TEST_SEED))
    rows = whole[order][TEST_SKIP : TEST_SKIP + count]
    if len(rows) < count:
        raise ValueError(f"{text.name}: {len(whole)} rows of {row_length} tokens, but {TEST_SKIP + count} are needed")
    return rows


def assert_disjoint(fit: Tensor, test: Tensor) -> None:
    """AssertionError where a test row is also a fit row."""
    seen = {tuple(row) for row in fit.tolist()}
    assert not any(tuple(row) in seen for row in test.tolist()), "a test row was fitted on"
