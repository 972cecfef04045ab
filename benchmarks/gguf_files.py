"""GGUFs beside llama.cpp's own: damage of types and recipes at equal bytes, and how many architectures a base GGUF reaches.

    python benchmarks/gguf_files.py types MODEL TEXT [--types q2_k,q3_k,...] [--rows 16]
    python benchmarks/gguf_files.py recipes MODEL TEXT [--recipes Q3_K_M,...] [--formats ...]
    python benchmarks/gguf_files.py families FOLDER

`types`: every module in one type (what stands in where its blocks do not divide a row), coded by llama.cpp without an importance matrix, with one, and by
gptq; damage by reconstruction. `recipes`: llama.cpp's own library quantizes the model by its recipes with the survey's importance matrix; ours is the first
plan (`quantize`) of at most that file's bytes; both files are run in llama.cpp on the same test rows. `families`: FOLDER holds checkpoints `NAME/` and what
llama.cpp's converter made of them, `NAME.gguf`; each is planned in six types, written on that base and run. Rows: 24 to fit, 24 to choose, 64 to judge, of 192
tokens. Results are added to benchmarks/results/gguf.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from bitatlas.data.rows import Rows, make_rows
from bitatlas.data.texts import read_documents
from bitatlas.export.gguf.base import followed, open_base, write_on_base
from bitatlas.export.gguf.run import open_gguf
from bitatlas.export.gguf.write import blueprint_of, write_gguf
from bitatlas.measure.damage import DamageMeter
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize.bank import Bank
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS, LLAMA_CPP
from bitatlas.records.journal import Journal
from bitatlas.records.runtimes import nearest_held
from bitatlas.records.sizes import size_of, units_of
from bitatlas.run.options import QuantizeOptions
from bitatlas.run.quantize import quantize_model
from bitatlas.run.verify import damage_in_llama_cpp
from bitatlas.stats.bootstrap import measured
from llama_quantize import llama_quantize

RESULTS = Path(__file__).parent / "results" / "gguf.json"
TYPES = "iq2_xxs,iq2_s,q2_k,iq3_xxs,iq3_s,q3_k,iq4_xs,q4_k,q5_k,q6_k,q8_0"
KINDS = ("q4_0", "q8_0", "q5_1", "iq4_nl", "q5_0", "q4_1")  # of `families`: blocks of 32
COUNTS, LENGTH = (24, 24, 64), 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("types", "recipes"):
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("text")
        command.add_argument("--formats", default="gguf")
        command.add_argument("--types", default=TYPES)
        command.add_argument("--recipes", default="IQ4_XS,Q3_K_M,Q4_K_M")
        command.add_argument("--rows", type=int, default=16, help="test rows of `types`")
    commands.add_parser("families").add_argument("folder", type=Path)
    words = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    key = words.what if words.what == "families" else Path(words.model).resolve().name
    for name, value in {"types": types, "recipes": recipes, "families": families}[words.what](words).items():
        results.setdefault(words.what, {}).setdefault(key, {"date": date.today().isoformat()})[name] = value
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def rows_of(checkpoint: Any, text: str) -> Rows:
    return make_rows(
        read_documents(text),
        checkpoint.load_tokenizer(),
        text,
        COUNTS,
        LENGTH,
        checkpoint.info.context,
        0,
        vocabulary=checkpoint.vocabulary,
    )


def shown(nats: np.ndarray, rows: Rows) -> dict[str, Any]:
    value = measured(nats, "nats/token", "", "test", 0, rows.blocks("test")[: len(nats)])
    return {"nats": value.mean, "ci95": value.ci95, "rows": len(nats)}


def types(words: argparse.Namespace) -> dict[str, Any]:
    """Return damage by type and quantizer."""
    checkpoint = open_checkpoint(words.model, None, False)
    rows, decoder, result = rows_of(checkpoint, words.text), checkpoint.load_model(), {}
    names = [module.name for module in checkpoint.modules]
    for kind in words.types.split(","):
        modules = {module.name: nearest_held(kind, module.shape[1], LLAMA_CPP) for module in checkpoint.modules}
        line: dict[str, Any] = {"stored_bits": size_of(checkpoint.modules, modules, checkpoint.info).stored_bits}
        for quantizer in ("llama.cpp", "imatrix", "gptq"):
            start, bank = time.monotonic(), Bank(decoder, names, quantizer, rows=rows.fit)
            bank.ready(list(modules.items()))
            seconds = time.monotonic() - start
            meter = DamageMeter(decoder, bank, "", bank.identity, Journal(None))
            line[quantizer] = {
                **shown(meter.plans({"p": modules}, rows.test[: words.rows])["p"], rows),
                "seconds": round(seconds, 1),
            }
        result[kind] = line
        print(kind, {name: value["nats"] if isinstance(value, dict) else value for name, value in line.items()}, flush=True)
    return result


def recipes(words: argparse.Namespace) -> dict[str, Any]:
    """Return bytes and damage in llama.cpp of its recipes, and of ours at most as large."""
    from libgguf import load_imatrix

    checkpoint = open_checkpoint(words.model, None, False)
    rows, decoder, result = rows_of(checkpoint, words.text), checkpoint.load_model(), {}

    def damage(file: Path) -> np.ndarray:
        with open_gguf(file, LENGTH) as session:
            return damage_in_llama_cpp(decoder, session, rows.test, lambda done, total: None)

    with TemporaryDirectory() as folder:
        work = Path(folder)
        write_gguf(work / "base.gguf", checkpoint, None, None, blueprint_of(checkpoint, None), lambda done, total: None)
        for recipe in words.recipes.split(","):
            file = work / f"{recipe}.gguf"
            if not (work / "out" / "imatrix.gguf").exists():  # the first plan, of any size, collects it
                _ours(words, work, checkpoint.info.total_bytes // 3)
            llama_quantize(work / "base.gguf", file, recipe, load_imatrix(work / "out" / "imatrix.gguf"))
            ours = _ours(words, work, file.stat().st_size)
            theirs, of_ours = damage(file), damage(ours)
            result[recipe] = {
                "bytes": file.stat().st_size, "ours_bytes": ours.stat().st_size, "theirs": shown(theirs, rows), "ours": shown(of_ours, rows),
                "ratio": float(of_ours.mean() / theirs.mean()),
            }  # fmt: skip
            print(recipe, json.dumps(result[recipe]), flush=True)
    return result


def _ours(words: argparse.Namespace, work: Path, size: int) -> Path:
    shutil.rmtree(work / "out" / "llama-cpp", ignore_errors=True)
    options = QuantizeOptions(
        words.model,
        out=work / "out",
        size=f"{size}B",
        formats=tuple(words.formats.split(",")),
        tokens=words.text,
        rows=COUNTS,
        row_length=LENGTH,
    )
    return Path(quantize_model(options).out)


def families(words: argparse.Namespace) -> dict[str, Any]:
    """Return damage in llama.cpp of the base, of the planned file, and of the planned file to our reconstruction, by family."""
    result = {}
    for base_file in sorted(words.folder.glob("*.gguf")):
        try:
            result[base_file.stem] = family(base_file)
        except Exception as error:
            result[base_file.stem] = {"failed": " ".join(str(error).split())[:200]}
        print(base_file.stem, result[base_file.stem], flush=True)
    return result


def family(base_file: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(str(base_file.with_suffix("")), None, True)
    checkpoint = checkpoint.planning(checkpoint.outer)
    base = open_base(base_file, checkpoint)
    checkpoint, lost = followed(base, checkpoint)
    modules = {
        module.name: KINDS[index % len(KINDS)]
        for index, unit in enumerate(units_of(checkpoint.modules))
        for module in unit.modules
        if module.shape[1] % 32 == 0
    }
    size = size_of(checkpoint.modules, modules, checkpoint.info)
    info, table = PlanModel(checkpoint.info.name, None, checkpoint.info.weights_sha256), {name: FORMATS[name] for name in KINDS}
    plan = Plan(info, table, LLAMA_CPP, modules, Budget("size", 1.0), size, PlanDamage(None, None), runtime=LLAMA_CPP)
    decoder, rows = checkpoint.load_model(), torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    bank = Bank(decoder, list(modules), LLAMA_CPP, plan.formats)

    def damage(file: Path) -> float:
        with open_gguf(file, 16) as session:
            return float(damage_in_llama_cpp(decoder, session, rows, lambda done, total: None).mean())

    with TemporaryDirectory() as folder:
        file = Path(folder) / "planned.gguf"
        (Path(folder) / "plan.json").write_text(to_json(plan), encoding="utf-8")
        kinds = write_on_base(file, base, checkpoint, plan, Path(folder) / "plan.json", lambda done, total: None)
        result = {
            "tensors": len(kinds), "not_followed": len(lost), "bytes": file.stat().st_size, "promised": size.total_bytes,
            "base": damage(base_file), "planned": damage(file),
        }  # fmt: skip
        with decoder.swapped(bank.weights(modules)):
            result["to_reconstruction"] = damage(file)
    return result


if __name__ == "__main__":
    main()
