"""Check `bitatlas compare` against a computation of its own, and time it beside the forward passes that it cannot do without.

    python benchmarks/referee.py MODEL FILE... --out DIR [--tokens label=FILE] [--rows 64]
    python benchmarks/referee.py MODEL --gptq FOLDER        write MODEL rounded to 4 bits in GPTQ's layout, for the above
    python benchmarks/referee.py --perplexity LLAMA_PERPLEXITY --base F16.gguf FILE.gguf --text FILE

The first runs `compare`, then every file again: whole vocabularies in float64, its weights opened by the tool that they belong to (compressed-tensors,
MLX, transformers), GPTQ's by a loop of this file. It prints both figures and their difference. With --time it prints the time of `compare` over that of the
forward passes alone (reference, noise floor and files, the rows and the continuations) instead. The last runs llama.cpp's own `--kl-divergence` and
takes the same mean of what we say about the same tokens. Results go to benchmarks/results/referee.json, one entry a model.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitatlas.measure.predictions import COLUMNS, deviate, keep
from bitatlas.measure.stream import read_stream
from bitatlas.run.compare import compare_models
from bitatlas.run.options import CompareOptions

RESULTS = Path(__file__).resolve().parent / "results" / "referee.json"
BITS, GROUP = 4, 64
Logits = Callable[[Tensor], Tensor]


# --- files opened by others ------------------------------------------------------------------------------------------------


def write_gptq(source: Path, folder: Path) -> None:
    """Write a checkpoint whose linear weights of the layers are rounded to 4 bits in groups of 64, in GPTQ's layout (zero-points less one)."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state: dict[str, Tensor] = {}
    widths = [weight.shape[-1] for name, weight in model.state_dict().items() if name.endswith("_proj.weight")]
    group = GROUP if all(width % GROUP == 0 for width in widths) else GROUP // 2
    for name, weight in model.state_dict().items():
        if ".layers." not in name or not name.endswith("_proj.weight"):
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                state[name] = weight.to(torch.bfloat16).contiguous()
            continue
        out, width = weight.shape
        grouped = weight.view(out, width // group, group)
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / (2**BITS - 1)).clamp_min(1e-8).half()
        zero = (-low / scale.float()).round().clamp(1, 2**BITS - 1)
        codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 2**BITS - 1).view(out, width)
        stem = name.removesuffix("weight")
        state[f"{stem}qweight"] = _words(codes.T.int().numpy(), 0)
        state[f"{stem}qzeros"] = _words((zero - 1).T.int().numpy(), 1)
        state[f"{stem}scales"] = scale.T.contiguous()
        state[f"{stem}g_idx"] = (torch.arange(width) // group).int()
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((source / "config.json").read_text(encoding="utf-8"))
    content["quantization_config"] = {
        "quant_method": "gptq", "bits": BITS, "group_size": group, "desc_act": False, "sym": False, "checkpoint_format": "gptq",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _words(codes: np.ndarray, axis: int) -> Tensor:
    """Pack eight codes of 4 bits a word along an axis, the first lowest."""
    words = np.zeros([n // 8 if i == axis else n for i, n in enumerate(codes.shape)], dtype=np.uint32)
    for place in range(8):
        words |= np.take(codes, range(place, codes.shape[axis], 8), axis).astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def _read_gptq(folder: Path) -> Any:
    """Open what `write_gptq` wrote, code by code."""
    tensors, state = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            stem = name.removesuffix("qweight")
            words, zeros = (tensors[stem + part].numpy().view(np.uint32) for part in ("qweight", "qzeros"))
            codes = np.stack([words >> np.uint32(4 * k) & np.uint32(15) for k in range(8)], 1).reshape(-1, words.shape[1])
            zero = np.stack([zeros >> np.uint32(4 * k) & np.uint32(15) for k in range(8)], 2).reshape(len(zeros), -1) + 1
            scale, group = tensors[f"{stem}scales"].float().numpy(), tensors[f"{stem}g_idx"].numpy()
            state[f"{stem}weight"] = torch.from_numpy(((codes.astype(np.float32) - zero[group]) * scale[group]).T.copy())
        elif not name.endswith((".qzeros", ".scales", ".g_idx")):
            state[name] = tensor.float()
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return _filled(config, state)


def _filled(config: Any, state: dict[str, Tensor]) -> Any:
    """Return a model with these weights, every one of them."""
    model = AutoModelForCausalLM.from_config(config).float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.eval()


def _read_mlx(folder: Path) -> Any:
    """Open an MLX folder with MLX's own `dequantize`."""
    import mlx.core as mx

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings, tensors, state = content["quantization"], mx.load(str(folder / "model.safetensors")), {}
    for name, array in tensors.items():
        if name.endswith((".scales", ".biases")):
            continue
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in tensors:
            own = settings.get(stem) or settings
            array = mx.dequantize(array, tensors[f"{stem}.scales"], tensors[f"{stem}.biases"], own["group_size"], own["bits"])
        state[name] = torch.from_numpy(np.array(array.astype(mx.float32)))
    config = AutoConfig.from_pretrained(folder)
    for key in ("quantization", "quantization_config"):
        if hasattr(config, key):
            delattr(config, key)
    return _filled(config, state)


def _logits_of(path: Path, context: int) -> Logits:
    """Return a function of rows [rows, tokens] to logits."""
    if path.suffix == ".gguf":
        from bitatlas.export.gguf.run import LlamaSession, _model, library

        model = _model(path)
        pointer, vocabulary = model.__enter__()
        session = LlamaSession(pointer, library().llama_vocab_n_tokens(vocabulary), path, context)

        def run(rows: Tensor, keep_alive: Any = model) -> Tensor:
            parts = []
            for row in rows:
                session.clear()
                session.decode(row.tolist())
                parts.append(torch.from_numpy(session.logits(len(row))))
            return torch.stack(parts)

        return run
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    method = content.get("quantization_config", {}).get("quant_method")
    if method == "gptq":
        model = _read_gptq(path)
    elif "quantization" in content:
        model = _read_mlx(path)
    elif method == "compressed-tensors":
        from bitatlas.export.trial import open_packed

        model = open_packed(path, "cpu")[0]
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if method == "bitsandbytes":  # its own kernels for a CPU compute in bfloat16
            model = model.dequantize().float()
    return lambda rows: model(input_ids=rows, use_cache=False).logits


# --- figures and time ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def timed(options: CompareOptions) -> dict[str, Any]:
    """Return the time of `compare`, and of the forward passes that it cannot do without."""
    begun = time.perf_counter()
    result = compare_models(options)
    seconds = time.perf_counter() - begun
    stream = read_stream(Path(options.out))
    continued = stream.continuations()
    forward = 0.0
    for path in (str(options.reference), *(candidate.file.path for candidate in result.candidates)):
        times = 1 + (path == str(options.reference))  # the noise floor is the reference again
        forward += times * _seconds(_logits_of(Path(path), stream.longest), stream, continued)
    tokens = sum(d.tokens for d in result.domains)
    print(f"{tokens} tokens: {seconds:.0f} s, forward passes alone {forward:.0f} s, {seconds / forward:.2f} times")
    return {
        "timed_tokens": tokens,
        "timed_files": len(result.candidates),
        "seconds": seconds,
        "forward_seconds": forward,
        "ratio": seconds / forward,
    }


@torch.no_grad()
def check(options: CompareOptions) -> dict[str, Any]:
    """Return both figures of every file."""
    result = compare_models(options)
    stream = read_stream(Path(options.out))
    reference = _logits_of(Path(str(options.reference)), stream.longest)
    whole = {rows.domain.name: _by_row(reference, rows)[0] for rows in stream.domains}
    entries = {}
    for candidate in result.candidates:
        other = _logits_of(Path(candidate.file.path), stream.longest)
        kl, same, count = 0.0, 0, 0
        values: list[np.ndarray] = []
        for rows in stream.domains:
            logits, _ = _by_row(other, rows)
            for p, q in zip(whole[rows.domain.name], logits, strict=True):
                p64, q64 = (torch.log_softmax(v[:, : stream.vocabulary].double(), -1) for v in (p, q))
                of_row = (p64.exp() * (p64 - q64)).sum(-1)
                values.append(of_row.numpy())
                kl, count = kl + float(of_row.sum()), count + len(of_row)
                same += int((p64.argmax(-1) == q64.argmax(-1)).sum())
        seen, every = candidate.deviation, np.concatenate(values)
        assert seen is not None
        last = {percent: float(np.percentile(every, float(percent))) for percent in seen.quantiles}
        entries[candidate.file.name] = {
            "family": candidate.file.family, "run": candidate.file.run, "bytes": candidate.file.bytes, "rank": candidate.rank,
            "damage": seen.damage.mean, "ci95": seen.damage.ci95, "estimate_error": seen.estimate_error, "again": kl / count,
            "difference": seen.damage.mean - kl / count, "same_top": seen.same_top.mean, "same_top_again": same / count,
            "quantiles": {percent: value.mean for percent, value in seen.quantiles.items()}, "quantiles_again": last,
        }  # fmt: skip
        print(
            f"{candidate.file.name}: {seen.damage.mean:.6f}, again {kl / count:.6f} nats/token; same top {seen.same_top.mean:.5f}, {same / count:.5f}"
        )
    tokens = sum(d.tokens for d in result.domains)
    return {
        "tokens": tokens, "domains": [d.name for d in result.domains], "noise": result.noise.damage.mean if result.noise else None, "files": entries,
    }  # fmt: skip


def _by_row(logits: Logits, rows: Any) -> tuple[list[Tensor], None]:
    """Return the logits of each row's scored predictions."""
    return [
        logits(tokens[None, :length])[0, :-1][scored[: length - 1]].clone()
        for tokens, length, scored in zip(rows.tokens, rows.lengths, rows.scored, strict=True)
    ], None


def _seconds(logits: Logits, stream: Any, continued: Tensor) -> float:
    """Time the forward passes on the rows and continuations, in batches of four."""
    begun = time.perf_counter()
    for rows in stream.domains:
        for batch in rows.tokens.split(4):
            logits(batch)
    for batch in continued.split(8):
        logits(batch)
    return time.perf_counter() - begun


# --- llama.cpp's own -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(
    program: str, base: Path, file: Path, text: Path, work: Path, context: int = 128, chunks: int = 16
) -> dict[str, float]:
    """Return the mean divergence of a GGUF from another by llama-perplexity, and by our own of the same tokens."""
    logits_file = work / "base.kld"
    words = [program, "-c", str(context), "--chunks", str(chunks), "-f", str(text), "-t", "2", "-b", str(context), "--no-warmup"]
    subprocess.run(
        [*words, "-m", str(base), "--kl-divergence-base", str(logits_file)], check=True, capture_output=True, text=True
    )
    printed = subprocess.run(
        [*words, "-m", str(file), "--kl-divergence-base", str(logits_file), "--kl-divergence"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    theirs = re.search(r"Mean\s+KLD:\s+([0-9.eE+-]+)", printed)
    assert theirs, printed[-2000:]
    header = logits_file.read_bytes()[: 8 + 12 + 4 * context * chunks]
    ids = np.frombuffer(header[20:], dtype=np.int32).reshape(-1, context)
    first, second = (_logits_of(path, context) for path in (base, file))
    total, count, half = 0.0, 0, context // 2  # llama.cpp scores the second half of each chunk
    generator = torch.Generator().manual_seed(0)
    for row in torch.from_numpy(ids.copy()).long():
        targets = row[half + 1 :]
        kept = keep(first(row[None])[0, half:-1], targets, generator)
        told = deviate(kept, second(row[None])[0, half:-1], targets)[:, COLUMNS.index("kl")]
        total, count = total + float(told.double().sum()), count + len(told)
    return {"llama.cpp": float(theirs[1]), "ours": total / count, "tokens": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("referee-out"))
    parser.add_argument("--tokens", action="append")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--gptq", type=Path)
    parser.add_argument("--perplexity")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    if options.gptq:
        write_gptq(Path(options.model), options.gptq)
        return
    if options.perplexity:
        options.out.mkdir(parents=True, exist_ok=True)
        for file in filter(None, [options.model, *options.files]):
            result = perplexity(options.perplexity, options.base, Path(file), options.text, options.out)
            print(
                f"{Path(file).name}: llama.cpp {result['llama.cpp']:.6f}, ours {result['ours']:.6f} nats/token on {result['tokens']} tokens"
            )
            _write("llama-perplexity", {Path(file).name: result})
        return
    shutil.rmtree(options.out, ignore_errors=True)
    run = timed if options.time else check
    result = run(
        CompareOptions(
            options.model, options.files, out=options.out, tokens=options.tokens, rows=options.rows, row_length=options.row_length
        )
    )
    _write(Path(options.model).name, result)


def _write(name: str, entry: dict[str, Any]) -> None:
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    content[name] = {**content.get(name, {}), **entry}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
