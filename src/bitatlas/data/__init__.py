"""The bundled demo: a small model trained on a small world, with its two tasks and a held-out text.

Only paths, so that importing it costs nothing. `scripts/demo_model/` makes them.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).resolve().parent
MODEL_DIR = DEMO_DIR / "bitatlas-demo"
DATA_DIR = DEMO_DIR / "demo_data"
PROBLEMS_FILE = DATA_DIR / "problems.json"
QUESTIONS_FILE = DATA_DIR / "questions.jsonl"
TEXT_FILE = DATA_DIR / "text.txt"
