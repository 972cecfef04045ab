"""The bundled demo: a small model trained on a small world, with its two tasks and a held-out text.

Only paths, so that importing it costs nothing. `world.py` makes the data, `train.py` the model, `score.py` the two accuracies.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).resolve().parent
MODEL_DIR = DEMO_DIR / "bitatlas-demo"
DATA_DIR = DEMO_DIR / "data"
PROBLEMS_FILE = DATA_DIR / "problems.json"
QUESTIONS_FILE = DATA_DIR / "questions.jsonl"
TEXT_FILE = DATA_DIR / "text.txt"
