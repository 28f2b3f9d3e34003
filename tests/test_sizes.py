"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.sizes import exact_size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        (" 5 GB ", 5 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("200kB", 200_000),
        ("64KiB", 65536),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("1B", 1),
        ("0.001kB", 1),
        ("5000000000", 5 * 10**9),
        (5, 5),
        (2**30, 2**30),
    ],
)
def test_sizes_are_read(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "has no unit; write for example 5GB or 5MiB"),
        ("999999", "has no unit"),
        ("5G", "is not a size"),
        ("five GB", "is not a size"),
        ("", "is not a size"),
        ("-1GB", "is not a size"),
        ("1e9", "is not a size"),
        ("nanGB", "is not a size"),
        ("5 ib", "unknown unit"),
        ("0GB", "is not a positive size"),
        ("0.1B", "is not a positive size"),
        ("9" * 400 + "TB", "is not a positive size"),
        (0, "is not a positive size"),
        (-5, "is not a positive size"),
    ],
)
def test_what_is_no_size_is_refused_with_the_reason(text: str | int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1500, "1.5 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (5_368_709_120, "5.37 GB"),
        (141_107_412_992, "141 GB"),
        (999_900_000_000, "0.9999 TB"),
        (3_141_592_653_589, "3.142 TB"),
        (-2000, "-2 kB"),
    ],
)
def test_sizes_are_shown(size: int, expected: str) -> None:
    assert format_size(size) == expected


@given(st.integers(1, 10**15))
def test_what_is_shown_is_read_back_to_three_digits(size: int) -> None:
    shown = format_size(size)
    assert "e" not in shown
    assert abs(parse_size(shown) - size) <= 0.005 * size + 0.5


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(2**30, "1GiB"), (5 * 10**9, "5GB"), (20_000, "20KB"), (1, "1B"), (1025, "1025B")],
)
def test_exact_sizes_are_short(nbytes: int, expected: str) -> None:
    assert exact_size(nbytes) == expected


@given(st.integers(1, 2**53))
def test_exact_sizes_are_exact(nbytes: int) -> None:
    assert parse_size(exact_size(nbytes)) == nbytes
