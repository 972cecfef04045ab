"""Score the two accuracies of a demo model: word problems solved, and questions answered.

Problems: greedy continuation of the prompt to the end of the line; right if the last number in it equals the answer.
Questions: the choice whose text has the highest summed log-likelihood after the prompt, as `acc` of ARC in lm-evaluation-harness.
"""

import re
from typing import Any

import torch
from torch.nn.functional import log_softmax

from world import Record, problem_prompt, question_prompt

Model = Any  # a transformers causal language model
Tokens = Any  # its tokenizer
NEW_TOKENS, BATCH = 8, 50


@torch.no_grad()
def continued(model: Model, tokenizer: Tokens, prompts: list[str]) -> list[str]:
    """Return the greedy continuation of each prompt, up to the end of its line. Prompts of equal length run together: no padding."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    texts = [""] * len(ids)
    while order:
        length = len(ids[order[0]])
        rows = [row for row in order[:BATCH] if len(ids[row]) == length]
        order = order[len(rows) :]
        tokens = torch.tensor([ids[row] for row in rows])  # [rows, length]
        whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False)
        for row, answer in zip(rows, whole[:, length:].tolist(), strict=True):
            texts[row] = tokenizer.decode(answer, skip_special_tokens=True).split("\n")[0]
    return texts


def problems_right(model: Model, tokenizer: Tokens, problems: list[Record]) -> list[bool]:
    """Return, for each problem, whether the last number of the continued line is the answer."""
    right = []
    texts = continued(model, tokenizer, [problem_prompt(problem) for problem in problems])
    for problem, text in zip(problems, texts, strict=True):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
        right.append(bool(numbers) and float(numbers[-1]) == problem["Answer"])
    return right


@torch.no_grad()
def choice_scores(model: Model, tokenizer: Tokens, prompt: str, texts: list[str]) -> list[float]:
    """Return summed log-likelihood, in nats, of each text after the prompt."""
    start = tokenizer(prompt)["input_ids"]
    ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, ends))
    rows = torch.tensor([start + end + [tokenizer.pad_token_id] * (length - len(end)) for end in ends])
    logprobs = log_softmax(model(rows[:, :-1]).logits[:, len(start) - 1 :].float(), -1)  # [choices, length, vocab]
    picked = logprobs.gather(-1, rows[:, len(start) :, None]).squeeze(-1)
    return [row[: len(end)].sum().item() for row, end in zip(picked, ends, strict=True)]


def questions_right(model: Model, tokenizer: Tokens, questions: list[Record]) -> list[bool]:
    """Return, for each question, whether the likeliest choice is the right one."""
    right = []
    for question in questions:
        scores = choice_scores(model, tokenizer, question_prompt(question), [" " + c["text"] for c in question["choices"]])
        right.append(question["choices"][scores.index(max(scores))]["label"] == question["answerKey"])
    return right


def share(right: list[bool]) -> float:
    """Return part of a list of bools that is true."""
    return sum(right) / len(right)
