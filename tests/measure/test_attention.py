"""The attention profile of whole models: every family, drift, memory, determinism, refusals."""

from __future__ import annotations

import dataclasses
import math
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

import tiny
from bitatlas.measure.attention import capture
from bitatlas.measure.attention.capture import eager
from bitatlas.measure.attention.maps import in_dtype
from bitatlas.measure.attention.profile import NO_MAPS, AttentionTexts, attention_profile
from bitatlas.measure.attention.roles import ROLES
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.model.decoder import Decoder, decoder_of
from live_bytes import LiveBytes

# --- whole models ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Loaded:
    decoder: Decoder
    modules: list
    changed: dict[str, Tensor]


def load(folder: Path) -> Loaded:
    checkpoint = open_checkpoint(str(folder))
    decoder = checkpoint.load_model()
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for module in checkpoint.modules:
        weight = decoder.weight(module.name)
        changed[module.name] = weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return Loaded(decoder, checkpoint.modules, changed)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Loaded:
    return load(tiny_llama)


def text_rows(rows: int = 5, tokens: int = 40) -> Tensor:
    return torch.randint(2, 300, (rows, tokens), generator=torch.Generator().manual_seed(2))


def profile(loaded: Loaded, rows: Tensor | None = None, batch_size: int = 8, **options: object):
    texts = AttentionTexts(text_rows() if rows is None else rows, batch_size=batch_size)
    return attention_profile(loaded.decoder, tiny.tokenizer(), loaded.modules, texts, "reference", **options)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_families(family: str, tmp_path: Path) -> None:
    loaded = load(tiny.make_checkpoint(tmp_path, family))
    before = {name: tensor.clone() for name, tensor in loaded.decoder.model.state_dict().items()}
    implementation = loaded.decoder.model.config._attn_implementation
    steps: list[tuple[int, int]] = []
    result = profile(loaded, changed=loaded.changed, batch_size=2, progress=lambda done, total: steps.append((done, total)))
    assert result.notes == []
    assert [layer.layer for layer in result.layers] == [0, 1, 2]
    assert [(head.layer, head.head) for head in result.heads] == [(a, b) for a in range(3) for b in range(4)]
    for layer in result.layers:
        assert 0 < layer.entropy.mean <= 1
        assert layer.entropy.ci95[0] <= layer.entropy.mean <= layer.entropy.ci95[1]
        assert 0 <= layer.drift_noise.mean < layer.drift_local.mean <= 1
        assert layer.entropy.n == layer.drift_local.n == 5
    assert result.layers[0].drift_local.mean == result.layers[0].drift_cumulative.mean  # no layer in front of it
    assert result.layers[2].drift_local.mean != result.layers[2].drift_cumulative.mean
    assert all(set(head.scores) == set(ROLES) for head in result.heads)
    assert steps == [(i, steps[-1][1]) for i in range(1, len(steps) + 1)]
    assert steps[-1][0] == steps[-1][1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.decoder.model.state_dict().items())
    assert loaded.decoder.model.config._attn_implementation == implementation != "eager"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.decoder.model.modules())


def test_window_limits_the_keys(tmp_path: Path) -> None:
    """The same weights as Llama and as Mistral with a window of 16: entropy in nats cannot pass ln 16 there, and does without."""
    wide = profile(load(tiny.make_checkpoint(tmp_path / "wide", "mistral", sliding_window=None, scale=0.3)))
    narrow = profile(load(tiny.make_checkpoint(tmp_path / "narrow", "mistral", scale=0.3)))
    assert max(layer.entropy_nats.mean for layer in narrow.layers) < math.log(16)
    assert min(layer.entropy_nats.mean for layer in wide.layers) > math.log(16)
    assert narrow.layers[0].entropy.mean == pytest.approx(wide.layers[0].entropy.mean, abs=0.03)  # each by its own keys


def close(first: object, second: object, tolerance: float) -> None:
    """Records are equal up to rounding: floats within `tolerance`, everything else the same."""
    if isinstance(first, float):
        assert first == pytest.approx(second, abs=tolerance)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            close(first[key], second[key], tolerance)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            close(one, other, tolerance)
    else:
        assert first == second


def test_streamed_equals_all_at_once_and_repeats_exactly(llama: Loaded) -> None:
    runs = [profile(llama, changed=llama.changed, batch_size=size, seed=3) for size in (2, 2, 64)]
    assert runs[0] == runs[1]
    close([dataclasses.asdict(r) for r in runs[0].layers], [dataclasses.asdict(r) for r in runs[2].layers], 2e-5)
    close([h.scores for h in runs[0].heads], [h.scores for h in runs[2].heads], 2e-5)
    close([h.p_values for h in runs[0].heads], [h.p_values for h in runs[2].heads], 0.02)
    assert profile(llama, seed=4).layers != profile(llama, seed=3).layers


def eager_maps(model: torch.nn.Module, rows: Tensor) -> list[np.ndarray]:
    """[rows, heads, queries, keys] of each layer, as transformers itself returns them."""
    with eager(model), torch.no_grad():
        return [maps.double().numpy() for maps in model(rows, output_attentions=True, use_cache=False).attentions]


