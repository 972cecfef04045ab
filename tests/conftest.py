"""Every test runs offline, and whatever libraries write under the home goes to a temporary place."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start; this process is told below
os.environ.setdefault("NPM_CONFIG_USERCONFIG", str(Path.home() / ".npmrc"))  # npm keeps its own settings
_LLAMA = Path(__file__).parents[1] / ".venv/llama.cpp/package/bins/linux-x64"  # where `make test` puts it
if _LLAMA.is_dir():
    os.environ.setdefault("BITATLAS_LLAMA_CPP", str(_LLAMA))
_HOME = tempfile.mkdtemp(prefix="bitatlas-tests-")
for _name, _place in {
    "HOME": "",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "HF_HOME": "hf",
}.items():
    os.environ[_name] = os.path.join(_HOME, _place)

import pytest  # noqa: E402  (the environment must be set before any library is imported)
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tiny import SHARED, TEXT, make_checkpoint  # noqa: E402

settings.register_profile("no deadline", deadline=None)  # how long an example takes says more about the machine's other work
settings.load_profile("no deadline")

if os.environ.get("BITATLAS_TEST_LLAMA_CPP") == "required" and "BITATLAS_LLAMA_CPP" not in os.environ:
    pytest.exit("no llama.cpp at hand: `make test` fetches one by npm", returncode=1)

# Tiny models on two busy cores: threads that wait for each other cost a hundred times what they save.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for the tiny models; nobody changes it."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def babyllama() -> Path:
    folder = SHARED / "models" / "babyllama-105"
    if not folder.is_dir():
        pytest.skip("the trained checkpoints are not at hand")
    return folder
