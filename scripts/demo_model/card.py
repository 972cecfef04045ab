"""Write the demo model's card, its README.md, from measurements of a saved checkpoint at several precisions.

Every figure in the card is measured here, with the package's own quantizer and swap; nothing is written by hand. `train.py` calls
it after training, and again with --card-only. Left out: the planner and its plans, which the report is about.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import score
import world
from bitatlas.data.rows import make_rows
from bitatlas.measure.damage import kl_per_row
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize.bank import Bank
from bitatlas.stats.paired import mcnemar_p

FORMAT_NAMES = ("int4_g32", "int4_g64", "int3_g32", "int3_g64", "int2_g32", "int2_g64", "int2_g128")
DAMAGE_ROWS, DAMAGE_TOKENS = 48, 192

CARD = """\
---
library_name: transformers
license: apache-2.0
---
# bitatlas demo model

A small language model to try bitatlas on: {layers} layers, hidden size {hidden}, {weights:,} weights in bfloat16, Llama architecture
({heads} heads of {head_size}, {kv_heads} key-value heads, feed-forward {feed_forward}, tied embedding), byte-level BPE with {vocabulary} tokens.

It knows one made-up world: one-step word problems with numbers up to 99 (`problems.json`, SVAMP's form) and {facts:,} facts about
{kinds} (`questions.jsonl`, ARC's form). It also continues
a random block of tokens that it has seen before, for which it has induction heads; without such blocks in its training it had none.
It is good for nothing else. The facts are those of `scripts/demo_model/tables.py` and `named.py`, not of the real world: the people are invented, and
so are the towns and planets. English only; no personal data; the text is generated, so it is free of other licences.

| | |
|---|---|
| trained by | `python scripts/demo_model/train.py --out DIR --seed {seed} --steps {steps} --repeat-steps {repeat_steps} --last-steps {last_steps}` |
| tokens seen | {tokens:,} |
| optimizer | Muon (matrices), AdamW (embedding, norms), peak rate {rate}, weight decay {decay} |
| word problems right, greedy, of {problem_count} | {problems:.1%} |
| questions right, likeliest of four choices, of {question_count} | {questions:.1%} |

No test item occurs in training: never the same story with the same two numbers, never the same wording of a question; the facts
and sums themselves do (see `world.py`). The figures are those of the bfloat16 weights loaded in float32. Another CPU, thread count
or torch version trains a slightly different model from the same seed.

## With fewer bits

All linear weights of the {layers} layers rounded to nearest, asymmetric, range of each group chosen for least squared error, nothing
trained or calibrated; embedding and norms untouched. All items of each task; p: exact McNemar test against the reference,
uncorrected; damage: KL(reference || quantized) in nats/token on {damage_rows} rows of {damage_tokens} tokens of `text.txt`.

| format | word problems | p | questions | p | damage |
|---|---|---|---|---|---|
{table}

Guessing gets 25 % of the questions right, and next to none of the word problems.
"""


@dataclass(frozen=True)
class Outcome:
    """What a model gets right at one precision; damage in nats/token."""

    precision: str
    problems: list[bool]
    questions: list[bool]
    damage: float


def outcome(
    model: Any, tokenizer: Any, precision: str, problems: list[world.Record], questions: list[world.Record], damage: float
) -> Outcome:
    """Score both tasks with the weights that the model has now."""
    right = score.problems_right(model, tokenizer, problems), score.questions_right(model, tokenizer, questions)
    return Outcome(precision, *right, damage)


@torch.no_grad()
def outcomes(folder: Path, data: Path, problems: list[world.Record], questions: list[world.Record]) -> Iterator[Outcome]:
    """Measure the reference, then every uniform format. folder: the checkpoint; data: where text.txt is."""
    checkpoint = open_checkpoint(str(folder))
    decoder, tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()
    text = (data / "text.txt").read_text(encoding="utf-8")
    rows: Tensor = make_rows([text], tokenizer, "text.txt", (1, 1, DAMAGE_ROWS), DAMAGE_TOKENS, DAMAGE_TOKENS, seed=0).test
    names = [module.name for module in checkpoint.modules]
    model, bank = decoder.model, Bank(decoder, names, "rtn")
    reference = torch.log_softmax(model(rows, use_cache=False).logits, -1)  # [rows, tokens, vocabulary]
    yield outcome(model, tokenizer, "reference", problems, questions, 0.0)
    for format_name in FORMAT_NAMES:
        with decoder.swapped(bank.weights(dict.fromkeys(names, format_name))):
            damage = kl_per_row(reference, model(rows, use_cache=False).logits).mean().item()
            yield outcome(model, tokenizer, format_name, problems, questions, damage)


def p_value(first: list[bool], second: list[bool]) -> float:
    """Return the exact McNemar p of two precisions' answers to the same items."""
    pairs = list(zip(first, second, strict=True))
    return mcnemar_p(pairs.count((True, False)), pairs.count((False, True)))


def table_line(reference: Outcome, row: Outcome) -> str:
    """Return one line of the card's table."""
    cells = [row.precision]
    for name in ("problems", "questions"):
        right = getattr(row, name)
        p = "" if row is reference else f"{p_value(getattr(reference, name), right):.1g}"
        cells += [f"{score.share(right):.1%}", p]
    return "| " + " | ".join([*cells, f"{row.damage:.3f}" if row.damage else "0"]) + " |"


def write_card(
    folder: Path, data: Path, seed: int, steps: tuple[int, int, int], tokens: int, rate: float, decay: float
) -> list[Outcome]:
    """Measure the checkpoint in `folder` on the 300 items of each task and write its README.md; returns what was measured."""
    problems = json.loads((data / "problems.json").read_text(encoding="utf-8"))
    questions = [json.loads(line) for line in (data / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = list(outcomes(folder, data, problems, questions))
    checkpoint = open_checkpoint(str(folder))
    config, reference = checkpoint.config, measured[0]
    kinds = [{"person": "people", "material": "materials"}.get(kind, f"{kind}s") for kind in world.PHRASES]
    text = CARD.format(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_size=config.head_dim,
        kv_heads=config.num_key_value_heads,
        feed_forward=config.intermediate_size,
        weights=sum(p.numel() for p in checkpoint.load_model().model.parameters()),
        vocabulary=checkpoint.vocabulary,
        facts=len(world.FACTS),
        kinds=", ".join(kinds[:-1]) + " and " + kinds[-1],
        seed=seed,
        steps=steps[0],
        repeat_steps=steps[1],
        last_steps=steps[2],
        tokens=tokens,
        rate=rate,
        decay=decay,
        problem_count=len(problems),
        question_count=len(questions),
        problems=score.share(reference.problems),
        questions=score.share(reference.questions),
        damage_rows=DAMAGE_ROWS,
        damage_tokens=DAMAGE_TOKENS,
        table="\n".join(table_line(reference, row) for row in measured),
    )
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
    return measured
