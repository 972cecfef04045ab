"""Every reader of files from outside, fed damaged files by atheris (coverage-guided): a value or one clear line, no traceback, no hang, no write.

    python tests/fuzz_readers.py all --seconds 60         # each reader for so long
    python tests/fuzz_readers.py plan --seconds 600       # one of them

The first inputs are valid files; atheris changes them, and keeps what reaches new code. A finding ends the run with the input that
made it, in a file that `python tests/fuzz_readers.py READER FILE` runs again. Not a test module by its name: `test_fuzz.py` runs it for a
moment where atheris is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import operator
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["bitatlas"]):
    import torch
    from safetensors import SafetensorError

    from bitatlas.data.tasks import load_items
    from bitatlas.data.texts import read_documents
    from bitatlas.errors import UserError
    from bitatlas.model.folder import read_config, weight_files
    from bitatlas.model.tensor_files import read_header
    from bitatlas.quantize.bank import load_checked, save_checked
    from bitatlas.records import Atlas, Plan
    from bitatlas.records.files import read_record, to_json
    from bitatlas.records.journal import Journal, content_key

from atlas_factory import make_atlas
from task_files import PROBLEMS, QUESTIONS
from tiny import make_checkpoint

SLOWEST = 10  # seconds for one input: more is a hang
VALUES: list[Any] = [
    None, True, 0, -1, 1e308, 2**70, float("nan"), "", "a", "../x", "/etc/passwd", "\ud800", "a\0b", "int2_g64", "9" * 400, [], {}, [[]], {"a": None}
]  # fmt: skip
KEYS = [content_key(number) for number in range(3)]


def journal(file: Path) -> None:
    found = Journal(file)
    try:
        for key in KEYS:
            assert found.get(key) in (None, [1.0, 2.0])
    finally:
        found.close()


def sealed(file: Path) -> None:
    with contextlib.suppress(SafetensorError, ValueError, KeyError, OSError):  # what the bank takes for "make it again"
        assert torch.equal(load_checked(file, "m")["codes"], torch.arange(40, dtype=torch.uint8))


# reader -> the file's name, and what reads it
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "plan": ("plan.json", lambda file: read_record(file, Plan)),
    "atlas": ("atlas.json", lambda file: read_record(file, Atlas)),
    "questions": ("ARC-Easy-test.jsonl", lambda file: load_items("arc_easy", file.parent, 3, seed=0)),
    "problems": ("SVAMP.json", lambda file: load_items("svamp", file.parent, 3, seed=0)),
    "worked": ("gsm8k_test.jsonl", lambda file: load_items("gsm8k", file.parent, 3, seed=0)),
    "tokens": ("text.jsonl", lambda file: read_documents(str(file))),
    "header": ("model.safetensors", read_header),
    "index": ("model.safetensors.index.json", lambda file: weight_files(file.parent)),
    "config": ("config.json", lambda file: read_config(file.parent, "model")),
    "bank": ("m.safetensors", sealed),
    "journal": ("run.sqlite", journal),
}
WRITES = {"journal"}  # SQLite's own files beside it are no finding


def seeds(place: Path) -> dict[str, bytes]:
    """A valid file of each reader."""
    atlas = make_atlas()
    assert atlas.plan is not None
    model = make_checkpoint(place / "model")
    save_checked({"codes": torch.arange(40, dtype=torch.uint8)}, place / "sealed", "m")
    written = Journal(place / "run.sqlite")
    for key in KEYS:
        written.put(key, "damage", [1.0, 2.0])
    written.close()
    whole = (model / "model.safetensors").read_bytes()
    index = {"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    worked = [{"question": "1 + 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"}] * 4
    found: dict[str, Any] = {
        "plan": to_json(atlas.plan), "atlas": to_json(atlas), "questions": "\n".join(map(json.dumps, QUESTIONS)), "problems": json.dumps(PROBLEMS),
        "worked": "\n".join(map(json.dumps, worked)), "tokens": '{"text": "one"}\n{"text": "two", "id": 3}\n',
        "header": whole[: 8 + int.from_bytes(whole[:8], "little")], "index": json.dumps(index), "config": (model / "config.json").read_bytes(),
        "bank": (place / "sealed").read_bytes(), "journal": (place / "run.sqlite").read_bytes(),
    }  # fmt: skip
    return {name: content if isinstance(content, bytes) else content.encode() for name, content in found.items()}


def once(name: str, content: bytes, folder: Path) -> None:
    """One input: anything but a value or a UserError comes out as the exception that it is."""
    file_name, read = READERS[name]
    for old in folder.iterdir():
        old.unlink()
    file = folder / file_name
    file.write_bytes(content)
    with contextlib.suppress(UserError):
        read(file)
    if name not in WRITES:
        assert [path.name for path in folder.iterdir()] == [file_name] and file.read_bytes() == content


def changed(content: bytes, most: int, seed: int) -> bytes:
    """atheris's own mutation; of what is JSON, or lines of JSON, half of the time another value somewhere in it."""
    chance = random.Random(seed)
    lines = content.split(b"\n") if b"\n{" in content else [content]
    number = chance.randrange(len(lines))
    with contextlib.suppress(ValueError, RecursionError):
        if chance.random() < 0.5:
            value = json.loads(lines[number])
            path = chance.choice(list(places(value)))
            new = chance.choice(VALUES)
            if path:
                parent = functools.reduce(operator.getitem, path[:-1], value)
                if chance.random() < 0.2:
                    del parent[path[-1]]
                else:
                    parent[path[-1]] = new
            else:
                value = new
            lines[number] = json.dumps(value).encode()
            if len(found := b"\n".join(lines)) <= most:
                return found
    return bytes(atheris.Mutate(content, most))


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every path into a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def fuzz(name: str, seconds: int, seed: bytes, place: Path, findings: Path) -> None:
    """Does not return: atheris ends the process, with 0 where nothing was found, and without a word of the readers' own."""
    folder, corpus = place / "work", place / "corpus"
    folder.mkdir()
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)
    words = [
        f"-max_total_time={seconds}",
        f"-timeout={SLOWEST}",
        f"-artifact_prefix={findings}/{name}-",
        f"-max_len={2 * len(seed) + 4096}",
    ]
    atheris.Setup(
        [sys.argv[0], *words, "-print_final_stats=1", str(corpus)],
        lambda content: once(name, content, folder),
        custom_mutator=changed,
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=["all", *READERS])
    parser.add_argument("file", nargs="?", type=Path, help="an input to run again")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--findings", type=Path, default=Path(tempfile.gettempdir()), help="folder for the inputs that were findings"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if args.file:
            once(args.reader, args.file.read_bytes(), Path(place))
            return
        valid = seeds(Path(place))
        names = list(READERS) if args.reader == "all" else [args.reader]
        raise SystemExit(max([apart(name, args.seconds, valid[name], args.findings) for name in names]))


def apart(name: str, seconds: int, seed: bytes, findings: Path) -> int:
    """Fuzz in a process of its own, since atheris ends the one it runs in; its exit code."""
    with tempfile.TemporaryDirectory() as place:
        print(f"--- {name}", file=sys.stderr, flush=True)
        if (child := os.fork()) == 0:
            fuzz(name, seconds, seed, Path(place), findings)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
