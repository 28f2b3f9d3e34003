"""Safetensors headers that lie: each is refused, naming file and tensor; none crashes the parser."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.checkpoint.header import build_header, parse_header, read_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16, F32, U8
from streamconv.errors import CheckpointError, InputError
from streamconv.storage.local import open_folder
from tests import strategies
from tests.checkpoint.files import official, raw_shard


def entry(start: object = 0, end: object = 4, shape: object = (4,), dtype: object = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(header: str | bytes | dict[str, Any], data_bytes: int = 4) -> str:
    """The message with which a file of this header and so many bytes of data is refused."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = raw_shard(text, data_bytes)
    with pytest.raises(CheckpointError) as caught:
        parse_header(raw, len(raw), "m.safetensors")
    message = str(caught.value)
    assert message.startswith("m.safetensors")
    assert len(message) < 2000
    return message


def test_the_honest_header_is_accepted() -> None:
    raw = raw_shard(json.dumps({"t": entry()}), 4)
    assert parse_header(raw, len(raw), "m.safetensors").tensors[0].end == 4


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "hole before": ({"t": entry(1, 5)}, "tensor 't' leaves a hole before it: it starts at byte 1"),
    "hole between": ({"a": entry(0, 1, [1]), "t": entry(2, 4, [2])}, "'t' leaves a hole"),
    "overlap": ({"a": entry(0, 3, [3]), "t": entry(2, 4, [2])}, "tensor 't' overlaps"),
    "same bytes twice": ({"a": entry(), "t": entry()}, "tensor 't' overlaps"),
    "empty inside another": ({"a": entry(), "t": entry(2, 2, [0])}, "tensor 't' overlaps"),
    "data beyond the end": ({"t": entry(0, 5, [5])}, "cut short: the header describes 5 bytes of data, 4"),
    "data before the end": ({"t": entry(0, 3, [3])}, "the rest belongs to no tensor"),
    "offsets reversed": ({"t": entry(4, 0)}, r"tensor 't': data_offsets must be \[start, end\]"),
    "offset negative": ({"t": entry(-4, 0)}, "tensor 't': data_offsets"),
    "offset as text": ({"t": entry("0", "4")}, "tensor 't': data_offsets"),
    "offset as float": ({"t": entry(0.0, 4.0)}, "tensor 't': data_offsets"),
    "offset as bool": ({"t": entry(False, True, [1])}, "tensor 't': data_offsets"),
    "offset beyond 64 bits": ({"t": entry(0, 2**64)}, "tensor 't': data_offsets"),
    "three offsets": ({"t": {**entry(), "data_offsets": [0, 2, 4]}}, "tensor 't': data_offsets"),
    "offsets as object": ({"t": {**entry(), "data_offsets": {"start": 0}}}, "tensor 't': data_offsets"),
    "shape too small": ({"t": entry(shape=[3])}, r"tensor 't': U8 \[3\] takes 3 bytes, .* have 4"),
    "dtype too wide": ({"t": entry(dtype="F32")}, r"tensor 't': F32 \[4\] takes 16 bytes"),
    "shape negative": ({"t": entry(shape=[-2, -2])}, "tensor 't': the shape must be a list of sizes"),
    "shape of floats": ({"t": entry(shape=[4.0])}, "tensor 't': the shape"),
    "shape of bools": ({"t": entry(shape=[True, 4])}, "tensor 't': the shape"),
    "shape as number": ({"t": entry(shape=4)}, "tensor 't': the shape"),
    "shape null": ({"t": entry(shape=None)}, "tensor 't': the shape"),
    "shape wraps around 64 bits": ({"t": entry(shape=[2**32, 2**32, 2**32, 4])}, "'t': shape .* overflows"),
    "shape wraps, then zero": ({"t": entry(0, 0, [2**62, 2**62, 0])}, "'t': shape .* overflows"),
    "shape of a huge number": ({"t": entry(shape=[10**4000])}, "tensor 't': the shape"),
    "dtype unknown": ({"t": entry(dtype="U7")}, "tensor 't': dtype must be one of BOOL, .* found 'U7'"),
    "dtype in small letters": ({"t": entry(dtype="u8")}, "found 'u8'"),
    "dtype null": ({"t": entry(dtype=None)}, "tensor 't': dtype must be .* found None"),
    "dtype a list": ({"t": entry(dtype=["U8"])}, "tensor 't': dtype must be"),
    "no dtype": (
        {"t": {"shape": [4], "data_offsets": [0, 4]}},
        "'t' must have dtype, shape and data_offsets",
    ),
    "field too many": ({"t": {**entry(), "bits": 4}}, "'t' must have dtype, shape and data_offsets only"),
    "entry is a list": ({"t": [0, 4]}, r"'t' must have dtype, shape and data_offsets only, found \[0, 4\]"),
    "empty name": ({"": entry()}, "a tensor has an empty name"),
    "metadata not text": ({"__metadata__": {"n": 1}, "t": entry()}, "__metadata__ must map strings"),
    "metadata nested": ({"__metadata__": {"n": {"a": "b"}}, "t": entry()}, "__metadata__ must map strings"),
    "metadata a list": ({"__metadata__": ["a"], "t": entry()}, "__metadata__ must map strings"),
    "metadata a number": ({"__metadata__": 0, "t": entry()}, "__metadata__ must map strings"),
    "long name": ({"x" * 100_000: entry(1, 5)}, "tensor 'xxx"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie: str) -> None:
    header, says = LIES[lie]
    message = refusal(header)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(message)


