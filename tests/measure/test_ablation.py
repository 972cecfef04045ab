"""Heads removed: exactly those, compared with as many others, journaled, and with an interval that covers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from bitatlas import data as demo
from bitatlas.findings.statements import ablation_findings, ablation_record, head_names
from bitatlas.measure.attention import ablation
from bitatlas.measure.attention.ablation import (
    ABLATION_DRAWS,
    SHORT_SEQUENCES,
    Removal,
    ablate,
    half_losses,
    random_sets,
    without_heads,
)
from bitatlas.measure.attention.capture import output_projection
from bitatlas.measure.attention.profile import AttentionTexts, attention_profile
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.records import AttentionHead
from bitatlas.records.journal import Journal

OUTPUTS = {"gpt_neox": "gpt_neox.layers.{}.attention.dense", "gpt2": "transformer.h.{}.attn.c_proj"}


def heads_called(roles: dict[tuple[int, int], str], layers: int = 3, heads: int = 4) -> list[AttentionHead]:
    places = itertools.product(range(layers), range(heads))
    return [AttentionHead(*place, "reference", 0.5, 0.1, roles.get(place), {}, {}, None) for place in places]


# --- removing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_removed_heads_are_columns_of_the_output_projection(family: str, tmp_path: Path) -> None:
    """The same logits as with these columns of its weight at zero, and the model is whole again afterwards."""
    decoder = open_checkpoint(str(tiny.make_checkpoint(tmp_path, family))).load_model()
    rows = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    gone = ((0, 1), (2, 0), (2, 3))
    changed = {}
    for layer in (0, 2):
        name = OUTPUTS.get(family, "model.layers.{}.self_attn.o_proj").format(layer)
        weight = decoder.weight(name).clone()
        size = weight.shape[1] // 4
        for head in (head for other, head in gone if other == layer):
            weight[:, head * size : (head + 1) * size] = 0
        changed[name] = weight
    with torch.no_grad():
        whole = decoder.model(rows).logits
        with decoder.swapped(changed):
            expected = decoder.model(rows).logits
        with without_heads(decoder, gone, dict.fromkeys(range(3), 4)):
            found = decoder.model(rows).logits
        assert torch.equal(decoder.model(rows).logits, whole)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, whole, atol=1e-2)


def test_heads_that_cannot_be_told_apart_are_refused(tiny_llama: Path) -> None:
    decoder = open_checkpoint(str(tiny_llama)).load_model()
    assert output_projection(decoder.model.model.layers[0], 5) is None  # 64 inputs
    with pytest.raises(ValueError, match="no output projection of 5 heads"), without_heads(decoder, ((0, 0),), {0: 5}):
        pass


def test_random_sets_are_different_ones_of_other_heads() -> None:
    every = list(itertools.product(range(3), range(4)))
    own = ((0, 1), (2, 2))
    found = random_sets(own, every, seed=0)
    assert len(set(found)) == len(found) == ABLATION_DRAWS
    assert all(len(set(one)) == 2 and one == tuple(sorted(one)) and not set(one) & set(own) for one in found)
    assert found == random_sets(own, every, seed=0) != random_sets(own, every, seed=1)
    assert sorted(random_sets(((0, 0),), every, seed=0)) == [(head,) for head in every[1:]]  # all eleven


@pytest.mark.parametrize("start", [0, 1])
def test_half_losses_against_loops(start: int) -> None:
    block = torch.randint(1, 9, (3, 5), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.zeros(3, start, dtype=torch.int64), block, block], dim=1)
    logits = torch.randn(3, ids.shape[1], 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row in range(3):
        for half in (0, 1):
            first = start + 5 * half + 1  # a block's first token is not predicted
            losses = [-logits[row, place - 1].log_softmax(0)[ids[row, place]] for place in range(first, first + 4)]
            assert float(half_losses(logits, ids)[row, half]) == pytest.approx(float(sum(losses)) / 4, abs=1e-5)


# --- the stage ---------------------------------------------------------------------------------------------------------------


def test_what_is_journaled_is_not_measured_again(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after one batch, gone on with, and read again: the same numbers as in one go."""
    decoder, tokenizer = open_checkpoint(str(tiny_llama)).load_model(), tiny.tokenizer()
    heads = heads_called({(0, 1): "induction", (1, 2): "induction", (1, 0): "previous"})
    whole = ablate(decoder, tokenizer, heads, ["x"], Journal(None), seed=3, sequences=6)
    journal = Journal(tmp_path / "run.sqlite")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(decoder, tokenizer, heads, ["x"], journal, seed=3, sequences=6, progress=stop)
    done = len(journal.entries())
    resumed = ablate(decoder, tokenizer, heads, ["x"], journal, seed=3, sequences=6)
    assert 0 < done < len(journal.entries())
    monkeypatch.setattr(ablation, "record", None)  # nothing is run any more
    again = ablate(decoder, tokenizer, heads, ["x"], journal, seed=3, sequences=6)
    for one, other, third in zip(whole, resumed, again, strict=True):
        assert (one.role, one.heads, one.draws) == (other.role, other.heads, other.draws)
        for name in ("intact", "removed", "random"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes() == getattr(third, name).tobytes()
    assert [(one.role, one.draws, one.every_draw, one.random.shape) for one in whole] == [
        ("induction", 20, False, (20, 6, 2)),
        ("previous", 11, True, (11, 6, 2)),
    ]


def test_what_cannot_be_tested_says_why(tiny_llama: Path) -> None:
    decoder, tokenizer = open_checkpoint(str(tiny_llama)).load_model(), tiny.tokenizer()
    assert ablate(decoder, tokenizer, [], [], Journal(None)) == []
    crowd = heads_called(dict.fromkeys(itertools.product(range(3), range(3)), "previous"))
    alone = [ablation_record(one).not_tested for one in ablate(decoder, tokenizer, crowd, [], Journal(None))]
    assert alone == ["no head is called induction", "no head is called induction, so none could need these for repeating"]
    crowd = [dataclasses.replace(head, role=head.role and "induction") for head in crowd]
    records = [ablation_record(one) for one in ablate(decoder, tokenizer, crowd, [], Journal(None))]
    texts = [finding.text for finding in ablation_findings(records)]
    assert texts[0] == "Not tested: 9 of 12 heads are called induction, so there are not as many others to compare with."
    assert texts[1] == "Not tested: no head is called previous."
    assert {finding.verdict for finding in ablation_findings(records)} == {"inconclusive"}
    assert all(record.effect is None for record in records)


# --- the statement -----------------------------------------------------------------------------------------------------------


def simulated(effect: float, rng: np.random.Generator, draws: int = 20, sequences: int = 32) -> Removal:
    """Sets of heads differ by 1 nat, sequences by 1, and every loss has its own noise."""
    intact = rng.normal(5, 1, (sequences, 2))
    random = intact + rng.normal(0, 1, (draws, 1, 1)) + rng.normal(0, 0.5, (draws, sequences, 2))
    removed = intact + effect + rng.normal(0, 0.5, (sequences, 2))
    return Removal("induction", ((1, 0),), draws, False, intact, removed, random)


def test_the_interval_covers_whatever_sets_were_drawn() -> None:
    """200 draws of sets and sequences with a known effect: 95 %, within three standard errors of that frequency."""
    rng = np.random.default_rng(0)
    records = [ablation_record(simulated(0.3, rng), seed) for seed in range(200)]
    covered = np.mean([r.effect.ci95[0] <= 0.3 <= r.effect.ci95[1] for r in records if r.effect and r.effect.ci95])
    assert covered == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 200) ** 0.5)


