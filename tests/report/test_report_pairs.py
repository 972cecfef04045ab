"""Interactions and heads as the report draws them: the pictures hold the numbers, the order joins what hurts together."""

from __future__ import annotations

import base64
import dataclasses
import re
import zlib
from itertools import pairwise

import numpy as np
import pytest

from atlas_factory import Recipe, make_atlas
from bitatlas.records import Atlas
from bitatlas.records.text import interval
from bitatlas.report.charts.canvas import png
from bitatlas.report.charts.heat import (
    MOST_CELLS,
    head_examples,
    head_grids,
    interaction_matrix,
    interaction_table,
    matrix_of,
    order_of,
)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return make_atlas(Recipe(layers=6))


def read_png(data: bytes) -> np.ndarray:
    """A grey PNG of 8 bits without filters -> [height, width], by the standard's chunk layout."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        chunks[kind] = data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + chunks[kind]) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        at += 12 + length
    width, height = int.from_bytes(chunks[b"IHDR"][:4], "big"), int.from_bytes(chunks[b"IHDR"][4:8], "big")
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def pictures(drawing: object) -> list[np.ndarray]:
    return [read_png(base64.b64decode(text)) for text in re.findall(r"data:image/png;base64,([^\"]+)", str(drawing))]


def test_a_picture_holds_its_shades_to_a_sixteenth() -> None:
    shades = np.random.default_rng(0).random((7, 5))
    assert np.abs(read_png(png(shades.tolist())) / 255 - shades).max() <= 0.5 / 15 + 1e-9
    assert read_png(png([[-1, 0, 1, 2]])).tolist() == [[0, 0, 255, 255]]


def test_the_matrix_is_drawn_in_the_order_of_its_rows(atlas: Atlas) -> None:
    found = atlas.interactions
    assert found is not None
    names, values = matrix_of(found, {m.unit: m.layer for m in atlas.modules})
    assert (values == values.T).all()
    assert values[3, 1] == found.extra[3][1]
    drawing = interaction_matrix(atlas, 460)
    more, less = pictures(drawing)
    shown = [text.partition(":")[0] for text in re.findall(r"<title>(.*?)</title>", str(drawing))]
    assert sorted(shown) == sorted(names)
    order = [names.index(name) for name in shown]
    scale = np.abs(values).max()
    expected = np.sqrt(np.clip(values[np.ix_(order, order)] / scale, 0, 1))
    assert np.abs(more / 255 - expected).max() <= 0.5 / 15 + 1e-9
    assert not ((more > 0) & (less > 0)).any()


def test_units_that_hurt_together_become_neighbours(atlas: Atlas) -> None:
    """The made-up units of a layer hurt together: shuffled, each layer's units stand in one run again."""
    found = atlas.interactions
    assert found is not None
    layer_of = {m.unit: m.layer for m in atlas.modules}
    _, values = matrix_of(found, layer_of)
    shuffle = np.random.default_rng(1).permutation(len(values))
    order = shuffle[order_of(values[np.ix_(shuffle, shuffle)])]
    layers = [layer_of[found.units[place]] for place in order]
    assert sum(a != b for a, b in pairwise(layers)) == len(set(layers)) - 1


def test_too_many_units_are_summed_by_layer() -> None:
    atlas = make_atlas(Recipe(layers=60))
    found = atlas.interactions
    assert found is not None
    layer_of = {m.unit: m.layer for m in atlas.modules}
    names, values = matrix_of(found, layer_of)
    assert len(names) == 60 < len(found.units) > MOST_CELLS
    one = sum(
        value
        for i, row in enumerate(found.extra)
        for j, value in enumerate(row)
        if {layer_of[found.units[i]], layer_of[found.units[j]]} == {3, 7}
    )
    assert values[3, 7] == pytest.approx(one)
    assert not np.diag(values).any()


def test_the_table_says_each_pair_with_its_interval(atlas: Atlas) -> None:
    found = atlas.interactions
    assert found is not None
    table = interaction_table(atlas)
    for pair, row in zip(found.pairs, table.rows, strict=True):
        assert row[1] == interval(pair.extra)
        layer = next(m.layer for m in atlas.modules if m.unit == pair.first)
        assert row[0].startswith(f"layer {layer} {pair.first.rpartition('.')[2]} + ")
    assert interaction_table(dataclasses.replace(atlas, interactions=None)).rows == []
    assert interaction_matrix(dataclasses.replace(atlas, interactions=None), 460) is None


def test_small_multiples_show_every_head_of_the_reference(atlas: Atlas) -> None:
    made = {small.title: small for small in head_grids(atlas)}
    assert set(made) == {"Previous", "Duplicate", "Induction", "Retrieval", "Entropy", "Reasoning focus"}
    for title, value in (("Induction", lambda h: h.scores["induction"]), ("Entropy", lambda h: h.entropy)):
        (picture,) = pictures(made[title].drawing)
        for head in atlas.heads:
            assert abs(picture[head.head, head.layer] / 255 - value(head)) <= 0.5 / 15 + 1e-9
    outlined = sum(head.role == "induction" for head in atlas.heads)
    assert str(made["Induction"].drawing).count("outlined") == outlined > 0
    assert f"{outlined} of {len(atlas.heads)} heads" in made["Induction"].caption
    assert head_grids(dataclasses.replace(atlas, heads=[])) == []


def test_an_example_map_is_its_percentages(atlas: Atlas) -> None:
    for one, small in zip(atlas.head_maps, head_examples(atlas), strict=True):
        (picture,) = pictures(small.drawing)
        assert picture.shape == (len(one.percent),) * 2
        assert not np.triu(picture, 1).any()
        assert picture[20, 20 - {"previous": 1, "induction": 11}[one.role]] == 255
