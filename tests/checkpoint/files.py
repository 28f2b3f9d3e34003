"""Checkpoints made by the official library, and by hand where it would refuse to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import deserialize
from safetensors.torch import save_file
from torch import Tensor

from streamconv.checkpoint.index import CheckpointIndex, read_index
from streamconv.checkpoint.types import Shape
from streamconv.storage import open_storage


def write_checkpoint(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], stem: str = "model") -> Path:
    """Shards, config.json and, unless there is but one shard, the index that lists them truly."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        write_index(folder, {tensor: shard for shard, tensors in shards.items() for tensor in tensors}, stem)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_index(folder: Path, weight_map: object, stem: str = "model") -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))


def index_of(folder: Path) -> CheckpointIndex:
    return read_index(open_storage(str(folder)))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def official(raw: bytes) -> dict[str, tuple[Shape, bytes]]:
    """Shape and bytes of every tensor, as the official parser reads the file `raw`."""
    found = deserialize(raw)  # type: ignore[no-untyped-call]  # its stub has no annotations
    return {name: (tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in found}


def raw_shard(header: str | bytes, data_bytes: int = 0) -> bytes:
    """A file with whatever header, true about nothing but its length."""
    text = header if isinstance(header, bytes) else header.encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)
