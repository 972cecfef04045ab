"""Tiny files of every task, and what the task tests need of the outside."""

import json
from pathlib import Path

import pytest

from bitatlas.data import PROBLEMS_FILE, QUESTIONS_FILE
from tiny import SHARED

needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data is not here")
needs_demo = pytest.mark.skipif(not (PROBLEMS_FILE.exists() and QUESTIONS_FILE.exists()), reason="the demo data is not built")

QUESTIONS = [
    {
        "id": "three",
        "question": "Which has three sides?",
        "choices": [{"label": "A", "text": "square"}, {"label": "B", "text": "triangle"}, {"label": "C", "text": "circle"}],
        "answerKey": "B",
    },
    {
        "id": "numbered",
        "question": "Where do fish live?",
        "choices": [{"label": str(n), "text": text} for n, text in enumerate(["sand", "trees", "water", "fire"], 1)],
        "answerKey": "3",
    },
    {
        "id": "five",
        "question": "What is ice?",
        "choices": [
            {"label": label, "text": text}
            for label, text in zip("ABCDE", ["iron", "cold-water", "wood", "oil", "air"], strict=True)
        ],
        "answerKey": "B",
    },
]
PROBLEMS = [
    {
        "ID": "p1",
        "Body": "Tom had 26 pens. He lost 9.",
        "Question": "How many are left?",
        "Equation": "( 26.0 - 9.0 )",
        "Answer": 17.0,
    },
    {"ID": "p2", "Body": "Ann has 3 cats and gets 4.", "Question": "How many now?", "Equation": "( 3.0 + 4.0 )", "Answer": 7.0},
    {
        "ID": "p3",
        "Body": "Six boxes hold 5 eggs each.",
        "Question": "How many eggs?",
        "Equation": "( 6.0 * 5.0 )",
        "Answer": 30.0,
    },
    {"ID": "p4", "Body": "12 nuts for 4 birds.", "Question": "How many each?", "Equation": "( 12.0 / 4.0 )", "Answer": 3.0},
]


def write_task_data(folder: Path) -> Path:
    """A folder as --task-data names it, with tiny files."""
    (folder / "ARC-Easy-test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    (folder / "SVAMP.json").write_text(json.dumps(PROBLEMS))
    worked = {"question": "Two hens lay 1,000 eggs each. How many?", "answer": "2*1000=<<2*1000=2000>>2000\n#### 2,000"}
    (folder / "gsm8k_test.jsonl").write_text(json.dumps(worked) + "\n")
    return folder
