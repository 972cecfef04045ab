"""Numbers as text: as many digits as their interval supports, read back without loss of what was meant."""

import pytest

from bitatlas.records import Measured
from bitatlas.records.text import byte_size, given, given_size, interval, listed, named_layers, number, p_is, p_value, percent


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (Measured(0.21437, (0.1992, 0.2321), "nats/token", "", "", 9), "0.214 [0.199, 0.232] nats/token"),
        (Measured(-0.004, (-0.02, 0.01), "share", "", "", 9), "−0.4% [−2.0, 1.0]"),
        (Measured(25.0, (25.0, 25.0), "%", "", "", 9), "25.0% (in every resample)"),
        (Measured(1.5, None, "ratio", "", "", 1), "1.50 [no interval]"),
    ],
)
def test_numbers_carry_what_their_interval_supports(measured: Measured, text: str):
    assert interval(measured, unit=True) == text


def test_numbers_layers_and_lists_read_as_text():
    assert [number(value) for value in (0, 1234.5, 0.000123, -1e-9)] == ["0.00", "1,234", "0.000123", "−1.0e−09"]
    assert [percent(share) for share in (0.125, 0.5, 0)] == ["12.5%", "50.0%", "0.0%"]
    assert [named_layers(layers) for layers in ([7], [3, 0, 1, 2, 7], range(2))] == ["layer 7", "layers 0–3, 7", "layers 0–1"]
    assert [listed(part) for part in ((), "a", "ab", "abc")] == ["none", "a", "a and b", "a, b and c"]
    assert [p_value(p) for p in (None, 0.00001, 0.0123, 0.5)] == ["", "< 0.0001", "0.012", "0.50"]
    assert [byte_size(count) for count in (12, 1_680_000)] == ["12 bytes", "1.68 MB"]


def test_numbers_that_somebody_gave_keep_their_digits():
    assert [given(value) for value in (3.0, 2.9, 1.9999999, 0.000001234, 4294967296.0)] == [
        "3", "2.9", "1.9999999", "0.000001234", "4294967296",
    ]  # fmt: skip
    sizes = (12, 500_000_000, 1_500_000, 1_234_567, 999_999, 2**30)
    assert [given_size(n) for n in sizes] == ["12 bytes", "500 MB", "1.50 MB", "1.234567 MB", "999.999 kB", "1.073741824 GB"]


def test_p_is_a_number_or_a_bound():
    assert [p_is(p) for p in (6e-33, 0.00099, 0.0123, 0.5)] == ["p < 0.0001", "p = 0.0010", "p = 0.012", "p = 0.50"]
