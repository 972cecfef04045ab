"""Sizes by arithmetic, against counting what a quantizer really stores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitatlas.errors import UserError
from bitatlas.quantize import rtn
from bitatlas.records.formats import FORMATS, INTEGER_FORMATS, Format, by_width, get_format, group_count, stored_bytes


def test_names_say_what_a_format_is():
    assert FORMATS["int2_g64"] == Format(bits=2, group_size=64, symmetric=False, scale_bits=16, zero_bits=16)
    assert FORMATS["int4_g32_sym"].zero_bits == 0
    assert all(fmt.name == name for name, fmt in FORMATS.items())


def test_bytes_of_a_known_module():
    # 64 x 172 inputs at 2 bits, groups of 32: 2752 bytes of codes, 64 x 6 groups x (2 + 2) bytes.
    assert stored_bytes((64, 172), get_format("int2_g32")) == 64 * 172 * 2 // 8 + 64 * 6 * 4


@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from(sorted(INTEGER_FORMATS)))
def test_bytes_equal_what_the_quantizer_stores(out_features: int, in_features: int, name: str):
    fmt = FORMATS[name]
    codes = rtn.quantize(torch.randn(out_features, in_features), fmt)
    assert codes.scale.shape == codes.zero.shape == (out_features, group_count((1, in_features), fmt.group_size))
    bits = codes.codes.numel() * fmt.bits
    extra = codes.scale.numel() * (fmt.scale_bits + fmt.zero_bits) // 8
    assert stored_bytes((out_features, in_features), fmt) == -(-bits // 8) + extra


def test_unknown_format_names_the_nearest():
    with pytest.raises(UserError, match=r"int2_g60.*nearest is 'int2_g6?.*'"):
        get_format("int2_g60")


def test_by_width_sorts_by_bits_then_real_size():
    assert by_width(["int4_g32", "int2_g32", "int4_g128", "int2_g64_sym"]) == [
        "int2_g64_sym",
        "int2_g32",
        "int4_g128",
        "int4_g32",
    ]


@pytest.mark.parametrize("wrong", [{"bits": 0, "group_size": 32}, {"bits": 9, "group_size": 32}, {"bits": 4, "group_size": 0}])
def test_impossible_formats_cannot_be_made(wrong: dict):
    with pytest.raises(ValueError):
        Format(**wrong)
