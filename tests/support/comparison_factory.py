"""Comparisons for the tests of their page: made up from a seed, in the shape of real ones. No number in them was measured.

They keep what a reader could check: ranks and the front follow from the pairs' verdicts, verdicts from differences and their errors, the mean
from the domains', scores and pairs of tasks from made-up answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

import numpy as np

from bitatlas.records import Measured
from bitatlas.records.comparison import (
    NOISE,
    TOLD_APART,
    UNTOLD,
    Bucket,
    Candidate,
    Comparison,
    Deviation,
    Domain,
    ModelFile,
    Pair,
    Requirement,
    StoredKind,
)
from bitatlas.stats.bootstrap import holm
from bitatlas.stats.paired import compare_all
from bitatlas.stats.ranking import front, ranks

WEIGHTS = 494_000_000
GGUF_KINDS = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output")
HF_KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHERS = "norms and other vectors"
NOISE_WHAT = "the reference itself, with what each of its layers gives rounded to bfloat16"
SHARES = {"prose": 1.0, "code": 1.7, "math": 0.8, "chat": 0.5}  # a domain's damage by the mean's
BUCKETS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class FileRecipe:
    """A candidate. refused: why it was not compared on text."""

    name: str
    family: str
    bits: float
    damage: float
    format: str = "Q4_K"
    refused: str = ""


EIGHT = (
    FileRecipe("Qwen2.5-0.5B-Instruct-Q2_K.gguf", "GGUF", 4.21, 0.2412, "Q2_K"),
    FileRecipe("Qwen2.5-0.5B-Instruct-Q3_K_M.gguf", "GGUF", 4.88, 0.0731, "Q3_K"),
    FileRecipe("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "GGUF", 5.62, 0.0228, "Q4_K"),
    FileRecipe("Qwen2.5-0.5B-Instruct-Q6_K.gguf", "GGUF", 7.40, 0.00171, "Q6_K"),
    FileRecipe("Qwen2.5-0.5B-Instruct-Q8_0.gguf", "GGUF", 8.50, 0.00049, "Q8_0"),
    FileRecipe("Qwen2.5-0.5B-Instruct-GPTQ-Int4", "gptq", 5.75, 0.0398, "gptq"),
    FileRecipe("atlas/plan.json", "plan", 4.90, 0.0244, "int4_g64"),
    FileRecipe("Qwen2.5-0.5B-Instruct-mlx-4bit", "MLX", 5.02, 0.0412, "mlx"),
)
MORE = (
    FileRecipe("Qwen2.5-0.5B-Instruct-IQ4_XS.gguf", "GGUF", 5.30, 0.0236, "IQ4_XS"),
    FileRecipe("Qwen2.5-0.5B-Instruct-Q5_K_M.gguf", "GGUF", 6.30, 0.0061, "Q5_K"),
    FileRecipe("Qwen2.5-0.5B-Instruct-W8A8", "compressed-tensors", 8.60, 0.0058, "int8"),
    FileRecipe("Qwen2.5-0.5B-Instruct-AWQ", "awq", 5.74, 0.0371, "awq"),
)
EVIL = '<b onload="alert(1)">|`x` **b** </script><script>alert(1)</script> & [a](b)\\'
LONG = "a-very-long-organisation-name/" + "a-model-with-a-name-that-goes-on-" * 6 + "Q4_K_M.gguf"


@dataclass(frozen=True)
class CompareRecipe:
    """What to compare. error: of a difference of two files, by the larger one's damage; text: whether one was compared on."""

    files: Sequence[FileRecipe] = EIGHT
    domains: Sequence[str] = ("prose", "code", "math", "chat")
    tasks: Sequence[str] = ("demo_questions", "demo_sums")
    noise: float | None = 0.00043
    error: float = 0.03
    text: bool = True
    documents: int = 32  # a domain's
    require: Sequence[tuple[str, float]] = ()
    notes: Sequence[str] = ("what runs in llama.cpp is measured with what llama.cpp rounds",)
    settings: dict = field(default_factory=lambda: {"rows": 128, "row_length": 512, "seed": 0, "tokens": {"prose": "bundled"}})


