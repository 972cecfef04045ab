"""How long quantizing takes, in nanoseconds for a weight and format, beside the floor: reading a weight once, and the products of gptq.

    python benchmarks/quantizing.py [MODEL] [--layers 6] [--text FILE]

One thread, seconds of its processor, after the loops are compiled. `rtn` is run with its compiled search and without (plain torch); `gptq` with the compiled one, on 24 rows of 192 tokens. The
first layers stand for the model. The floor of `rtn` is a copy of the weights; that of `gptq` its multiply-adds (three passes of rounding
and one refit, half of in x in each; H times W once for all formats; the comparison with rtn over an eighth of the inputs) at the speed
of a large product, without the run of the model that the sums of H need, which its time includes.
Written to benchmarks/results/quantizing.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bitatlas.data import MODEL_DIR, TEXT_FILE
from bitatlas.data.rows import make_rows
from bitatlas.data.texts import read_documents
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.quantize import QUANTIZERS, gptq, rtn
from bitatlas.records.formats import FORMATS

RESULTS = Path(__file__).resolve().parent / "results" / "quantizing.json"
NAMES = ("int2_g64", "int3_g64", "int4_g64")
ROWS = (24, 2, 2)
ROW_LENGTH = 192
# In units of in x in multiply-adds for an output row and format: rounding, refit, H W, comparison
PRODUCTS = 3 / 2 + 1 / 2 + 1 / len(NAMES) + 1 / gptq.LAST


def seconds(run: Callable[[], object], times: int = 1) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(MODEL_DIR))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--text", default=str(TEXT_FILE))
    words = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(words.model, None, True)
    decoder, formats = checkpoint.load_model(), [FORMATS[name] for name in NAMES]
    modules = [module for module in checkpoint.modules if module.layer < words.layers]
    weights = {module.name: decoder.weight(module.name) for module in modules}
    count = sum(module.weights for module in modules) * len(formats)
    documents, tokenizer = read_documents(words.text), checkpoint.load_tokenizer()
    rows = make_rows(
        documents, tokenizer, words.text, ROWS, ROW_LENGTH, checkpoint.info.context, 0, vocabulary=decoder.vocabulary
    )

    def each() -> None:
        for weight in weights.values():
            for fmt in formats:
                rtn.quantize(weight, fmt)

    def fitted() -> None:
        for _ in QUANTIZERS["gptq"].quantize(decoder, list(weights), formats, rows.fit):
            pass

    side = torch.randn(2048, 2048)
    product = seconds(lambda: side @ side, 5)
    floors = {
        "rtn": seconds(lambda: [weight.clone() for weight in weights.values()], 5) * len(formats),
        "gptq": product * sum(m.weights * m.shape[1] for m in modules) * PRODUCTS * len(formats) / 2048**3,
    }
    compiled = rtn._compiled()
    for _ in QUANTIZERS["gptq"].quantize(decoder, list(weights)[:1], formats, rows.fit[:1]):
        pass  # compiles
    times = {"gptq": seconds(fitted), "rtn": seconds(each, 3)}
    if compiled:
        rtn._compiled = lambda: None  # type: ignore[assignment]
        times["rtn, plain torch"] = seconds(each)
    lines = {
        name: {
            "seconds": round(taken, 3),
            "nanoseconds": round(1e9 * taken / count, 2),
            "above_floor": round(taken / floors[name.split(",")[0]], 1),
        }
        for name, taken in times.items()
    }
    model_count = sum(module.weights for module in checkpoint.modules) * len(formats)
    result = {
        "model": checkpoint.info.name,
        "compiled": compiled is not None,
        "layers": words.layers,
        "formats": list(NAMES),
        "times": lines,
    }
    for name, line in lines.items():
        whole = line["nanoseconds"] * model_count / 1e9
        print(
            f"{name}: {line['nanoseconds']} ns a weight and format, {line['above_floor']} times its floor; the whole model {whole:.0f} s"
        )
    written = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(written | {checkpoint.info.name: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
