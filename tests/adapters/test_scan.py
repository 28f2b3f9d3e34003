"""The pass over an adapter's bytes, on tensors longer than one chunk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from streamconv.adapters.scan import CHUNK_BYTES, Scan, scan_tensors
from streamconv.checkpoint.index import read_index
from streamconv.errors import AdapterError
from streamconv.storage import open_storage

LENGTH = 5 * CHUNK_BYTES // 4 // 2  # float32: two chunks and a half


def scan(folder: Path, tensors: dict[str, Tensor], config: bytes = b"{}") -> Scan:
    save_file(tensors, folder / "adapter_model.safetensors")
    index = read_index(open_storage(str(folder)), stem="adapter_model", require_config=False)
    return scan_tensors(config, index.tensors.values())


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    tensors = {"long": torch.arange(LENGTH).float(), "half": torch.ones(3).half(), "none": torch.ones(0)}
    found = scan(tmp_path, tensors)
    assert found.digests == {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("position", [0, CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, LENGTH - 1])
def test_every_value_is_looked_at(tmp_path: Path, position: int) -> None:
    tensor = torch.zeros(LENGTH)
    assert scan(tmp_path, {"long": tensor}).constants == {"long": 0}
    tensor[position] = 2**-149
    assert scan(tmp_path, {"long": tensor}).constants == {}
    tensor[position] = float("nan")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: long holds NaN"):
        scan(tmp_path, {"long": tensor})


def test_negative_zeros_are_zero(tmp_path: Path) -> None:
    assert scan(tmp_path, {"tensor": -torch.zeros(9)}).constants == {"tensor": 0}


def test_the_hash_tells_what_belongs_to_which_name(tmp_path: Path) -> None:
    one, other = torch.ones(4), torch.zeros(4)
    hashes = {
        scan(tmp_path, {"a": one, "b": other}).sha256,
        scan(tmp_path, {"a": other, "b": one}).sha256,
        scan(tmp_path, {"a": one, "c": other}).sha256,
        scan(tmp_path, {"a": one.reshape(2, 2), "b": other}).sha256,
        scan(tmp_path, {"a": torch.cat([one, other])}).sha256,
        scan(tmp_path, {"a": one, "b": other}, config=b"{ }").sha256,
    }
    assert len(hashes) == 6
    assert scan(tmp_path, {"b": other, "a": one}).sha256 in hashes
