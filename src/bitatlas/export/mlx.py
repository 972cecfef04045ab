"""MLX: a folder that `mlx_lm.load` reads, with our own codes in it.

MLX's affine weights are w = scale * q + bias with one scale and bias a group; ours are scale * (q - zero), so bias = -scale * zero.
A row's codes lie one after the other, little-endian, in 32-bit words: the layout that compressed-tensors has too. `config.json` gets
`quantization` with a {bits, group_size} for every path; modules without an entry and without scales stay as they are.

Scales and biases are float32 in a float32 checkpoint, where they are exact (a product of 11 and 8 bits fits 24). In a 16-bit one they
are float16, as many bytes as the plan counts; the bias is then rounded by up to zero * 2^-12 of a step.
Other tensors are copied byte for byte, module by module like `apply`; see there.

Left out: embeddings and heads, which plans do not quantize. Families whose paths in mlx-lm differ from transformers' in other ways than
`RENAMED` knows are written under transformers' names, with a note.
Source: mlx 0.32 `mx.quantize`, mlx_lm 0.32 `utils.load_model`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitatlas.export.blueprint import read_tensor, sources_of, weight_keys
from bitatlas.export.compressed_tensors import WORD, pack_rows
from bitatlas.export.packed import codes_of, copy_tensor
from bitatlas.export.target import Job, Target, template, write_readme
from bitatlas.model.decoder import decoder_of
from bitatlas.model.folder import check_free_space, companion_files
from bitatlas.model.tensor_files import Entry, Writer, padded, split_shards
from bitatlas.quantize.codes import Codes
from bitatlas.records.formats import Format, group_count
from bitatlas.records.runtimes import Integers
from bitatlas.records.text import byte_size

RENAMED = {"gpt_neox": ("gpt_neox.layers.", "model.h.")}  # model type -> transformers' path of the layers, mlx-lm's
CHECKED = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")  # loaded in mlx-lm by benchmarks/runtimes.py
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int32: "U32"}
SMALL_BYTES = 2**20  # room for config, plan and README
ROUNDED = (
    ", but for the biases, which are rounded to float16. Scales and biases are float16; where other tensors are bfloat16, MLX computes in float32. "
    "`model.set_dtype(mx.bfloat16)` after loading is faster and rounds the scales"
)


def side_dtype(job: Job) -> torch.dtype:
    """Return the dtype of scales and biases."""
    assert job.checkpoint is not None
    return torch.float32 if job.checkpoint.info.dtype in ("float32", "float64") else torch.float16


def tensors(codes: Codes, fmt: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return `weight` int32 [out, in * bits / 32] (bits of MLX's uint32), `scales` and `biases` [out, groups]."""
    scale = codes.scale.float()
    return {
        "weight": pack_rows(codes.codes, fmt.bits),
        "scales": scale.to(dtype).contiguous(),
        "biases": (-scale * codes.zero.float()).to(dtype).contiguous(),
    }


def path_of(name: str, model_type: str) -> str:
    """Return what mlx-lm calls the module."""
    theirs, ours = RENAMED.get(model_type, ("", ""))
    return ours + name.removeprefix(theirs) if theirs and name.startswith(theirs) else name


def config(job: Job, content: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's config with `quantization`."""
    usual = job.usual
    quantization: dict[str, Any] = {"group_size": usual.group_size, "bits": usual.bits, "mode": "affine"}
    for name, fmt in job.formats.items():
        quantization[path_of(name, content["model_type"])] = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": "affine"}
    return {**_older_names(content), "quantization": quantization}


def _older_names(content: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the rotary settings under the names that mlx-lm looks for, too.

    transformers 5 writes them into `rope_parameters` alone, and mlx-lm then takes its own defaults, silently.
    """
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # none, or one a kind of layer
        return content
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if content["model_type"] == "gpt_neox":
        older |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    return {**older, **content}  # what the checkpoint says itself comes first


def write(job: Job, folder: Path) -> list[str]:
    """Write the folder. Return what the command prints."""
    checkpoint = job.checkpoint
    assert checkpoint is not None
    content = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    others = companion_files(checkpoint.folder)
    disk_bytes = _write_weights(job, folder, sum(file.stat().st_size for file in others) + SMALL_BYTES)
    for file in others:
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config(job, content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "load.py").write_text(template("mlx.py.txt"), encoding="utf-8")
    rounded = "" if side_dtype(job) == torch.float32 else ROUNDED
    write_readme(folder, job, f"{Path(job.plan.model.name).name} for MLX", template("mlx.md").format(rounded=rounded))
    notes = [f"{byte_size(disk_bytes)} of weights with their header; the plan counts {byte_size(job.plan.size.total_bytes)}"]
    if content["model_type"] not in CHECKED:
        notes.append(f"mlx-lm's names for {content['model_type']} were not checked: run load.py, which says what each module is")
    return notes


def _write_weights(job: Job, folder: Path, more_bytes: int) -> int:
    """Write all tensors; return the bytes of their files. UserError where the disk is too full or a weight cannot be found."""
    checkpoint, plan = job.checkpoint, job.plan
    assert checkpoint is not None
    skeleton, dtype = checkpoint.skeleton(), side_dtype(job)
    entries, sources = sources_of(checkpoint)
    keys, decoder = weight_keys(plan, skeleton, entries), decoder_of(skeleton, checkpoint.layers_path)
    copied = [key for key in entries if key not in set(keys.values())]
    wanted = [entries[key] for key in copied]
    modules = [module for module in checkpoint.modules if module.name in plan.modules]
    for module in modules:
        wanted += _entries(keys[module.name], module.shape, plan.formats[plan.modules[module.name]], dtype)
    shards = padded(split_shards(wanted), plan.size.total_bytes if plan.runtime == "mlx" else 0)
    disk_bytes = sum(shard.size_bytes for shard in shards)
    check_free_space(folder, disk_bytes + more_bytes)
    with Writer(folder, shards) as writer, job.reporter.stage("packing") as progress:
        for key in copied:
            copy_tensor(writer, key, *sources[key])
        for done, module in enumerate(modules, start=1):
            key = keys[module.name]
            codes = codes_of(plan, job.plan_file, decoder, module.name, read_tensor(sources[key][0], key))
            for suffix, tensor in tensors(codes, plan.formats[plan.modules[module.name]], dtype).items():
                writer.write(key.removesuffix("weight") + suffix, tensor.numpy().tobytes())
            progress(done, len(modules))
    return disk_bytes


def _entries(key: str, shape: tuple[int, int], fmt: Format, dtype: torch.dtype) -> list[Entry]:
    out, width = shape
    words, groups = width * fmt.bits // WORD, group_count(shape, fmt.group_size) // out
    prefix, name = key.removesuffix("weight"), NAMES[dtype]
    return [
        Entry(f"{prefix}weight", NAMES[torch.int32], (out, words), out * words * 4),
        *(Entry(prefix + part, name, (out, groups), out * groups * dtype.itemsize) for part in ("scales", "biases")),
    ]


TARGET = Target(
    "mlx",
    "a folder that `mlx_lm.load` reads, with the plan's own codes",
    Integers(bits=(2, 3, 4, 5, 6, 8)),
    write,
    needs_model=True,
    whole_groups=True,
)
