"""`report --figures`: files that stand alone, valid and not blank, or one line and nothing."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import pytest

from atlas_factory import make_atlas
from bitatlas.errors import UserError
from bitatlas.records.files import to_json
from bitatlas.report.charts import figures as standalone
from bitatlas.report.charts.figures import figures
from command import run

SVG = "{http://www.w3.org/2000/svg}"


def pixels(data: bytes) -> tuple[int, int, set[bytes]]:
    """Width, height and the distinct bytes of an 8-bit PNG's filtered lines: of a blank picture there are hardly any."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height, depth = struct.unpack(">IIB", data[16:25])
    assert depth == 8
    packed, place = b"", 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += length + 12
    return width, height, {bytes([value]) for value in zlib.decompress(packed)}


@pytest.fixture(scope="module")
def drawings() -> dict[str, str]:
    return standalone.standalone(make_atlas())


def test_every_figure_is_valid_and_needs_nothing_else(drawings: dict[str, str]):
    assert set(figures(make_atlas())) < set(drawings)
    assert {"attention-entropy", "sparsity"} < set(drawings)
    for name, text in drawings.items():
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert root[0].tag == f"{SVG}title" and root[0].text
        assert not re.search(r"url\((?!#)|@import|<script|var\(", text), name
        assert all(link.startswith("data:image/png;base64,") for link in re.findall(r'href="([^"]*)', text)), name
        assert text.count("http") == 1  # the namespace


def test_every_class_of_a_mark_has_a_rule(drawings: dict[str, str]):
    """A class without a rule would be drawn black: colours come from the page's style sheet alone."""
    for name, text in drawings.items():
        style = ElementTree.fromstring(text).find(f"{SVG}style").text
        used = set(re.findall(r'class="[^"]*\b([vc]-[a-z]+)', text))
        assert not {css for css in used if f".{css} " not in style}, name
    assert "v-critical" in drawings["criticality"] and "c-plan" in drawings["size"]


def test_the_legend_is_drawn_inside_the_picture(drawings: dict[str, str]):
    root = ElementTree.fromstring(drawings["criticality"])
    _, _, width, height = map(float, root.get("viewBox").split())
    words = {node.text: (float(node.get("x")), float(node.get("y"))) for node in root.iter(f"{SVG}text")}
    for meaning in ("critical", "safe", "light", "uncertain"):
        x, y = words[meaning]
        assert 0 <= x < width - 60 and y < height - standalone.MARGIN


def test_pngs_have_their_size_and_are_not_blank(drawings: dict[str, str]):
    for name in ("criticality", "plan", "sparsity"):
        root = ElementTree.fromstring(drawings[name])
        width, height, values = pixels(standalone.png(drawings[name]))
        assert (width, height) == tuple(standalone.PNG_ZOOM * int(root.get(side)) for side in ("width", "height"))
        assert len(values) > 40
    blank = re.sub(r"</style>.*</svg>", "</style></svg>", drawings["plan"], flags=re.DOTALL)
    assert len(pixels(standalone.png(blank))[2]) < 5


def test_the_command_writes_both_and_lists_them(capsys, monkeypatch, tmp_path: Path):
    (tmp_path / "atlas.json").write_text(to_json(make_atlas()), encoding="utf-8")
    code, out, err = run(capsys, monkeypatch, "report", tmp_path, "--figures")
    assert (code, err) == (0, "")
    assert out.splitlines() == [str(tmp_path / "report.html"), str(tmp_path / "figures")]
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in standalone.standalone(make_atlas()) for kind in ("svg", "png")}


def test_without_the_package_nothing_is_written(capsys, monkeypatch, tmp_path: Path):
    (tmp_path / "atlas.json").write_text(to_json(make_atlas()), encoding="utf-8")
    monkeypatch.setattr(standalone, "find_spec", lambda name: None)
    code, out, err = run(capsys, monkeypatch, "report", tmp_path, "--figures")
    assert (code, out) == (2, "")
    assert err == "bitatlas: --figures: PNGs need a package: pip install 'bitatlas[figures]'\n"
    assert [file.name for file in tmp_path.iterdir()] == ["atlas.json"]


def test_without_a_font_it_is_said(monkeypatch):
    import resvg_py

    real = resvg_py.svg_to_bytes
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda svg, **options: real(svg, skip_system_fonts=True, **options))
    with pytest.raises(UserError, match="no font"):
        standalone.png("<svg/>")
