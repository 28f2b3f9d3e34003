"""parse_object: what Python's parser lets pass and a stranger's file may not."""

from __future__ import annotations

import math

import pytest

from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.errors import CheckpointError


def test_an_object_comes_back_in_file_order() -> None:
    found = parse_object(b' {"b": [1, 2.5, null, true], "a": {"\\u00e9": "\\ud83d\\ude00"}}\n', "x.json")
    assert list(found) == ["b", "a"]
    assert found == {"b": [1, 2.5, None, True], "a": {"é": "\N{GRINNING FACE}"}}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"[1]", r"must hold a JSON object, found \[1\]"),
        (b"\xff{}", "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON: it begins with a byte order mark"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
        (b'{"x": [{"a": {"k": 1, "k": 2}}]}', "'k' stands twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_bad_input_names_the_file_and_what_is_wrong(raw: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x\.json .*{says}"):
        parse_object(raw, "x.json")


def test_infinity_passes_where_it_is_allowed() -> None:
    found = parse_object(
        b'{"time_step_limit": [0.0, Infinity], "x": NaN}', "config.json", allow_nonfinite=True
    )
    assert found["time_step_limit"] == [0.0, math.inf]
    assert math.isnan(found["x"])


def test_what_is_shown_is_short() -> None:
    assert shown("layer.0") == "'layer.0'"
    assert len(shown("x" * 10**6)) < 250
    assert len(shown([[["x" * 100] * 1000] * 1000] * 1000)) < 310
    assert "\n" not in shown("a\nb")