@pytest.mark.parametrize(("effect", "verdict"), [(3, "holds"), (0, "inconclusive"), (-3, "does not hold")])
def test_the_verdict_follows_the_interval(effect: float, verdict: str) -> None:
    found = simulated(effect, np.random.default_rng(1))
    record = ablation_record(found)
    (finding,) = ablation_findings([record])
    assert finding.verdict == verdict
    assert finding.evidence == record.effect
    assert record.effect is not None
    exact = (found.removed[:, 1] - found.random[..., 1].mean(0)).mean()
    assert record.effect.mean == pytest.approx(exact, abs=1e-12)
    assert "1 head called induction (1.0)" in finding.text
    assert f"{record.as_harmful} of 20 random heads" in finding.text
    assert (record.effect.unit, record.effect.base, record.effect.n) == ("nats/token", "reference", 32)


def test_when_every_set_was_measured_only_sequences_vary() -> None:
    found = simulated(1, np.random.default_rng(2))
    some, every = (ablation_record(one).effect for one in (found, dataclasses.replace(found, every_draw=True)))
    assert some is not None
    assert every is not None
    assert some.mean == every.mean
    assert np.ptp(every.ci95) < 0.5 * np.ptp(some.ci95)


def test_many_heads_are_named_in_short() -> None:
    assert head_names([[3, 1], [5, 0]]) == "3.1, 5.0"
    assert head_names([[layer, 2] for layer in range(9)]) == "0.2, 1.2, 2.2, 3.2, 4.2, 5.2 and 3 more"


# --- the bar -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demos_induction_heads_do_the_repeating() -> None:
    """On the bundled model the heads called induction matter more for repetition than as many random others."""
    checkpoint = open_checkpoint(str(demo.MODEL_DIR))
    decoder, tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()
    text = demo.TEXT_FILE.read_text(encoding="utf-8")[:4000]
    rows = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 4 * 96]).reshape(4, 96)
    heads = attention_profile(decoder, tokenizer, checkpoint.modules, AttentionTexts(rows), "reference").heads
    if not any(head.role == "induction" for head in heads):
        pytest.skip("no head of the bundled model is called induction: it was not trained on repetitions")
    heads = [
        dataclasses.replace(head, role=head.role if head.role == "induction" else None) for head in heads
    ]  # one role is the bar
    record = ablation_record(ablate(decoder, tokenizer, heads, ["demo"], Journal(None), sequences=SHORT_SEQUENCES)[0])
    assert record.role == "induction"
    assert record.second_half.mean < record.first_half.mean - 1  # it does repeat
    assert record.effect.ci95[0] > 0
