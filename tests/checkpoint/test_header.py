"""Headers: parse after build is the identity, and the official library agrees with both."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamconv.checkpoint.header import Header, build_header, parse_header, read_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16, DTYPES, F32, U8
from streamconv.errors import UnsupportedError
from streamconv.storage.base import SourceFile
from streamconv.storage.local import open_folder
from tests import strategies
from tests.checkpoint.files import official


def specs(header: Header) -> list[TensorSpec]:
    return [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors]


@given(strategies.tensor_lists, strategies.metadata, st.sampled_from([8, 512, 4096]))
def test_parse_after_build_is_the_identity(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str], align: int
) -> None:
    raw = build_header(tensors, metadata, align)
    size = len(raw) + sum(tensor.nbytes for tensor in tensors)
    header = parse_header(raw, size, "x")
    assert specs(header) == list(tensors)
    assert header.metadata == metadata
    assert header.data_start == len(raw)
    assert header.data_start % align == 0
    assert header.sha256 == hashlib.sha256(raw).hexdigest()
    assert [tensor.end - tensor.start for tensor in header.tensors] == [tensor.nbytes for tensor in tensors]


@given(strategies.tensor_lists, strategies.metadata)
def test_the_official_parser_reads_what_we_build(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str]
) -> None:
    content = {tensor.name: bytes([i + 1]) * tensor.nbytes for i, tensor in enumerate(tensors)}
    file = build_header(tensors, metadata) + b"".join(content.values())
    assert official(file) == {tensor.name: (tensor.shape, content[tensor.name]) for tensor in tensors}


def every_dtype() -> dict[str, torch.Tensor]:
    """One tensor of every type, with bytes that are valid for all of them (0 and 1: BOOL)."""
    return {
        code: torch.tensor([1, 0] * dtype.itemsize * 3, dtype=torch.uint8).view(dtype.torch).reshape(2, 3)
        for code, dtype in DTYPES.items()
    }


def test_a_file_of_the_official_library_is_read(tmp_path: Path) -> None:
    save_file(every_dtype(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(open_folder(str(tmp_path)).file("a.safetensors"))
    assert header.metadata == {"format": "pt"}
    assert {(tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors} == {
        (code, dtype, (2, 3)) for code, dtype in DTYPES.items()
    }
    raw = (tmp_path / "a.safetensors").read_bytes()
    data = raw[header.data_start :]
    assert official(raw) == {
        tensor.name: (tensor.shape, data[tensor.start : tensor.end]) for tensor in header.tensors
    }


def test_a_file_of_ours_opens_with_the_official_library(tmp_path: Path) -> None:
    tensors = [TensorSpec(code, dtype, (2, 3)) for code, dtype in DTYPES.items()]
    data = b"".join(bytes([1, 0] * (tensor.nbytes // 2)) for tensor in tensors)
    (tmp_path / "a.safetensors").write_bytes(build_header(tensors, {"format": "pt"}) + data)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(DTYPES)
    for code, tensor in load_file(tmp_path / "a.safetensors").items():
        expected = every_dtype()[code]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_tensors_keep_the_order_given_and_data_starts_on_a_block() -> None:
    raw = build_header([TensorSpec("z", U8, (3,)), TensorSpec("a", BF16, (2, 2))], {"format": "pt"})
    assert len(raw) == 4096
    fields = json.loads(raw[8:])
    assert list(fields) == ["__metadata__", "z", "a"]
    assert fields["z"] == {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    assert fields["a"] == {"dtype": "BF16", "shape": [2, 2], "data_offsets": [3, 11]}


def test_tensors_come_in_file_order_whatever_the_order_of_the_names(tmp_path: Path) -> None:
    text = (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[3,7]},"none":{"dtype":"F32","shape":[0],"data_offsets":[3,3]},'
        '"z":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    )
    raw = len(text).to_bytes(8, "little") + text.encode()
    header = parse_header(raw, len(raw) + 7, "x")
    assert [tensor.name for tensor in header.tensors] == ["z", "none", "a"]


def test_metadata_may_be_null() -> None:
    """MLX writes so where there is none, and the format's own reader takes it for none."""
    text = b'{"__metadata__":null,"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    raw = len(text).to_bytes(8, "little") + text
    assert parse_header(raw, len(raw) + 4, "x").metadata == {}


def test_a_scalar_and_an_empty_file_are_fine() -> None:
    raw = build_header([TensorSpec("scalar", F32, ())], {})
    assert parse_header(raw, len(raw) + 4, "x").tensors[0].shape == ()
    assert parse_header(build_header([], {}), 4096, "x").tensors == ()


@pytest.mark.parametrize("names", [["a", "a"], [""], ["__metadata__"]], ids=str)
def test_a_header_that_could_not_be_read_is_not_built(names: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="cannot have a tensor named"):
        build_header([TensorSpec(name, U8, (1,)) for name in names], {})


def test_a_header_beyond_the_limit_of_readers_is_not_built() -> None:
    with pytest.raises(UnsupportedError, match="smaller shards"):
        build_header([TensorSpec("x" * 100_000_000, U8, (1,))], {})


def test_sizes_beyond_32_bits_are_exact() -> None:
    shape = (2**20, 2**20)
    raw = build_header([TensorSpec("big", F32, shape)], {})
    assert parse_header(raw, len(raw) + 4 * math.prod(shape), "x").tensors[0].end == 2**42


@pytest.mark.parametrize(("count", "reads"), [(10, 1), (2000, 2)])
def test_a_header_takes_one_read_or_two(tmp_path: Path, count: int, reads: int) -> None:
    """From the Hub, each is a request."""
    planned = [TensorSpec(f"model.layers.{i}.weight", BF16, (1,)) for i in range(count)]
    raw = build_header(planned, {}) + bytes(2 * count)
    (tmp_path / "a.safetensors").write_bytes(raw)
    asked = []

    def read(file: SourceFile, length: int) -> bytes:
        asked.append(length)
        return raw[:length]

    header = read_header(open_folder(str(tmp_path)).file("a.safetensors"), read)
    assert specs(header) == planned
    assert asked == [2**16, header.data_start][:reads]
