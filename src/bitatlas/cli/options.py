"""The command line's options that several commands share: their names, types and help texts, each told once.

A shell completes values from the names below. They repeat what the registries have, because asking those imports torch, two
seconds a key press; `tests/test_completion.py` compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import typer

QUANTIZER_NAMES = ("rtn", "gptq", "hqq", "autoround", "llama.cpp")
RUNTIME_NAMES = ("vllm", "mlx", "torchao", "llm-compressor", "gptqmodel", "autoround", "exllamav3", "llama.cpp")
TASK_NAMES = ("demo_problems", "demo_questions", "arc_easy", "arc_challenge", "svamp", "gsm8k")


def not_empty(text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise typer.BadParameter("is empty")
    return text


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes an option's value."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """The same for a list with commas: its last name is completed."""

    def complete(incomplete: str) -> list[str]:  # typer asks for that name
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in names if name.startswith(last) and name not in before.split(",")]

    return complete


CodeBits = Annotated[
    float | None, typer.Option("--code-bits", help="Budget: bits of the codes alone, per weight (the usual '3-bit').")
]
StoredBits = Annotated[
    float | None, typer.Option("--stored-bits", help="Budget: all stored bits of the quantized modules, per weight.")
]
SizeText = Annotated[str | None, typer.Option("--size", callback=not_empty, help="Budget: bytes of the whole model, like 4GiB.")]
MaxDamage = Annotated[
    float | None, typer.Option("--max-damage", help="Budget: the greatest damage tolerated, nats/token; finds the smallest plan.")
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        "--protect",
        help="Budget: a task and the points it may lose, like svamp=1pp; finds the smallest model that holds it. Repeatable.",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option("--vram", callback=not_empty, help="Budget: device memory for weights, cache and activations, like 8GiB."),
]
Context = Annotated[int | None, typer.Option("--context", help="With --vram: tokens in the cache. Default: the model's own.")]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        "--cache-dtype",
        callback=not_empty,
        help="With --vram: float16, bfloat16, float32, float8_e4m3fn or float8_e5m2. Default: the checkpoint's if 16 bit, else float16.",
    ),
]
Batch = Annotated[
    int | None, typer.Option("--batch", help="With --vram: sequences at once, each with the whole context. Default: 1.")
]
Chunk = Annotated[int | None, typer.Option("--chunk", help="With --vram: tokens of a prompt read in one pass. Default: 512.")]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        callback=not_empty,
        help="Text to measure on: a text file, JSON lines or a JSON list (field text), or hub:owner/name[:config[:split]].",
    ),
]
RowCounts = Annotated[str, typer.Option("--rows", help="Rows to find, choose and judge a plan on: fit,select,test.")]
RowLength = Annotated[int, typer.Option("--row-length", help="Tokens in a row.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        callback=not_empty,
        autocompletion=some_of((*TASK_NAMES, "none")),
        help="Tasks, like arc_easy,svamp; or none. Default: the demo's two, else arc_easy,svamp.",
    ),
]
TaskData = Annotated[
    str | None,
    typer.Option(
        "--task-data",
        callback=not_empty,
        help="Folder with the tasks' files (SVAMP.json, ARC-Easy-test.jsonl, ...), instead of the hub.",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="At most so many items a task.")]
FewShot = Annotated[
    int,
    typer.Option(
        "--few-shot",
        help="Examples with their answers before each question, from items that are not scored (published GSM8K: 5).",
    ),
]
Margin = Annotated[
    str,
    typer.Option(
        "--margin", callback=not_empty, help="A task is held where a loss of so many percentage points can be ruled out."
    ),
]
Device = Annotated[str, typer.Option("--device", callback=not_empty, help="cpu, cuda, mps or auto.")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        callback=not_empty,
        help="What this may take at its peak, like 6GiB (of the GPU with --device cuda); layer by layer where all weights do not fit. Default: what is free.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        callback=not_empty,
        help="What the model computes in: float32, bfloat16, float16; auto: float32 on a CPU, else bfloat16.",
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", callback=not_empty, help="Hub revision.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="For scripts: one JSON object on stdout instead of tables.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.")]