def make_comparison(recipe: CompareRecipe = CompareRecipe()) -> Comparison:
    """A comparison of made-up numbers; the same recipe gives the same record."""
    compared = [one for one in recipe.files if not one.refused] if recipe.text else []
    pairs = _pairs(recipe, compared)
    better = {
        (pair.first, pair.second) if pair.difference.mean > 0 else (pair.second, pair.first)
        for pair in pairs
        if pair.verdict == TOLD_APART
    }
    files = {one.name: _file(one) for one in recipe.files}
    places = ranks([one.name for one in compared], better)
    best = front({one.name: files[one.name].bytes for one in compared}, better)
    candidates = [
        Candidate(
            files[one.name],
            _deviation(one.damage, recipe),
            places[one.name],
            one.name in best,
            recipe.noise is not None and one.damage < 1.2 * recipe.noise,
        )
        for one in sorted(compared, key=lambda one: (places[one.name], one.damage))
    ]
    refused = [
        Candidate(files[one.name], None, refused=one.refused or "no text was compared on")
        for one in recipe.files
        if one.refused or not recipe.text
    ]
    reference = ModelFile(
        "Qwen2.5-0.5B-Instruct",
        "/models/Qwen2.5-0.5B-Instruct",
        "transformers",
        "in transformers",
        988_097_824,
        16.0,
        [StoredKind(kind, "bf16", 24, WEIGHTS // 8, WEIGHTS // 4) for kind in HF_KINDS],
    )
    damages = {one.name: one.damage for one in compared}
    scores, task_pairs = _tasks(recipe, reference.name)
    return Comparison(
        reference,
        _measured(2.4871, 0.02, "nats/token", recipe) if recipe.text else None,
        [_domain(name, recipe) for name in recipe.domains] if recipe.text else [],
        [*candidates, *refused],
        pairs,
        _deviation(recipe.noise, recipe) if recipe.noise is not None and recipe.text else None,
        NOISE_WHAT,
        scores,
        task_pairs,
        [Requirement(name, limit, damages.get(name), damages.get(name, math.inf) <= limit) for name, limit in recipe.require],
        list(recipe.notes),
        dict(recipe.settings),
    )


def _measured(mean: float, relative: float, unit: str, recipe: CompareRecipe, base: str = "reference") -> Measured:
    documents = recipe.documents * max(1, len(recipe.domains))
    half = abs(mean) * relative
    ends = (mean - 0.96 * half, mean + 1.04 * half) if documents > 1 else None
    if unit == "share" and ends:
        ends = (ends[0], min(1.0, ends[1]))
    return Measured(mean, ends, unit, base, "text", documents, documents)


def _domain(name: str, recipe: CompareRecipe) -> Domain:
    digest = "9f2c" * 16
    return Domain(name, f"bundled:{name}", 32, 16_352, recipe.documents, name == "chat", "all", digest)


def _file(one: FileRecipe) -> ModelFile:
    kinds, several = (GGUF_KINDS, one.family == "GGUF") if one.family == "GGUF" else (HF_KINDS, False)
    weights = WEIGHTS // len(kinds)
    stored = [StoredKind(kind, one.format, 24, weights, int(weights * one.bits / 8)) for kind in kinds]
    if several:
        stored.append(StoredKind("ffn_down", "Q6_K", 12, weights // 2, int(weights * 6.5625 / 16)))
    stored.append(StoredKind(OTHERS, "f32", 49, 43_904, 175_616))
    run = "in llama.cpp" if one.family == "GGUF" else "dequantized, in transformers"
    return ModelFile(one.name, f"/models/{one.name}", one.family, run, int(WEIGHTS * one.bits / 8), one.bits, stored)


def _deviation(damage: float, recipe: CompareRecipe) -> Deviation:
    total = sum(SHARES.get(name, 1.0) for name in recipe.domains) / max(1, len(recipe.domains))
    kl = {"50": 0.21, "90": 2.4, "99": 11.0, "99.9": 34.0}
    weight = {0: 0.06, 1: 0.21, 2: 0.19, 3: 0.13, 4: 0.15, 5: 0.26}
    return Deviation(
        damage=_measured(damage, 0.08, "nats/token", recipe),
        quantiles={percent: _measured(factor * damage, 0.12, "nats", recipe) for percent, factor in kl.items()},
        same_top=_measured(1 - min(0.6, 0.55 * math.sqrt(damage)), 0.006, "share", recipe),
        top5=_measured(1 - min(0.6, 0.48 * math.sqrt(damage)), 0.004, "share", recipe),
        loss=_measured(2.4871 + 0.9 * damage, 0.02, "nats/token", recipe),
        loss_difference=_measured(0.9 * damage - 0.0004, 0.4, "nats/token", recipe),
        domains={name: _measured(damage * SHARES.get(name, 1.0) / total, 0.14, "nats/token", recipe) for name in recipe.domains},
        buckets=[
            Bucket(low, high, weight[i], _measured(damage * (1.9 - 0.32 * i), 0.11, "nats/token", recipe))
            for i, (low, high) in enumerate(pairwise(BUCKETS))
        ],
        estimate_error=0.001 * damage,
        agreement=_measured(min(60.0, 5.5 / math.sqrt(damage + 1e-4) ** 0.8), 0.1, "tokens", recipe, "continuations"),
        agreement_limit=64,
        never_differ=max(0.0, 0.7 - 2 * math.sqrt(damage)),
    )


def _pairs(recipe: CompareRecipe, compared: Sequence[FileRecipe]) -> list[Pair]:
    errors, p = {}, {}
    for one, other in combinations(compared, 2):
        errors[one.name, other.name] = error = recipe.error * max(one.damage, other.damage) or 1e-9
        p[one.name, other.name] = max(1e-4, math.erfc(abs(other.damage - one.damage) / error / math.sqrt(2)))
    adjusted = dict(zip(p, holm(list(p.values())).tolist(), strict=True)) if p else {}
    tokens = 16_352 * len(recipe.domains)
    result = []
    for one, other in combinations(compared, 2):
        key, mean = (one.name, other.name), other.damage - one.damage
        half = 1.96 * errors[key]
        m = Measured(mean, (mean - half, mean + half), "nats/token", one.name, "text", 128, 128)
        verdict = UNTOLD if adjusted[key] >= 0.05 else NOISE if abs(mean) < (recipe.noise or 0) else TOLD_APART
        needed = None if mean == 0 else int(float(f"{tokens * (2.8 * errors[key] / mean) ** 2:.1e}"))
        inside = {name: replace(m, mean=mean * SHARES.get(name, 1.0), ci95=None) for name in recipe.domains}
        result.append(Pair(one.name, other.name, m, p[key], adjusted[key], verdict, needed, inside))
    return result


def _tasks(recipe: CompareRecipe, reference: str) -> tuple[list, list]:
    rng, items = np.random.default_rng(7), 200
    outcomes = {}
    for number, task in enumerate(recipe.tasks):
        right = rng.random(items) < 0.72 - 0.1 * number
        outcomes[task] = {reference: right.tolist()}
        for one in recipe.files:
            flipped = rng.random(items) < min(0.4, 0.6 * math.sqrt(one.damage))
            outcomes[task][one.name] = np.where(flipped, rng.random(items) < 0.3, right).tolist()
    pairs = lambda names: list(combinations(names, 2))  # noqa: E731
    return compare_all(outcomes, dict.fromkeys(recipe.tasks, 0.25), 2.0, pairs) if recipe.tasks else ([], [])