ENTRY = json.dumps(entry())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f' {{"t":{ENTRY}}}', "must begin with '{'"),
        ("[]", "must begin with '{'"),
        ("", "must begin with '{'"),
        (f'{{"t":{ENTRY}}}x', "not valid JSON"),
        (f'{{"t":{ENTRY},"t":{ENTRY}}}', "the key 't' stands twice"),
        (
            '{"t":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
            "the key 'dtype' stands twice",
        ),
        (f'{{"__metadata__":{{"a":"1","a":"2"}},"t":{ENTRY}}}', "the key 'a' stands twice"),
        ('{"t":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', "NaN"),
        (b'{"\xff":1}', "not valid JSON"),
        ('{"\\ud800":' + ENTRY + "}", "not valid JSON"),
        ('{"t":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"t":{"dtype":"U8","shape":[' + "4" * 5000 + '],"data_offsets":[0,4]}}', "not valid JSON"),
    ],
    ids=lambda value: repr(value[:20]) if len(value) > 20 else repr(value),
)
def test_a_header_that_is_not_strict_json_is_refused(text: str | bytes, says: str) -> None:
    assert says in refusal(text)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F4", (2, 4), 4),
        ("F6_E2M3", (2, 4), 6),
        ("F6_E3M2", (4,), 3),
        ("F8_E4M3FNUZ", (3,), 3),
        ("F4", (0, 3), 0),
    ],
)
def test_types_without_whole_bytes_are_known_by_their_bits(
    dtype: str, shape: tuple[int, ...], nbytes: int
) -> None:
    raw = raw_shard(json.dumps({"t": entry(0, nbytes, shape, dtype)}), nbytes)
    (found,) = parse_header(raw, len(raw), "m.safetensors").tensors
    assert (found.dtype.code, found.shape, found.end) == (dtype, shape, nbytes)
    assert "takes" in refusal({"t": entry(0, nbytes + 1, shape, dtype)}, nbytes + 1)


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (3,)), ("F4", (3, 5)), ("F6_E2M3", (2, 3))])
def test_a_tensor_that_ends_within_a_byte_is_refused(dtype: str, shape: tuple[int, ...]) -> None:
    assert "no whole number of bytes" in refusal({"t": entry(0, 2, shape, dtype)}, 2)


def test_a_name_cannot_write_to_the_terminal() -> None:
    message = refusal({"\x1b[2Jgone\n": entry(1, 5)})
    assert message.isprintable()


HONEST = build_header(
    [TensorSpec("a", BF16, (2, 3)), TensorSpec("b", U8, (5,)), TensorSpec("s", F32, ())], {"k": "v"}, 8
)
HONEST_DATA = bytes(12 + 5 + 4)


def check_against_official(raw: bytes) -> None:
    """Nothing but an InputError may come out; what is accepted means the same to the official parser."""
    try:
        header = parse_header(raw, len(raw), "m.safetensors")
    except InputError:
        return
    data = raw[header.data_start :]
    assert official(raw) == {
        tensor.name: (tensor.shape, data[tensor.start : tensor.end]) for tensor in header.tensors
    }