def js_of(first: np.ndarray, second: np.ndarray) -> float:
    """Mean distance over rows, heads and queries with 8 keys beside the first token, by scipy and loops."""
    values = []
    for row, head, query in np.ndindex(*first.shape[:3]):
        if query >= 8:
            values.append(jensenshannon(first[row, head, query, 1:], second[row, head, query, 1:], base=2))
    return float(np.mean(values))


def test_drift_is_what_whole_passes_and_scipy_give(llama: Loaded) -> None:
    """Local: only that layer changed; cumulative: all changed; noise: a bfloat16 copy, its rotary table in float32 as it is loaded."""

    rows = text_rows(3, 24)
    found = profile(llama, rows, changed=llama.changed).layers
    reference = eager_maps(llama.decoder.model, rows)
    with llama.decoder.swapped(llama.changed):
        changed = eager_maps(llama.decoder.model, rows)
    with in_dtype(llama.decoder.model, torch.bfloat16):
        rotary = llama.decoder.model.model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq = rotary.compute_default_rope_parameters(llama.decoder.model.config)[0]
        half = eager_maps(llama.decoder.model, rows)
    for number, layer in enumerate(found):
        only = {m.name: llama.changed[m.name] for m in llama.modules if m.layer == number}
        with llama.decoder.swapped(only):
            alone = eager_maps(llama.decoder.model, rows)
        assert layer.drift_local.mean == pytest.approx(js_of(reference[number], alone[number]), abs=1e-5)
        assert layer.drift_cumulative.mean == pytest.approx(js_of(reference[number], changed[number]), abs=1e-5)
        assert layer.drift_noise.mean == pytest.approx(js_of(reference[number], half[number]), rel=0.1)


def test_one_map_at_a_time(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows, the maps alive are those of one layer: one for the reference, four where drift is measured."""
    maps: list[weakref.ref[Tensor]] = []
    most = 0

    def counting(*args: Any) -> Tensor | None:
        nonlocal most
        found = original(*args)
        assert found is not None
        maps.append(weakref.ref(found))
        most = max(most, sum(other() is not None for other in maps))
        return found

    original = capture.map_in
    monkeypatch.setattr(capture, "map_in", counting)
    for rows, changed, limit in ((3, None, 1), (12, None, 1), (3, llama.changed, 4), (12, llama.changed, 4)):
        most = 0
        profile(llama, text_rows(rows), changed=changed, batch_size=1)
        assert 1 <= most <= limit
    assert all(other() is None for other in maps)


@pytest.mark.parametrize("drift", [False, True])
def test_memory_does_not_grow_with_the_sequences(llama: Loaded, drift: bool) -> None:
    """Most bytes alive at once with 4 and with 16 sequences, in batches of 2: a few numbers a sequence are kept, far below a map."""
    peaks = {}
    for rows in (4, 16):
        given = text_rows(rows, 96)
        with LiveBytes(
            [*llama.decoder.model.parameters(), *llama.decoder.model.buffers(), *llama.changed.values(), given]
        ) as live:
            profile(llama, given, changed=llama.changed if drift else None, batch_size=2)
        peaks[rows] = live.peak
    one_map = 2 * 4 * 96 * 96 * 4  # rows x heads x queries x keys in float32
    assert peaks[4] > one_map
    assert peaks[16] - peaks[4] < 0.05 * one_map


def test_models_without_attention_give_a_note() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4))
    decoder = decoder_of(model.eval())
    assert len(decoder.layers) == 2
    result = attention_profile(decoder, tiny.tokenizer(), [], AttentionTexts(text_rows(2, 16)), "reference")
    assert (result.layers, result.heads, result.notes) == ([], [], [NO_MAPS])


def test_wrong_use_is_refused(llama: Loaded) -> None:
    short = profile(llama, text_rows(2, 9))
    assert short.layers == short.heads == []
    assert "9 tokens are too short" in short.notes[0]
    with pytest.raises(ValueError, match=r"model\.nothing"):
        profile(llama, changed={"model.nothing": torch.zeros(1, 1)})


def test_eager_comes_off_after_an_error(llama: Loaded) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llama.decoder.model.modules())

    before = llama.decoder.model.config._attn_implementation, hooks()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for options in ({}, {"changed": llama.changed}):
        with pytest.raises(KeyboardInterrupt):
            profile(llama, progress=stop, **options)
        assert (llama.decoder.model.config._attn_implementation, hooks()) == before


def test_trained_model_has_previous_token_heads(babyllama: Path) -> None:
    """The smallest trained model at hand has heads for the previous letter, in the second and third layer."""
    checkpoint = open_checkpoint(str(babyllama))
    decoder, tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()
    text = (tiny.SHARED / "data" / "tinystories_test.txt").read_text(encoding="utf-8")[:2000]
    rows = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 8 * 96]).reshape(8, 96)
    run = partial(attention_profile, decoder, tokenizer, checkpoint.modules, AttentionTexts(rows), "reference")
    found = [layer.roles["previous"] for layer in run().layers]
    assert found[1] >= 2
    assert found[2] >= 2
    assert found[0] == found[4] == 0
