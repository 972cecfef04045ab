"""Statistics of attention maps, on hand-made maps with a known truth and against loops, scipy and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor

import tiny
from bitatlas.measure.attention.maps import Sinks, allowed_keys, count_keys, js_distance, massive_tokens, spread, strip_sinks
from bitatlas.measure.attention.roles import (
    NEAR_TOKENS,
    REPEATED_ROLES,
    ROLES,
    TEXT_ROLES,
    kappa,
    matched_pairs,
    ordinary_tokens,
    permutation_p,
    repeated_tokens,
    role_mass,
    role_targets,
)
from bitatlas.measure.attention.scoring import Tally, score

BLOCK, SEQUENCES = 20, 6
TOKENS = 1 + 2 * BLOCK


# --- hand-made maps -------------------------------------------------------------------------------------------------------


def repeated_ids(sequences: int = SEQUENCES, seed: int = 0) -> Tensor:
    """A beginning token 0, then a random block twice: [sequences, TOKENS]."""
    generator = np.random.default_rng(seed)
    blocks = [generator.choice(np.arange(1, 500), BLOCK, replace=False) for _ in range(sequences)]
    return torch.tensor(np.asarray([[0, *block, *block] for block in blocks]))


def looking_back(distance: int, strength: float, tokens: int = TOKENS) -> Tensor:
    """A head that gives `strength` to the key `distance` back and spreads the rest evenly: [tokens, tokens]."""
    head = torch.zeros(tokens, tokens)
    for query in range(tokens):
        keys = query + 1
        if query - distance >= 0 and keys > 1:
            head[query, :keys] = (1 - strength) / (keys - 1)
            head[query, query - distance] = strength
        else:
            head[query, :keys] = 1 / keys
    return head


def uniform(tokens: int = TOKENS) -> Tensor:
    return torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None]


def resting(head: Tensor, mass: float) -> Tensor:
    """The same head with `mass` of every row moved to the first token."""
    sink = torch.zeros_like(head)
    sink[:, 0] = 1
    return (1 - mass) * head + mass * sink


HEADS = {
    "previous": looking_back(1, 0.8),
    "uniform": uniform(),
    "duplicate": looking_back(BLOCK, 0.7),
    "induction": looking_back(BLOCK - 1, 0.7),
    "sink": resting(uniform(), 0.9),
    "induction behind a sink": resting(looking_back(BLOCK - 1, 0.7), 0.9),
}


def planted_scores(strip: bool = True) -> dict[str, dict[str, float]]:
    """kappa of each planted head for each role that repeated tokens can show."""
    ids = repeated_ids()
    maps = torch.stack(list(HEADS.values())).expand(SEQUENCES, -1, -1, -1)
    if strip:
        maps, _ = strip_sinks(maps, Sinks(ids).keys)
    roles = ("previous", "duplicate", "induction")
    masses = role_mass(roles, ids, 0, seed=0).read(maps)  # [rows, roles, 1 + draws, heads]
    scores = kappa(masses[:, :, 0].mean(0), masses[:, :, 1:].mean((0, 2)))
    return {name: dict(zip(roles, column, strict=True)) for name, column in zip(HEADS, scores.T.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("head", "role"),
    [
        ("previous", "previous"),
        ("duplicate", "duplicate"),
        ("induction", "induction"),
        ("induction behind a sink", "induction"),
    ],
)
def test_planted_heads_score_in_their_role_only(head: str, role: str) -> None:
    scores = planted_scores()[head]
    assert scores.pop(role) == pytest.approx(0.7 if role != "previous" else 0.8, abs=0.03)
    assert max(scores.values()) < 0.02


@pytest.mark.parametrize("head", ["uniform", "sink"])
def test_heads_without_preference_score_zero(head: str) -> None:
    assert list(planted_scores()[head].values()) == pytest.approx([0, 0, 0], abs=1e-6)


def test_without_stripping_a_sink_hides_the_role() -> None:
    assert planted_scores(strip=False)["induction behind a sink"]["induction"] < 0.1


def test_planted_heads_get_their_roles_in_the_records() -> None:
    """Through the same scoring as a real model: roles, specialization, sinks counted apart, intervals over sequences."""
    ids = repeated_ids()
    whole = torch.stack(list(HEADS.values())).expand(SEQUENCES, -1, -1, -1)
    sinks = Sinks(ids).keys
    maps, kept = strip_sinks(whole, sinks)
    tally = Tally()
    for name, values in zip(
        ("entropy", "entropy_nats", "sink_mass"),
        spread(maps, kept, count_keys(allowed_keys(whole), sinks)),
        strict=True,
    ):
        tally.add(0, name, values.numpy())
    text = torch.randint(1, 60, ids.shape, generator=torch.Generator().manual_seed(0))
    tally.add(0, "text_roles", role_mass(TEXT_ROLES, text, 0, seed=0).read(maps))
    tally.add(0, "repeated_roles", role_mass(REPEATED_ROLES, ids, 0, seed=0).read(maps))
    (layer,), heads, _ = score(tally, "reference", "items:none", seed=0)
    assert [head.role for head in heads] == ["previous", None, "duplicate", "induction", None, "induction"]
    assert layer.roles == {"previous": 1, "duplicate": 1, "induction": 2, "retrieval": 0, "sink": 2}
    assert layer.specialization_percent.mean == pytest.approx(100 * 4 / 6)
    assert layer.specialization_percent.n == 2 * SEQUENCES
    assert layer.specialization_at == {
        "0.2": pytest.approx(400 / 6),
        "0.3": pytest.approx(400 / 6),
        "0.4": pytest.approx(400 / 6),
    }
    assert heads[1].entropy == pytest.approx(1, abs=1e-5)
    assert heads[4].sink_mass == pytest.approx(0.9, abs=0.02)
    assert layer.entropy.n == SEQUENCES
    assert layer.focus_percent is None
    assert layer.drift_local is None


# --- targets and their replacements -----------------------------------------------------------------------------------------


def test_targets_on_a_line_of_tokens() -> None:
    """Letters for tokens. Key 0 is never a target."""
    ids = np.asarray([ord(c) for c in "^abcdabd"])
    found = {role: set(zip(*(a.tolist() for a in np.nonzero(role_targets(role, ids))), strict=True)) for role in ROLES}
    assert found["previous"] == {(q, q - 1) for q in range(2, 8)}
    assert found["duplicate"] == {(5, 1), (6, 2), (7, 4)}
    assert found["induction"] == {(5, 2), (6, 3), (7, 5)}  # behind the earlier a, b, d
    # query 4 (d) must predict a, which stands at 1; query 6 (b) must predict d, which stands at 4 and not behind a b;
    # query 5 (a) must predict b, but the b at 2 stands behind an a: induction's, so left out
    assert found["retrieval"] == {(4, 1), (6, 4)}


def test_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="previous, duplicate, induction, retrieval"):
        role_targets("copying", np.arange(5))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 40), st.integers(2, 12), st.sampled_from(ROLES))
def test_replacements_are_near_free_and_causal(seed: int, tokens: int, vocabulary: int, role: str) -> None:
    generator = np.random.default_rng(seed)
    targets = role_targets(role, generator.integers(vocabulary, size=tokens))
    pairs = matched_pairs(targets, 5, generator)
    assert targets[pairs.query, pairs.target].all()
    assert not targets[pairs.query, pairs.drawn].any()
    assert (np.abs(pairs.drawn - pairs.target) <= NEAR_TOKENS).all()
    assert (pairs.drawn >= 1).all()
    assert (pairs.drawn <= pairs.query).all()
    for drawn in pairs.drawn:  # no key stands in for two targets of one query
        assert len(np.unique(pairs.query * tokens + drawn)) == len(drawn)


@pytest.mark.parametrize("vocabulary", [3, 6, 20])
def test_crowded_targets_give_even_attention_no_role(vocabulary: int) -> None:
    """With few different tokens a query has many targets; were a key drawn for two of them, chance would come out too low."""
    ids = torch.randint(1, 1 + vocabulary, (4, 60), generator=torch.Generator().manual_seed(vocabulary))
    maps, _ = strip_sinks(uniform(60).expand(4, 1, -1, -1), Sinks(ids).keys)
    masses = role_mass(ROLES, ids, 0, seed=0).read(maps)[..., 0].mean(0)  # [roles, 1 + draws]
    assert (masses[:, 0] > 0.05).sum() >= 2  # crowded indeed
    np.testing.assert_allclose(masses[:, 1:], masses[:, :1].repeat(16, 1), atol=1e-6)


def test_masses_are_what_loops_give() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 6, (3, 24), generator=generator)
    maps = torch.rand(3, 2, 24, 24, generator=generator).tril()
    read = role_mass(ROLES, ids, 0, seed=5, draws=3).read(maps)
    for row in range(3):
        for number, role in enumerate(ROLES):
            targets = role_targets(role, ids[row].numpy())
            tokens = ids[row].numpy()
            counts = np.bincount(tokens)[tokens] if role == "retrieval" else None  # matched on frequency, too
            pairs = matched_pairs(targets, 3, np.random.default_rng([5, number, row]), counts)
            queries = sorted(set(pairs.query.tolist()))
            for draw in range(4):
                keys = pairs.target if draw == 0 else pairs.drawn[draw - 1]
                per_query = [
                    sum(maps[row, :, q, k] for k in sorted({k for p, k in zip(pairs.query, keys, strict=True) if p == q}))
                    for q in queries
                ]
                exact = torch.stack(per_query).mean(0)  # type: ignore[arg-type]
                np.testing.assert_allclose(read[row, number, draw], exact.numpy(), atol=1e-5)


def test_chance_level_heads_have_uniform_p_values() -> None:
    """300 heads of random attention: at most 1 in 100 such samples would be further from uniform."""
    generator = torch.Generator().manual_seed(11)
    ids = repeated_ids()
    logits = 2 * torch.randn(SEQUENCES, 300, TOKENS, TOKENS, generator=generator)
    maps, _ = strip_sinks(logits.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -math.inf).softmax(-1), Sinks(ids).keys)
    masses = role_mass(("induction",), ids, 0, seed=0).read(maps)[:, 0]
    p = permutation_p(np.moveaxis(masses, 1, 0), 2000, seed=0)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 < (p < 0.05).mean() < 0.09


def test_p_is_exact_for_few_sequences() -> None:
    """One sequence, 16 draws all below the truth: one of 17 exchangeable values is the largest, so p is about 1/17."""
    masses = np.concatenate([np.ones((1, 1, 1)), np.linspace(0, 0.5, 16).reshape(16, 1, 1)])
    assert permutation_p(masses, 20_000, seed=0)[0] == pytest.approx(1 / 17, abs=0.006)


def test_repeated_tokens_repeat_ordinary_tokens() -> None:
    tokenizer = tiny.tokenizer()
    groups = repeated_tokens(tokenizer, 300, 128, 10, seed=0)
    assert sum(len(group) for group in groups) == 10
    assert len({group.shape[1] for group in groups}) == 4  # four block lengths
    ordinary = set(ordinary_tokens(tokenizer, 300).tolist())
    assert not ordinary & set(tokenizer.all_special_ids)
    for group in groups:
        half = (group.shape[1] - 1) // 2
        assert (group[:, 0] == tokenizer.bos_token_id).all()
        assert torch.equal(group[:, 1 : 1 + half], group[:, 1 + half :])
        assert set(group[:, 1:].flatten().tolist()) <= ordinary
        assert all(len(set(row)) == half for row in group[:, 1 : 1 + half].tolist())
    assert all(torch.equal(a, b) for a, b in zip(groups, repeated_tokens(tokenizer, 300, 128, 10, seed=0), strict=True))
    assert repeated_tokens(tokenizer, 300, 12, 10, seed=0) == []


# --- sinks, entropy, distance ---------------------------------------------------------------------------------------------


def random_maps(seed: int = 0, shape: tuple[int, int, int] = (2, 3, 14), window: int | None = None) -> Tensor:
    rows, heads, tokens = shape
    logits = 3 * torch.randn(rows, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen = torch.ones(tokens, tokens).tril().bool()
    if window:
        seen &= torch.ones(tokens, tokens).triu(1 - window).bool()
    return logits.masked_fill(~seen, -math.inf).softmax(-1)


@pytest.mark.parametrize("window", [None, 10])
def test_entropies_and_sink_mass_against_loops(window: int | None) -> None:
    maps = random_maps(window=window)
    rows, heads, tokens = maps.shape[:3]
    sinks = torch.zeros(rows, tokens, dtype=torch.bool)
    sinks[:, 0] = sinks[1, 5] = True
    stripped, kept = strip_sinks(maps, sinks)
    found = spread(stripped, kept, count_keys(allowed_keys(maps), sinks))
    for row in range(rows):
        for head in range(heads):
            share, nats, sink = [], [], []
            for query in range(tokens):
                first = 0 if window is None else max(0, query - window + 1)
                keys = [k for k in range(first, query + 1) if not sinks[row, k]]
                if len(keys) < 8:
                    continue
                weights = maps[row, head, query, keys].numpy()
                own = weights / weights.sum()
                nats.append(-(own * np.log(own)).sum())
                share.append(nats[-1] / math.log(len(keys)))
                sink.append(1 - weights.sum())
            exact = np.mean(share), np.mean(nats), np.mean(sink)
            assert [float(value[row, head]) for value in found] == pytest.approx(exact, abs=1e-6)


def test_a_head_wholly_on_the_sink_has_no_entropy() -> None:
    maps = resting(uniform(), 1.0)[None, None]
    sinks = torch.zeros(1, TOKENS, dtype=torch.bool)
    sinks[:, 0] = True
    entropy, nats, sink = spread(*strip_sinks(maps, sinks), count_keys(torch.ones(TOKENS, TOKENS).tril().bool(), sinks))
    assert entropy.isnan().all()
    assert nats.isnan().all()
    assert float(sink) == 1.0


def test_massive_tokens_are_found_and_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 30, 64, generator=generator)
    hidden[:, :, 7] += 200  # large at every token: not massive
    assert not massive_tokens(hidden).any()
    hidden[1, 9, 3] = 5000
    expected = torch.zeros(2, 30, dtype=torch.bool)
    expected[1, 9] = True
    assert torch.equal(massive_tokens(hidden), expected)
    sinks = Sinks(torch.zeros(2, 30, dtype=torch.int64))
    assert sinks.at(torch.randn(2, 30, 64, generator=generator)).sum() == 2  # the first tokens
    assert torch.equal(sinks.at(hidden)[:, 1:], expected[:, 1:])
    assert sinks.at(torch.randn(2, 30, 64, generator=generator))[1, 9]


def test_padding_is_never_massive() -> None:
    hidden = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    hidden[0, 15] = 1e6
    hidden[0, 4, 2] = 1e4
    assert massive_tokens(hidden, torch.tensor([10])).nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_is_scipys(dtype: torch.dtype) -> None:
    first, second = random_maps(0), random_maps(1)
    second[0] = first[0] + 1e-4 * (second[0] - first[0])  # nearly equal rows, where a difference of entropies loses its digits
    found = js_distance(first.to(dtype), second.to(dtype))
    for place in np.ndindex(*found.shape):
        exact = jensenshannon(first[place].numpy(), second[place].numpy(), base=2)
        assert float(found[place]) == pytest.approx(np.nan_to_num(exact), rel=2e-3, abs=2e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12))
def test_distance_is_a_distance(pairs: list[tuple[float, float]]) -> None:
    weights = torch.tensor(pairs, dtype=torch.float64).T + torch.tensor([[1e-12], [1e-12]])
    first, second = weights / weights.sum(-1, keepdim=True)
    there, back = float(js_distance(first, second)), float(js_distance(second, first))
    assert there == pytest.approx(back, abs=1e-9)
    assert 0 <= there <= 1
    assert float(js_distance(first, first)) == 0


def test_rows_apart_are_at_distance_one() -> None:
    assert float(js_distance(torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.1, 0.9]))) == pytest.approx(1, abs=2e-6)