@given(st.integers(0, 2**32), st.integers(1, 3))
def test_an_edited_text_is_refused_or_means_the_same_to_the_official_parser(seed: int, edits: int) -> None:
    """Edits that often leave valid JSON: of digits and brackets, bytes put in, taken out, exchanged."""
    chance = random.Random(seed)
    text = bytearray(HONEST[8:])
    for _ in range(edits):
        at, other = chance.randrange(1, len(text)), chance.randrange(1, len(text))
        match chance.randrange(4):
            case 0:
                text[at] = chance.choice(b'0123456789{}[]",:eE-. BFUI\\\x00\xff')
            case 1:
                text[at : at + chance.randrange(1, 4)] = b""
            case 2:
                text[at:at] = chance.choice([b"0", b"1", b",", b'"a":', b"[", b"-", b" ", b"\\u0061", b"e0"])
            case _:
                text[at], text[other] = text[other], text[at]
    check_against_official(raw_shard(bytes(text), len(HONEST_DATA)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 30) | st.sampled_from(["U8", "I8", "BF16", "F4", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
lies = st.tuples(st.sampled_from(["dtype", "shape", "data_offsets", "name", "more", "size"]), json_values)


@given(strategies.tensor_lists, st.lists(lies, max_size=1), st.integers(0, 7))
def test_a_false_field_is_refused_or_means_the_same_to_the_official_parser(
    tensors: Sequence[TensorSpec], told: Sequence[tuple[str, Any]], victim: int
) -> None:
    """An honest header with at most one field changed to any other JSON value."""
    fields = json.loads(build_header(tensors, {})[8:])
    data_bytes = sum(tensor.nbytes for tensor in tensors)
    for field, value in told:
        if field == "size":
            data_bytes += value if isinstance(value, int) and value > 0 else 0
        elif field == "name" or not fields:
            fields[str(value)] = value
        elif field == "more":
            fields[list(fields)[victim % len(fields)]]["more"] = value
        else:
            fields[list(fields)[victim % len(fields)]][field] = value
    check_against_official(raw_shard(json.dumps(fields), data_bytes))


PICKLE_HEAD = b"\x80\x02}q\x00X\x05\x00\x00\x00state"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (
            b"PK\x03\x04\x14\x00\x00\x00\x08\x00archive/data.pkl",
            "found a zip archive, probably a PyTorch pickle",
        ),
        (PICKLE_HEAD, "found a Python pickle"),
        (b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00", "found a GGUF file"),
        (b"<!DOCTYPE html><html></html>", "found a web page"),
        (b"<html>503</html>", "found a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 12\n", "run `git lfs pull`"),
        (b"abc", "found one of 3 bytes that begins with b'abc'"),
        (b'{"weight_map": {}}', "must be a safetensors file, found one of 18 bytes"),
        (bytes(7), "found one of 7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "cut short: it has 10 bytes, and its header alone 100"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "must be a safetensors file"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "must be a safetensors file"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_a_file_of_another_kind_is_recognised(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(open_folder(str(tmp_path)).file("m.safetensors"))
    assert str(caught.value).startswith("m.safetensors ")
    assert says in str(caught.value)


@pytest.mark.parametrize("length", [0x0280, 0x4B50])
def test_a_header_whose_length_looks_like_another_kind_is_read(tmp_path: Path, length: int) -> None:
    """The length field of a header of 640 bytes begins as a pickle does, of 19280 as a zip archive."""
    text = json.dumps({"t": entry()}).ljust(length)
    (tmp_path / "m.safetensors").write_bytes(raw_shard(text, 4))
    assert read_header(open_folder(str(tmp_path)).file("m.safetensors")).data_start == 8 + length


def test_a_length_field_cannot_make_us_take_memory(tmp_path: Path) -> None:
    """100 MB are claimed and, being sparse, are there to be read; more is not even tried."""
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)
    with pytest.raises(CheckpointError, match=r"m\.safetensors must be a safetensors file"):
        read_header(open_folder(str(tmp_path)).file("m.safetensors"))


def test_a_truncated_download_is_cut_short_at_every_length(tmp_path: Path) -> None:
    whole = HONEST + HONEST_DATA
    for size in (1, 7, 8, 9, len(HONEST) - 1, len(HONEST), len(HONEST) + 1, len(whole) - 1):
        (tmp_path / "m.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"^m\.safetensors"):
            read_header(open_folder(str(tmp_path)).file("m.safetensors"))
