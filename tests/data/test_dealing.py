"""Rows are dealt out by documents or stretches, against brute force over tuples of tokens."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitatlas.data.rows import EVERYWHERE, LEAST_BLOCKS, RUN, deal, repeated_rows


def runs_of(row):
    return {tuple(row[place : place + RUN]) for place in range(len(row) - RUN + 1)}


def cut(lengths, row_length):
    """Documents one after the other -> starts of rows, document of each token."""
    begins = np.cumsum(lengths) - lengths
    starts = [begin + row_length * k for begin, n in zip(begins, lengths, strict=True) for k in range(n // row_length)]
    return np.array(starts, dtype=np.int64), np.repeat(np.arange(len(lengths)), lengths)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(20, 80), st.integers(1, 6), st.integers(1, 4))
def test_rows_that_are_kept_have_no_run_in_common(seed, row_length, documents, copies):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(row_length, 600, documents)
    ids = rng.integers(0, 50, lengths.sum())
    for _ in range(copies):  # pieces of the text again elsewhere, at any offset
        size = int(rng.integers(RUN, 200))
        if len(ids) > size:
            source, target = rng.integers(0, len(ids) - size, 2)
            ids[target : target + size] = ids[source : source + size].copy()
    starts, document = cut(lengths, row_length)
    repeated = repeated_rows(ids, starts, row_length, document)
    kept = [ids[start : start + row_length] for start in starts[~repeated]]
    seen = Counter(run for row in kept for run in runs_of(row))
    assert max(seen.values(), default=1) == 1
    assert len({row.tobytes() for row in kept}) == len(kept)
    everything = Counter(tuple(ids[place : place + RUN]) for place in range(len(ids) - RUN + 1))
    for start in starts[repeated]:  # dropped for a reason: a run that overlaps the row stands in the text twice
        near = range(max(0, start - RUN + 1), min(len(ids) - RUN + 1, start + row_length))
        assert any(everything[tuple(ids[place : place + RUN])] > 1 for place in near)


def test_a_row_that_repeats_itself_alone_is_kept():
    ids = np.concatenate([np.tile([1, 2], 48), np.arange(3, 99)])
    starts, document = cut(np.array([192]), 96)
    assert not repeated_rows(ids, starts, 96, document).any()


def test_what_stands_everywhere_is_let_pass_but_not_as_half_of_a_row():
    rng = np.random.default_rng(0)
    head = rng.integers(0, 1000, 40)
    fresh = rng.integers(0, 1000, (20, 60))
    ids = np.concatenate([np.concatenate([head, own]) for own in fresh])
    starts, document = cut(np.full(20, 100), 100)
    assert repeated_rows(ids, starts, 100, document).sum() == 19
    assert not repeated_rows(ids, starts, 100, document, everywhere=True).any()
    once = ids.copy()
    once[100 * 9 : 100 * 9 + 40] = once[100 * 12 + 50 : 100 * 12 + 90]  # a run that only two documents have
    assert np.flatnonzero(repeated_rows(once, starts, 100, document, everywhere=True)).tolist() == [12]
    shorter = np.concatenate([np.concatenate([head, own[:30]]) for own in fresh])  # 40 of 70 tokens
    starts, document = cut(np.full(20, 70), 70)
    assert repeated_rows(shorter, starts, 70, document, everywhere=True).sum() == 19
    assert EVERYWHERE == 0.1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.tuples(*[st.integers(1, 30)] * 3), st.integers(0, 999))
def test_dealt_rows(sizes, counts, seed):
    document = np.repeat(np.arange(len(sizes)), sizes)
    dealt = deal(document, 192, counts, seed)
    if sum(sizes) < sum(counts):
        assert dealt is None
        return
    assert dealt is not None
    assert [len(rows) for rows in dealt.rows] == list(counts)
    assert len(set(np.concatenate(dealt.rows).tolist())) == sum(counts)
    assert all((np.diff(rows) > 0).all() for rows in dealt.rows)
    blocks = [set(own.tolist()) for own in dealt.blocks]
    assert not (blocks[0] & blocks[1] or blocks[0] & blocks[2] or blocks[1] & blocks[2])
    owners = [set(document[rows].tolist()) for rows in dealt.rows]
    apart = not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    assert apart or not dealt.documents
    if dealt.by_document:
        assert dealt.documents
        assert all((document[rows] == own).all() for rows, own in zip(dealt.rows, dealt.blocks, strict=True))
    again = deal(document, 192, counts, seed)
    assert all((a == b).all() for a, b in zip(dealt.rows, again.rows, strict=True))


def test_one_row_of_each_document_before_a_second():
    document = np.repeat(np.arange(40), 5)
    dealt = deal(document, 192, (4, 4, 4), 0)
    assert dealt.by_document
    assert [len(set(own.tolist())) for own in dealt.blocks] == [4, 4, 4]
    dealt = deal(document, 192, (24, 24, 64), 0)
    for own, count in zip(dealt.blocks, (24, 24, 64), strict=True):
        each = Counter(own.tolist()).values()
        assert len(each) >= LEAST_BLOCKS
        assert max(each) - min(each) <= 1
        assert sum(each) == count
    places = np.concatenate([deal(document, 192, (24, 24, 64), seed).rows[2] % 5 for seed in range(20)])
    assert set(places.tolist()) == set(range(5))  # not always a document's first row


def test_stretches_of_one_long_text():
    dealt = deal(np.zeros(2000, dtype=np.int64), 192, (24, 24, 64), 0)
    assert not dealt.documents
    assert not dealt.by_document
    assert [len(set(own.tolist())) for own in dealt.blocks] == [24, 24, 64]  # a row each
    places = np.sort(np.concatenate(dealt.rows))
    assert np.diff(places).min() >= 2000 // 112 - 1  # far from each other, whatever set they are in
    other = deal(np.zeros(2000, dtype=np.int64), 192, (24, 24, 64), 1)
    assert set(other.blocks[0].tolist()) != set(dealt.blocks[0].tolist())
    scarce = deal(np.zeros(112, dtype=np.int64), 192, (24, 24, 64), 0)
    assert sorted(np.concatenate(scarce.rows).tolist()) == list(range(112))


@pytest.mark.parametrize("sizes", [[1000, 1, 1], [300, 30, 30], [5, 5, 5, 200]])
def test_few_documents_stay_whole_where_they_can(sizes):
    dealt = deal(np.repeat(np.arange(len(sizes)), sizes), 192, (24, 24, 64), 3)
    assert dealt.documents == (sizes == [300, 30, 30])
    assert not dealt.by_document
    assert all(len(set(own.tolist())) >= 4 for own in dealt.blocks)
