"""Heads with hand-set weights in a real model, through the whole profile: each is called what it was made to be, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import tiny
from bitatlas.findings.statements import ablation_record
from bitatlas.measure.attention.ablation import Removal, ablate
from bitatlas.measure.attention.capture import eager, run_captured
from bitatlas.measure.attention.maps import LEAST_KEYS, Sinks, allowed_keys, count_keys, spread, strip_sinks
from bitatlas.measure.attention.profile import BLOCK, AttentionResult, AttentionTexts, attention_profile, example_maps
from bitatlas.measure.attention.scoring import RESTING_SINK_MASS
from bitatlas.records.journal import Journal
from planted import DUPLICATE, EVEN, INDUCTION, PREVIOUS, SINK, planted_decoder

ROLE_OF = {PREVIOUS: "previous", DUPLICATE: "duplicate", INDUCTION: "induction"}


def text_rows() -> Tensor:
    return torch.randint(2, 64, (6, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def profiled() -> AttentionResult:
    return attention_profile(planted_decoder(), tiny.tokenizer(), [], AttentionTexts(text_rows()), "reference")


@pytest.fixture(scope="module")
def removed(profiled: AttentionResult) -> dict[str, Removal]:
    decoder = planted_decoder()
    found = ablate(decoder, tiny.tokenizer(), profiled.heads, ["planted"], Journal(None))
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())
    return {one.role: one for one in found}


def test_each_head_is_called_what_it_is(profiled: AttentionResult) -> None:
    assert {(head.layer, head.head): head.role for head in profiled.heads if head.role} == ROLE_OF
    for head in profiled.heads:
        own = ROLE_OF.get((head.layer, head.head))
        for role, score in head.scores.items():
            if role == own:  # equal tokens include the query itself, so half of a duplicate head's attention stays there
                assert score > (0.4 if role == "duplicate" else 0.99)
            else:
                assert score < 0.05
                assert head.p_values[role] > 0.05
    assert [layer.roles["sink"] for layer in profiled.layers] == [1, 0]
    assert [layer.specialization_percent.mean for layer in profiled.layers] == [50, 25]


def test_example_maps_show_each_role_as_its_line(profiled: AttentionResult) -> None:
    found = {(one.layer, one.head): one for one in example_maps(planted_decoder(), tiny.tokenizer(), profiled.heads)}
    assert {at: one.role for at, one in found.items()} == ROLE_OF
    start = len(found[INDUCTION].percent) - 2 * BLOCK  # a beginning token, where there is one
    for at, back in ((PREVIOUS, 1), (DUPLICATE, BLOCK), (INDUCTION, BLOCK - 1)):
        rows = found[at].percent
        assert [len(row) for row in rows] == list(range(1, len(rows) + 1))
        assert all(96 <= sum(row) <= 104 for row in rows)
        second = range(start + BLOCK, len(rows))
        itself = at == DUPLICATE  # equal tokens include the query's own
        assert min(rows[query][query - back] + itself * rows[query][query] for query in second) >= 95
        assert max(rows[query][query - back] for query in second) >= 95


def test_without_roles_there_are_no_example_maps(profiled: AttentionResult) -> None:
    plain = [dataclasses.replace(head, role=None) for head in profiled.heads]
    assert example_maps(planted_decoder(), tiny.tokenizer(), plain) == []


def test_the_sinks_mass_is_reported_and_rests_on_nothing_else(profiled: AttentionResult) -> None:
    resting = {(head.layer, head.head): head.sink_mass for head in profiled.heads if head.sink_mass > RESTING_SINK_MASS}
    assert resting == {SINK: pytest.approx(1, abs=1e-4)}
    assert any("rests on the sinks wholly" in note for note in profiled.notes)


def test_even_attention_has_the_entropy_of_its_keys(profiled: AttentionResult) -> None:
    """ln of the number of keys without the sink, 1 of that at most; heads that look at one key have none."""
    rows = text_rows()
    found: list[Tensor] = []

    def read(layer: int, hidden: Tensor, maps: Tensor) -> None:
        keys = Sinks(rows).keys
        found.append(spread(*strip_sinks(maps, keys), count_keys(allowed_keys(maps), keys))[1])

    decoder = planted_decoder()
    with eager(decoder.model):
        run_captured(decoder, rows, read)
    exact = sum(math.log(keys) for keys in range(LEAST_KEYS, rows.shape[1])) / (rows.shape[1] - LEAST_KEYS)
    assert found[0][:, EVEN[1]].tolist() == pytest.approx([exact] * len(rows), abs=1e-5)
    entropy = {(head.layer, head.head): head.entropy for head in profiled.heads}
    assert entropy[EVEN] == pytest.approx(1, abs=1e-5)
    assert entropy[PREVIOUS] < 1e-3


def test_removing_the_induction_head_ends_repetition(removed: dict[str, Removal]) -> None:
    """It costs the whole gain; of the seven others only the head that it reads from does too, and the others nothing."""
    found = removed["induction"]
    assert found.heads == (INDUCTION,)
    assert (found.draws, found.every_draw) == (7, True)
    gain = found.intact[:, 0] - found.intact[:, 1]
    added = found.removed[:, 1] - found.intact[:, 1]
    assert gain.min() > 3
    assert added == pytest.approx(gain, abs=0.15)
    others = (found.random[..., 1] - found.intact[:, 1]).mean(1)
    assert sorted(abs(others))[:6] == pytest.approx([0] * 6, abs=0.05)
    record = ablation_record(found)
    assert record.as_harmful == 1
    assert record.effect is not None
    assert record.effect.ci95[0] > 2
    assert record.effect.mean == pytest.approx(added.mean() - others.mean())


def test_removing_the_previous_token_head_does_too(removed: dict[str, Removal]) -> None:
    record = ablation_record(removed["previous"])
    assert record.heads == [list(PREVIOUS)]
    assert record.effect is not None
    assert record.effect.ci95[0] > 2
